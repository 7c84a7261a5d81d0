# SPDX-License-Identifier: BSD-3-Clause
"""What a user installs: the archives, what is in them, and that they run away from the checkout."""

import doctest
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.version import Version

import bcd

ROOT = Path(bcd.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("bcd", "llm")
LARGEST_WHEEL, LARGEST_SDIST = 1_000_000, 2_000_000  # bytes; results and pictures would be more


def sources(package):
    """The .py files of the checkout."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}


def called(*words, cwd, **variables):
    """Run a program outside the checkout, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheel and sdist, the wheel built from the sdist, with the hatchling that is installed: no network."""
    pytest.importorskip("build", reason="build is not installed (the dev extra has it)")
    pytest.importorskip("hatchling", reason="hatchling is not installed (the dev extra has it)")
    out = tmp_path_factory.mktemp("dist")
    called(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    with tarfile.open(sdist) as packed:
        members = {name.partition("/")[2]: packed.getmember(name).size for name in packed.getnames()}
    return SimpleNamespace(wheel=wheel, sdist=sdist, files=files, members=members)


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """A folder that holds the wheel and nothing else of ours; dependencies come from this environment."""
    target = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet")
    called(*pip, "--target", target, archives.wheel, cwd=target)
    return target


# -- the archives -------------------------------------------------------------------------------


def test_the_wheel_holds_the_packages_and_nothing_else(archives):
    info = f"blockdescent-{bcd.__version__}.dist-info/"
    own = {name for name in archives.files if not name.startswith(info)}
    wanted = set().union(*map(sources, PACKAGES)) | {f"{package}/py.typed" for package in PACKAGES}
    assert own == wanted
    assert info + "licenses/LICENSE" in archives.files
    assert archives.wheel.stat().st_size < LARGEST_WHEEL
    assert archives.wheel.name.endswith("-py3-none-any.whl")


def test_the_sdist_has_sources_and_tests_and_no_results(archives):
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "bcd/py.typed", "tests/conftest.py"):
        assert name in archives.members, name
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= archives.members.keys()
    assert {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")} <= archives.members.keys()
    unwanted = re.compile(r"(^|/)(results|demo|docs|\.venv|__pycache__|\.github)/|\.(pyc|png|nbi|nbc)$")
    assert not [name for name in archives.members if unwanted.search(name)]
    assert archives.sdist.stat().st_size < LARGEST_SDIST


def test_no_archive_names_a_folder_of_the_machine_that_built_it(archives):
    for name, content in archives.files.items():
        assert str(ROOT).encode() not in content, name


def test_the_metadata_say_what_pyproject_says(archives):
    text = archives.files[f"blockdescent-{bcd.__version__}.dist-info/METADATA"].decode()
    project = PROJECT["project"]
    assert f"\nName: {project['name']}\n" in text
    assert f"\nVersion: {bcd.__version__}\n" in text
    assert f"\nRequires-Python: {project['requires-python']}\n" in text
    assert f"\nLicense-Expression: {project['license']}\n" in text
    assert "\nDescription-Content-Type: text/markdown\n" in text
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == set(project["optional-dependencies"])
    needed = {re.split(r"[<>=!~ ;]", need)[0] for need in project["dependencies"]}
    plain = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, re.MULTILINE)
    assert set(plain) == needed


def test_classifiers_name_only_versions_that_are_tested(archives):
    """The tests run on one version of Python; another one may be named when they run there as well."""
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert named == ["3.11"]
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "bcd/__init__.py"
    quoted = re.compile(rf"[\"']{re.escape(bcd.__version__)}[\"']")
    texts = [path for pattern in ("bcd/**/*.py", "llm/**/*.py", "docs/*.py", "*.toml") for path in ROOT.glob(pattern)]
    assert [path.name for path in texts if quoted.search(path.read_text(encoding="utf-8"))] == ["__init__.py"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert newest == Version(bcd.__version__).base_version
    assert importlib.metadata.version("blockdescent") == bcd.__version__


# -- installed ----------------------------------------------------------------------------------

IMPORTED = """
import numpy as np, bcd
from bcd import cli, libsvm, svm
problem = bcd.Problem(bcd.Quadratic(np.diag([1.0, 2.0, 4.0])), bcd.SumBox(lower=0, total=7))
assert bcd.minimize(problem, "gss", tol=1e-9).x.round(6).tolist() == [4.0, 2.0, 1.0]
print(bcd.__file__)
"""


def test_it_is_imported_and_run_from_where_it_was_installed(installed, tmp_path):
    """Without compiling, which would take most of a minute; the slow test below compiles."""
    printed = called(sys.executable, "-c", IMPORTED, cwd=tmp_path, PYTHONPATH=str(installed), NUMBA_DISABLE_JIT="1")
    assert Path(printed.strip()) == installed / "bcd" / "__init__.py"


def test_the_commands_are_there(installed, tmp_path):
    for name in PROJECT["project"]["scripts"]:
        help_text = called(installed / "bin" / name, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
        assert "Usage" in help_text, name
    for command in ([installed / "bin" / "bcd"], [sys.executable, "-m", "bcd"]):
        printed = called(*command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
        assert printed == f"bcd (blockdescent) {bcd.__version__}\n"
    assert "GS-1" in called(installed / "bin" / "bcd", "rules", cwd=tmp_path, PYTHONPATH=str(installed))


def test_llm_is_imported_from_where_it_was_installed(installed, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed (the llm extra has it)")
    code = "import llm; print(llm.__file__, llm.BlockLLM.__name__)"
    printed = called(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.split() == [str(installed / "llm" / "__init__.py"), "BlockLLM"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_solves_from_a_virtual_environment_of_its_own(archives, tmp_path):
    """Dependencies come from the package index; compiles everything anew."""
    called(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    called(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", archives.wheel, cwd=tmp_path)
    np.savez(tmp_path / "p.npz", Q=np.diag([1.0, 2.0, 4.0]), lower=0.0, total=7.0)
    printed = called(tmp_path / "venv" / "bin" / "bcd", "solve", "p.npz", "--tol", "1e-9", cwd=tmp_path)
    assert "Converged" in printed
    missing = "import importlib.util as u; print(*[u.find_spec(name) for name in ('experiments', 'tests', 'torch')])"
    assert called(python, "-c", missing, cwd=tmp_path).split() == ["None"] * 3
    called(tmp_path / "venv" / "bin" / "bcd", "demo", "--out", "demo", cwd=tmp_path)
    assert (tmp_path / "demo" / "index.html").exists()


# -- what contributors read ---------------------------------------------------------------------


def test_the_example_for_contributors_runs_as_written():
    result = doctest.testfile(
        str(ROOT / "CONTRIBUTING.md"),
        module_relative=False,
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.attempted >= 3
    assert result.failed == 0


def test_contributors_are_told_of_targets_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]+)", text))
    assert named
    assert named <= targets
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path


def test_hooks_and_issue_forms_can_be_read():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (the dev extra brings it with transformers)")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    tools = {hook["entry"].split()[0] for hook in hooks[0]["hooks"]}
    assert tools == {"ruff", "mypy"}
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.name for form in forms] == ["bug.yml", "config.yml", "idea.yml", "number.yml"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name != "config.yml":
            assert content["name"]
            assert content["description"]
            assert all(part["type"] in ("markdown", "textarea", "input", "dropdown") for part in content["body"])
