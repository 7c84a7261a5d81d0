"""The house rules for llm that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from test_architecture import LONGEST, functions, imported, tree

import llm

FILES = sorted(Path(llm.__file__).parent.glob("**/*.py"))
WORDS = ("TODO", "FIXME", "XXX")


def lines(node):
    """Of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_functions_are_short(path):
    for node in functions(path):
        assert lines(node) <= LONGEST, f"{path.name}:{node.lineno} {node.name}"


def test_most_functions_are_very_short():
    sizes = sorted(lines(node) for path in FILES for node in functions(path))
    assert sizes[len(sizes) // 2] < 12
    assert sizes[int(0.9 * len(sizes))] < 30


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_modules_and_public_names_are_documented(path):
    module = tree(path)
    assert ast.get_docstring(module), path.name
    assert path.read_text().startswith("# SPDX-License-Identifier: BSD-3-Clause\n")
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name} {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_of_bcd_only_the_selection_module_is_used(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bcd":
            assert node.module == "bcd.selection"
    assert not imported(path) & {"experiments", "tests"}
    if path.name not in ("hf.py",):
        assert "transformers" not in imported(path)
    assert not any(word in path.read_text() for word in WORDS)


def test_importing_llm_brings_in_nothing_but_torch():
    code = (
        "import sys, llm; print(*[n for n in ('transformers', 'matplotlib', 'sklearn', 'pandas') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == []


def test_what_is_exported_exists_and_is_documented():
    for name in llm.__all__:
        assert getattr(llm, name).__doc__
