# SPDX-License-Identifier: BSD-3-Clause
"""The loop: every rule solves every problem, certified; stops, limits, interruptions; compiled = one by one."""

import itertools
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from catalogue import (
    CATALOGUE,
    Plain,
    case,
    clarabel_qp,
    default_update,
    infeasibility_of,
    path,
    random_qp,
    svm_case,
    violation_of,
)

import bcd
from bcd.selection import GS1Block, Selection
from bcd.updates import PairStep

TOL = 1e-6
SECOND_ORDER = ("wss2", "gsl")
GREEDY = ("gs1", "wss2", "gss", "gsq", "gsl")
DRAWN = ("random", "permutation", "cyclic")


def ill_conditioned(n=40, cond=1e8, seed=0, scale=1.0):
    """A problem that takes long, whatever the rule: eigenvalues from 1 down to 1 / cond.

    The minimum lies inside the box along most directions, and ten coordinates are pushed against it.
    """
    Q, push = random_qp(seed, n, cond)
    c = -Q @ np.random.default_rng(seed).uniform(-0.9, 0.9, n)
    c[:10] += np.sign(push[:10])
    lower, upper = -scale * np.linspace(0.9, 1.1, n), scale * np.linspace(0.8, 1 + 1 / 3, n)
    return bcd.Problem(bcd.Quadratic(Q, scale * c), bcd.SumBox(lower, upper, 0.5 * scale))


# -- every rule on every problem -----------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("rule", bcd.RULES)
def test_every_rule_solves_every_problem(rule, name):
    known = case(name)
    problem = known.problem
    if rule == "gs" and known.bounded:
        with pytest.raises(ValueError, match=r'rule "gs" ignores bounds.*use "gss" or "gs1"'):
            bcd.minimize(problem, rule)
        return
    if rule in SECOND_ORDER and known.smooth:
        with pytest.raises(ValueError, match=r'reads second derivatives and the objective has none.*use rule "gs1"'):
            bcd.minimize(problem, rule)
        return
    result = bcd.minimize(problem, rule, tol=TOL, time_limit=60)
    assert result.status is bcd.Status.CONVERGED
    assert result.violation <= TOL
    # written down a second time; products in another order differ by rounding
    assert violation_of(problem, result.x) <= TOL + 1e-12 * (1 + np.abs(problem.objective.gradient(result.x)).max())
    assert infeasibility_of(problem, result.x) == 0
    assert result.certificate.infeasibility == 0
    f, known_to = problem.objective.value(result.x), known.accuracy * max(1, abs(known.minimum))
    assert result.objective == f
    assert f >= known.minimum - known_to
    excess = result.gap
    if not np.isfinite(excess):
        # without bounds: f - f* <= |g - mean(g)|^2 / (2 mu) <= n V^2 / (2 mu), strong convexity
        assert known.mu > 0
        excess = problem.n * TOL**2 / (2 * known.mu)
    assert f - known.minimum <= excess + known_to
    if known.minimiser is not None and known.mu > 0:  # |x - x*|^2 <= 2 (f - f*) / mu
        near = np.sqrt(2 * (max(f - known.minimum, 0) + known_to) / known.mu)
        assert np.linalg.norm(result.x - known.minimiser) <= near + 1e-5  # the known x is good to 1e-5 (Clarabel)


@pytest.mark.parametrize("rule", ["gs1", "block", "wss2", "gss", "random"])
def test_a_whole_svm_dual(rule):
    """All 569 rows of the breast cancer data, against scikit-learn's LIBSVM."""
    known = svm_case(569)
    result = bcd.minimize(known.problem, rule, tol=1e-5, time_limit=100)
    assert result.status is bcd.Status.CONVERGED
    assert -1e-9 * abs(known.minimum) <= result.objective - known.minimum <= result.gap + 1e-9


@pytest.mark.parametrize("rule", [*GREEDY, "block", *DRAWN])
def test_steps_one_by_one_reach_the_same_minimum(rule):
    """The loop in Python, which other objectives take as well, on a dense problem."""
    for name in ("simplex projection", "sum and box, enumerated", "some in no sum", "range, upper end"):
        known = case(name)
        result = bcd.minimize(known.problem, Plain(rule), default_update(rule), max_iter=100_000)
        assert result.status is bcd.Status.CONVERGED
        assert abs(result.objective - known.minimum) <= result.gap + 1e-9


