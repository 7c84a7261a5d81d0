# SPDX-License-Identifier: BSD-3-Clause
"""Bounds and sums: projection, feasibility, moves, input errors."""

import cvxpy as cp
import numpy as np
import pytest
from catalogue import CATALOGUE, case, infeasibility_of, simplex_projection

import bcd
from bcd.constraints import Moves
from bcd.selection import Selection

INF = np.inf


def cvxpy_projection(point, lower, upper, sums):
    """Closest point to ``point``; sums: list of (member, lo, hi)."""
    x = cp.Variable(len(point))
    within = [x[k] >= lower[k] for k in np.flatnonzero(np.isfinite(lower))]
    within += [x[k] <= upper[k] for k in np.flatnonzero(np.isfinite(upper))]
    for member, lo, hi in sums:
        total = cp.sum(x[np.flatnonzero(member)])
        within += [total == lo] if lo == hi else []
        within += [total >= lo] if lo < hi and lo > -INF else []
        within += [total <= hi] if lo < hi and hi < INF else []
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - point)), within)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    assert problem.status == "optimal"
    return x.value


@pytest.mark.parametrize("seed", range(12))
def test_projection_on_one_sum_agrees_with_cvxpy(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    lower, upper = -rng.exponential(size=n), rng.exponential(size=n)
    if seed % 2:
        lower[rng.random(n) < 0.4], upper[rng.random(n) < 0.4] = -INF, INF
    inside = np.clip(rng.normal(size=n), lower, upper)
    point, total = 2 * rng.normal(size=n), float(inside.sum())
    x = bcd.SumBox(lower, upper, total).bind(n).project(point)
    assert (x >= lower).all()
    assert (x <= upper).all()
    assert abs(x.sum() - total) <= 1e-14 * (1 + np.abs(x).sum())
    # Clarabel's point is good to about the square root of its 1e-11 gap
    np.testing.assert_allclose(x, cvxpy_projection(point, lower, upper, [(np.ones(n, bool), total, total)]), atol=1e-5)


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 0.5), (None, -0.25), (3.0, None), (-9.0, 9.0), (-INF, INF)])
def test_projection_on_a_range_agrees_with_cvxpy(lo, hi):
    rng = np.random.default_rng(3)
    point, lower, upper = 2 * rng.normal(size=8), np.full(8, -1.0), np.full(8, 2.0)
    x = bcd.SumBox(lower, upper, (lo, hi)).bind(8).project(point)
    known = (-INF if lo is None else lo, INF if hi is None else hi)
    np.testing.assert_allclose(x, cvxpy_projection(point, lower, upper, [(np.ones(8, bool), *known)]), atol=1e-5)
    # which side is met is known: the sum of the clipped point, moved to the nearest end of the range
    assert x.sum() == pytest.approx(np.clip(np.clip(point, lower, upper).sum(), *known), abs=1e-13)


def test_projection_on_groups_is_that_of_each_group():
    rng = np.random.default_rng(4)
    groups = np.array([2, 0, 0, -1, 2, 0, 1, 1, -1, 2])
    lower, upper, point = np.full(10, -1.0), np.full(10, 1.5), 3 * rng.normal(size=10)
    sums = [(groups == 0, 1.0, 1.0), (groups == 1, -0.5, 0.5), (groups == 2, -INF, 0.25)]
    x = bcd.SumBox(lower, upper, [1, (-0.5, 0.5), (None, 0.25)], groups).bind(10).project(point)
    np.testing.assert_allclose(x, cvxpy_projection(point, lower, upper, sums), atol=1e-5)
    np.testing.assert_array_equal(x[groups == -1], np.clip(point, -1, 1.5)[groups == -1])


def test_projection_on_the_simplex_is_the_closed_form():
    rng = np.random.default_rng(5)
    for n in (1, 2, 3, 50, 1000):
        z = rng.normal(size=n)
        np.testing.assert_allclose(bcd.SumBox(0, None, 1).bind(n).project(z), simplex_projection(z), atol=1e-14)


def test_projection_without_bounds_shifts_every_coordinate_alike():
    z = np.array([1e6, -3.0, 0.25])
    np.testing.assert_allclose(bcd.SumBox(total=7).bind(3).project(z), z + (7 - z.sum()) / 3, rtol=1e-15)


