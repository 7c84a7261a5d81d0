# SPDX-License-Identifier: BSD-3-Clause
"""Updates: exact steps, line searches, backtracking, blocks; f falls at every step of every rule."""

import itertools

import numpy as np
import pytest
from catalogue import CATALOGUE, Plain, case, default_update, infeasibility_of, path, random_qp
from scipy.optimize import minimize_scalar

import bcd
from bcd.constraints import Moves
from bcd.problem import Point
from bcd.selection import GS1Block, Selection
from bcd.updates import (
    UPDATES,
    Backtracking,
    LineSearch,
    ModelStep,
    PairStep,
    SolveBlock,
    UnboundedError,
    resolve_update,
)

PROPOSING = ("gs1", "gss", "gsq", "gsl", "gs")  # rules that say how far
PAIRS = ("wss2", "gss", "gsq", "gsl", "gs", "random", "permutation", "cyclic")
SECOND_ORDER = ("wss2", "gsl")

COMBINATIONS = (
    [(rule, update) for rule in PAIRS for update in ("pair", "pair-l2")]
    + [(rule, update) for rule in PROPOSING for update in ("model", "line-search", "backtracking")]
    + [(rule, "backtracking") for rule in ("wss2", "random")]
    + [("block", "block"), ("wss2", "block")]
)


def applies(rule, update, known):
    if rule == "gs" and known.bounded:
        return False
    return not (known.smooth and (rule in SECOND_ORDER or update in ("pair", "block")))


def largest_multiple(problem, x, d):
    """The largest t for which x + t d keeps bounds and ranges."""
    feasible, n, t = problem.feasible, problem.n, np.inf
    limits = [(x[k], d[k], feasible.lower[k], feasible.upper[k]) for k in range(n)]
    for s, (lo, hi) in enumerate(feasible.ranges):
        member = feasible.labels[:n] == s
        limits += [(x[member].sum(), d[member].sum(), lo, hi)] if lo < hi else []
    for value, slope, lo, hi in limits:
        if abs(slope) > 1e-12:
            t = min(t, ((hi if slope > 0 else lo) - value) / slope)
    return t


def at_start(problem, x=None):
    moves = Moves(problem.feasible, problem.feasible.project(np.zeros(problem.n) if x is None else x))
    return Point(problem, moves), moves


@pytest.mark.parametrize(("rule", "update"), COMBINATIONS, ids=lambda v: v)
def test_f_never_rises(rule, update):
    """Steps one by one, on every problem of the catalogue; f as computed from x, to rounding."""
    for name in CATALOGUE:
        known = case(name)
        if not applies(rule, update, known):
            continue
        if update in ("model", "pair-l2") and known.problem.lipschitz is None:
            continue  # no constant to step with
        start = 0.5 * np.random.default_rng(0).normal(size=known.problem.n)
        points, result = path(known.problem, rule, update, 40, x0=start)
        values = np.array([known.problem.objective.value(x) for x in points])
        rounding = 1e-13 * max(1.0, np.abs(values).max()) * known.problem.n
        assert (np.diff(values) <= rounding).all(), (name, np.diff(values).max())
        assert result.objective <= values[0] + rounding
        for x in points[::7]:
            assert infeasibility_of(known.problem, x) == 0, name
        if result.iterations >= 5 and rule != "cyclic":
            assert values[-1] < values[0], name


@pytest.mark.parametrize("rule", PAIRS)
def test_pair_step_is_the_exact_minimum_along_the_pair(rule):
    """Against a bounded scalar search on f itself."""
    for name in ("sum, no bounds", "sum and box, condition 300", "some in no sum", "range, upper end"):
        known = case(name)
        if rule == "gs" and known.bounded:
            continue
        points, _ = path(known.problem, rule, PairStep(), 12, tol=1e-4)
        f, moved = known.problem.objective.value, 0
        for x, after in itertools.pairwise(points):
            d = after - x
            size = np.abs(d).max()
            if size < 1e-3:
                continue
            moved += 1
            cap = min(3.0, largest_multiple(known.problem, x, d))
            search = minimize_scalar(lambda t, f=f, x=x, d=d: f(x + t * d), bounds=(0, cap), method="bounded",
                                     options={"xatol": 1e-10})  # fmt: skip
            assert f(after) <= search.fun + 1e-12 * max(1, abs(search.fun))
        assert moved >= 3, name


