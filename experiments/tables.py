# SPDX-License-Identifier: BSD-3-Clause
"""Tables in README.md and docs/*.md, written from the result files.

Between ``<!-- table:NAME/TABLE -->`` and ``<!-- /table -->`` stands what the experiment NAME makes of its
numbers under TABLE. Every experiment also has a table "machine": where and when its numbers were taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experiments

MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns after the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n"


def documents() -> list[Path]:
    """The files that may hold tables."""
    root = experiments.FOLDER.parent
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]


def load(name: str) -> dict[str, Any]:
    """The result file of an experiment."""
    path = experiments.RESULTS / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there are no results of {name!r} yet; run: python -m experiments run {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def table(marker: str) -> str:
    """The Markdown that belongs to a marker "NAME/TABLE".

    Raises
    ------
    ValueError
        If there is no such experiment, result or table.
    """
    name, _, part = marker.partition("/")
    module, entry = experiments.module(name), load(name)
    known = {"machine": origin(entry)} | module.tables(entry["results"])
    if part not in known:
        raise ValueError(f"experiment {name!r} has no table {part!r}; it has {', '.join(known)}")
    return known[part]


def origin(entry: dict[str, Any]) -> str:
    """One line that says where numbers come from."""
    machine, versions = entry["machine"], entry["versions"]
    return (
        f"*{entry['date'][:10]}, {machine['cpu']} ({machine['architecture']}), {machine['cores']} cores, "
        f"Python {versions['python']}, NumPy {versions['numpy']}, Numba {versions['numba']}; "
        f"`python -m experiments run {entry['name']}`*\n"
    )


def rewritten(text: str) -> str:
    """The text with every marked table as the results have it now."""
    return MARKED.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


def update(path: Path) -> bool:
    """Rewrite a file; returns whether it changed."""
    old = path.read_text(encoding="utf-8")
    new = rewritten(old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    return new != old
