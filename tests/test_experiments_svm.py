# SPDX-License-Identifier: BSD-3-Clause
import bz2
import json
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import scale

from experiments import data, record, svm_judge, svm_peers, svm_report, svm_workers
from experiments.svm_cases import CASES, Case, even, exact_in_float32, forms, load, majority, rounded, shaped
from experiments.svm_judge import certify, duals, judge, kernel_times
from experiments.svm_workers import Worker, machines, trainer

MODULES = {"ours": "bcd.svm", "scikit-learn": "sklearn", "libsvm-official": "libsvm"}
INSTALLED = [solver for solver, module in MODULES.items() if find_spec(module)]


@pytest.fixture(scope="module")
def problems():
    """A small real problem for every task."""
    X, y = load_breast_cancer(return_X_y=True)
    X = scale(X)
    digits, digit = load_digits(return_X_y=True)
    diabetes, target = load_diabetes(return_X_y=True)
    return {
        "classify": (Case("", "classify", 1 / 30, 2.0), X, np.where(y == 1, 1.0, -1.0)),
        "linear": (Case("", "classify", None, 0.5), X, np.where(y == 1, 1.0, -1.0)),
        "regress": (Case("", "regress", 0.1, 3.0, 0.2), scale(diabetes), scale(target)),
        "one-class": (Case("", "one-class", 1 / 30, nu=0.2), X, np.ones(len(y))),
        "multi-class": (Case("", "multi-class", 0.5, 1.0), digits[:300] / 16, digit[:300].astype(float)),
    }


@pytest.fixture(scope="module")
def solved(problems):
    """What scikit-learn returns for each of them."""
    found = {}
    for task, (case, X, y) in problems.items():
        found[task] = machines("scikit-learn", case, trainer("scikit-learn", case, X, y, 200)())
    return found


TASKS = ["classify", "linear", "regress", "one-class", "multi-class"]


# -- the judge ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_judge_accepts_an_exact_solution(problems, solved, task):
    verdict = judge(*_swap(problems[task]), {"exact": solved[task]})["exact"]
    assert verdict.feasible
    assert verdict.violation <= 1.01e-3
    assert verdict.intercept_error <= 1e-12
    assert verdict.n_sv == len(np.unique(np.concatenate([m.support for m in solved[task]])))


