# SPDX-License-Identifier: BSD-3-Clause
"""Objectives: values, gradients, Hessians, the state that follows x, Lipschitz constants, input errors."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from catalogue import CATALOGUE, case

import bcd
from bcd.constraints import Moves
from bcd.problem import Point

N, M = 9, 14


def objectives():
    rng = np.random.default_rng(0)
    F, D, A = rng.normal(size=(N, 3)), rng.random(N), rng.normal(size=(M, N))
    thin = np.where(rng.random((M, N)) < 0.4, A, 0.0)
    b, signs, c = rng.normal(size=M), np.where(rng.random(M) < 0.5, -1.0, 1.0), rng.normal(size=N)
    Q = F @ F.T + np.diag(D)
    sparse_Q = np.where(np.abs(Q) > 1, Q, 0.0) + 20 * np.eye(N)
    return {
        "dense": bcd.Quadratic(Q, c),
        "sparse": bcd.Quadratic(sp.csr_array(sparse_Q), c),
        "low rank": bcd.Quadratic(bcd.LowRank(F, D), c),
        "low rank, sparse factors": bcd.Quadratic(bcd.LowRank(sp.csr_array(np.where(np.abs(F) > 0.7, F, 0)), 0.5), c),
        "least squares": bcd.LeastSquares(A, b, l2=0.3),
        "least squares, sparse": bcd.LeastSquares(sp.coo_array(thin), b),
        "logistic": bcd.Logistic(A, signs, l2=0.2),
        "logistic, sparse": bcd.Logistic(sp.csr_matrix(thin), signs),
        "smooth": bcd.Smooth(lambda x: float(np.cosh(x).sum() + x[0] * x[1]),
                             lambda x: np.sinh(x) + np.r_[x[1], x[0], np.zeros(N - 2)], N),
    }  # fmt: skip


NAMES = list(objectives())
CURVED = [name for name in NAMES if name != "smooth"]


@pytest.fixture
def objective(request):
    return objectives()[request.param]


def every(names):
    return pytest.mark.parametrize("objective", names, indirect=True, ids=str)


def numerical_gradient(f, x, h=1e-6):
    steps = h * np.eye(len(x))
    return np.array([(f(x + e) - f(x - e)) / (2 * h) for e in steps])


def numerical_hessian(gradient, x, h=1e-6):
    steps = h * np.eye(len(x))
    return np.array([(gradient(x + e) - gradient(x - e)) / (2 * h) for e in steps])


@every(NAMES)
def test_gradient_agrees_with_finite_differences(objective):
    x = np.random.default_rng(1).normal(size=N)
    # central differences of step 1e-6: truncation 1e-12 f''', rounding 1e-10 |f|
    np.testing.assert_allclose(objective.gradient(x), numerical_gradient(objective.value, x), atol=3e-8, rtol=3e-8)


@every(CURVED)
def test_hessian_is_the_second_derivative_or_bounds_it(objective):
    x = np.random.default_rng(2).normal(size=N)
    H, true = objective.hessian.block(np.arange(N)), numerical_hessian(objective.gradient, x)
    if objective.exact:
        np.testing.assert_allclose(H, true, atol=3e-8 * np.abs(H).max())
    else:
        assert np.linalg.eigvalsh(H - true).min() >= -1e-7 * np.abs(H).max()
        assert np.linalg.eigvalsh(H - 2 * true).min() < 0  # and is not needlessly large


@every(CURVED)
def test_hessian_methods_agree_with_each_other(objective):
    """Dense and sparse meet in column, block, product, add_columns and diagonal: all are one matrix."""
    rng, hessian = np.random.default_rng(3), objective.hessian
    columns = np.column_stack([hessian.column(i) for i in range(N)])
    np.testing.assert_array_equal(columns.shape, (N, N))
    np.testing.assert_allclose(columns, columns.T, atol=1e-12 * np.abs(columns).max())
    tolerance = {"atol": 1e-13 * np.abs(columns).max(), "rtol": 1e-13}
    np.testing.assert_allclose(hessian.diagonal, columns.diagonal(), **tolerance)
    index, x = np.array([7, 2, 5]), rng.normal(size=N)
    block = hessian.block(index)
    assert block.flags.c_contiguous
    np.testing.assert_allclose(block, columns[np.ix_(index, index)], **tolerance)
    np.testing.assert_allclose(hessian.product(x), columns @ x, atol=1e-12 * np.abs(columns).max() * N)
    pair, one = (np.array([4, 1]), np.array([0.3, -0.3])), (np.array([6]), np.array([2.0]))
    for where, step in ((index, rng.normal(size=3)), pair, one):
        grad = rng.normal(size=N)
        wanted = grad + columns[:, where] @ step
        hessian.add_columns(grad, where, step)
        np.testing.assert_allclose(grad, wanted, atol=1e-12 * np.abs(columns).max())


@every(NAMES)
def test_the_state_follows_a_moving_point(objective):
    """Moves of 1, 2 and many coordinates, then grad and value as computed anew; rebuild changes only rounding."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=N)
    state = objective.start(x)
    for size in (1, 2, 2, 5, N):
        index, step = rng.permutation(N)[:size], 0.3 * rng.normal(size=size)
        if size == 2:
            step[1] = -step[0]
        x[index] += step
        state.move(index, step)
        np.testing.assert_allclose(state.grad, objective.gradient(x), rtol=1e-12, atol=1e-11)
        assert state.value == pytest.approx(objective.value(x), rel=1e-12, abs=1e-11)
    state.rebuild()
    np.testing.assert_allclose(state.grad, objective.gradient(x), rtol=1e-14, atol=1e-13)


