# SPDX-License-Identifier: BSD-3-Clause
"""The `bcd` command: what it prints, writes and returns."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import bcd
from bcd import cli, demo

run = CliRunner()


@pytest.fixture
def saved(tmp_path):
    """Write arrays to an npz and return its path."""

    def save(**arrays):
        path = tmp_path / "problem.npz"
        np.savez(path, **arrays)
        return str(path)

    return save


def test_solve_prints_a_table_and_returns_zero(saved):
    done = run.invoke(cli.app, ["solve", saved(Q=np.diag([1.0, 2.0, 4.0]), lower=0.0, total=7.0), "--tol", "1e-9"])
    assert done.exit_code == 0
    assert "Converged" in done.output
    assert "objective" in done.output


@pytest.mark.parametrize("rule", [rule for rule in bcd.RULES if rule != "gs"])
def test_solve_by_every_rule_as_json(saved, rule):
    path = saved(Q=np.diag([1.0, 2.0, 4.0]), lower=0.0, upper=np.full(3, 5.0), total=7.0)
    done = run.invoke(cli.app, ["solve", path, "--rule", rule, "--tol", "1e-9", "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.output)
    np.testing.assert_allclose(answer["x"], [4, 2, 1], atol=1e-7)
    assert answer["status"] == "converged"
    assert answer["gap"] < 1e-6


def test_solve_factors_groups_and_ranges(saved):
    path = saved(F=np.ones((4, 1)), D=1.0, c=[0, 0, -3.0, -1], lower=0.0, groups=[0, 0, 1, 1], total=[[1, 1], [0, 2]])
    done = run.invoke(cli.app, ["solve", path, "--tol", "1e-10", "--json"])
    answer = json.loads(done.output)
    constraint = bcd.SumBox(0, None, [1, (0, 2)], [0, 0, 1, 1])
    problem = bcd.Problem(bcd.Quadratic(bcd.LowRank(np.ones((4, 1)), 1.0), [0, 0, -3, -1]), constraint)
    assert bcd.certify(problem, answer["x"]).violation <= 1e-10


def test_solve_writes_result_and_picture(saved, tmp_path):
    path, out, plot = saved(Q=np.eye(3), total=3.0, x0=[3.0, 0, 0]), tmp_path / "x.npz", tmp_path / "run.png"
    done = run.invoke(cli.app, ["solve", path, "--rule", "gs1", "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0
    with np.load(out, allow_pickle=False) as result:
        np.testing.assert_allclose(result["x"], 1, atol=1e-6)
        assert result["violation"] <= 1e-6
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_has_no_infinity(saved):
    done = run.invoke(cli.app, ["solve", saved(Q=np.zeros((3, 3)), c=[1.0, 2, 3], total=1.0), "--json"])
    assert done.exit_code == 4
    answer = json.loads(done.output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert answer["gap"] is None
    assert answer["status"] == "unbounded"
    assert np.dot(answer["ray"], [1, 2, 3]) < 0


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for out, why in ((tmp_path / "file", "must be a folder"), (tmp_path / "file" / "b", "cannot be made")):
        done = run.invoke(cli.app, ["demo", "--out", str(out)])
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"{out}: {why}" in done.stderr


@pytest.mark.parametrize("ending", ["gz", "bz2"])
def test_broken_compressed_data_are_named(tmp_path, ending):
    data = tmp_path / f"data.{ending}"
    data.write_text("1 1:2\n")
    done = run.invoke(cli.app, ["svm", "train", str(data)])
    assert done.exit_code == 2
    assert f"{data}: the compressed file is broken" in done.stderr


@pytest.mark.parametrize("rule", [["--rule", "gs1"], []])
def test_limits_return_three(saved, rule):
    x = np.linspace(0, 1, 50)
    path = saved(Q=np.exp(-((x[:, None] - x) ** 2) / 0.01), c=np.sin(9 * x), lower=0.0, total=1.0)
    done = run.invoke(cli.app, ["solve", path, *rule, "--max-iter", "1"])
    assert done.exit_code == 3
    assert "max_iter" in done.output


def test_without_a_rule_solve_qp_works(saved):
    n = 300
    x = np.linspace(0, 1, n)
    Q = np.exp(-((x[:, None] - x) ** 2) / 0.01) + 1e-6 * np.eye(n)
    path = saved(Q=Q, c=np.sin(9 * x), lower=0.0, total=1.0)
    told = ["solve", path, "--tol", "1e-9", "--max-iter", "1000"]
    assert run.invoke(cli.app, told).exit_code == 0
    assert run.invoke(cli.app, [*told, "--rule", "gs1"]).exit_code == 3


def test_ctrl_c_ends_the_demo_and_not_one_of_its_rules():
    result = bcd.minimize(bcd.Problem(bcd.Quadratic(np.eye(3)), bcd.SumBox(total=1.0)))
    assert demo.whole(result) is result
    with pytest.raises(KeyboardInterrupt):
        demo.whole(replace(result, status=bcd.Status.INTERRUPTED))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"Q": [[1.0, 2.0], [3.0, 4.0]]}, "Q must be symmetric"),
        ({"Q": np.eye(3), "foo": 1}, "unknown arrays ['foo']"),
        ({"c": np.ones(3)}, "needs either Q or F"),
        ({"Q": np.eye(3), "F": np.eye(3)}, "needs either Q or F"),
        ({"Q": np.eye(3), "D": 1.0}, "D goes with F"),
        ({"Q": np.eye(3), "lower": 0.0, "upper": 0.1, "total": 1.0}, "misses it by 0.7"),
        ({"Q": np.eye(3), "total": np.ones((2, 2))}, "total must be a number or (lo, hi)"),
        ({"Q": np.eye(3), "c": np.ones(2)}, "c must have shape (3,)"),
        ({"Q": np.array([["a", "b"], ["b", "a"]])}, "Q must hold real numbers"),
        ({"Q": np.array([object()])}, "must be an npz archive of plain arrays"),
        ({"Q": np.eye(2), "groups": [0.5, 1.0], "total": [1.0, 1.0]}, "groups must be an integer array"),
    ],
)  # fmt: skip
def test_a_bad_problem_is_one_sentence_and_exit_code_two(saved, arrays, message):
    done = run.invoke(cli.app, ["solve", saved(**arrays)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 torn", np.random.default_rng(0).bytes(300)])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    done = run.invoke(cli.app, ["solve", str(path)])
    assert done.exit_code == 2
    assert "broken.npz: must be an npz archive" in done.stderr


def test_a_truncated_archive_is_named(saved, tmp_path):
    whole = Path(saved(Q=np.eye(50))).read_bytes()
    path = tmp_path / "torn.npz"
    for size in range(0, len(whole), 997):
        path.write_bytes(whole[:size])
        done = run.invoke(cli.app, ["solve", str(path)])
        assert done.exit_code == 2, size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "newton"], "rule must be one of"),
        (["--rule", "gs1", "--tol", "-1"], "tol must be a non-negative number"),
        (["--tol", "-1"], "tol must be at least 0"),
        (["--plot", "p.png"], "--plot needs a rule, such as --rule gs1"),
        (["--update", "model"], "--update needs a rule"),
        (["--seed", "1"], "--seed needs a rule"),
        (["--out", "missing-folder/x.npz"], "must be a file in a folder that exists"),
    ],
)
def test_wrong_options_return_two(saved, options, message):
    done = run.invoke(cli.app, ["solve", saved(Q=np.eye(2), total=1.0), *options])
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_problem_is_not_overwritten(saved):
    file = saved(Q=np.eye(2), total=1.0)
    done = run.invoke(cli.app, ["solve", file, "--out", file])
    assert done.exit_code == 2
    assert "is read and would be overwritten" in done.stderr


def test_a_missing_file_is_named():
    done = run.invoke(cli.app, ["solve", "nowhere.npz"])
    assert done.exit_code == 2
    assert "nowhere.npz: no such file" in done.stderr


def test_rules_prints_every_rule():
    done = run.invoke(cli.app, ["rules"])
    assert done.exit_code == 0
    assert all(name in done.output for name in bcd.RULES)


def test_version():
    assert bcd.__version__ in run.invoke(cli.app, ["--version"]).output


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "bcd", "rules"], capture_output=True, text=True, check=True)
    assert "GS-1" in done.stdout


def test_demo_solves_by_every_rule_and_writes_its_page(tmp_path):
    text = io.StringIO()
    (tmp_path / "demo").mkdir()
    assert demo.run_demo(tmp_path / "demo", Console(file=text, width=140)) == 0
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    for rule in demo.RULES_SHOWN:
        assert bcd.RULES[rule].title in text.getvalue()
        assert bcd.RULES[rule].title in page
    assert "LIBSVM" in page
    assert page.count("data:image/png;base64") == 2
    assert "http" not in page