@pytest.mark.parametrize("task", TASKS)
def test_the_judge_computes_the_dual_from_its_definition(problems, solved, task):
    case, X, y = problems[task]
    objective = 0.0
    for machine in solved[task]:
        Z, b = X[machine.support], machine.beta
        K = rbf_kernel(Z, gamma=case.gamma) if case.gamma is not None else Z @ Z.T
        target = np.zeros(len(b)) if task == "one-class" else y[machine.support]
        if machine.pair is not None:
            target = np.where(target == machine.pair[1], 1.0, -1.0)
        objective += 0.5 * b @ K @ b - target @ b + case.epsilon * np.abs(b).sum()
    assert judge(X, y, case, {"m": solved[task]})["m"].objective == pytest.approx(objective, rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong", ["perturbed", "infeasible sum", "swapped sign", "out of bounds", "nan"])
def test_the_judge_catches_what_is_wrong(problems, solved, task, wrong):
    case, X, y = problems[task]
    first, *others = solved[task]
    verdict = judge(X, y, case, {"wrong": [spoilt(first, wrong, case), *others], "right": solved[task]})
    assert not verdict["wrong"].converged
    assert verdict["right"].violation <= 1.01e-3
    if wrong in ("infeasible sum", "out of bounds", "nan"):
        assert not verdict["wrong"].feasible
    if wrong == "perturbed":
        assert verdict["wrong"].feasible
        assert verdict["wrong"].violation > 1e-2
        assert verdict["wrong"].objective > verdict["right"].objective


def spoilt(machine, wrong, case):
    """Coefficients that are wrong in one way."""
    beta, C = machine.beta.copy(), case.C if case.task != "one-class" else 1.0
    inside = np.flatnonzero((np.abs(beta) > 0.02 * C) & (np.abs(beta) < 0.9 * C))
    if wrong == "perturbed":
        i, j = inside[0], next(k for k in inside[1:] if beta[k] * beta[inside[0]] > 0)
        step = 0.9 * min(abs(beta[i]), C - abs(beta[j])) * np.sign(beta[i])
        beta[i], beta[j] = beta[i] - step, beta[j] + step
    elif wrong == "infeasible sum":
        beta[inside[0]] *= 0.99
    elif wrong == "swapped sign":
        beta = -beta
    elif wrong == "out of bounds":
        same = np.flatnonzero(np.sign(beta) == np.sign(beta[0]))
        i, j = same[np.argmax(np.abs(beta[same]))], same[np.argmin(np.abs(beta[same]))]
        step = (C * 1.01 - abs(beta[i])) * np.sign(beta[i])
        beta[i], beta[j] = beta[i] + step, beta[j] - step
    else:
        beta[0] = np.nan
    return machine._replace(beta=beta)


def _swap(problem):
    case, X, y = problem
    return X, y, case


def test_a_wrong_intercept_is_seen(problems, solved):
    case, X, y = problems["classify"]
    (machine,) = solved["classify"]
    verdict = judge(X, y, case, {"m": [machine._replace(intercept=machine.intercept + 0.1)]})["m"]
    assert verdict.intercept_error == pytest.approx(0.1, abs=2e-3)


def test_a_coordinate_next_to_its_bound_is_free_but_for_rounding():
    case = Case("", "classify", None, 10.0)
    dual = duals(case, np.array([1.0, -1.0]))[(-1.0, 1.0)]
    product = np.array([-3.0, 3.0])  # both want to go further
    for shortfall, violation in ((0.0, 0.0), (1e-13, 0.0), (1e-9, 8.0)):
        beta = np.array([1.0, -1.0]) * 10 * (1 - shortfall)
        assert certify(dual, beta, product).violation == violation, shortfall
        assert certify(dual, beta, product).n_bound == 2 * (violation == 0)


def test_the_two_multipliers_of_a_regression_row_are_judged_apart():
    dual = duals(Case("", "regress", None, 1.0, 0.5), np.zeros(3))[None]
    beta = np.array([0.5, -0.5, 0.0])
    # free rows have slope -epsilon and +epsilon, a row at 0 anything between
    assert certify(dual, beta, np.array([-0.5, 0.5, 0.3])).violation == 0
    assert certify(dual, beta, np.array([-0.5, 0.5, 0.7])).violation == pytest.approx(0.2)
    assert certify(dual, beta, np.array([-0.4, 0.5, 0.0])).violation == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.002, 0.2, 1.0])
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_products_in_tiles(share, gamma, monkeypatch):
    monkeypatch.setattr(svm_judge, "TILE", 16)
    rng = np.random.default_rng(0)
    X = sp.random(70, 200, share, "csr", rng=rng) if share < 1 else rng.standard_normal((70, 5))
    support, B = np.array([3, 5, 60]), rng.standard_normal((3, 2))
    dense = X.toarray() if sp.issparse(X) else X
    K = dense @ dense[support].T if gamma is None else rbf_kernel(dense, dense[support], gamma=gamma)
    assert kernel_times(X, support, B, gamma) == pytest.approx(K @ B, abs=1e-12)


def test_a_missing_machine_and_a_stray_row_are_seen(problems, solved):
    case, X, y = problems["multi-class"]
    with pytest.raises(ValueError, match="44 machines where 45"):
        judge(X, y, case, {"m": solved["multi-class"][1:]})
    first, *others = solved["multi-class"]
    stray = np.flatnonzero(~np.isin(y, first.pair))[:1]
    bad = first._replace(support=np.append(first.support, stray), beta=np.append(first.beta, 0.1))
    assert not judge(X, y, case, {"m": [bad, *others]})["m"].feasible


