# SPDX-License-Identifier: BSD-3-Clause
import json
import math
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest

from experiments import qp_peers, qp_problems, qp_report, qp_workers, record
from experiments.qp_judge import REACHED, SNAPS, best_vertex, bounds_of, feasible_point, judge
from experiments.qp_problems import CASES, Case, Factors, Problem, factor_model, ill_conditioned, next_day, wishart
from experiments.qp_workers import GREEDY, OURS, PEERS, PRODUCTS, Server, Worker, forms, options, write

needs_peers = pytest.mark.skipif(find_spec("qpsolvers") is None, reason="qpsolvers is not installed")
DENSE_PROBLEM, FACTOR_PROBLEM = wishart(60, 0), factor_model(60, 0, 5)


def planted(n=12, seed=0, steepness=1.0):
    """A problem with a known solution: a third of the coordinates at each bound, the rest between."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, 2 * n))
    lower, upper = -rng.random(n), 1 + rng.random(n)
    x, where = lower + rng.uniform(0.2, 0.8, n) * (upper - lower), np.arange(n) % 3
    x[where == 0], x[where == 1] = lower[where == 0], upper[where == 1]
    slope = np.where(where == 0, 1.0, np.where(where == 1, -1.0, 0.0)) * steepness * (1 + rng.random(n))
    P = A @ A.T / n
    return Problem(P, 0.3 + slope - P @ x, float(x.sum()), lower, upper), x


# -- the judge ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_judge_accepts_an_exact_solution(seed):
    problem, x = planted(seed=seed)
    verdict = judge(problem, x)
    assert verdict.residual <= 1e-14
    assert verdict.infeasibility <= 1e-15
    assert abs(verdict.gap) <= 1e-13
    assert verdict.free == 4 / 12
    assert verdict.objective == pytest.approx(0.5 * x @ problem.P @ x + problem.q @ x, rel=1e-14)
    assert verdict.reached


def test_the_residual_is_the_violation_by_definition():
    problem, x = planted()
    x[2] += 0.1
    x[5] -= 0.1
    g = problem.P @ x + problem.q
    pairs = [
        g[i] - g[j] for i, j in product(range(12), range(12)) if x[i] > problem.lower[i] and x[j] < problem.upper[j]
    ]
    verdict = judge(problem, x)
    assert verdict.residual == pytest.approx(max(pairs) / max(1.0, abs(g).max()), rel=1e-12)
    assert verdict.residual > 1e-2
    assert not verdict.reached


def test_the_residual_is_relative_to_the_gradient_where_that_is_large():
    problem, x = planted()
    x[2], x[5] = x[2] + 0.1, x[5] - 0.1
    large = problem._replace(P=1e4 * problem.P, q=1e4 * problem.q)
    small = problem._replace(P=1e-4 * problem.P, q=1e-4 * problem.q)
    g = problem.P @ x + problem.q
    violation = judge(problem, x).residual * max(1.0, abs(g).max())
    assert judge(large, x).residual == pytest.approx(violation / abs(g).max(), rel=1e-12)
    assert judge(small, x).residual == pytest.approx(1e-4 * violation, rel=1e-10)


@pytest.mark.parametrize("at", ["lower", "upper"])
def test_multipliers_of_the_wrong_sign_are_seen(at):
    """Every coordinate at a bound, and one of them wants to leave it."""
    problem = Problem(np.eye(3), np.array([0.0, 0.0, 0.0]), 1.0, 0.0, 1.0)
    x = np.array([1.0, 0.0, 0.0]) if at == "lower" else np.array([0.0, 1.0, 0.0])
    assert judge(problem, x).residual == 1.0


def test_points_near_their_bounds_are_snapped_and_the_sum_is_repaired():
    """An interior point method stops short of every bound by about the same distance."""
    problem, x = planted()
    inside = x + 1e-7 * (0.5 * (problem.lower + problem.upper) - x)
    assert judge(problem, inside, snaps=(0.0,)).residual > 1e-2
    verdict = judge(problem, inside)
    assert verdict.residual < 1e-6
    assert verdict.snap == 1e-7
    y = feasible_point(problem, bounds_of(problem), inside, verdict.snap)
    assert abs(y.sum() - problem.total) <= 1e-14
    assert np.array_equal(y == problem.lower, x == problem.lower)
    assert np.array_equal(y == problem.upper, x == problem.upper)


def test_what_is_further_away_than_every_snap_is_free():
    problem, x = planted()
    i, j = np.flatnonzero(x == problem.lower)[0], np.flatnonzero(x == problem.upper)[0]
    step = 20 * max(SNAPS) * 2
    x[i], x[j] = x[i] + step, x[j] - step
    verdict = judge(problem, x)
    assert verdict.residual > 1e-2
    assert verdict.free == 6 / 12


def test_infeasibility_is_that_of_the_point_as_returned():
    problem, x = planted()
    assert judge(problem, x + 1e-6).infeasibility == pytest.approx(12e-6 / problem.total, rel=1e-6)
    beyond = x.copy()
    i, j = np.flatnonzero(x == problem.lower)[0], np.flatnonzero(x == problem.upper)[0]
    beyond[i], beyond[j] = beyond[i] - 1e-5, beyond[j] + 1e-5
    narrow = min(problem.upper[i] - problem.lower[i], problem.upper[j] - problem.lower[j])
    assert judge(problem, beyond).infeasibility == pytest.approx(1e-5 / narrow, rel=1e-6)
    assert judge(problem, beyond).residual <= 1e-14


def test_points_that_are_no_points():
    problem, x = planted()
    assert judge(problem, x[:-1]).residual == np.inf
    assert judge(problem, np.where(x == x[0], np.nan, x)).residual == np.inf
    assert judge(problem._replace(total=float(problem.upper.sum()) + 1.0), x).residual == np.inf


def test_the_only_feasible_point_is_optimal():
    problem, _ = planted()
    assert judge(problem._replace(total=float(problem.upper.sum())), problem.upper).residual == 0
    fixed = problem._replace(upper=problem.lower, total=float(problem.lower.sum()))
    assert judge(fixed, problem.lower).residual == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_bounds_the_objective_and_the_vertex_is_the_best(seed):
    problem, x = planted(seed=seed)
    bounds = bounds_of(problem)
    rng = np.random.default_rng(seed)
    best = judge(problem, x).objective
    for _ in range(20):
        y = feasible_point(problem, bounds, rng.uniform(problem.lower, problem.upper), 0.0)
        verdict = judge(problem, y)
        assert best - 1e-12 <= verdict.objective <= best + verdict.gap + 1e-12
        g = rng.standard_normal(12)
        v = best_vertex(problem, bounds, g)
        assert abs(v.sum() - problem.total) <= 1e-12
        assert ((v >= problem.lower) & (v <= problem.upper + 1e-15)).all()
        assert g @ v <= g @ y + 1e-12


def test_bounds_may_be_infinite_above():
    problem = Problem(np.eye(3), np.array([0.0, 1.0, 5.0]), 1.0, 0.0, np.inf)
    verdict = judge(problem, np.array([1.0, 0.0, 0.0]))
    assert (verdict.residual, verdict.gap) == (0, 0)
    verdict = judge(problem, np.array([0.0, 1.0, 0.0]))  # the gradient is (0, 2, 5)
    assert (verdict.residual, verdict.gap) == (2 / 5, 2.0)


# -- the problems -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c._replace(n=80) for c in dict((c.family, c) for c in CASES).values()], ids=lambda c: c.family
)
def test_problems_are_repeatable_convex_and_feasible(case):
    problem, again, other = case.make(80, 0), case.make(80, 0), case.make(80, 1)
    P = problem.P.dense() if isinstance(problem.P, Factors) else problem.P
    assert np.array_equal(P, P.T)
    assert np.array_equal(problem.q, again.q)
    assert np.array_equal(problem.P @ problem.q, again.P @ again.q)
    assert not np.array_equal(problem.q, other.q)
    assert np.linalg.eigvalsh(P)[0] > 0
    assert 80 * problem.lower < problem.total < 80 * problem.upper


def test_condition_numbers_are_those_of_the_names():
    values = np.linalg.eigvalsh(ill_conditioned(100, 0).P)
    assert values[-1] / values[0] == pytest.approx(1e6, rel=1e-4)
    values = np.linalg.eigvalsh(wishart(400, 0).P)
    assert 300 < values[-1] / values[0] < 600


def test_factors_are_the_matrix_they_stand_for():
    model = factor_model(50, 0, 4).P
    x = np.random.default_rng(0).standard_normal(50)
    P = model.F @ model.F.T + np.diag(model.D)
    assert np.allclose(model.dense(), P, rtol=1e-14)
    assert np.allclose(model @ x, P @ x, rtol=1e-12)


@pytest.mark.parametrize("problem", [DENSE_PROBLEM, FACTOR_PROBLEM], ids=["dense", "factors"])
def test_the_next_day_changes_what_it_says(problem):
    days = next_day(problem, 0)
    assert len(days) == 4
    for name, day in days.items():
        assert day.P is problem.P
        assert np.array_equal(day.q, problem.q) == (name in ("new total", "new bounds"))
        assert (day.total == problem.total) == (name in ("new linear term", "new bounds"))
        assert np.array_equal(np.broadcast_to(day.upper, 60), np.full(60, problem.upper)) == (
            "term" in name or "total" in name
        )
        assert np.sum(np.broadcast_to(day.upper, 60)) > day.total
    step = np.abs(days["new linear term"].q - problem.q).mean()
    assert 0 < step < 0.1 * np.abs(problem.q - problem.q.mean()).mean()


# -- the processes ------------------------------------------------------------------------------


def peer_forms():
    return [
        pytest.param(solver, form, kind, id=f"{solver}, {form}")
        for kind in ("dense", "factors")
        for solver in PEERS
        for form in forms(solver, kind == "factors")
    ]


@needs_peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("solver", "form", "kind"), peer_forms())
def test_every_peer_solves_the_same_problem_in_every_form(solver, form, kind, tmp_path):
    problem = DENSE_PROBLEM if kind == "dense" else FACTOR_PROBLEM
    if find_spec(qp_peers.PACKAGES[solver]) is None:
        pytest.skip(f"{solver} is not installed")
    path = write(problem, tmp_path / "problem")
    answer = Server(solver).fit(path, form, 1e-9, 30.0, 2)
    assert "error" not in answer, answer
    assert answer["x"].shape == (60,)
    assert answer["seconds"] > 0
    verdict = judge(problem, answer["x"])
    assert verdict.residual < 1e-6
    assert verdict.infeasibility < 1e-7


@needs_peers
@pytest.mark.skipif(find_spec("proxsuite") is None, reason="proxsuite is not installed")
def test_proxqp_is_told_what_its_bounds_are(monkeypatch):
    from proxsuite import proxqp

    formed, made = qp_workers.peer_problem(DENSE_PROBLEM, "dense, box"), []

    class Spy(proxqp.dense.QP):
        def __init__(self, *sizes, **kinds):
            super().__init__(*sizes, **kinds)
            made.append(self)

    monkeypatch.setattr(proxqp.dense, "QP", Spy)
    answer = qp_workers.proxqp_box_call(formed, options("proxqp", "dense, box", 1e-10, 30.0))()
    (qp,) = made
    assert qp.is_box_constrained()
    assert (qp.model.n_in, qp.settings.eps_abs, qp.settings.eps_rel) == (0, 1e-10, 0.0)
    assert judge(DENSE_PROBLEM, answer.x).reached
    assert answer.found


def test_greedy_pairs_through_their_process(tmp_path):
    path = write(DENSE_PROBLEM, tmp_path / "problem")
    server = Server(GREEDY)
    answer = server.fit(path, "", 1e-9, 30.0, 2, warm=True)
    assert judge(DENSE_PROBLEM, answer["x"]).residual <= 1e-9 * 1.01
    assert answer["iterations"] > 0
    loose = server.fit(path, "", 1e-2, 30.0, 1)
    assert loose["iterations"] < answer["iterations"]
    assert loose["first"] == loose["seconds"]


def test_a_measurement_is_the_calls_after_an_untimed_one(tmp_path, monkeypatch):
    made = []

    class Answer:
        x, found, build_time = np.zeros(60), True, 0.25

    monkeypatch.setattr(Server, "prepare", lambda self, path, form: {})
    monkeypatch.setattr(Server, "_call", lambda *of: lambda: made.append(of) or Answer)
    monkeypatch.setattr(qp_workers.time, "perf_counter", lambda: 10.0 * len(made) ** 2)
    answer = Server("piqp").fit("", "dense", 1e-6, 30.0, 2, warm=True)
    assert (answer["first"], answer["seconds"], answer["build"]) == (10.0, (90 - 10) / 2, 0.25)


def test_a_hundred_products_are_a_hundred(tmp_path, monkeypatch):
    """50 with F and 50 with F'."""
    count = []

    class Counted(np.ndarray):
        def __matmul__(self, other):
            count.append(self.shape)
            return np.asarray(self) @ np.asarray(other)

    F, D = FACTOR_PROBLEM.P
    counted = FACTOR_PROBLEM._replace(P=Factors(F.view(Counted), D))
    plain = type("Result", (), {"x": np.zeros(60), "columns": 0})
    monkeypatch.setattr(qp_workers, "our_call", lambda *of: lambda: plain)
    monkeypatch.setattr(qp_workers, "read", lambda path: counted)
    Server(OURS).huge("", 1)
    assert len(count) == PRODUCTS == 100
    assert count.count(F.shape) == count.count(F.T.shape) == 50


