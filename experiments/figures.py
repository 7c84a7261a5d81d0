# SPDX-License-Identifier: BSD-3-Clause
"""Figures in the style of :mod:`bcd.pictures`, drawn off screen."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bcd.pictures import COLOURS, DASHES


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, shape (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def style(k: int) -> dict[str, Any]:
    """Colour and dashes of the k-th line."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)], "linewidth": 1.6}


def tidy(axes: Axes, xlabel: str = "", ylabel: str = "", title: str = "", scale: str = "log") -> None:
    """Labels, scales and a light grid."""
    axes.set(xscale=scale, yscale=scale, xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