@every(NAMES)
def test_slope_along_a_direction(objective):
    rng = np.random.default_rng(5)
    x = rng.normal(size=N)
    state = objective.start(x)
    index, step = np.array([8, 3, 1]), rng.normal(size=3)
    slope = state.along(index, step)
    for t in (0.0, 0.4, 1.0, -0.7):
        at = x.copy()
        at[index] += t * step
        assert slope(t) == pytest.approx(float(objective.gradient(at)[index] @ step), rel=1e-11, abs=1e-11)
    np.testing.assert_array_equal(state.objective.gradient(x), objective.gradient(x))  # asking moved nothing


def test_low_rank_and_sparse_equal_the_dense_matrix():
    rng = np.random.default_rng(6)
    F, D, c, x = rng.normal(size=(N, 4)), rng.random(N), rng.normal(size=N), rng.normal(size=N)
    Q = F @ F.T + np.diag(D)
    forms = [
        bcd.LowRank(F, D), bcd.LowRank(sp.csc_array(F), D), sp.csr_array(Q), sp.coo_array(Q), sp.csc_matrix(Q)
    ]  # fmt: skip
    dense = bcd.Quadratic(Q, c)
    for form in forms:
        objective = bcd.Quadratic(form, c)
        assert objective.value(x) == pytest.approx(dense.value(x), rel=1e-13)
        np.testing.assert_allclose(objective.gradient(x), dense.gradient(x), rtol=1e-12, atol=1e-12)
        for i in range(N):
            np.testing.assert_allclose(objective.hessian.column(i), Q[:, i], rtol=1e-12, atol=1e-12)
        result = bcd.minimize(bcd.Problem(objective, bcd.SumBox(-1, 1, 0.5)), tol=1e-9)
        wanted = bcd.minimize(bcd.Problem(dense, bcd.SumBox(-1, 1, 0.5)), tol=1e-9)
        assert result.objective == pytest.approx(wanted.objective, abs=1e-12)


def test_sparse_duplicates_are_summed():
    Q = sp.coo_array((np.array([1.0, 1.0, 3.0]), (np.array([0, 0, 1]), np.array([0, 0, 1]))), shape=(2, 2))
    assert bcd.Quadratic(Q).gradient(np.ones(2)).tolist() == [2, 3]


# -- Lipschitz constants -------------------------------------------------------------------------


def true_l1(Q, labels):
    """max d'Qd over the extreme points of ||d||_1 <= 1 on the feasible directions (Q positive semidefinite)."""
    best = 0.0
    for i, j in itertools.combinations(range(len(Q)), 2):
        if labels[i] == labels[j] >= 0:
            best = max(best, (Q[i, i] + Q[j, j] - 2 * Q[i, j]) / 4)
    return max([best, *(Q[i, i] for i in range(len(Q)) if labels[i] < 0)])


LABELS = [np.zeros(N, int), -np.ones(N, int), np.arange(N) % 3, np.array([0, 0, 0, 1, 1, 1, -1, -1, -1])]


@pytest.mark.parametrize("labels", LABELS, ids=["one sum", "no sum", "groups", "some alone"])
@every(CURVED)
def test_lipschitz_is_exact_when_dense_and_an_upper_bound_otherwise(objective, labels):
    true = true_l1(objective.hessian.block(np.arange(N)), labels)
    found = objective.hessian.lipschitz(labels.astype(np.int64))
    if isinstance(objective.hessian, bcd.LowRank) or not hasattr(objective.hessian.matrix, "nnz"):
        assert found == pytest.approx(true, rel=1e-12)
    else:
        assert true * (1 - 1e-12) <= found <= 4 * true