def test_ours_through_its_process(tmp_path):
    """One process: a fit, solving again, and 10^6 variables in small."""
    path = write(DENSE_PROBLEM, tmp_path / "problem")
    day = next_day(DENSE_PROBLEM, 0)["all three"]
    worker = Worker(OURS)
    try:
        answer = worker.ask("fit", 200, path=path, form="", eps=math.nan, cap=60.0, calls=2)
        assert answer["said"] == "CONVERGED", answer
        assert answer["iterations"] >= 0
        assert judge(DENSE_PROBLEM, answer["x"]).residual <= REACHED
        answer = worker.ask("again", 200, path=path, new_path=write(day, tmp_path / "day"), rounds=2)
        assert judge(day, answer["x"]).residual <= REACHED
        assert {len(answer[key]) for key in ("again", "fresh", "ready")} == {2}
        answer = worker.ask("huge", 200, path=write(FACTOR_PROBLEM, tmp_path / "factors"), rounds=2)
        assert judge(FACTOR_PROBLEM, answer["x"]).residual <= 1.01e-6
        assert len(answer["seconds"]) == len(answer["products"]) == 2
    finally:
        worker.close()


def test_a_process_that_takes_too_long_or_dies_or_errs_ends_nothing_else():
    worker = Worker("nobody")
    assert worker.ask("prepare", 0.0, path="", form="") == {"over": True}
    assert worker.process is None
    assert "AttributeError" in worker.ask("nonsense", 100)["error"]
    worker.process.kill()
    worker.process.join()
    assert worker.ask("nonsense", 100) == {"error": "the process ended"}
    assert "AttributeError" in worker.ask("nonsense", 100)["error"]
    worker.close()