@pytest.mark.parametrize("rule", ["gs1", "gss", "gsl"])
def test_line_search_is_the_best_multiple(rule):
    for name in ("sum, no bounds", "sum and box, condition 300", "logistic", "groups"):
        known = case(name)
        at, moves = at_start(known.problem, 0.05 * np.arange(known.problem.n))
        chosen, _ = bcd.RULES[rule].rule.select(at, moves, None)
        step = LineSearch()(at, chosen, moves)
        ratio = step.step / chosen.step
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
        assert (step.step <= moves.rise[step.index]).all()
        assert (-step.step <= moves.fall[step.index]).all()

        def f(t, at=at, step=step, known=known):
            x = at.x.copy()
            x[step.index] += t * step.step
            return known.problem.objective.value(x)

        assert f(1) < f(0)
        assert f(1) <= f(0.999) + 1e-14
        room = np.where(step.step > 0, moves.rise[step.index], moves.fall[step.index])
        if (room > np.abs(step.step)).all():  # an inner minimum: a little further is worse
            assert f(1) <= f(1.001) + 1e-14


def test_with_a_valid_constant_the_line_search_multiple_is_at_least_one():
    """THEORY section 2: and it is exactly 1 as soon as one moved coordinate saturates."""
    known = case("sum and box, condition 300")
    multiples = []

    def update(at, chosen, moves):
        step = LineSearch()(at, chosen, moves)
        saturated = (step.step == moves.rise[step.index]) | (-step.step == moves.fall[step.index])
        multiples.append((step.step[0] / chosen.step[0], bool(saturated.any())))
        return step

    bcd.minimize(known.problem, Plain("gs1"), update, max_iter=300)
    assert min(t for t, _ in multiples) >= 1 - 1e-12
    assert max(t for t, _ in multiples) > 1.1
    assert {round(t, 12) for t, saturated in multiples if saturated} >= {1.0}


def test_pair_step_orients_the_pair_by_the_gradient():
    problem = bcd.Problem(bcd.Quadratic(np.eye(2), [1.0, -1.0]), bcd.SumBox(total=0))
    at, moves = at_start(problem)
    for order in ([0, 1], [1, 0]):
        step = PairStep()(at, Selection(np.array(order)), moves)
        assert dict(zip(step.index.tolist(), step.step.tolist(), strict=True)) == {0: -1.0, 1: 1.0}
        step = PairStep("l2")(at, Selection(np.array(order)), moves)
        assert dict(zip(step.index.tolist(), step.step.tolist(), strict=True)) == {0: -1.0, 1: 1.0}


def test_pair_step_of_the_constant_is_shorter_than_the_exact_one():
    problem = bcd.Problem(bcd.Quadratic(np.diag([1.0, 1.0, 100.0]), [1.0, -1.0, 0.0]), bcd.SumBox(total=0))
    at, moves = at_start(problem)
    exact, short = (PairStep(c)(at, Selection(np.array([0, 1])), moves).step for c in ("exact", "l2"))
    assert np.abs(exact).max() == 1.0
    assert np.abs(short).max() == pytest.approx(2 / 101)  # gap 2 over L2 * 2 = (1 + 100) / 2 * 2


def test_an_unbounded_pair_is_reported_as_the_direction():
    problem = bcd.Problem(bcd.Quadratic(np.zeros((2, 2)), [1.0, 0.0]), bcd.SumBox(total=0))
    at, moves = at_start(problem)
    with pytest.raises(UnboundedError) as found:
        PairStep()(at, Selection(np.array([0, 1])), moves)
    assert dict(zip(found.value.chosen.index, found.value.chosen.step, strict=True)) == {0: -1, 1: 1}


