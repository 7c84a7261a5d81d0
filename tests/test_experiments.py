# SPDX-License-Identifier: BSD-3-Clause
import bz2
import io
import json
import re
import subprocess
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import bcd
import experiments
from bcd import _compiled
from experiments import data, engine_speed, front_page, paper_rates, record, rules_svm, tables, timing
from experiments.__main__ import app
from experiments.figures import panels

SVMLIGHT = b"+1 1:0.5 3:-1\n-1 2:1 3:0.25\n+1 1:1 2:1 3:1\n"
KEYS = {"name", "title", "date", "commit", "machine", "versions", "blas", "seed", "pictures", "results", "seconds"}
DONE = [name for name in experiments.names() if (experiments.RESULTS / f"{name}.json").exists()]


# -- data ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty data and cache folders, and no network."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BCD_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "svm").mkdir(parents=True)
    return SimpleNamespace(data=tmp_path / "data" / "svm", cache=tmp_path / "cache" / "blockdescent")


def test_load_prefers_the_folder_in_the_environment(folders):
    folders.cache.mkdir(parents=True)
    (folders.cache / "toy.bz2").write_bytes(bz2.compress(b"1 1:9\n"))
    (folders.data / "toy.bz2").write_bytes(bz2.compress(SVMLIGHT))
    X, y = data.load("toy")
    assert X.tolist() == [[0.5, 0, -1], [0, 1, 0.25], [1, 1, 1]]
    assert y.tolist() == [1, -1, 1]


def test_load_falls_back_to_the_cache(folders, monkeypatch):
    monkeypatch.delenv("BCD_DATA")
    folders.cache.mkdir(parents=True)
    (folders.cache / "toy.bz2").write_bytes(bz2.compress(SVMLIGHT))
    assert data.load("toy")[0].shape == (3, 3)


def test_load_keeps_sparse_data_sparse(folders):
    (folders.data / "toy.bz2").write_bytes(bz2.compress(b"1 50:1\n-1 3:1\n"))
    X, _ = data.load("toy")
    assert X.shape == (2, 50)
    assert X.nnz == 2


@pytest.mark.parametrize("name", ["german_scale", "never_heard_of"])
def test_a_missing_set_says_what_to_do(folders, name):
    with pytest.raises(FileNotFoundError, match=f"{name}.*BCD_DATA"):
        data.load(name)


def test_a_download_is_prepared_and_cached(folders, monkeypatch):
    raw = b"1 1:0 2:5\n0 1:10 2:6\n0 1:5 2:7\n"
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(raw)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    for _ in range(2):  # the second time from the cache
        X, y = data.load("svmguide1_scale")
        assert y.tolist() == [1, -1, -1]
        assert X.tolist() == [[-1, -1], [1, 0], [0, 1]]
    assert len(asked) == 1
    assert asked[0].startswith("https://")
    assert [path.name for path in folders.cache.iterdir()] == ["svmguide1_scale.bz2"]


@pytest.mark.parametrize(("name", "shape"), [("digits", (1797, 64)), ("breast_cancer", (569, 30))])
def test_bundled_sets_need_no_file(folders, name, shape):
    X, y = data.load(name)
    assert X.shape == shape
    assert y.dtype == float


# -- records and the command --------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment that draws an empty picture; results and temporary files go to folders of this test."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(quick):
        return {"quick": quick, "numbers": np.arange(3), "pictures": {"": panels(1, 1)[0], "more": panels(1, 1)[0]}}

    return SimpleNamespace(TITLE="a toy", SEED=1, run=run)


def test_a_full_run_is_recorded(toy, tmp_path):
    paths = record.record("toy", toy, quick=False)
    assert sorted(path.name for path in paths) == ["toy-more.png", "toy.json", "toy.png"]
    assert all(path.parent == tmp_path / "results" for path in paths)
    entry = json.loads(paths[0].read_text())
    assert entry.keys() >= KEYS
    assert entry["results"] == {"quick": False, "numbers": [0, 1, 2]}