def test_processes_get_two_threads_and_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    before = dict(qp_workers.os.environ)
    with qp_workers.environment(qp_workers.surroundings()):
        assert qp_workers.os.environ["OMP_NUM_THREADS"] == str(qp_workers.THREADS)
        assert "OPENBLAS_CORETYPE" not in qp_workers.os.environ
    assert dict(qp_workers.os.environ) == before


def test_settings_of_every_peer_carry_the_tolerance():
    for solver in PEERS:
        for form in forms(solver, False):
            loose, tight = (options(solver, form, eps, 60.0) for eps in (1e-4, 1e-9))
            changed = {key for key in loose if loose[key] != tight[key]}
            assert bool(changed) == (solver != "quadprog"), solver
            assert all((loose[key], tight[key]) == (1e-4, 1e-9) for key in changed)


# -- the benchmark ------------------------------------------------------------------------------


SPEED = {OURS: 0.01, GREEDY: 0.04, "clarabel": 0.3, "piqp": 0.1, "osqp": 0.2}  # seconds; the others fail
BEST = {"osqp": 1e-6}  # never more accurate than this
ASKED = []  # of all processes in turn


class Actor:
    """Stands for a process: an exact solution, but for a step between two free coordinates that eps decides."""

    def __init__(self, solver):
        self.solver = solver

    def close(self):
        pass

    def ask(self, action, limit, path="", form="", **arguments):
        ASKED.append((self.solver, action, arguments))
        if self.solver not in SPEED:
            return {"over": True} if self.solver == "scs" else {"error": "ValueError: no"}
        if action == "prepare":
            return {}
        problem, x = qp_workers.read(path), planted(30)[1]
        assert np.array_equal(problem.q, planted(30)[0].q)
        size = 0.0 if self.solver in (OURS, GREEDY) else max(arguments["eps"], BEST.get(self.solver, 0.0))
        x[2], x[5] = x[2] + 0.1 * size, x[5] - 0.1 * size
        slow = 5.0 if form.endswith(("plain", "qdldl")) or form == "csc" else 1.0
        seconds = slow * SPEED[self.solver]
        # first calls of ours take twice as long; half of what a peer takes passes before it starts
        first = 2 * seconds if self.solver == OURS and arguments["warm"] else seconds
        taken = {"seconds": seconds, "first": first, "cpu": 0.0, "x": x, "said": "solved"}
        return taken | ({"iterations": 7} if self.solver in (OURS, GREEDY) else {"build": seconds / 2})