def test_projection_keeps_a_feasible_point_to_the_bit():
    x = np.array([0.1, 0.2, 0.7])
    x[2] = 1.0 - (x[0] + x[1])
    np.testing.assert_array_equal(bcd.SumBox(0, 1, (0, 1)).bind(3).project(x), x)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e9])
def test_projection_of_far_points_is_exact_to_rounding(magnitude):
    """A point far outside: the answer depends on differences that its size could have drowned."""
    z = magnitude * np.array([4.0, 3.0, -8.0, 0.0])
    x = bcd.SumBox(0, magnitude, 2 * magnitude).bind(4).project(z)
    np.testing.assert_allclose(x, magnitude * np.array([1.0, 1.0, 0.0, 0.0]), atol=1e-15 * magnitude)


# -- totals that leave one point, or just none ---------------------------------------------------


@pytest.mark.parametrize(
    ("upper", "total"),
    [
        (np.full(3, 1 / 3), 1.0),
        (np.full(10, 0.1), 1.0),
        (np.array([0.1, 0.2, 0.3]), 0.6),  # 0.1 + 0.2 + 0.3 > 0.6 in floating point
        (np.array([0.1, 0.7]), 0.8),  # and 0.1 + 0.7 < 0.8
        (np.full(49, 1 / 49), 1.0),
        (np.full(7, 1e-300), 7e-300),
    ],
)
def test_a_total_equal_to_the_sum_of_the_bounds_leaves_the_bounds(upper, total):
    """Rounding must neither refuse it nor push a coordinate past its bound."""
    feasible = bcd.SumBox(0, upper, total).bind(len(upper))
    # decimal bounds miss their decimal total by a rounding, and a coordinate may make up for it
    for x in (feasible.project(np.zeros(len(upper))), -bcd.SumBox(-upper, 0, -total).bind(len(upper)).project(upper)):
        assert (x <= upper).all()
        np.testing.assert_allclose(x, upper, rtol=5e-16)
    rng = np.random.default_rng(0)
    problem = bcd.Problem(bcd.Quadratic(np.eye(len(upper)), rng.normal(size=len(upper))), bcd.SumBox(0, upper, total))
    result = bcd.minimize(problem, max_iter=100)
    assert result.status is bcd.Status.CONVERGED
    assert result.certificate.infeasibility == 0
    assert (result.x <= upper).all()
    np.testing.assert_allclose(result.x, upper, rtol=5e-16)


def test_fixed_coordinates_leave_one_point():
    x = np.array([0.3, -0.1, 2.0])
    problem = bcd.Problem(bcd.Quadratic(np.eye(3), [1.0, 2.0, 3.0]), bcd.SumBox(x, x, x.sum()))
    for rule in ("gs1", "wss2", "gss", "gsq", "gsl", "block", "random", "cyclic", "permutation"):
        result = bcd.minimize(problem, rule)
        assert result.status is bcd.Status.CONVERGED
        assert result.iterations == 0
        np.testing.assert_array_equal(result.x, x)


def test_a_total_missed_by_more_than_rounding_is_refused_with_the_amount():
    with pytest.raises(bcd.InfeasibleError, match=r"total = 1\.001 .*sums from 0\.0 to 1\.0.*misses it by 0\.001"):
        bcd.SumBox(0, 1 / 3, 1.001).bind(3)
    with pytest.raises(bcd.InfeasibleError, match=r"misses it by 1e-09"):
        bcd.SumBox(0, 1, 3 + 1e-9).bind(3)


