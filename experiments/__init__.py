# SPDX-License-Identifier: BSD-3-Clause
"""Experiments: one file is one figure or table of a paper, or one comparison.

An experiment is a module of this folder with a ``TITLE``, a ``SEED``, its settings at the top, and

    run(quick) -> dict       raw numbers; under "pictures", figures or the bytes of PNGs by suffix ("" for NAME.png)
    tables(results) -> dict  Markdown by name, from what a result file holds under "results"

``python -m experiments run NAME`` writes results/NAME.json and results/NAME*.png;
``python -m experiments tables`` brings README.md and docs/*.md in step with them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


def names() -> list[str]:
    """The experiments of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\nTITLE = " in path.read_text(encoding="utf-8"))


def module(name: str) -> ModuleType:
    """Import an experiment.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in names():
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(names())}")
    return import_module(f"experiments.{name}")