TINY = Case("dense, condition 400", 30, lambda n, seed: planted(30)[0])


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(qp_peers, "Worker", Actor)
    ASKED.clear()
    return qp_peers.Bench(tmp_path, 3, tmp_path / "partial.json")


@pytest.fixture
def run(bench, capsys):
    bench.part("runs", "tiny", lambda: bench.compare(TINY, 0))
    return bench.results["runs"]["tiny"]


def test_the_loosest_accurate_setting_counts(run):
    entry = run["entries"]["piqp, dense"]
    accurate = {attempt["eps"]: attempt["residual"] <= REACHED for attempt in entry["ladder"]}
    chosen = entry["chosen"]["eps"]
    assert accurate[chosen]
    assert accurate[10 * chosen] is False
    assert chosen == max(eps for eps, good in accurate.items() if good)
    assert entry["rung"] == qp_workers.EPS.index(chosen)


def test_settings_of_slow_peers_are_not_loosened(bench, tmp_path):
    problem = planted(30)[0]
    instance = qp_peers.Instance("tiny", TINY, 0, problem, write(problem, tmp_path / "problem"))
    tried = [bench.entry(instance, "piqp", "dense", qp_workers.EPS, 7, slow) for slow in (0.09, 0.11)]
    assert [attempt["eps"] for attempt in tried[0]["ladder"]] == [1e-10]
    assert [attempt["eps"] for attempt in tried[1]["ladder"]] == [1e-10, 1e-9, 1e-8, 1e-7]


