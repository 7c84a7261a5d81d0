# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a run's losses (matplotlib, drawn off screen)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_losses"]

SMOOTHING = 0.9  # weight of the past in the line that runs through the losses of the steps
FAINT, STRONG, HELD = "#9ecae1", "#0072B2", "#D55E00"  # told apart with any colour vision


def plot_losses(log: Sequence[Mapping[str, Any]], path: str | Path) -> Any:
    """Loss of every step, its moving average, the held-out losses, and where the choice of what is active changed.

    Parameters
    ----------
    log : sequence of mapping
        Lines with ``event`` ("step", "evaluation", "switch"), ``step`` and ``loss``.
    path : str or Path
        Where to save it.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    points = {event: [line for line in log if line["event"] == event] for event in ("step", "evaluation", "switch")}
    for line in points["switch"][1:]:
        axes.axvline(line["step"], color="#999999", linewidth=0.6)
    steps, losses = [line["step"] for line in points["step"]], [line["loss"] for line in points["step"]]
    axes.plot(steps, losses, color=FAINT, linewidth=0.8, label="step")
    axes.plot(steps, _smooth(losses), color=STRONG, linewidth=1.8, label="moving average")
    held = [(line["step"], line["loss"]) for line in points["evaluation"]]
    axes.plot(*zip(*held, strict=True) if held else ([], []), "o--", color=HELD, label="held out")
    axes.set(xlabel="step (grey lines: what is active changed)", ylabel="loss, nats a token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=144)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Moving averages, without a bias towards 0 at the beginning."""
    smooth, average = [], 0.0
    for k, value in enumerate(values, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smooth.append(average / (1 - SMOOTHING**k))
    return smooth