# -- errors: argument, found, needed -------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (bcd.SumBox(0, 1, 4), r"total = 4\.0 .*sums from 0\.0 to 3\.0.* by 1;"),
        (bcd.SumBox(0, 1, -0.5), r"total = -0\.5 .* by 0\.5;"),
        (bcd.SumBox(0, 1, (5, 6)), r"total = \(5\.0, 6\.0\) .* by 2;"),
        (bcd.SumBox(0, 1, (None, -1)), r"total = \(-inf, -1\.0\) .* by 1;"),
        (bcd.SumBox(0, 1, [1, 3, 0], [0, 1, 1]), r"total must have one entry for each group; found 3 totals, 2 groups"),
        (bcd.SumBox(0, 1, [0.5, 3], [0, 1, 1]), r"total\[1\] = 3\.0 .* by 1;"),
        (bcd.SumBox([0, 2, 0], 1), r"lower must not exceed upper; lower\[1\] = 2\.0 and upper\[1\] = 1\.0"),
        (bcd.SumBox(INF), r"lower must not be \+inf"),
        (bcd.SumBox(None, -INF), r"upper -inf"),
    ],
)
def test_infeasible_constraints_say_by_how_much(constraint, message):
    with pytest.raises((bcd.InfeasibleError, ValueError), match=message):
        constraint.bind(3)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (bcd.SumBox([0, 1]), r"lower must be a scalar or have shape \(3,\); found shape \(2,\)"),
        (bcd.SumBox(upper=np.ones((3, 1))), r"upper must be a scalar or have shape \(3,\); found shape \(3, 1\)"),
        (bcd.SumBox([0, 0, np.nan]), r"lower must not be NaN .*found NaN at 2"),
        (bcd.SumBox(upper=np.nan), r"upper must not be NaN"),
        (bcd.SumBox(total=np.nan), r"total must be finite; found nan"),
        (bcd.SumBox(total=INF), r"total must be finite; found inf"),
        (bcd.SumBox(total=(2, 1)), r"total must be .*lo <= hi; found \(2, 1\)"),
        (bcd.SumBox(total=(1, 2, 3)), r"total must be a number or a pair \(lo, hi\); found \(1, 2, 3\)"),
        (bcd.SumBox(total=(np.nan, 1)), r"total must be .*found \(nan, 1\)"),
        (bcd.SumBox(total=(INF, None)), r"total must be .*found"),
        (bcd.SumBox(total=1, groups=[0, 0, 0]), r"total must list one entry for each of the 1 groups; found 1"),
        (bcd.SumBox(groups=[0, 0, 1]), r"total must list one entry for each of the 2 groups; found None"),
        (bcd.SumBox(total=[1, np.nan], groups=[0, 0, 1]), r"total\[1\] must be finite; found nan"),
        (bcd.SumBox(total=[1], groups=[0, 0]), r"groups must be an integer array of shape \(3,\).*found .*\(2,\)"),
        (bcd.SumBox(total=[1], groups=[0.0, 0.0, 0.0]), r"groups must be an integer array .*found dtype float64"),
        (bcd.SumBox(total="much"), r"total must be .*found 'much'"),
    ],
)
def test_malformed_constraints_name_the_argument(constraint, message):
    with pytest.raises(ValueError, match=message):
        constraint.bind(3)


def test_problem_checks_its_parts():
    with pytest.raises(ValueError, match=r"constraint must be a SumBox; found tuple"):
        bcd.Problem(bcd.Quadratic(np.eye(2)), (0, 1))
    with pytest.raises(ValueError, match=r"objective must have 'n'.*found ndarray"):
        bcd.Problem(np.eye(2))
    with pytest.raises(ValueError, match=r"lower must be a scalar or have shape \(2,\)"):
        bcd.Problem(bcd.Quadratic(np.eye(2)), bcd.SumBox([0, 0, 0]))


def test_an_infeasible_error_is_a_value_error():
    assert issubclass(bcd.InfeasibleError, ValueError)


# -- what is accepted ----------------------------------------------------------------------------


def test_bounds_are_copied():
    lower = np.zeros(3)
    problem = bcd.Problem(bcd.Quadratic(np.eye(3), [1.0, 2.0, 3.0]), bcd.SumBox(lower, 1, 1))
    lower[:] = 0.9
    assert problem.feasible.lower.tolist() == [0, 0, 0]