def test_a_peer_that_does_not_reach_the_residual_is_marked_and_does_not_count(run):
    entry = run["entries"]["osqp, csc, polished"]
    assert not qp_report.reached(entry)
    assert entry["chosen"]["residual"] == min(attempt["residual"] for attempt in entry["ladder"])
    assert {attempt["eps"] for attempt in entry["ladder"]} >= {1e-7, 1e-12}
    assert qp_report.against(run) == {"peer": "piqp", "ratio": pytest.approx(10), "peer_reached": True}
    assert qp_report.against(run, any_residual=True)["ratio"] == pytest.approx(10)


def test_the_fastest_form_counts_and_the_left_behind_do_not_run_again(run):
    assert qp_report.entry_of(run["entries"], "clarabel")["form"] == "csc, faer"
    assert len(run["entries"]["piqp, dense"]["seconds"]) == qp_peers.SHORT_ROUNDS
    assert len(run["entries"][OURS]["seconds"]) == qp_peers.SHORT_ROUNDS
    assert run["entries"]["clarabel, csc, qdldl"]["seconds"] == []
    assert run["entries"]["scs, csc, sparse"]["status"] == "over"
    assert run["entries"]["daqp, dense"]["status"] == "ValueError: no"


def test_turns_rotate(bench, run):
    """Nobody always runs after the same one; short calls are repeated within a measurement, alike for everyone."""
    taking = [name for name, entry in run["entries"].items() if entry["seconds"]]
    fits = [(solver, arguments) for solver, action, arguments in ASKED if action == "fit"]
    rounds = fits[-len(taking) * qp_peers.SHORT_ROUNDS :]
    firsts = [solver for solver, _ in rounds[:: len(taking)]]
    assert firsts == [name.split(",")[0] for name in (taking * 9)[: qp_peers.SHORT_ROUNDS]]
    assert taking == [OURS, GREEDY, "piqp, dense", "clarabel, csc, faer", "osqp, csc, polished"]
    assert {arguments["calls"] for _, arguments in rounds} == {1}
    assert {arguments["warm"] for _, arguments in rounds} == {True}
    assert {arguments["eps"] for solver, arguments in rounds if solver == "piqp"} == {
        run["entries"]["piqp, dense"]["chosen"]["eps"]
    }


