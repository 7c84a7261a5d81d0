# SPDX-License-Identifier: BSD-3-Clause
"""Run the scripts of this folder for docs/gallery.md; docs/conf.py calls it.

A script NAME.py prints what the page shows as its output, and saves NAME.png in the working folder. Both go to
docs/_build/gallery. A script whose output is newer than the script and the packages is not run again. Warnings are
errors.
"""

import os
import runpy
import sys
import warnings
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "_build" / "gallery"
PACKAGES = ("bcd", "llm")


def scripts() -> list[Path]:
    """The examples."""
    return sorted(path for path in HERE.glob("*.py") if path.name not in ("run.py", "conftest.py"))


def newest() -> float:
    """When the packages were changed last."""
    files = [path for package in PACKAGES for path in (HERE.parents[1] / package).glob("*.py")]
    return max(path.stat().st_mtime for path in files)


def run(script: Path, target: Path) -> None:
    """Run a script in the folder ``target`` and keep what it prints."""
    said = StringIO()
    with chdir(target), redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(script), run_name="__main__")
    if not (target / f"{script.stem}.png").exists():
        sys.exit(f"{script.name} must save {script.stem}.png")
    (target / f"{script.stem}.txt").write_text(said.getvalue(), encoding="utf-8")  # last: a failure is tried again


def run_outdated(target: Path = TARGET) -> list[str]:
    """Run what has no up to date output; returns the names."""
    target.mkdir(parents=True, exist_ok=True)
    since, done = newest(), []
    for script in scripts():
        output = target / f"{script.stem}.txt"
        if not output.exists() or output.stat().st_mtime <= max(since, script.stat().st_mtime):
            run(script, target)
            done.append(script.stem)
    return done


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    run_outdated()