@pytest.mark.parametrize("labels", LABELS, ids=["one sum", "no sum", "groups", "some alone"])
@pytest.mark.parametrize("seed", range(5))
def test_the_ball_bound_of_large_low_rank_matrices_is_an_upper_bound(seed, labels, monkeypatch):
    rng = np.random.default_rng(seed)
    F, D = rng.normal(size=(N, 2)) + 3 * rng.normal(size=2), rng.random(N) * (seed % 2)
    exact = bcd.LowRank(F, D).lipschitz(labels.astype(np.int64))
    monkeypatch.setattr(bcd.LowRank, "EXACT_UP_TO", 0)
    for factors in (F, sp.csr_array(F)):
        bound = bcd.LowRank(factors, D).lipschitz(labels.astype(np.int64))
        assert exact * (1 - 1e-12) <= bound <= 10 * exact


@pytest.mark.parametrize("name", [name for name in CATALOGUE if not name.startswith("smooth")])
def test_the_constant_of_a_problem_bounds_random_feasible_directions(name):
    """d'Hd <= L1 ||d||_1^2, with the slacks' share in the norm."""
    problem = case(name).problem
    feasible, rng = problem.feasible, np.random.default_rng(7)
    H = problem.objective.hessian.block(np.arange(problem.n))
    for _ in range(200):
        d = rng.normal(size=len(feasible.lower)) * (rng.random(len(feasible.lower)) < rng.choice([0.2, 0.5, 1.0]))
        for s in range(len(feasible.totals)):
            member = feasible.members(s)
            d[member[0]] -= d[member].sum()
        real = d[: problem.n]
        assert real @ H @ real <= problem.lipschitz * np.abs(d).sum() ** 2 * (1 + 1e-12) + 1e-14


def test_the_constant_of_one_slack_coordinate_is_attained():
    """x against its slack: a move of mass t has 1-norm 2 t and curvature Q t^2."""
    problem = bcd.Problem(bcd.Quadratic([[8.0]]), bcd.SumBox(total=(0, 1)))
    assert problem.lipschitz == 2.0


def test_an_rbf_kernel_has_constant_at_most_one_half():
    problem = case("SVM dual").problem
    assert 0.3 < problem.lipschitz <= 0.5


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bcd.Quadratic(np.ones((2, 3))), r"Q must be square; found shape \(2, 3\)"),
        (lambda: bcd.Quadratic(np.ones(3)), r"Q must be a matrix of shape \(n, n\); found shape \(3,\)"),
        (lambda: bcd.Quadratic(np.ones((0, 0))), r"Q must be a matrix .*found shape \(0, 0\)"),
        (lambda: bcd.Quadratic([[1.0, 2.0], [0.0, 1.0]]), r"Q must be symmetric; Q\[\d, \d\] = .*\(Q \+ Q\.T\) / 2"),
        (lambda: bcd.Quadratic(sp.csr_array([[1.0, 2.0], [0.0, 1.0]])), r"Q must be symmetric; Q\[\d, \d\] = "),
        (lambda: bcd.Quadratic([[np.nan]]), r"Q must be finite; found 1 NaN or infinite"),
        (lambda: bcd.Quadratic(sp.csr_array([[np.inf]])), r"Q must be finite; found 1 NaN or infinite"),
        (lambda: bcd.Quadratic(np.eye(2), [1.0, np.nan]), r"c must be finite; c\[1\] is nan"),
        (lambda: bcd.Quadratic(np.eye(2), [1.0, 2.0, 3.0]), r"c must have shape \(2,\); found shape \(3,\)"),
        (lambda: bcd.LowRank(np.ones((3, 1)), [1.0, -2.0, 0.0]), r"D must be non-negative; found -2\.0 at 1"),
        (lambda: bcd.LowRank(np.ones((3, 1)), [1.0]), r"D must have shape \(3,\); found shape \(1,\)"),
        (lambda: bcd.LowRank([[np.inf]]), r"F must be finite"),
        (lambda: bcd.LowRank(np.ones(3)), r"F must be a matrix of shape \(n, r\); found shape \(3,\)"),
        (lambda: bcd.LeastSquares(np.ones(3), 1), r"A must be a matrix of shape \(m, n\); found shape \(3,\)"),
        (lambda: bcd.LeastSquares(np.ones((3, 2)), np.ones(2)), r"b must have shape \(3,\); found shape \(2,\)"),
        (lambda: bcd.LeastSquares(np.ones((3, 2)), np.ones(3), -1), r"l2 must be non-negative and finite; found -1"),
        (lambda: bcd.LeastSquares(np.ones((3, 2)), 1, np.nan), r"l2 must be non-negative and finite; found nan"),
        (lambda: bcd.LeastSquares([[np.nan]], [1.0]), r"A must be finite; found 1"),
        (lambda: bcd.Logistic(np.ones((2, 2)), [0, 1]), r"b must hold labels -1 and \+1; found \[0\. 1\.\]"),
        (lambda: bcd.Smooth(None, np.sin, 2), r"fun must be callable; found NoneType"),
        (lambda: bcd.Smooth(np.sum, 3.0, 2), r"grad must be callable; found float"),
        (lambda: bcd.Smooth(np.sum, np.sin, 0), r"n must be a positive integer; found 0"),
        (lambda: bcd.Smooth(np.sum, np.sin, 2.0), r"n must be a positive integer; found 2\.0"),
        (lambda: bcd.Smooth(np.sum, np.sin, 2, -1), r"lipschitz must be positive and finite; found -1"),
    ],
)  # fmt: skip
def test_malformed_objectives_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rounding_does_not_make_a_matrix_asymmetric():
    Q = np.eye(2)
    Q[0, 1] = 1e-12
    assert bcd.Quadratic(Q).n == 2