def test_what_is_known_decides_who_is_tried(bench, run):
    known = run["entries"]

    def why(name, n):
        return qp_peers.why_not(known[name], known, 30, TINY._replace(n=n))

    assert why("piqp, dense", 30) == why("piqp, dense", 60) == ""
    assert why("piqp, csc", 30) == qp_peers.SLOW_FORM
    assert why("piqp, csc", 60) == ""  # 0.5 s times 2^3: what is slow at a size may be quick at another
    assert why("piqp, csc", 30 * 4) == qp_peers.TOO_SLOW
    skipped = known["piqp, csc"] | {"status": qp_peers.SLOW_FORM, "ladder": []}
    assert qp_peers.why_not(skipped, known, 30, TINY._replace(n=60)) == ""
    assert why("scs, csc, sparse", 60) == qp_peers.TOO_SLOW
    assert why("daqp, dense", 30) == ""
    assert why("piqp, dense", 30 * 9) == qp_peers.TOO_SLOW  # 0.1 s times 9^3 is above CAP
    slow = known["clarabel, csc, faer"] | {"seconds": []}
    assert qp_peers.why_not(slow, {"clarabel, csc, faer": slow}, 30, TINY) == qp_peers.BEHIND
    assert qp_peers.why_not(slow, {"clarabel, csc, faer": slow}, 30, TINY._replace(n=31)) == ""
    factor = known["piqp, dense"] | {"form": "factor"}
    assert qp_peers.why_not(factor, {"piqp, factor": factor}, 30, TINY._replace(n=30 * 9)) == ""
    assert qp_peers.why_not(factor, {"piqp, factor": factor}, 30, TINY._replace(n=30 * 900)) == qp_peers.TOO_SLOW


def test_the_next_seed_starts_at_the_known_setting(bench, run, capsys):
    bench.part("runs", "tiny, again", lambda: bench.compare(TINY, 1))
    entry = bench.results["runs"]["tiny, again"]["entries"]["piqp, dense"]
    assert entry["ladder"][0]["eps"] == run["entries"]["piqp, dense"]["chosen"]["eps"]
    assert len(entry["ladder"]) == 2


def test_measurements_are_as_many_calls_for_all():
    def calls(*times):
        return qp_peers.calls_each([{"chosen": {"seconds": s}} for s in times])

    assert calls(0.001, 0.002) == 50
    assert calls(0.001, 0.02) == 10  # the longest measurement is 0.2 s
    assert calls(0.001, 7.0) == calls(3.0) == calls() == 1


def test_a_solver_that_took_its_time_is_not_tried_further():
    entry = qp_peers.untried("osqp", "csc") | {"ladder": [{"seconds": qp_peers.CAP / 3, "residual": 1.0}] * 2}
    assert not qp_peers.hopeless(entry)
    entry["ladder"] = 3 * entry["ladder"][:1]
    assert qp_peers.hopeless(entry)


