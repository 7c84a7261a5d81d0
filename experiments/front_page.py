# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the README: scripts of the gallery (docs/gallery), each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import FOLDER

TITLE = "The README's pictures: an SVM, a portfolio, a language model"
SEED = 0
SCRIPTS = {"svm": "svm_margins", "qp": "portfolio", "llm": "activity"}


def run(quick: bool) -> dict[str, Any]:
    """What the scripts print, by name, and their pictures; quick: the first of them alone."""
    names = list(SCRIPTS)[:1] if quick else list(SCRIPTS)
    found = {name: carry_out(SCRIPTS[name]) for name in names}
    printed = {name: lines for name, (lines, _) in found.items()}
    return {"printed": printed, "pictures": {name: picture for name, (_, picture) in found.items()}}


def carry_out(script: str) -> tuple[list[str], bytes]:
    """What a script of the gallery prints, and the PNG that it writes.

    Raises
    ------
    RuntimeError
        If it fails, with its last line.
    """
    file = FOLDER.parent / "docs" / "gallery" / f"{script}.py"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MPLBACKEND": "agg"}
        done = subprocess.run([sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file.name} failed: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout.splitlines(), (Path(folder) / f"{script}.png").read_bytes()


def tables(results: dict[str, Any]) -> dict[str, str]:
    """What the scripts printed, by name."""
    return {name: "\n".join(["```text", *lines, "```"]) + "\n" for name, lines in results["printed"].items()}