# -- solvers and their processes ----------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("solver", INSTALLED)
def test_every_solver_is_read_and_asked_the_same(problems, solved, solver, task):
    case, X, y = problems[task]
    found = machines(solver, case, trainer(solver, case, X, y, 200)())
    verdicts = judge(X, y, case, {"theirs": found, "scikit-learn": solved[task]})
    assert verdicts["theirs"].violation <= 1.01e-3
    assert verdicts["theirs"].intercept_error <= 1e-3
    assert verdicts["theirs"].objective == pytest.approx(verdicts["scikit-learn"].objective, rel=1e-5)


def test_labels_in_any_order_are_read_alike():
    """LIBSVM orders classes by first appearance, scikit-learn by label."""
    support, coef = np.array([7, 8, 9]), np.array([[1.0, -0.25, -0.75]])
    (one,) = svm_workers.one_against_one(support, coef, np.array([0.5]), np.array([3.0, 2.0]), [1, 2])
    (two,) = svm_workers.one_against_one(
        support[[1, 2, 0]], -coef[:, [1, 2, 0]], -np.array([0.5]), np.array([2.0, 3.0]), [2, 1]
    )
    assert one.pair == two.pair == (2.0, 3.0)
    assert dict(zip(one.support, one.beta, strict=True)) == dict(zip(two.support, two.beta, strict=True))
    assert one.beta[0] == 1.0
    assert one.intercept == two.intercept == 0.5


def test_a_process_answers_is_ended_when_it_takes_too_long_and_starts_again():
    case, missing = Case("breast_cancer", "classify", 1e-4), Case("none", "classify", 1.0)
    worker = Worker("scikit-learn")
    try:
        assert worker.ask("supports", 60, task="classify") == {"supported": True}
        answer = worker.ask("fit", 60, case=case, form="dense f64", cache=200)
        assert answer["seconds"] > 0
        assert judge(*load(case), case, {"m": answer["machines"]})["m"].converged
        assert "FileNotFoundError" in worker.ask("warm", 60, case=missing, form="dense f64")["error"]
        assert worker.ask("memory", 60, case=case, form="dense f32", cache=200)["peak"] > 0
        assert worker.ask("fit", 0.0, case=case, form="dense f64", cache=200) == {"over": True}
        assert worker.process is None
        assert worker.ask("supports", 60, task="nothing known") == {"error": "KeyError: 'nothing known'"}
    finally:
        worker.close()


@pytest.mark.skipif(not find_spec("sklearnex"), reason="scikit-learn-intelex is not installed")
def test_intelex_is_read_in_its_own_process():
    worker = Worker("intelex")
    try:
        assert worker.ask("supports", 120, task="one-class") == {"supported": False}
        for case in (
            Case("breast_cancer", "classify", 1e-4),
            Case("breast_cancer", "regress", 1e-4, 1.0, 0.1),
            Case("digits", "multi-class", 1e-3, rows=400),
        ):
            answer = worker.ask("fit", 60, case=case, form="dense f64", cache=200)
            assert judge(*load(case), case, {"m": answer["machines"]})["m"].converged
    finally:
        worker.close()