def test_a_single_violating_pair_is_found_by_rules_that_draw():
    """Optimal but for one pair of n^2 / 2: drawing it takes as many tries, which is not stagnation."""
    n = 600
    x = np.full(n, 1.0)
    x[[0, 1]] = 1.5, 0.5
    fixed = np.ones(n - 2)
    problem = bcd.Problem(bcd.Quadratic(np.eye(n)), bcd.SumBox(np.r_[0, 0, fixed], np.r_[2, 2, fixed], n))
    for rule in DRAWN:
        result = bcd.minimize(problem, rule, x0=x, time_limit=60)
        assert result.status is bcd.Status.CONVERGED, rule


def test_block_on_a_smooth_function_larger_than_the_block():
    """Works, or says what does: the choice falls on a block that no step fits in."""
    known = case("smooth, no constant")
    try:
        result = bcd.minimize(known.problem, GS1Block(2))
    except ValueError as error:
        assert "second derivatives" in str(error)  # noqa: PT017
    else:
        assert result.status is bcd.Status.CONVERGED


def test_the_rules_an_error_recommends_work():
    known = case("smooth, no constant")
    for rule in ("gs1", "gss", "random", "cyclic"):
        assert bcd.minimize(known.problem, rule, time_limit=60).status is bcd.Status.CONVERGED


# -- compiled bursts take the same steps ---------------------------------------------------------


BURST_PROBLEMS = ["sum and box, condition 300", "SVM dual", "groups", "range, upper end", "one side, slack",
                  "box, no sum", "some in no sum", "half bounds", "sum, no bounds"]  # fmt: skip


@pytest.mark.parametrize("name", BURST_PROBLEMS)
@pytest.mark.parametrize("rule", [*(rule for rule in GREEDY if rule != "gs1"), *DRAWN])
def test_compiled_bursts_are_the_loop(rule, name):
    """The same x after 1, 2, 3, 10, 60 and 300 steps, to the bit."""
    problem = case(name).problem
    start = 0.3 * np.random.default_rng(1).normal(size=problem.n)
    options = {"x0": start, "tol": 1e-9, "random_state": 5}
    reached = set()
    for steps in (1, 2, 3, 10, 60, 300):
        burst = bcd.minimize(problem, rule, max_iter=steps, **options)
        slow = bcd.minimize(problem, Plain(rule), default_update(rule), max_iter=steps, **options)
        if rule in GREEDY:
            assert burst.iterations == slow.iterations
        reached.add(burst.iterations)
        if rule in GREEDY or burst.iterations == slow.iterations:
            np.testing.assert_array_equal(burst.x, slow.x)
            assert burst.columns == slow.columns
        else:  # a rule that draws looks at the violation only between bursts, so it may go on past tol
            assert max(burst.violation, slow.violation) <= 1e-9 * (1 + 1e-6)
    assert len(reached) > 1


@pytest.mark.parametrize("name", BURST_PROBLEMS)
def test_compiled_gs1_steps_are_the_loop(name):
    """The same step from each of the first 300 points.

    An exact pair step leaves two equal gradients, so the rounding of one line search decides which of the
    two moves next, and whole runs part; each step from one point is the same choice and length.
    """
    problem = case(name).problem
    start = 0.3 * np.random.default_rng(1).normal(size=problem.n)
    points, _ = path(problem, "gs1", "line-search", 300, x0=start, tol=1e-9)
    assert len(points) >= 3
    for x in points[:-1]:
        burst = bcd.minimize(problem, "gs1", x0=x, max_iter=1, tol=1e-9)
        slow = bcd.minimize(problem, Plain("gs1"), "line-search", x0=x, max_iter=1, tol=1e-9)
        assert burst.iterations == slow.iterations == 1
        assert burst.columns == slow.columns
        # the length is a quotient of rounded sums; what is moved is of the size of the step
        np.testing.assert_allclose(burst.x, slow.x, rtol=1e-13, atol=1e-9 * np.abs(slow.x - x).max() + 1e-15)


def test_the_comparison_above_can_fail():
    """A rule wrapped wrongly (its pair replaced now and then) is told apart."""

    class Other(Plain):
        def select(self, at, moves, state):
            chosen, state = super().select(at, moves, state)
            return (Selection(np.array([0, 1])) if at.columns == 20 else chosen), state

    problem = case("sum and box, condition 300").problem
    good = bcd.minimize(problem, "wss2", max_iter=20)
    assert (bcd.minimize(problem, Other("wss2"), "pair", max_iter=20).x != good.x).any()


