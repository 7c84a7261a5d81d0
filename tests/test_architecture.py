# SPDX-License-Identifier: BSD-3-Clause
"""The house rules that a machine can check (DESIGN section 3)."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bcd

PACKAGE = Path(bcd.__file__).parent
FILES = sorted(PACKAGE.glob("**/*.py"))
HEAVY = ("torch", "cvxpy", "sklearn", "matplotlib", "rich", "typer", "transformers", "pandas")
LONGEST = 60  # lines of a function without its docstring; the one loop may be longer
IMPORT_SECONDS = 1.0


def tree(path):
    return ast.parse(path.read_text())


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def fresh(code, *flags):
    """Run code in a new interpreter, warnings as errors."""
    run = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_brings_in_nothing_heavy():
    code = f"import sys, bcd; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert fresh(code).split() == []


def test_import_is_quick():
    """CPU seconds, since other processes may run beside us; the best of a few."""
    code = "import bcd, time; print(time.process_time())"
    best = float(fresh(code))
    for _ in range(4):
        best = min(best, float(fresh(code)))
        if best < IMPORT_SECONDS:
            return
    raise AssertionError(f"import bcd takes {best:.2f} s, and {IMPORT_SECONDS} s is the limit")


def imported(path):
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_package_never_imports_what_is_built_on_it(path):
    assert not imported(path) & {"llm", "experiments", "tests"}


def jitted(node):
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")
        if name in ("njit", "jit", "vectorize", "guvectorize", "jitclass", "cfunc", "stencil"):
            yield decorator


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_compiled_functions_live_in_two_files_and_are_cached(path):
    """Steps in _compiled.py, tiles of kernel entries in _tiles.py."""
    found = [(node.name, decorator) for node in functions(path) for decorator in jitted(node)]
    if path.name not in ("_compiled.py", "_tiles.py"):
        assert found == []
        assert path.name == "_jit.py" or "njit" not in path.read_text()  # the compiler's settings are there
        return
    assert len(found) > 5
    for name, decorator in found:
        options = {k.arg: k.value for k in decorator.keywords} if isinstance(decorator, ast.Call) else {}
        assert isinstance(options.get("cache"), ast.Constant), name
        assert options["cache"].value is True, name


def test_a_second_process_loads_the_compiled_code_from_disk():
    """And numba has nothing to warn of: warnings are errors in these processes."""
    code = """
import numpy as np, bcd
from bcd import _compiled
problem = bcd.Problem(bcd.Quadratic(np.eye(3), [0.0, 1.0, 2.0]), bcd.SumBox(0, 1, 1))
for rule in ("gs1", "wss2", "random"):
    bcd.minimize(problem, rule)
used = [f for f in vars(_compiled).values() if hasattr(f, "stats") and f.signatures]
print(sum(sum(f.stats.cache_hits.values()) for f in used), sum(sum(f.stats.cache_misses.values()) for f in used))
"""
    fresh(code)
    hits, misses = map(int, fresh(code).split())
    assert misses == 0
    assert hits >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_functions_are_short(path):
    for node in functions(path):
        first = node.body[0]
        text = (
            isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        )
        docstring = first.end_lineno - first.lineno + 1 if text else 0
        length = node.end_lineno - node.lineno + 1 - docstring
        assert length <= LONGEST or node.name == "minimize", f"{path.name}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in ("__main__.py",)], ids=lambda p: p.name)
def test_modules_and_public_names_are_documented(path):
    module = tree(path)
    assert ast.get_docstring(module), path.name
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name} {node.name}"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    assert ast.get_docstring(inner), f"{path.name} {node.name}.{inner.name}"


def test_what_is_exported_exists_and_is_documented():
    assert sorted(set(bcd.__all__)) == sorted(bcd.__all__)
    for name in bcd.__all__:
        thing = getattr(bcd, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name
            assert not inspect.getdoc(thing).startswith(f"{name}("), f"{name} has the docstring that dataclass makes"


def test_every_rule_has_a_row_and_the_row_a_rule():
    for name, row in bcd.RULES.items():
        assert name == name.lower()
        assert callable(row.rule.init)
        assert callable(row.rule.select)
        assert all((row.title, row.choice, row.cost, row.note))


def test_no_assertions_about_user_input():
    """assert is for what cannot happen; errors of the user are ValueErrors (DESIGN 13)."""
    for path in FILES:
        asserts = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
        assert len(asserts) <= 2, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_unfinished_work_is_left_in_the_code(path):
    text = path.read_text()
    assert not any(word in text for word in ("TODO", "FIXME", "XXX", 'print("debug'))