def test_a_picture_may_come_as_a_png(toy, tmp_path):
    toy.run = lambda quick: {"pictures": {"": b"png"}}
    _, picture = record.record("toy", toy, quick=False)
    assert picture.read_bytes() == b"png"


def test_a_script_of_the_gallery_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(front_page, "FOLDER", tmp_path / "experiments")
    (tmp_path / "docs" / "gallery").mkdir(parents=True)
    (tmp_path / "docs" / "gallery" / "broken.py").write_text("raise ValueError('what happened')")
    with pytest.raises(RuntimeError, match=r"broken.py failed: ValueError: what happened"):
        front_page.carry_out("broken")


def test_a_quick_run_leaves_the_results_alone(toy, tmp_path):
    record.record("toy", toy, quick=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    paths = record.record("toy", toy, quick=True)
    assert all((tmp_path / "temporary") in path.parents for path in paths)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()} == before


def test_json_keeps_lists_on_one_line():
    entry = {"a": [1.5, 2, 3], "b": {"c": ["x y", "z"]}, "d": [{"e": [np.float64(1), np.int64(2)]}], "f": []}
    text = record.to_json(entry)
    assert json.loads(text) == {"a": [1.5, 2, 3], "b": {"c": ["x y", "z"]}, "d": [{"e": [1.0, 2]}], "f": []}
    assert '"a": [1.5, 2, 3]' in text


def test_the_command_lists_every_experiment():
    listed = CliRunner().invoke(app, ["list"])
    assert listed.exit_code == 0
    for name in ("engine_speed", "paper_rates", "rules_svm"):
        assert f"{name} " in listed.output
        assert experiments.module(name).TITLE in listed.output


def test_an_unknown_experiment_is_refused():
    assert CliRunner().invoke(app, ["run", "nothing"]).exit_code == 2


@pytest.mark.parametrize("name", DONE)
def test_results_are_full_runs_that_name_no_path(name):
    text = (experiments.RESULTS / f"{name}.json").read_text(encoding="utf-8")
    entry = json.loads(text)
    assert entry.keys() >= KEYS
    assert not entry["quick"]
    assert all((experiments.RESULTS / picture).exists() for picture in entry["pictures"])
    assert '"/' not in text
    assert all(experiments.module(name).tables(entry["results"]).values())


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_are_in_step_with_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run: python -m experiments tables"


def test_rewriting_touches_only_what_is_marked(monkeypatch):
    monkeypatch.setattr(tables, "table", lambda marker: f"| {marker} |\n")
    text = "a\n<!-- table:x/one -->\nold\n<!-- /table -->\nb\n<!-- table:x/two -->\n<!-- /table -->\nc\n"
    new = tables.rewritten(text)
    assert new == (
        "a\n<!-- table:x/one -->\n| x/one |\n<!-- /table -->\nb\n<!-- table:x/two -->\n| x/two |\n<!-- /table -->\nc\n"
    )
    assert tables.rewritten(new) == new


def test_markdown():
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


@pytest.mark.parametrize("marker", ["nothing/at all", "engine_speed/nothing"])
def test_an_unknown_marker_is_an_error(marker):
    with pytest.raises(ValueError, match=r"there (is|are) no|has no table"):
        tables.table(marker)


# -- what the experiments measure ---------------------------------------------------------------


def test_sorting_and_steepest_l1_take_the_same_step():
    rooms = engine_speed.instance(5000)
    lipschitz = engine_speed.lipschitz_that_moves(60, rooms)
    assert 40 <= len(bcd.steepest_l1(*rooms, lipschitz).index) <= 80
    assert set(engine_speed.contestants(rooms, lipschitz)) == {"steepest_l1", "argpartition", "one sort", "two sorts"}