def test_everyone_gets_two_threads_and_free_openblas(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    around = svm_workers.surroundings()
    assert not any(name.startswith("OPENBLAS_") for name in around)
    assert {around[k] for k in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")} == {"2"}


# -- cases --------------------------------------------------------------------------------------


def test_forms_of_the_data():
    dense, sparse = np.eye(3), sp.csr_matrix(np.eye(3) / 3)
    assert forms(dense) == ["dense f64", "dense f32"]
    assert forms(sparse) == ["CSR f64", "CSR f32", "dense f64", "dense f32"]
    assert shaped(sparse, "dense f32").dtype == np.float32
    assert shaped(sparse, "CSR f32").dtype == np.float32
    assert exact_in_float32(dense)
    assert not exact_in_float32(sparse)


def test_cases_are_what_the_comparison_is_about():
    tasks = [case.task for case in CASES.values()]
    assert tasks.count("classify") == 15
    assert {"regress", "one-class", "multi-class"} <= set(tasks)
    X, y = np.arange(4.0)[:, None], np.array([0.0, 1.0, 2.0, 3.0])
    assert even(X, y)[1].tolist() == [1, -1, 1, -1]
    kept, labels = majority(X, np.array([1.0, -1.0, -1.0, -1.0]))
    assert kept.ravel().tolist() == [1, 2, 3]
    assert set(labels) == {-1.0}


def test_subsets_are_seeded():
    case = Case("breast_cancer", "classify", 0.1, rows=50)
    assert np.array_equal(load(case)[0], load(case)[0])
    assert load(case)[0].shape == (50, 30)


def test_sparse_data_have_indices_that_libsvm_takes(tmp_path, monkeypatch):
    (tmp_path / "svm").mkdir()
    (tmp_path / "svm" / "toy.bz2").write_bytes(bz2.compress(b"1 50:1\n-1 3:1\n"))
    monkeypatch.setenv("BCD_DATA", str(tmp_path))
    X, _ = data.load("toy")
    assert X.indices.dtype == X.indptr.dtype == np.int32


def test_a_set_without_an_address_is_described(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BCD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="UCI spambase"):
        data.load("spambase_std")


# -- what is made of the numbers ----------------------------------------------------------------


def entry(solver, form, seconds, converged=True, cache=svm_report.CACHE, status="ok"):
    row = {"solver": solver, "form": form, "cache": cache, "seconds": seconds, "cpu": seconds, "status": status}
    verdict = svm_judge.Verdict(-1.0, 9e-4 if converged else 2e-3, 0.0, 0.0, 0.0, True, 10, 5)
    return row | (asdict(verdict) | {"converged": converged, "relative_excess": 1e-8} if seconds else {})


def a_case(task, n, *entries):
    named = {f"{e['solver']}, {e['form']}, {e['cache']}": e for e in entries}
    numbers = {"n": n, "d": 5, "n_sv": 10, "floor_seconds": 0.5, "floor_rate": 1e9}
    return {"task": task, "data": "x", "parameters": {}, **numbers, "contestants": named}


@pytest.fixture
def results():
    """Made up: two small cases, a large one with an ended peer, a regression."""
    ours = entry("ours", "dense f32", [1.0, 2.0, 9.0])
    cases = {
        "small": a_case(
            "classify",
            1000,
            ours,
            entry("ours", "dense f64", [1.5], False),
            entry("scikit-learn", "dense f64", [4.0]),
            entry("intelex", "dense f32", [1.0], False),
            entry("intelex", "dense f64", [8.0]),
            entry("ours", "dense f32", [2.5], cache=200),
        ),
        "none converged": a_case("classify", 1000, ours, entry("scikit-learn", "dense f64", [1.0], False)),
        svm_report.MEMORY[0]: a_case(
            "classify",
            40_000,
            entry("ours", "CSR f64", [3.0]),
            entry("scikit-learn", "CSR f64", [], status="over"),
            entry("libsvm-official", "CSR f64", [], status="over"),
            entry("intelex", "CSR f64", [24.0]),
        ),
        "SVR": a_case("regress", 1000, ours, entry("libsvm-official", "dense f64", [6.0])),
    }
    scaled = {str(n): entry("ours", "CSR f64", [1e-6 * n**1.5]) | {"n": n, "n_sv": n} for n in (1000, 2000, 4000)}
    row = {"form": "CSR f64", "cache": 200, "status": "ok", "data": 10.0, "added": 300.0, "limit": 510.0}
    found = {"cases": cases, "scaling": scaled, "memory": {"a9a, 200 MB": row | {"within": True}}, "settings": {}}
    return found | {"bars": svm_report.bars(found)}


def test_ratios_and_geometric_means(results):
    bars = results["bars"]
    assert bars["ratios"] == {"small": 2.0, "none converged": 0.5, svm_report.MEMORY[0]: 8.0, "SVR": 3.0}
    assert bars["geometric_mean"] == pytest.approx((2.0 * 0.5 * 8.0) ** (1 / 3))
    assert bars["any_model_ratios"]["small"] == 0.5
    assert bars["any_model"] == pytest.approx((0.5 * 0.5 * 8.0) ** (1 / 3))
    assert bars["worst"] == 0.5
    assert bars["others"] == pytest.approx(3.0)
    assert bars["libsvm_large_ratios"] == {svm_report.MEMORY[0]: svm_report.CAP / 3}
    assert bars["over_floor"]["small"] == 4.0
    assert bars["ours_not_converged"] == []
    assert bars["exponents"] == pytest.approx({"seconds": 1.5, "n_times_n_sv": 2.0})
    assert svm_report.geometric_mean([1.0, 100.0]) == pytest.approx(10.0)


def test_ended_peers_give_a_lower_bound(results):
    case = results["cases"][svm_report.MEMORY[0]]
    row = svm_report.against(case, svm_report.LIBSVM)
    assert row["at_least"]
    assert row["ratio"] == svm_report.CAP / 3


def test_tables_mark_what_does_not_count(results):
    made = svm_peers.tables(json.loads(record.to_json(results)))
    assert set(made) == {"cases", "others", "default_cache", "scaling", "memory", "accuracy", "bars"}
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in made["cases"].splitlines()}
    assert "2 (dense f32)" in lines["small"]
    assert "8 (dense f64)" in lines["small"]
    assert "1*" in lines["none converged"]
    assert "0.50*" in lines["none converged"]
    assert "> 300" in lines[svm_report.MEMORY[0]]
    assert "exponent" in made["scaling"]
    assert "2.5" in made["default_cache"]
    assert '"/' not in record.to_json(results)


def test_the_picture_is_drawn(results, tmp_path):
    svm_report.draw(results).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_forms_that_fall_behind_drop_out():
    rows = {
        "a": entry("intelex", "dense f64", [2.0]),
        "b": entry("intelex", "dense f32", [1.0], False),
        "c": entry("intelex", "CSR f64", [4.0]),
        "d": entry("scikit-learn", "CSR f64", [70.0]),
        "e": entry("libsvm-official", "CSR f64", [3.0], False),
    }
    assert {n for n, row in rows.items() if svm_peers.worth_repeating(rows, row)} == {"a", "e"}


def test_parts_of_an_interrupted_run_are_kept(tmp_path, monkeypatch):
    bench = svm_peers.Bench(1, tmp_path / "partial.json")
    bench.part("memory", "x", lambda: {"added": 1})
    monkeypatch.setenv("SVM_PEERS_RESUME", "1")
    again = svm_peers.Bench(1, tmp_path / "partial.json")
    again.part("memory", "x", lambda: pytest.fail("done before"))
    assert again.results["memory"] == {"x": {"added": 1}}


def test_float32_input_is_judged_as_given_and_compared_on_the_data(tmp_path):
    """A solver of the rounded problem solves it; on the data themselves it is a little off."""
    rng = np.random.default_rng(0)
    X, y = 100 + rng.standard_normal((60, 2)), np.where(np.arange(60) % 2, 1.0, -1.0)
    case = Case("", "classify", 1.0, 1e4)
    bench, entries = svm_peers.Bench(1, tmp_path / "none"), {}
    for form, Z in (("dense f64", X), ("dense f32", rounded(X))):
        entries[form] = {"form": form}
        bench.models[form] = machines("scikit-learn", case, trainer("scikit-learn", case, Z, y, 200)())
    bench.judge_all(case, X, y, entries)
    assert bench.models == {}
    single, double = entries["dense f32"], entries["dense f64"]
    assert single["violation"] < single["violation_on_float64"]
    assert double["violation"] == double["violation_on_float64"]
    assert single["relative_excess"] > double["relative_excess"] == 0


def test_the_floor_is_a_rate():
    assert 1e6 < svm_peers.entries_a_second(10, False) < svm_peers.entries_a_second(10, True) * 3
