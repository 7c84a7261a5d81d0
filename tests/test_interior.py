"""Second-order steps on small dense problems, against cvxpy and by conditions that hold at every solution."""

from itertools import pairwise

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcd.interior import newton, solve_interior


def problem(seed, q=20, segments=1, rank=None, scale=1.0, box=1.0, fixed=0.0):
    """K, c, a feasible x that is no vertex, bounds and segments."""
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(q, q if rank is None else rank)) / np.sqrt(q)
    K, c = scale * (F @ F.T), scale * box * rng.normal(size=q)
    lower = -box * rng.random(q)
    upper = lower + box * (0.2 + rng.random(q))
    stuck = rng.random(q) < fixed
    upper[stuck] = lower[stuck]
    x = lower + (upper - lower) * np.round(rng.random(q), 1)
    low = rng.random(q) < 0.2
    x[low] = lower[low]
    start = np.unique(np.concatenate([[0, q], np.sort(rng.choice(np.arange(1, q), segments - 1, replace=False))]))
    return K, c, x, lower, upper, start.astype(np.int64)


def objective(K, c, x):
    return float(0.5 * x @ K @ x + c @ x)


def sums(x, start):
    return np.array([np.sum(x[a:b].astype(np.longdouble)) for a, b in pairwise(start)], float)


def optimum(K, c, x, lower, upper, start):
    """By Clarabel, in units where numbers are about 1."""
    unit, box = float(np.abs(c).max()), float((upper - lower).max())
    root = np.linalg.eigh(K / (unit / box))
    factor = (root.eigenvectors * np.sqrt(np.maximum(root.eigenvalues, 0))).T
    t = cp.Variable(len(x))
    rows = [cp.sum(t[a:b]) == total / box for a, b, total in zip(start[:-1], start[1:], sums(x, start), strict=True)]
    goal = cp.Minimize(0.5 * cp.sum_squares(factor @ t) + (c / unit) @ t)
    solver = cp.Problem(goal, [t >= lower / box, t <= upper / box, *rows])
    solver.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert solver.status == "optimal"
    return float(solver.value) * unit * box


def violation(grad, x, lower, upper, start):
    worst = 0.0
    for a, b in pairwise(start):
        g, up, low = grad[a:b], x[a:b] < upper[a:b], x[a:b] > lower[a:b]
        if up.any() and low.any():
            worst = max(worst, float(g[low].max() - g[up].min()))
    return worst


def is_kept(out, x, lower, upper, start):
    """Bounds exactly, sums to rounding."""
    assert (out >= lower).all()
    assert (out <= upper).all()
    np.testing.assert_allclose(
        sums(out, start), sums(x, start), rtol=0, atol=1e-14 * (np.abs(lower) + np.abs(upper)).sum()
    )


CASES = st.builds(
    problem,
    seed=st.integers(0, 2**20),
    q=st.integers(4, 24),
    segments=st.integers(1, 3),
    rank=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    box=st.sampled_from([1e-4, 1.0, 1e6]),
    fixed=st.sampled_from([0.0, 0.3]),
)


# -- the interior-point method -------------------------------------------------------------------


@settings(max_examples=150)
@given(CASES)
def test_the_interior_point_solution_is_that_of_clarabel(case):
    """Random, singular and badly scaled problems with up to three sums; warnings are errors here."""
    K, c, x, lower, upper, start = case
    before = [part.copy() for part in case]
    out = solve_interior(K, K @ x + c, x, lower, upper, start, float(np.abs(c).max()))
    for part, kept in zip(case, before, strict=True):
        assert (part == kept).all()
    best, unit = optimum(*case), float(np.abs(c).max() * (upper - lower).max())
    if out is None:
        assert objective(K, c, x) - best <= 1e-8 * unit
        return
    is_kept(out, x, lower, upper, start)
    assert objective(K, c, out) < objective(K, c, x)
    assert objective(K, c, out) - best <= 1e-8 * unit * len(x)


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_coordinates_at_a_bound_are_exactly_there(segments, seed):
    K, c, x, lower, upper, start = problem(seed, 40, segments)
    out = solve_interior(K, K @ x + c, x, lower, upper, start, 1.0)
    grad = K @ out + c
    assert violation(grad, out, lower, upper, start) <= 1e-7
    at = (out == lower) | (out == upper)
    near = np.minimum(out - lower, upper - out) < 1e-6 * (upper - lower)
    assert at.sum() >= 10
    assert (at == near).all()


def test_an_optimal_point_is_left_alone():
    """Nothing is better; or the gain is that of rounding."""
    for seed in range(20):
        K, c, x, lower, upper, start = problem(seed, 15)
        best = solve_interior(K, K @ x + c, x, lower, upper, start, 1.0)
        for _ in range(3):
            newton(K, K @ best + c, best, lower, upper, start)
        again = solve_interior(K, K @ best + c, best, lower, upper, start, 1.0)
        assert again is None or objective(K, c, best) - objective(K, c, again) <= 1e-12


@pytest.mark.parametrize("free", [0, 1])
def test_nothing_to_move(free):
    lower = np.array([0.0, 1.0, 2.0])
    upper = lower + np.array([1.0, 0.0, 0.0]) * free
    x, start = lower.copy(), np.array([0, 3])
    assert solve_interior(np.eye(3), np.ones(3), x, lower, upper, start, 1.0) is None
    newton(np.eye(3), np.ones(3), x, lower, upper, start)
    assert (x == lower).all()