@pytest.mark.parametrize("rule", DRAWN)
def test_random_state_repeats_and_matters(rule):
    problem = ill_conditioned()
    runs = [bcd.minimize(problem, rule, max_iter=500, random_state=s).x for s in (None, 0, 7, 7)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[2], runs[3])
    assert (runs[0] != runs[2]).any() == (rule != "cyclic")


# -- a million steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "wss2", "permutation"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_million_steps_leave_the_point_feasible(rule, scale):
    """Looked at before the loop tidies up: the sum drifts by rounding only, and bounds are kept to the bit."""
    problem = ill_conditioned(scale=scale)
    lower, upper = problem.feasible.lower, problem.feasible.upper
    seen = []

    def note(progress):
        seen.append(progress.x)
        assert (seen[-1] >= lower).all()
        assert (seen[-1] <= upper).all()
        assert abs(seen[-1].sum() - 0.5 * scale) <= 1e-12 * np.abs(seen[-1]).sum()

    result = bcd.minimize(problem, rule, tol=0, max_iter=1_000_000, callback=note)
    assert result.iterations == 1_000_000 or (rule == "wss2" and result.status is bcd.Status.STAGNATED)
    assert result.iterations > 2000
    assert abs(result.x.sum() - 0.5 * scale) <= 1e-15 * np.abs(result.x).sum() + 1e-300
    # wherever the price of a bound is clearly positive the bound is attained exactly, at the end and on the way
    pressed = np.abs(result.certificate.bound_multipliers) > 1e-3 * scale
    assert pressed.sum() >= 5
    at_bound = (result.x == lower) | (result.x == upper)
    assert at_bound[pressed].all()
    assert (at_bound | ((result.x - lower > 1e-12 * scale) & (upper - result.x > 1e-12 * scale))).all()


# -- the gradient is rebuilt ---------------------------------------------------------------------


class Drifting:
    """A quadratic whose followed gradient loses whatever says to go on; only a rebuilt one is right."""

    def __init__(self, inner):
        self.inner, self.n, self.exact, self.hessian = inner, inner.n, inner.exact, inner.hessian
        self.value, self.gradient = inner.value, inner.gradient
        self.rebuilt = 0

    def start(self, x):
        state, outer = self.inner.start(x), self

        class State:
            grad = property(lambda self: state.grad)
            value = property(lambda self: state.value)
            along = staticmethod(state.along)

            @staticmethod
            def move(index, step):
                state.grad[:] = 0.0  # says: optimal

            @staticmethod
            def rebuild():
                outer.rebuilt += 1
                state.rebuild()

        return State()


@pytest.mark.parametrize("rule", ["gs1", "gss", "wss2", "block"])
def test_optimality_is_declared_only_for_the_rebuilt_gradient(rule):
    known = case("sum and box, enumerated")
    objective = Drifting(known.problem.objective)
    problem = bcd.Problem(objective, known.problem.constraint)
    result = bcd.minimize(problem, rule, max_iter=5000)
    assert objective.rebuilt >= 1
    assert result.status is bcd.Status.CONVERGED
    assert abs(result.objective - known.minimum) <= result.gap + 1e-9


def test_a_corrupted_gradient_in_a_burst_is_found_out():
    """bcd's own dense state, its gradient spoilt from a callback: the run goes on to the true minimum."""
    known = case("sum and box, condition 300")
    spoilt = []

    class Spoiling(Plain):
        def select(self, at, moves, state):
            if at.columns > 20 and not spoilt:
                spoilt.append(True)
                at.grad[:] = 1.0
                return Selection(np.array([0, 1]), np.zeros(2)), state
            return super().select(at, moves, state)

    result = bcd.minimize(known.problem, Spoiling("gs1"), "model", max_iter=20_000)
    assert spoilt
    assert result.status is bcd.Status.CONVERGED
    assert abs(result.objective - known.minimum) <= result.gap + 1e-9


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 7, 1000])
@pytest.mark.parametrize("rule", [*GREEDY, *DRAWN])
def test_max_iter_is_exact(rule, steps):
    for wrapped in (rule, Plain(rule)):
        result = bcd.minimize(ill_conditioned(), wrapped, default_update(rule), tol=0, max_iter=steps)
        assert result.iterations == steps
        assert result.status is bcd.Status.ITERATION_LIMIT


