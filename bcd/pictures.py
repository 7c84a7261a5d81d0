# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of runs (matplotlib, drawn off screen; imported only when a picture is asked for)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bcd.result import Trace

__all__ = ["plot_traces"]

# Okabe and Ito's colours, told apart with any colour vision; dashes repeat the distinction in print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000", "#8B4513", "#6A3D9A"]
DASHES = ["-", "--", "-.", ":"]


def plot_traces(
    traces: Mapping[str, Trace],
    path: str | Path | None = None,
    quantity: str = "violation",
    against: tuple[str, ...] = ("iteration", "columns"),
    gap: bool = False,
    tol: float | None = None,
    label: str | None = None,
) -> Figure:
    """Draw a quantity of one or several runs against iterations, columns or seconds.

    Parameters
    ----------
    traces : mapping of str to Trace
        One line each.
    path : path, optional
        Where to save the picture.
    quantity : str
        An attribute of :class:`bcd.Trace`.
    against : tuple of str
        One panel each.
    gap : bool
        Draw the Frank-Wolfe gap as well.
    tol : float, optional
        Draw a line there.
    label : str, optional
        Of the vertical axis; default: the quantity.
    """
    figure = Figure(figsize=(5.2 * len(against), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, axis in zip(figure.subplots(1, len(against), squeeze=False)[0], against, strict=True):
        for k, (name, trace) in enumerate(traces.items()):
            style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
            axes.plot(*_points(trace, axis, quantity), label=name, linewidth=1.6, **style)
            if gap:
                axes.plot(*_points(trace, axis, "gap"), label="Frank-Wolfe gap", linewidth=1.6, **_second(style))
        if tol is not None:
            axes.axhline(tol, color="#999999", linewidth=0.8)
        if any(len(line.get_xdata()) for line in axes.lines):
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel({"iteration": "iterations", "columns": "columns of the Hessian"}.get(axis, axis))
        axes.set_ylabel("" if gap else label or quantity)
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 9), frameon=False, fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=144)
    return figure


def _points(trace: Trace, axis: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """What a logarithmic picture can show: positive and finite; the start counts as step 1."""
    x, y = np.array(getattr(trace, axis), dtype=float), np.array(getattr(trace, quantity), dtype=float)
    if axis != "seconds":
        x = np.maximum(x, 1)
    shown = (y > 0) & np.isfinite(y) & (x > 0)
    return x[shown], y[shown]


def _second(style: dict[str, str]) -> dict[str, str]:
    return {"color": COLOURS[1], "linestyle": DASHES[1]} if style["color"] == COLOURS[0] else style