def test_a_gradient_of_the_wrong_shape_is_named():
    objective = bcd.Smooth(lambda x: 0.0, lambda x: np.zeros(3), 2)
    with pytest.raises(ValueError, match=r"grad must return an array of shape \(2,\); found shape \(3,\)"):
        bcd.minimize(bcd.Problem(objective))


def test_the_callables_of_smooth_cannot_spoil_the_point():
    def spoil(x):
        x[:] = np.nan
        return np.array([1.0, -1.0])

    objective = bcd.Smooth(lambda x: x.sum(), spoil, 2, lipschitz=1.0)
    result = bcd.minimize(bcd.Problem(objective, bcd.SumBox(0, 1, 1)), max_iter=50)
    assert result.x.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("form", "rule"),  # gs1 and block look at no pair of a sparse matrix: here their first step ends at a bound
    [
        (form, rule)
        for form in ("dense", "sparse", "groups")
        for rule in bcd.RULES
        if rule != "gs" and not (form == "sparse" and rule in ("gs1", "block"))
    ],
)
@pytest.mark.parametrize("bounds", [(None, None), (0, 1)], ids=["no bounds", "box"])
def test_a_matrix_that_is_not_convex_is_refused_with_the_direction(rule, bounds, form):
    """Curvature 1 + 1 - 2 * 2 = -2 along the only pair that descends, whatever the rule."""
    Q = np.array([[1.0, 2.0], [2.0, 1.0]])
    objective = bcd.Quadratic(sp.csr_array(Q) if form == "sparse" else Q, [0.0, 1.0])
    constraint = bcd.SumBox(*bounds, total=1) if form != "groups" else bcd.SumBox(*bounds, [1.0], [0, 0])
    with pytest.raises(
        ValueError, match=r"Q must be positive semidefinite .*along e_[01] - e_[01] the curvature is -2"
    ):
        bcd.minimize(bcd.Problem(objective, constraint), rule)


def test_a_matrix_convex_on_the_feasible_directions_alone_is_accepted():
    """Indefinite, but x'Qx > 0 on sum(x) = 0: Q = I - 2 ee'/3, whose value is |x|^2/2 - (sum x)^2/3."""
    Q = np.eye(3) - 2 * np.ones((3, 3)) / 3
    assert np.linalg.eigvalsh(Q)[0] < 0
    result = bcd.minimize(bcd.Problem(bcd.Quadratic(Q), bcd.SumBox(total=3)), x0=[3, 0, 0], tol=1e-10)
    np.testing.assert_allclose(result.x, 1, atol=1e-9)


# -- the point of a run --------------------------------------------------------------------------


def test_a_point_with_slacks_has_gradient_zero_there():
    problem = bcd.Problem(bcd.Quadratic(np.eye(2), [1.0, 2.0]), bcd.SumBox(-1, 1, (-1, 0.5)))
    moves = Moves(problem.feasible, np.array([0.25, -0.5]))
    at = Point(problem, moves)
    assert at.grad.tolist() == [1.25, 1.5, 0.0]
    assert at.column(2).tolist() == [0, 0, 0]
    assert at.column(1).tolist() == [0, 1, 0]
    assert at.block(np.array([2, 0])).tolist() == [[0, 0], [0, 1]]
    assert at.diagonal.tolist() == [1, 1, 0]
    assert (at.weight > 0).all()