@pytest.mark.parametrize("trace", [False, True])
def test_time_limit(trace):
    # conditioned so badly that no rule is done in seconds
    problem = ill_conditioned(200)
    for rule in ("random", "wss2", "gs1"):
        bcd.minimize(problem, rule, max_iter=3)  # compile
        started = time.perf_counter()
        result = bcd.minimize(problem, rule, tol=1e-300, time_limit=0.3, trace=trace)
        took = time.perf_counter() - started
        assert result.status is bcd.Status.TIME_LIMIT
        assert 0.3 <= result.seconds <= took < 2.5  # one burst (20 ms) late, and other processes beside us
        assert infeasibility_of(problem, result.x) == 0


def test_the_callback_sees_the_run_and_stops_it():
    problem, seen = ill_conditioned(), []

    def note(progress):
        seen.append(progress)
        assert progress.objective == pytest.approx(problem.objective.value(progress.x), abs=1e-12)
        assert progress.violation == pytest.approx(violation_of(problem, progress.x), rel=1e-6, abs=1e-12)
        progress.x[:] = np.nan  # a copy: nothing happens
        return progress.iteration >= 12

    result = bcd.minimize(problem, Plain("gss"), "pair", callback=note)
    assert result.status is bcd.Status.CALLBACK
    assert result.iterations == 12
    assert [p.iteration for p in seen] == list(range(13))
    assert [p.columns for p in seen] == list(range(0, 26, 2))
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(seen))
    assert all(a.objective >= b.objective for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("rule", ["gs1", "wss2", "random"])
def test_a_callback_stops_a_burst(rule):
    result = bcd.minimize(ill_conditioned(), rule, tol=0, callback=lambda p: p.iteration >= 500)
    assert result.status is bcd.Status.CALLBACK
    assert 500 <= result.iterations <= 600


def test_the_callback_is_called_before_every_step():
    """As documented; a step that the update rejects is tried again, and announced again."""
    for name, rule in (("simplex projection", "gs1"), ("smooth, no constant", "gs1"), ("simplex projection", "block")):
        seen = []
        result = bcd.minimize(case(name).problem, Plain(rule), default_update(rule) if "smooth" not in name else None,
                              callback=lambda p, seen=seen: seen.append(p.iteration))  # fmt: skip
        assert sorted(seen) == seen, name
        assert sorted(set(seen)) == list(range(result.iterations)), name


@pytest.mark.parametrize("rule", [*GREEDY, "block", *DRAWN])
@pytest.mark.parametrize("name", ["sum and box, enumerated", "some in no sum", "singular", "SVM dual", "low rank"])
def test_tolerance_zero_ends_by_itself(rule, name):
    """At the last digit V wavers around 1e-16 and will not become 0: the run must say so, and soon."""
    known = case(name)
    result = bcd.minimize(known.problem, rule, tol=0, time_limit=20)
    assert result.status in (bcd.Status.STAGNATED, bcd.Status.CONVERGED)
    # a burst takes up to 4e5 steps between two rebuilt gradients, each of which may round by 2e-16
    assert result.violation <= 1e-10
    assert abs(result.objective - known.minimum) <= 1e-12 + 2 * known.accuracy * max(1, abs(known.minimum))
    assert infeasibility_of(known.problem, result.x) == 0


@pytest.mark.parametrize(
    ("rule", "tiny"),
    [(rule, tiny) for rule in (*GREEDY, "gs", "block") for tiny in (1.0, 1e-140, 1e-160, 1e-300)]
    + [(rule, tiny) for rule in DRAWN for tiny in (1.0, 1e-300)],
)
def test_a_minimum_of_zero_at_zero_ends_by_itself_with_tolerance_zero(rule, tiny):
    """x, g and f fall through the exponents, and every step is progress, down to squares that underflow to 0.

    From 1e-140 on the scores gap^2 / curvature do; then nothing may hang, crash, or seem unbounded.
    """
    Q, _ = random_qp(4, 6, 5.0)
    problem = bcd.Problem(bcd.Quadratic(Q), bcd.SumBox(total=0))
    x0 = tiny * np.random.default_rng(5).normal(size=6)
    result = bcd.minimize(problem, rule, x0=x0, tol=0, time_limit=20)
    assert result.status in (bcd.Status.STAGNATED, bcd.Status.CONVERGED)
    assert result.violation <= max(1e-12 * tiny, 1e-150)


def test_bursts_of_few_variables_are_short():
    """A step of six variables costs more than six coordinates: a limit or Ctrl-C waits for one burst at most."""
    Q, _ = random_qp(4, 6, 5.0)
    x0 = 1e-300 * np.random.default_rng(5).normal(size=6)
    result = bcd.minimize(bcd.Problem(bcd.Quadratic(Q), bcd.SumBox(total=0)), "gss", x0=x0, tol=0)
    assert result.status is bcd.Status.STAGNATED
    assert result.iterations < 2e6  # some bursts; one alone was longer when coordinates were all that counted


def test_stagnation_is_not_declared_while_progress_is_made():
    """Ill-conditioned and slow, but each look is lower than the last: the tolerance is reached."""
    Q, c = random_qp(6, 30, 1e6)
    problem = bcd.Problem(bcd.Quadratic(Q, Q @ c), bcd.SumBox(total=1))
    result = bcd.minimize(problem, "gss", tol=1e-8, time_limit=60)
    assert result.status is bcd.Status.CONVERGED
    assert result.iterations > 5000


# -- the gap as a stopping test ------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*GREEDY, "block", "random"])
@pytest.mark.parametrize("tol", [np.inf, 1e-3])
def test_the_gap_asked_for_is_reached(rule, tol):
    known = case("sum and box, condition 300")
    steps = []
    for tol_gap in (1e-2, 1e-7):
        result = bcd.minimize(known.problem, rule, tol=tol, tol_gap=tol_gap, time_limit=60)
        assert result.status is bcd.Status.CONVERGED
        assert result.gap <= tol_gap * (1 + 1e-9)
        assert result.violation <= tol
        assert result.objective - known.minimum <= tol_gap + 1e-9
        steps.append(result.iterations)
    assert steps[0] <= steps[1]


def test_the_gap_alone_stops_earlier_than_a_small_violation():
    known = case("sum and box, condition 300")
    steps = [bcd.minimize(known.problem, Plain("gss"), "pair", tol=tol, tol_gap=gap).iterations
             for tol, gap in ((np.inf, 1e-1), (np.inf, 1e-6), (1e-9, None))]  # fmt: skip
    assert steps[0] < steps[1] < steps[2]


def test_an_infinite_tolerance_accepts_the_start():
    result = bcd.minimize(ill_conditioned(), tol=np.inf)
    assert result.status is bcd.Status.CONVERGED
    assert result.iterations == 0


# -- unbounded -----------------------------------------------------------------------------------


def flat_pair():
    """Curvature 0 along e_0 - e_1 alone; the largest violation is elsewhere."""
    return bcd.Problem(bcd.Quadratic(np.diag([0, 0, 1.0, 1.0]), [-1.0, 0, 3, 3]), bcd.SumBox(total=0)), None


def partly_bounded():
    """A linear f: some mass moves up to a bound first, the rest without end."""
    return (
        bcd.Problem(
            bcd.Quadratic(np.zeros((4, 4)), [-1.0, 2, 5, 0]), bcd.SumBox([-np.inf, -np.inf, 0, 0], None, total=3)
        ),
        [0.0, 1, 1, 1],
    )


def no_sum():
    """One coordinate without curvature falls alone."""
    return bcd.Problem(bcd.Quadratic(np.diag([1.0, 0, 1]), [1.0, -1, 1]), bcd.SumBox(0, None)), None


def with_slack():
    """Sum at least 0: raising one coordinate raises the sum, which its slack allows."""
    return bcd.Problem(bcd.Quadratic(np.diag([1.0, 0, 1]), [1.0, -1, 1]), bcd.SumBox(-1, None, (0, None))), None


def in_a_group():
    Q = np.diag([1.0, 1, 0, 0])
    return bcd.Problem(bcd.Quadratic(Q, [3.0, 1, 1, -1]), bcd.SumBox(None, None, [1, 2], [0, 0, 1, 1])), None


def low_rank():
    F = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    return bcd.Problem(bcd.Quadratic(bcd.LowRank(F), [2.0, 0, -1, 0]), bcd.SumBox(total=0)), None


@pytest.mark.parametrize("build", [flat_pair, partly_bounded, no_sum, with_slack, in_a_group, low_rank])
@pytest.mark.parametrize("rule", bcd.RULES)
def test_an_unbounded_problem_comes_with_a_ray(rule, build):
    problem, x0 = build()
    if rule == "gs" and np.isfinite(np.r_[problem.feasible.lower, problem.feasible.upper]).any():
        pytest.skip('rule "gs" refuses bounds')
    for wrapped in (rule, Plain(rule)):
        result = bcd.minimize(problem, wrapped, default_update(rule), x0=x0, time_limit=30)
        assert result.status is bcd.Status.UNBOUNDED
        assert infeasibility_of(problem, result.x) == 0
        assert result.ray.shape == (problem.n,)
        size = np.abs(result.ray).max()
        assert 0 < size < np.inf
        values = []
        for t in (0, 1, 10, 1e3, 1e6):
            x = result.x + t / size * result.ray
            assert infeasibility_of(problem, x) <= 1e-15 * t
            values.append(problem.objective.value(x))
        assert values[4] < values[3] < values[2] < values[1] < values[0]
        # f falls at a constant rate, without end
        assert values[4] - values[3] <= 0.9 * (1e6 - 1e3) * (values[1] - values[0])
        assert values[4] - values[3] >= 1.1 * (1e6 - 1e3) * (values[1] - values[0])


@pytest.mark.parametrize("rule", ["wss2", "random", "cyclic"])
def test_an_unbounded_run_counts_only_the_steps_it_took(rule):
    problem, _ = flat_pair()
    result = bcd.minimize(problem, rule)
    slow = bcd.minimize(problem, Plain(rule), "pair")
    assert result.iterations == slow.iterations


# -- functions that fail -------------------------------------------------------------------------


def logarithm(bad):
    """-sum log(x) and a gradient that is NaN (or inf) below 1/4; the minimum of the tilted f is there."""
    tilt = np.array([5.0, 0, 0, 0])

    def fun(x):
        return float(-np.log(np.maximum(x, 1e-300)).sum() + tilt @ x)

    def grad(x):
        g = -1 / np.maximum(x, 1e-300) + tilt
        g[x < 0.25] = bad
        return g

    return bcd.Smooth(fun, grad, 4, lipschitz=16.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["gs1", "gss", "random"])
def test_a_gradient_that_breaks_down_keeps_the_last_good_point(rule, bad):
    objective = logarithm(bad)
    problem = bcd.Problem(objective, bcd.SumBox(1e-3, None, total=4))
    result = bcd.minimize(problem, rule, x0=np.ones(4), max_iter=10_000)
    assert result.status is bcd.Status.NOT_FINITE
    assert np.isfinite(objective.gradient(result.x)).all()
    assert infeasibility_of(problem, result.x) == 0
    assert result.objective < objective.value(np.ones(4))
    assert np.isfinite(result.objective)
    assert np.isfinite(result.violation)


def test_a_function_that_breaks_down_is_backed_away_from():
    """NaN below 1/4, with a good gradient and no constant: backtracking steps shorter and goes on or stops there."""

    def fun(x):
        return float(x @ x) if (x > 0.25).all() else np.nan

    problem = bcd.Problem(bcd.Smooth(fun, lambda x: 2 * x, 2), bcd.SumBox(None, None, (0.1, 4)))
    result = bcd.minimize(problem, "gs1", x0=np.ones(2), max_iter=5000, time_limit=20)
    assert result.status is not bcd.Status.TIME_LIMIT
    assert (result.x > 0.25).all()
    assert 0.125 <= result.objective < 0.2


def test_a_function_that_is_nan_everywhere_ends():
    problem = bcd.Problem(bcd.Smooth(lambda x: np.nan, lambda x: 2 * x, 2), bcd.SumBox(total=1))
    result = bcd.minimize(problem, x0=[1.0, 0.0], time_limit=20, max_iter=5000)
    assert result.status in (bcd.Status.NOT_FINITE, bcd.Status.STAGNATED)


def test_a_gradient_that_is_bad_at_the_start_is_an_error():
    objective = bcd.Smooth(lambda x: 0.0, lambda x: np.array([0.0, np.nan, 1.0]), 3)
    with pytest.raises(ValueError, match=r"gradient must be finite at the start; entry 1 is nan"):
        bcd.minimize(bcd.Problem(objective, bcd.SumBox(total=1)))


def test_errors_of_the_user_pass_through_and_leave_ctrl_c_as_it_was():
    def boom(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        bcd.minimize(bcd.Problem(bcd.Smooth(lambda x: 0.0, boom, 2)))
    with pytest.raises(RuntimeError, match="mine"):
        bcd.minimize(ill_conditioned(), callback=boom)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- Ctrl-C --------------------------------------------------------------------------------------


LONG_RUN = """
import sys, time
sys.path.insert(0, {tests!r})
import numpy as np, bcd
from test_minimize import ill_conditioned
problem = ill_conditioned(300)
bcd.minimize(problem, {rule!r}, max_iter=3)

def ready(progress):
    if progress.iteration == 0:
        print("ready", flush=True)
    {extra}

result = bcd.minimize(problem, {rule!r}, tol=1e-300, callback=ready)
print(result.status.name, result.certificate.infeasibility, result.iterations > 0, flush=True)
"""


def start_long_run(rule, extra="pass"):
    code = textwrap.dedent(LONG_RUN).format(tests=str(__file__).rsplit("/", 1)[0], rule=rule, extra=extra)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().strip() == "ready", run.stderr.read()
    return run


@pytest.mark.parametrize("rule", ["random", "gs1"])
def test_ctrl_c_ends_the_run_with_a_feasible_point(rule):
    run = start_long_run(rule)
    time.sleep(0.7)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert out.split() == ["INTERRUPTED", "0.0", "True"], err
    assert run.returncode == 0


def test_a_second_ctrl_c_raises():
    """The callback sleeps, so that no look at the run comes between the two."""
    run = start_long_run("random", extra="time.sleep(30)")
    for _ in range(2):
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert out == ""
    assert run.returncode != 0


def test_ctrl_c_between_two_steps_and_the_handler_afterwards():
    before = signal.getsignal(signal.SIGINT)

    def press(progress):
        if progress.iteration == 5:
            signal.raise_signal(signal.SIGINT)

    result = bcd.minimize(ill_conditioned(), Plain("gss"), "pair", callback=press)
    assert result.status is bcd.Status.INTERRUPTED
    assert 5 <= result.iterations <= 6
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_the_users_own_stays_in_charge():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        result = bcd.minimize(
            ill_conditioned(), Plain("gss"), "pair", max_iter=10,
            callback=lambda p: signal.raise_signal(signal.SIGINT) if p.iteration == 5 else None,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status is bcd.Status.ITERATION_LIMIT
    assert pressed == [signal.SIGINT]


def test_runs_in_other_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(bcd.minimize(case("SVM dual").problem)))
    thread.start()
    thread.join(timeout=60)
    assert results[0].status is bcd.Status.CONVERGED


# -- start and going on --------------------------------------------------------------------------


def test_the_start_is_projected_and_not_changed():
    x0 = np.array([5.0, -3.0, 0.2])
    problem = bcd.Problem(bcd.Quadratic(np.eye(3)), bcd.SumBox(0, 1, 1))
    result = bcd.minimize(problem, x0=x0, max_iter=0)
    assert x0.tolist() == [5.0, -3.0, 0.2]
    assert result.x.tolist() == [1, 0, 0]


def test_going_on_from_a_result_costs_little():
    problem = case("SVM dual").problem
    whole = bcd.minimize(problem, "wss2", tol=1e-8)
    half = bcd.minimize(problem, "wss2", tol=1e-8, max_iter=whole.iterations // 2)
    rest = bcd.minimize(problem, "wss2", tol=1e-8, x0=half.x)
    assert rest.status is bcd.Status.CONVERGED
    # the point is the same up to a settled rounding, so the steps are nearly those of the whole run
    assert abs(half.iterations + rest.iterations - whole.iterations) <= 0.2 * whole.iterations + 5
    assert bcd.minimize(problem, "wss2", tol=1e-8, x0=whole.x).iterations == 0


def test_the_matrix_and_the_vectors_are_not_changed():
    Q, c = random_qp(8, 10)
    copies = Q.copy(), c.copy()
    for rule in ("gs1", "wss2", "random", "block"):
        bcd.minimize(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-1, 1, 1)), rule)
    np.testing.assert_array_equal(Q, copies[0])
    np.testing.assert_array_equal(c, copies[1])


def test_the_scale_of_the_data_changes_no_step():
    """Data of size 1e-12 and 1e12 are the same problem: as many steps, the same point."""
    Q, c = random_qp(9, 20)
    box = bcd.SumBox(-1, 1, 1)
    runs = [
        bcd.minimize(bcd.Problem(bcd.Quadratic(2.0**k * Q, 2.0**k * c), box), "wss2", tol=2.0**k * 1e-7)
        for k in (-40, 0, 40)
    ]  # fmt: skip
    for run in runs:
        assert run.iterations == runs[1].iterations
        np.testing.assert_array_equal(run.x, runs[1].x)


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "newton"}, r"rule must be one of gs1, .*cyclic or an object with select\(\); found 'newton'"),
        ({"rule": 3}, r"rule must be a name or an object with init\(\) and select\(\); found 3"),
        ({"update": "newton"}, r"update must be one of pair, .*found 'newton'"),
        ({"update": 3}, r"update must be a name or a callable; found 3"),
        ({"x0": [1.0, 2.0]}, r"x0 must have shape \(12,\); found shape \(2,\)"),
        ({"x0": np.full(12, np.nan)}, r"x0 must be finite.*(nan|NaN)"),
        ({"x0": "start"}, r"x0 must .*"),
        ({"tol": -1.0}, r"tol must be a non-negative number; found -1\.0"),
        ({"tol": np.nan}, r"tol must be a non-negative number; found nan"),
        ({"tol_gap": -1e-3}, r"tol_gap must be a non-negative number; found -0\.001"),
        ({"max_iter": -1}, r"max_iter must be a non-negative number; found -1"),
        ({"max_iter": 2.5}, r"max_iter must be an integer; found 2\.5"),
        ({"time_limit": -1}, r"time_limit must be a non-negative number; found -1"),
        ({"tol": "small"}, r"tol must be .*found 'small'"),
        ({"random_state": 1.5}, r"random_state must be an integer or None; found 1\.5"),
        ({"random_state": "seed"}, r"random_state must be an integer or None; found 'seed'"),
        ({"callback": 3}, r"callback must be .*callable.*; found 3"),
    ],
    ids=lambda v: next(iter(v.items()))[0] if isinstance(v, dict) else "",
)  # fmt: skip
def test_malformed_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bcd.minimize(case("sum, no bounds").problem, **options)