def test_a_zero_matrix_is_a_linear_program():
    c, start = np.array([1.0, -1.0, 0.5, 0.2]), np.array([0, 4])
    x, lower, upper = np.full(4, 0.5), np.zeros(4), np.ones(4)
    out = solve_interior(np.zeros((4, 4)), c, x, lower, upper, start, 1.0)
    np.testing.assert_allclose(out, [0, 1, 0, 1], atol=1e-9)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["K", "grad"])
def test_numbers_that_are_not_finite_end_quietly(poison, where):
    """And never in a point that is not finite."""
    K, c, x, lower, upper, start = problem(0)
    grad = K @ x + c
    (K if where == "K" else grad)[3] = poison
    if where == "K":
        K[:, 3] = poison
    kept = x.copy()
    with np.errstate(all="ignore"):
        out = solve_interior(K, grad, x, lower, upper, start, 1.0)
    assert out is None or np.isfinite(out).all()
    assert (x == kept).all()


def test_an_indefinite_matrix_gives_a_better_point_or_none():
    found = 0
    for seed in range(30):
        K, c, x, lower, upper, start = problem(seed, 15, 1 + seed % 3)
        noise = np.random.default_rng(seed).normal(size=K.shape)
        K = K + 0.3 * (noise + noise.T)
        out = solve_interior(K, K @ x + c, x, lower, upper, start, 1.0)
        if out is not None:
            is_kept(out, x, lower, upper, start)
            assert objective(K, c, out) < objective(K, c, x)
            found += 1
    assert found > 0


# -- Newton steps --------------------------------------------------------------------------------


@settings(max_examples=150)
@given(CASES)
def test_newton_steps_descend_and_stay_feasible(case):
    """Every matrix; the gradient that comes back is that of the point that comes back."""
    K, c, x, lower, upper, start = case
    moved, grad = x.copy(), K @ x + c
    newton(K, grad, moved, lower, upper, start)
    is_kept(moved, x, lower, upper, start)
    size = float(np.abs(K).max() * np.abs(x).sum() + np.abs(c).max())
    np.testing.assert_allclose(grad, K @ moved + c, rtol=0, atol=1e-12 * size)
    assert objective(K, c, moved) <= objective(K, c, x) + 1e-14 * size * np.abs(np.concatenate([lower, upper])).sum()
    bound = (x == lower) | (x == upper)
    assert (moved[bound] == x[bound]).all()


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_newton_solves_what_has_no_bound_in_the_way(segments, scale):
    """In one step: gradients of a segment's free coordinates are equal."""
    K, c, x, _, _, start = problem(1, 30, segments, scale=scale)
    K += scale * np.eye(30)
    lower, upper = np.full(30, -1e3), np.full(30, 1e3)
    grad, moved = K @ x + c, x.copy()
    newton(K, grad, moved, lower, upper, start)
    is_kept(moved, x, lower, upper, start)
    assert violation(K @ moved + c, moved, lower, upper, start) <= 1e-10 * scale


def test_newton_stops_at_the_first_bound_and_goes_on_without_it():
    K, c = np.eye(3), np.array([-3.0, 0.0, 0.0])
    x, lower, upper, start = np.full(3, 0.4), np.zeros(3), np.ones(3), np.array([0, 3])
    grad = K @ x + c
    newton(K, grad, x, lower, upper, start)
    assert x[0] == 1.0
    np.testing.assert_allclose(x, [1.0, 0.1, 0.1], atol=1e-12)
    np.testing.assert_allclose(grad, x + c, atol=1e-14)


def test_newton_hits_the_bound_exactly():
    """Not to rounding: a coordinate next to its bound would stop every later step."""
    hit = 0
    for seed in range(200):
        K, c, _, lower, upper, start = problem(seed, 8)
        x = lower + (upper - lower) * np.random.default_rng(seed).uniform(0.1, 0.9, 8)
        newton(K, K @ x + c, x, lower, upper, start)
        room = np.minimum(x - lower, upper - x)
        assert (room[room < 1e-12] == 0).all(), seed
        hit += np.count_nonzero(room == 0)
    assert hit > 200


def test_newton_takes_no_step_that_does_not_descend():
    """Negative curvature: the solution of the system is a maximum along its direction."""
    K, c, start = -np.eye(4), np.array([0.1, -0.1, 0.2, -0.2]), np.array([0, 4])
    x, lower, upper = np.full(4, 0.5), np.zeros(4), np.ones(4)
    kept, grad = x.copy(), K @ x + c
    newton(K, grad, x, lower, upper, start)
    is_kept(x, kept, lower, upper, start)
    assert objective(K, c, x) <= objective(K, c, kept)


def test_newton_follows_a_direction_without_curvature_to_the_bound():
    """Singular on the free coordinates, with a gradient that falls for ever."""
    K, c, start = np.zeros((2, 2)), np.array([1.0, 0.0]), np.array([0, 2])
    x, lower, upper = np.full(2, 0.5), np.zeros(2), np.ones(2)
    newton(K, c.copy(), x, lower, upper, start)
    assert x.tolist() == [0.0, 1.0]