def failing(run, how):
    """The run with ours not accurate or without a point."""
    ours = run["entries"][OURS]
    worse = {
        "inaccurate": {"chosen": ours["chosen"] | {"residual": 1e-3, "reached": False}},
        "failed": {"ladder": [], "seconds": [], "first": [], "status": "ValueError: no"},
    }
    return run | {"entries": run["entries"] | {OURS: ours | worse[how]}}


@pytest.mark.parametrize("how", ["inaccurate", "failed"])
def test_the_ratio_is_0_where_ours_does_not_reach_the_residual(bench, run, how):
    broken = failing(run, how)
    assert qp_report.against(broken) == {"peer": "piqp", "ratio": 0.0, "peer_reached": True}
    assert qp_report.against(broken, any_residual=True)["ratio"] == 0
    assert qp_report.greedy_ratio(broken) == 0
    alone = broken | {"entries": {OURS: broken["entries"][OURS]}}
    assert qp_report.against(alone)["ratio"] == 0
    results = bench.results | {"runs": {"good": run, "bad": broken}, "held_out": {"bad, held out": broken}}
    results["bars"] = found = qp_report.bars(results)
    assert found["main"] == found["main_any_residual"] == found["main_worst"] == found["main_held_out"] == 0
    assert found["greedy_over_ours"] == 0
    assert found["ours_not_reached"] == ["bad", "bad, held out"]
    made = qp_report.tables(results)
    (row,) = [line for line in made["cases"].splitlines() if "condition 400" in line]
    assert [cell.strip() for cell in row.split("|")][14:18] == ["0.0", "0.0", "0.0", "0.0"]
    assert ("1e-03*" if how == "inaccurate" else "ValueError: no") in made["accuracy"]
    qp_report.draw(results)


def test_where_ours_is_alone_there_is_no_ratio(run):
    assert qp_report.against(run | {"entries": {OURS: run["entries"][OURS]}}) is None


@pytest.mark.parametrize(
    "row",
    [{"status": "over"}, {"status": "ok", "residual": 1.1e-6, "over_products": 2.0, "added": 1, "n_k_megabytes": 1}],
)
def test_a_million_variables_that_are_not_solved_fail_the_bar(bench, row):
    assert qp_report.bars(bench.results | {"huge": {"huge": row}})["over_products"] == math.inf


@pytest.mark.parametrize("change", [{"status": "over"}, {"status": "ok", "residual": 1e-7, "again": [1], "fresh": [9]}])
def test_solving_again_counts_only_if_it_solves(bench, change):
    again = {"again": {"tiny": {"changes": {"new total": change}}}}
    assert qp_report.bars(bench.results | again)["again_over_fresh"] == math.inf


def test_the_picture_shows_accurate_peers_alone(run):
    def lines(shown):
        return {
            line.get_label(): list(line.get_ydata()) for line in qp_report.draw({"runs": {"": shown}}).axes[0].lines
        }

    assert lines(run) == {"ours": [pytest.approx(0.01)], "best accurate peer": [pytest.approx(0.1)]}
    few = {name: e for name, e in run["entries"].items() if e["solver"] in (OURS, "osqp")}
    assert np.isnan(lines(run | {"entries": few})["best accurate peer"]).all()


def test_the_accuracy_table_shows_the_worst_seed(bench, run):
    entry = run["entries"]["piqp, dense"]
    chosen = entry["chosen"] | {"residual": 3e-5, "reached": False, "infeasibility": 0.5}
    worse = run | {"entries": run["entries"] | {"piqp, dense": entry | {"chosen": chosen}}}
    ours = run["entries"][OURS]
    steep = run | {"entries": run["entries"] | {OURS: ours | {"chosen": ours["chosen"] | {"gradient": 1234.0}}}}
    row = qp_report._accuracy_table({"runs": {"0": run, "1": worse}, "held_out": {"2": steep}}).splitlines()[2]
    assert "3e-05*, 5e-01" in row
    assert "| 1.2e+03 |" in row