def test_negative_and_numpy_seeds_are_accepted():
    for seed in (-3, np.int64(5), 2**70):
        assert bcd.minimize(case("sum, no bounds").problem, "random", random_state=seed).status.ok


def test_a_rule_and_an_update_of_the_users_own():
    """An object with init and select is enough; the update that suits follows from whether it proposes a step."""

    class Largest:
        def init(self, moves, seed):
            return 0

        def select(self, at, moves, state):
            free = np.where(((at.grad < 0) & (moves.rise > 0)) | ((at.grad > 0) & (moves.fall > 0)), np.abs(at.grad), 0)
            return Selection(np.array([int(np.argmax(free))])), state + 1

    Q, c = random_qp(10, 8)
    value, _ = clarabel_qp(Q, c, lambda x: [x >= -0.5, x <= 0.5])
    problem = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-0.5, 0.5))
    for update in (None, "pair", PairStep("l2")):
        result = bcd.minimize(problem, Largest(), update)
        assert result.status is bcd.Status.CONVERGED
        assert result.objective == pytest.approx(value, abs=1e-8)


# -- defects found in review ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "permutation", "cyclic"])
def test_drawn_bursts_end_soon_after_convergence(rule):
    """Draws do not look at V; a burst may overshoot by n draws or 1/32 of what was needed, not by 2e7 / n."""
    problem = bcd.Problem(bcd.Quadratic(np.eye(1), [-1.0]), bcd.SumBox())
    assert bcd.minimize(problem, rule).iterations <= 2


def test_near_duplicates_of_large_norm_are_convex():
    """F F' is positive semidefinite by construction; differences of equal large entries round to -4e-9."""
    rng = np.random.default_rng(0)
    F = np.tile(rng.normal(size=5) * 1e3, (300, 1)) + 1e-9 * rng.normal(size=(300, 5))
    assert bcd.Problem(bcd.Quadratic(bcd.LowRank(F)), bcd.SumBox(lower=0, total=1)).lipschitz >= 0


def test_an_objective_that_is_always_nan_is_said_to_be():
    problem = bcd.Problem(bcd.Smooth(lambda x: np.nan, lambda x: x + np.arange(4.0), 4), bcd.SumBox(0, None, 1))
    assert bcd.minimize(problem).status is bcd.Status.NOT_FINITE


def test_block_without_second_derivatives_takes_the_steepest_step():
    n, c = 600, np.linspace(-1, 1, 600)
    problem = bcd.Problem(bcd.Smooth(lambda x: 0.5 * x @ x + c @ x, lambda x: x + c, n), bcd.SumBox(0, 0.01, 3))
    assert bcd.minimize(problem, "block").status.ok