def test_the_floor_does_the_arithmetic_of_a_step():
    Q, c, x0, lower, upper = engine_speed.rbf_dual(37)
    grad, diagonal = Q @ x0 + c, Q.diagonal().copy()
    up, low = np.where(x0 < upper, 0.0, np.inf), np.where(x0 > lower, 0.0, -np.inf)
    moved = grad + 0.1 * (Q[3] - Q[5])
    curvature = np.maximum(diagonal[3] + diagonal - 2 * Q[3], 1e-300)
    gain = (np.maximum(moved + low + 2.0, 0) ** 2 / curvature).max()
    total = engine_speed.floor_kernel(False)(Q, grad, 0.1, up, low, diagonal, np.array([3]), np.array([5]))
    assert grad == pytest.approx(moved)
    assert total == pytest.approx(gain + (moved + up).min())


def test_pairs_taken_lead_where_the_loop_leads():
    problem = Q, c, x0, lower, upper = engine_speed.rbf_dual(40)
    grad, x = Q @ x0 + c, x0.copy()
    steps = _compiled.pair_loop(Q, grad, x, lower, upper, Q.diagonal().copy(), engine_speed.PAIR_TOL, 10**5)[0]
    rising, falling = engine_speed.pairs_taken(problem, steps)
    assert (rising != falling).all()
    assert set(np.flatnonzero(x != x0)) <= set(rising) | set(falling)


def test_interleaved_keeps_every_repetition():
    order = []
    times = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert {name: len(one) for name, one in times.items()} == {"a": 3, "b": 3}
    assert order[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_every_rule_agrees_with_svc():
    rng = np.random.default_rng(0)
    y = np.where(np.arange(60) % 2 == 0, 1.0, -1.0)
    X = rng.standard_normal((60, 2)) + 0.5 * y[:, None]
    K = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1))
    box = bcd.SumBox(np.where(y > 0, 0.0, -1.0), np.where(y > 0, 1.0, 0.0), total=0)
    problem = bcd.Problem(bcd.Quadratic(K, -y), box)
    svc = rules_svm.reference(problem, y, 1.0)
    for rule in rules_svm.RULES:
        assert rules_svm.solve(problem, rule, 1e-6, 20.0).objective == pytest.approx(svc["objective"], rel=1e-9)
    counted = rules_svm.moved(problem, "line-search")
    assert counted["iterations"] == sum(counted["steps"])
    assert counted["iterations"] == pytest.approx(rules_svm.solve(problem, "GS-1", 1e-6, 20.0).iterations, rel=0.1)
    assert 2 <= counted["mean"] <= counted["largest"]


def test_width_of_a_square_and_of_a_triangle():
    square = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]])
    assert paper_rates.width_over_diameter(square) == pytest.approx(1 / np.sqrt(2))
    triangle = np.array([[0.0, 0], [2, 0], [1, np.sqrt(3)]])
    assert paper_rates.width_over_diameter(triangle) == pytest.approx(np.sqrt(3) / 2)


def test_greedy_iterations_do_not_depend_on_zero_rows():
    counts = []
    for n in (12, 60):
        A = paper_rates.spanning_rows(n, np.random.default_rng(0))
        counts.append(paper_rates.iterations(*paper_rates.gram_problem(A, np.random.default_rng(1)), "gs1"))
    assert counts[0] == counts[1]


def test_every_step_meets_its_guarantee():
    for row in paper_rates.rates(1)[:2]:
        assert row["gs1"]["worst"] >= row["gs1"]["predicted"]
        assert row["random"]["mean"] >= row["random"]["predicted"]


def test_a_commit_is_marked_where_code_differs_from_it_but_not_where_results_do(monkeypatch, tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    folders = [tmp_path / name for name in ("bcd", "llm", "experiments", "experiments/results")]
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    monkeypatch.setattr(record, "FOLDER", tmp_path / "experiments")
    assert re.fullmatch("[0-9a-f]{12}", record.git_commit())
    (folders[3] / "file").write_text("2")
    assert "+" not in record.git_commit()
    (folders[1] / "file").write_text("2")
    assert record.git_commit().endswith("+")