def test_an_interrupted_run_goes_on(bench, run, monkeypatch, tmp_path):
    monkeypatch.setenv("QP_PEERS_RESUME", "1")
    again = qp_peers.Bench(tmp_path, 3, bench.partial)
    again.part("runs", "tiny", lambda: pytest.fail("it is there"))
    assert json.loads(record.to_json(again.results)) == json.loads(record.to_json(bench.results))


def test_tables_and_bars_say_what_was_measured(bench, run):
    huge = {"status": "ok", "n": 10, "k": 2, "free": 0.1, "seconds": [3.0], "products": [1.0], "over_products": 3.0}
    huge |= {"residual": 1e-7, "added": 30.0, "n_k_megabytes": 15.0}
    change = {"status": "ok", "residual": 1e-9, "again": [0.001], "fresh": [0.004], "ready": [0.003]}
    results = bench.results | {"huge": {"huge": huge}, "again": {"tiny": run | {"changes": {"new total": change}}}}
    results["held_out"] = {"tiny": run | {"seed": qp_problems.HELD_OUT}}
    results["bars"] = qp_report.bars(results)
    assert results["bars"]["main"] == results["bars"]["main_held_out"] == pytest.approx(10)
    assert results["bars"]["main_first"] == results["bars"]["main_without_build"] == pytest.approx(5)
    assert results["bars"]["greedy_over_ours"] == pytest.approx(4)
    assert results["bars"]["over_products"] == 3
    assert results["bars"]["added_over_n_k"] == 2
    assert results["bars"]["again_over_fresh"] == pytest.approx(0.25)
    assert results["bars"]["ours_not_reached"] == results["bars"]["no_peer_reached"] == []
    made = qp_report.tables(json.loads(record.to_json(results)))
    (row,) = [line for line in made["cases"].splitlines() if "condition 400" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:5] == ["dense, condition 400", "30", "33%", "0.01"]
    assert cells[5:13] == ["0.1", "failed", "0.3", "> 30", "0.2*", "failed", "failed", "failed"]
    assert cells[13:18] == ["piqp", "10.0", "10.0", "10.0", "10.0"]
    assert "| dense, condition 400, 30 | 0.01 | 0.01 | 7 | 0.04 | 7 | 4.00 |" in made["ours"]
    assert "| dense, condition 400, 30 | 50% | - | 50% |" in made["build"]
    assert "csc, polished 1e-" in made["accuracy"]
    assert "| 3 | 1 | 3.00 | 1e-07 | 30 | 15 |" in made["huge"]
    assert "| new total | 1 | 3 | 4 | 0.25 | 1e-09 |" in made["again"]
    assert "| 10 | >= 10 |" in made["bars"]
    qp_report.draw(results)


def test_where_no_peer_is_accurate_the_best_one_counts_with_a_mark(run):
    entries = {name: e for name, e in run["entries"].items() if e["solver"] in (OURS, "osqp")}
    row = qp_report.against(run | {"entries": entries})
    assert row["peer"] == "osqp"
    assert not row["peer_reached"]


def test_every_case_is_a_part_and_quick_ones_are_few(bench):
    full, quick = qp_peers.parts(bench, False), qp_peers.parts(bench, True)
    assert len({name for name, _, _ in full}) == len(full) == 4 * len(CASES) + 1 + len(qp_problems.AGAIN)
    assert len(quick) < len(full) / 3
    assert {section for _, section, _ in quick} == {"runs", "huge", "again", "held_out"}
    assert [name for name, section, _ in full if section == "held_out"] == [name for name, _, _ in full[-len(CASES) :]]
    assert all(str(qp_problems.HELD_OUT) in name for name, section, _ in full if section == "held_out")


def test_a_part_of_the_cases_saves_nothing(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("QP_PEERS_CASES", "nothing of the kind")
    monkeypatch.setattr(qp_peers, "partial_file", lambda part: tmp_path / "partial.json")
    monkeypatch.setattr(qp_peers, "touch_memory", lambda size: None)
    with pytest.raises(SystemExit, match="no result was saved"):
        qp_peers.run(False)