# -- backtracking --------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1e-9, 1.0, 1e9])
def test_backtracking_finds_the_constant_from_any_start(guess):
    """Every accepted step fulfils the model inequality it was tested with; the constant stays in its range."""
    Q, c = random_qp(1, 12)
    objective = bcd.Smooth(lambda x: float(0.5 * x @ Q @ x + c @ x), lambda x: Q @ x + c, 12)
    problem = bcd.Problem(objective, bcd.SumBox(total=1))
    true = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(total=1)).lipschitz
    first, seen, rejected = True, [], 0

    def update(at, chosen, moves):
        nonlocal first, rejected
        if first:
            at.lipschitz, first = guess, False
        before, g, x = at.lipschitz, at.grad.copy(), at.x.copy()
        step = Backtracking()(at, chosen, moves)
        rejected += step is None
        if step is not None:
            there = x.copy()
            there[step.index] += step.step
            model = g[step.index] @ step.step + 0.5 * before * np.abs(step.step).sum() ** 2
            assert objective.value(there) <= objective.value(x) + model + 1e-12
            assert at.lipschitz == pytest.approx(0.9 * before)
            seen.append(before)
        else:
            assert at.lipschitz >= 2 * before
        return step

    result = bcd.minimize(problem, "gs1", update, tol=1e-8, max_iter=3000)
    assert result.status is bcd.Status.CONVERGED
    if guess < true:
        assert rejected > 0
    late = seen[len(seen) // 2 :]  # a tenth off each step, so also 1e9 has come down by now
    assert max(late) <= 2.0 * true


def test_backtracking_reaches_tolerances_below_the_rounding_of_f():
    """Near the minimum f(x+d) - f(x) drowns in rounding; the gradients decide then."""
    Q, c = random_qp(2, 10)
    objective = bcd.Smooth(lambda x: float(0.5 * x @ Q @ x + c @ x) + 1e6, lambda x: Q @ x + c, 10)
    result = bcd.minimize(bcd.Problem(objective, bcd.SumBox(-1, 1, 0.5)), "gs1", tol=1e-10, max_iter=20_000)
    assert result.status is bcd.Status.CONVERGED


# -- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["simplex projection", "sum and box, condition 300", "groups", "some in no sum", "low rank", "sparse"]
)
@pytest.mark.parametrize("q", [2, 3, 6, 12])
def test_a_block_step_decreases_f_at_least_as_much_as_the_gs1_model(name, q):
    """The safeguard of THEORY section 4, for blocks smaller than the support of the GS-1 step too."""
    problem = case(name).problem
    drops = []

    def update(at, chosen, moves):
        steepest, _ = bcd.RULES["gs1"].rule.select(at, moves, None)
        promised = -(at.grad[steepest.index] @ steepest.step + 0.5 * at.lipschitz * np.abs(steepest.step).sum() ** 2)
        step = SolveBlock()(at, chosen, moves)
        x = at.x.copy()
        x[step.index] += step.step
        f = problem.objective.value
        drops.append((promised, f(at.x[: problem.n]) - f(x[: problem.n])))
        return step

    start = 2 * np.random.default_rng(3).normal(size=problem.n)
    result = bcd.minimize(problem, GS1Block(q), update, x0=start, max_iter=200)
    assert result.status is bcd.Status.CONVERGED
    for promised, drop in drops:
        assert drop >= promised * (1 - 1e-9) - 1e-14


def test_a_block_as_large_as_the_problem_solves_it_in_few_steps():
    known = case("sum and box, condition 300")
    result = bcd.minimize(known.problem, GS1Block(40), SolveBlock(accuracy=1e-9))
    assert result.iterations <= 2
    assert result.objective == pytest.approx(known.minimum, abs=1e-9)


def test_a_block_hits_bounds_exactly():
    """The step is exactly the room wherever the block's solution is at a bound."""
    known = case("sum and box, condition 300")
    result = bcd.minimize(known.problem, GS1Block(6), tol=1e-9)
    near = (np.abs(result.x - 0.3) < 1e-12) | (np.abs(result.x + 0.2) < 1e-12)
    assert near.sum() > 10
    np.testing.assert_array_equal(near, (result.x == 0.3) | (result.x == -0.2))


# -- resolving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", bcd.RULES)
def test_the_default_update_on_a_quadratic(rule):
    known = case("sum, no bounds")
    assert resolve_update(None, bcd.RULES[rule].rule, known.problem) == UPDATES[default_update(rule)]


def test_updates_are_resolved_by_name_object_or_not_at_all():
    problem, rule = case("sum, no bounds").problem, bcd.RULES["gs1"].rule
    assert resolve_update("pair-l2", rule, problem) == PairStep("l2")
    mine = lambda at, chosen, moves: chosen  # noqa: E731
    assert resolve_update(mine, rule, problem) is mine
    with pytest.raises(ValueError, match=r"update must be one of pair, .*block or a callable; found 'newton'"):
        resolve_update("newton", rule, problem)
    with pytest.raises(ValueError, match=r"update must be a name or a callable; found 3"):
        resolve_update(3, rule, problem)


def test_updates_that_do_not_fit_say_what_does():
    problem = case("sum and box, condition 300").problem
    with pytest.raises(ValueError, match=r'curvature must be "exact" or "l2"; found \'l1\''):
        PairStep("l1")
    with pytest.raises(ValueError, match=r"PairStep moves 1 or 2 coordinates; the rule chose \d+; use SolveBlock"):
        bcd.minimize(problem, "block", "pair")
    with pytest.raises(ValueError, match=r"ModelStep needs a rule that proposes a step.*PairStep"):
        bcd.minimize(problem, "wss2", ModelStep())
    with pytest.raises(ValueError, match=r"q >= 2"):
        GS1Block(1)


def test_backtracking_stays_where_f_is_finite():
    def fun(x):
        return -np.log(x[0] - 0.3) + 10 * x[0] if x[0] > 0.3 else np.inf

    def grad(x):
        return np.array([10 - 1 / (x[0] - 0.3), 0.0])

    problem = bcd.Problem(bcd.Smooth(fun, grad, 2), bcd.SumBox(lower=0, total=1))
    result = bcd.minimize(problem, x0=[0.9, 0.1], tol=1e-8)
    assert result.status is bcd.Status.CONVERGED
    np.testing.assert_allclose(result.x, [0.4, 0.6], atol=1e-7)  # 10 = 1 / (x - 0.3)
