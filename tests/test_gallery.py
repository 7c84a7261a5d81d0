# SPDX-License-Identifier: BSD-3-Clause
"""The gallery: the page shows every script, and scripts run when they have to. (`make docs` runs them.)"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def runner():
    """docs/gallery/run.py as a module."""
    spec = importlib.util.spec_from_file_location("gallery_run", DOCS / "gallery" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_every_script_its_output_and_its_picture(runner):
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for script in runner.scripts():
        assert f"{{literalinclude}} gallery/{script.name}" in page
        assert f"{{literalinclude}} _build/gallery/{script.stem}.txt" in page
        assert f"](_build/gallery/{script.stem}.png)" in page
        assert f'("{script.stem}.png"' in script.read_text(encoding="utf-8")
    assert len(re.findall("gallery/.*py$", page, re.MULTILINE)) == len(runner.scripts()) >= 6


def test_only_what_is_outdated_runs_again(runner, tmp_path, monkeypatch):
    script = tmp_path / "one.py"
    script.write_text("from pathlib import Path\nPath('one.png').touch()\nprint(1 + 1)\n")
    monkeypatch.setattr(runner, "scripts", lambda: [script])
    monkeypatch.setattr(runner, "newest", lambda: 0.0)
    target = tmp_path / "out"
    assert runner.run_outdated(target) == ["one"]
    assert (target / "one.txt").read_text() == "2\n"
    os.utime(script, (1, 1))
    assert runner.run_outdated(target) == []
    monkeypatch.setattr(runner, "newest", lambda: 2e10)
    assert runner.run_outdated(target) == ["one"]


@pytest.mark.parametrize(("code", "error"), [("import warnings; warnings.warn('x')", UserWarning), ("", SystemExit)])
def test_warnings_and_missing_pictures_are_errors(runner, tmp_path, code, error):
    script = tmp_path / "one.py"
    script.write_text(code)
    with pytest.raises(error):
        runner.run(script, tmp_path)
    assert not (tmp_path / "one.txt").exists()