def test_a_total_open_on_both_sides_is_no_sum():
    Q, c = np.diag([1.0, 2.0, 4.0]), np.array([1.0, -1.0, 2.0])
    open_total = bcd.minimize(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-1, 1, (None, None))), tol=1e-12)
    assert open_total.total_multipliers.tolist() == [0.0]
    np.testing.assert_allclose(open_total.x, np.clip(-c / np.diag(Q), -1, 1), atol=1e-12)
    groups = bcd.SumBox(-1, 1, [(None, None), 0.5], [0, 0, 1])
    result = bcd.minimize(bcd.Problem(bcd.Quadratic(Q, c), groups), tol=1e-12)
    np.testing.assert_allclose(result.x, [-1, 0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(result.total_multipliers, [0, -(4 * 0.5 + 2)], atol=1e-11)


def test_an_empty_group_must_have_total_zero():
    assert bcd.SumBox(0, 1, [1, 0, 1], [0, 0, 2]).bind(3).project([1.0, 1, 1]).tolist() == [0.5, 0.5, 1]
    with pytest.raises(bcd.InfeasibleError, match=r"total\[1\] = 1\.0"):
        bcd.SumBox(0, 1, [1, 1, 1], [0, 0, 2]).bind(3)


def test_equal_ends_of_a_range_are_an_equality():
    feasible = bcd.SumBox(0, 1, (1.5, 1.5)).bind(3)
    assert len(feasible.lower) == 3
    assert feasible.project([0.0, 0, 0]).tolist() == [0.5, 0.5, 0.5]


# -- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_start_is_feasible_and_its_slacks_fit(name):
    problem = case(name).problem
    for seed in range(3):
        point = 3 * np.random.default_rng(seed).normal(size=problem.n)
        moves = Moves(problem.feasible, problem.feasible.project(point))
        assert infeasibility_of(problem, moves.x[: problem.n]) == 0
        for s, total in enumerate(problem.feasible.totals):
            member = problem.feasible.members(s)
            assert abs(moves.x[member].sum() - total) <= 1e-14 * (1 + np.abs(moves.x[member]).sum())
        np.testing.assert_array_equal(moves.rise, moves.upper - moves.x)
        np.testing.assert_array_equal(moves.fall, moves.x - moves.lower)
        assert (moves.rise >= 0).all()
        assert (moves.fall >= 0).all()


def test_a_step_that_uses_up_the_room_hits_the_bound_exactly():
    """x + (u - x) differs from u for about half of all pairs (THEORY section 2)."""
    rng = np.random.default_rng(6)
    lower, upper = -rng.random(200), rng.random(200)
    x = np.where(rng.random(200) < 0.5, lower, upper) * rng.random(200)
    feasible = bcd.SumBox(lower, upper).bind(200)
    assert (x + (upper - x) != upper).any()  # the naive step misses some
    for sign, bound in ((1, upper), (-1, lower)):
        moves = Moves(feasible, x)
        step = moves.rise.copy() if sign > 0 else -moves.fall
        assert moves.shift(Selection(np.arange(200), step)) == np.count_nonzero(x != bound)
        np.testing.assert_array_equal(moves.x, bound)
        np.testing.assert_array_equal(moves.rise if sign > 0 else moves.fall, 0)


def test_a_shift_counts_only_what_changed():
    moves = Moves(bcd.SumBox(-1, 1).bind(3), np.array([0.5, 0.5, 0.5]))
    assert moves.shift(Selection(np.array([0, 2]), np.array([1e-30, 0.25]))) == 1
    assert moves.x.tolist() == [0.5, 0.5, 0.75]


def test_settling_takes_rounding_out_of_the_sum():
    rng = np.random.default_rng(7)
    groups = np.arange(30) % 3
    feasible = bcd.SumBox(0, 1, [4, 5, 6], groups).bind(30)
    moves = Moves(feasible, feasible.project(rng.random(30)))
    noisy = np.clip(moves.x + 1e-13 * rng.normal(size=30), 0, 1)
    moves.place_at(noisy)
    moves.settle()
    for s, total in enumerate((4, 5, 6)):
        assert abs(moves.x[groups == s].sum() - total) <= 1e-15 * total
    assert np.count_nonzero(moves.x != noisy) <= 3 * 4  # few coordinates take it all
    assert (moves.x >= 0).all()
    assert (moves.x <= 1).all()


@pytest.mark.parametrize(("fall", "rise"), [(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0)])
def test_violation_counts_only_moves_that_are_allowed(fall, rise):
    """Two coordinates with gradients 1 and -1: mass can move only where both have room."""
    moves = Moves(bcd.SumBox([-fall, 0], [0, rise], 0).bind(2), np.zeros(2))
    assert moves.violation(np.array([1.0, -1.0])) == (2.0 if fall and rise else 0.0)
    assert moves.gap(np.array([1.0, -1.0])) == (4.0 if fall and rise else 0.0)
