# SPDX-License-Identifier: BSD-3-Clause
"""solve_qp and QP: arguments, extremes, hard problems, limits, Ctrl-C, re-solving."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from qps import Case, forms, judge, judge_direction, judge_ray, make_case, rounding
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import bcd
from bcd import QP, InfeasibleError, LowRank, NonConvexError, Status, faces, solve_qp
from bcd.gram import Gram, Kernel
from experiments import qp_problems

FORMS = ("dense", "sparse", "low rank", "sparse factors", "operator")


def case_of(P, q=0.0, total=None, lower=-np.inf, upper=np.inf, weights=None, groups=None):
    """A case with this matrix."""
    P = np.asarray(P, float)
    n = len(P)
    q, lower, upper = (np.array(np.broadcast_to(np.asarray(v, float), n)) for v in (q, lower, upper))
    values, vectors = np.linalg.eigh(P)
    made = Case(
        vectors * np.sqrt(np.maximum(values, 0)),
        np.zeros(n),
        q,
        lower,
        upper,
        np.clip(np.zeros(n), lower, upper),
        total,
        None if weights is None else np.asarray(weights, float),
        groups,
    )
    made.__dict__["P"] = P
    return made


def solved(case, form="dense", **options):
    """The result, judged."""
    result = bcd.solve_qp(forms(case)[form], case.q, **case.options, **options)
    assert result.status is Status.CONVERGED
    judge(case, result, options.get("tol", 1e-8))
    return result


def rotated(rng, spectrum):
    """A matrix with these eigenvalues and a random basis."""
    basis = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    half = basis * np.sqrt(spectrum)
    return half @ half.T


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"P": np.ones((2, 3))}, r"P must be square; found shape \(2, 3\)"),
        ({"P": np.ones(3)}, r"P must be a matrix of shape \(n, n\); found shape \(3,\)"),
        ({"P": np.ones((0, 0))}, r"P must be a matrix of shape \(n, n\)"),
        ({"P": np.array([[1.0, 2.0], [0.0, 1.0]])}, r"P must be symmetric; P\[1, 0\] = 0.0 but P\[0, 1\] = 2.0"),
        ({"P": sp.csc_array([[1.0, 2.0], [0.0, 1.0]])}, r"P must be symmetric; P\[.*\(P \+ P.T\) / 2"),
        ({"P": np.diag([1.0, np.nan])}, "P must be finite; found 1 NaN"),
        ({"P": np.array([[1.0, np.inf], [np.inf, 1.0]])}, "P must be finite"),
        ({"P": sp.csc_array(np.diag([1.0, np.inf]))}, "P must be finite"),
        ({"P": np.array([["a"]])}, "P must hold real numbers"),
        ({"P": np.eye(2) * 1j}, "P must hold real numbers"),
        ({"P": aslinearoperator(np.ones((2, 3)))}, r"P must be square; found shape \(2, 3\)"),
        ({"P": aslinearoperator(np.array([[1.0, 5.0], [0.0, 1.0]]))}, "operator must be symmetric"),
        ({"P": aslinearoperator(np.diag([1.0, np.nan]))}, "must be finite for finite v"),
        ({"q": np.zeros(2)}, r"q must have shape \(3,\); found shape \(2,\)"),
        ({"q": [0, np.nan, 0]}, r"q must be finite; q\[1\] is nan"),
        ({"q": ["a", "b", "c"]}, "q must hold real numbers"),
        ({"lower": np.zeros(2)}, r"lower must be a scalar or have shape \(3,\)"),
        ({"upper": [1, np.nan, 1]}, "upper must not be NaN.*found NaN at 1"),
        ({"lower": 1, "upper": 0}, r"lower must not exceed upper; lower\[0\] = 1.0 and upper\[0\] = 0.0"),
        ({"lower": np.inf}, r"lower must not be \+inf"),
        ({"total": "one"}, "total must be a number or a pair"),
        ({"total": (1, 2, 3)}, "total must be a number or a pair"),
        ({"total": (2, 1)}, r"total must be a number or a pair \(lo, hi\) with lo <= hi"),
        ({"total": np.inf}, "total must be finite"),
        ({"total": np.nan}, "total must be finite"),
        ({"total": 1, "weights": np.ones(2)}, r"weights must have shape \(3,\)"),
        ({"total": 1, "weights": [0, 0, 0]}, "weights must not all be 0"),
        ({"total": 1, "weights": [1, 1e-15, 1]}, r"weights must be 0 or at least .* weights\[1\] is 1e-15"),
        ({"total": 1, "weights": [1, np.inf, 1]}, r"weights must be finite"),
        ({"total": "one", "weights": [1, 1, 1]}, "total must be a number or a pair"),
        ({"total": 1, "groups": [0, 0, 1]}, "total must list one entry for each of the 2 groups"),
        ({"total": [1], "groups": [0, 0, 1]}, "found 1 totals, 2 groups"),
        ({"total": [1, 1], "groups": [0.0, 0.5, 1.0]}, "groups must be an integer array"),
        ({"total": [1, 1], "groups": [0, 1]}, r"groups must be an integer array of shape \(3,\)"),
        ({"x0": np.zeros(2)}, r"x0 must have shape \(3,\)"),
        ({"x0": [0, np.inf, 0]}, r"x0 must be finite; x0\[1\] is inf"),
        ({"tol": -1}, "tol must be at least 0; found -1"),
        ({"tol": "small"}, "tol must be a number; found 'small'"),
        ({"tol": np.nan}, "tol must be at least 0; found nan"),
        ({"tol_gap": -1}, "tol_gap must be at least 0"),
        ({"max_iter": -1}, "max_iter must be at least 0"),
        ({"time_limit": -0.5}, "time_limit must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"P": np.eye(3)} | arguments
    with pytest.raises(ValueError, match=message):
        solve_qp(arguments.pop("P"), **arguments)


def test_factors_are_checked():
    with pytest.raises(ValueError, match=r"D must be non-negative; found -1\.0 at 1"):
        LowRank(np.ones((2, 1)), [1.0, -1.0])
    with pytest.raises(ValueError, match="F must be finite"):
        LowRank(np.full((2, 1), np.nan))


@pytest.mark.parametrize(
    "P",
    [
        [[2, 0], [0, 4]],
        np.diag([2, 4]),
        np.diag(np.array([2, 4], np.float32)),
        np.asfortranarray(np.diag([2.0, 4.0])),
        np.diag([2.0, 7.0, 4.0, 7.0])[::2, ::2],
        sp.csr_array(np.diag([2.0, 4.0])),
        sp.coo_matrix(np.diag([2, 4])),
        sp.csc_array((np.array([1.0, 1.0, 4.0]), np.array([0, 0, 1]), np.array([0, 2, 3])), shape=(2, 2)),
        LinearOperator((2, 2), matvec=lambda v: np.array([2.0, 4.0]) * v, dtype=np.float64),
        LowRank(np.zeros((2, 1)), [2, 4]),
        LowRank(np.diag(np.sqrt([2.0, 4.0]))),
    ],
    ids=[
        "list",
        "int",
        "float32",
        "fortran",
        "strided",
        "csr",
        "coo int",
        "duplicates",
        "operator",
        "diagonal",
        "factors",
    ],
)
def test_whatever_holds_a_matrix(P):
    np.testing.assert_allclose(solve_qp(P, total=3, lower=0).x, [2, 1], rtol=1e-12)


def test_arguments_are_left_alone():
    rng = np.random.default_rng(0)
    case = make_case(5, 12, "definite", "normal", "mixed", "groups", "signed")
    x0 = rng.standard_normal(12)
    given = [case.P, case.q, case.lower, case.upper, case.weights, case.groups, x0]
    copies = [a.copy() for a in given]
    for a in given:
        a.flags.writeable = False
    case.solve(x0=x0)
    for a, b in zip(given, copies, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_result_is_the_callers_own():
    """The next solve and the caller do not write into each other's arrays."""
    qp = QP(np.eye(3))
    first = qp.solve(total=1, lower=0)
    kept = first.x.copy()
    second = qp.solve([5.0, 0, 0], total=1, lower=0)
    np.testing.assert_array_equal(first.x, kept)
    second.x[:] = np.nan
    np.testing.assert_allclose(qp.solve(total=1, lower=0).x, 1 / 3)


def test_a_result_prints_and_goes_into_json():
    result = solve_qp(np.eye(3), total=1)
    assert "Converged" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["status"] == "converged"
    ray = solve_qp(np.zeros((2, 2)), [1.0, 0.0]).as_dict()["ray"]
    assert ray[0] < 0


def test_names_and_imports():
    assert bcd.solve_qp is solve_qp
    assert bcd.qp.solve_qp is solve_qp
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        bcd.qp.nonsense  # noqa: B018
    code = "import bcd, sys; from bcd.qp import QP; print({'torch', 'cvxpy', 'qpsolvers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# -- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("P", "q", "total", "lower", "upper", "x"),
    [
        (2.0, -4.0, None, -np.inf, np.inf, 2.0),
        (2.0, -4.0, None, 0.0, 1.0, 1.0),
        (2.0, -4.0, 3.0, -np.inf, np.inf, 3.0),
        (2.0, -4.0, 3.0, 3.0, 3.0, 3.0),
        (2.0, -4.0, (None, 1.5), 0.0, np.inf, 1.5),
        (2.0, -4.0, (2.5, None), 0.0, np.inf, 2.5),
        (2.0, -4.0, (1.0, 3.0), 0.0, np.inf, 2.0),
        (0.0, -4.0, None, 0.0, 1.0, 1.0),
        (0.0, 0.0, None, 0.0, 1.0, None),
        (0.0, 4.0, (None, 5.0), -1.0, np.inf, -1.0),
        (0.0, -4.0, (None, 5.0), -1.0, np.inf, 5.0),
    ],
)
def test_one_coordinate(form, P, q, total, lower, upper, x):
    result = solved(case_of([[P]], q, total, lower, upper), form)
    if x is not None:
        np.testing.assert_allclose(result.x, [x], rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sums", ["none", "total", "range", "side", "groups", "vertex"])
def test_all_coordinates_fixed(form, sums):
    case = make_case(3, 9, "definite", "normal", "fixed", sums, "signed")
    result = solved(case, form)
    np.testing.assert_array_equal(result.x, case.lower)
    assert result.violation == 0
    assert result.gap == 0


def test_bounds_that_are_one_array():
    """Fixed by one and the same array for both bounds, with weights that round."""
    bound = np.array([0.1, 0.2, 0.7, -0.3])
    weights = np.array([0.3, -0.7, 1.1, 0.0])
    result = solve_qp(np.eye(4), total=math.fsum(weights * bound), weights=weights, lower=bound, upper=bound)
    np.testing.assert_array_equal(result.x, bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["lower", "upper"])
def test_one_feasible_point(form, end):
    """The total is the sum of the bounds of one side, which rounds."""
    rng = np.random.default_rng(1)
    lower = rng.random(30)
    upper = lower + rng.random(30)
    total = math.fsum(lower if end == "lower" else upper)
    case = case_of(rotated(rng, np.linspace(1, 5, 30)), rng.standard_normal(30), total, lower, upper)
    result = solved(case, form)
    np.testing.assert_allclose(result.x, lower if end == "lower" else upper, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_every_coordinate_at_a_bound(form):
    rng = np.random.default_rng(2)
    q = np.where(rng.random(40) < 0.5, -100.0, 100.0)
    case = case_of(rotated(rng, np.linspace(1, 5, 40)), q, None, 0.0, 1.0)
    result = solved(case, form)
    np.testing.assert_array_equal(result.x, q < 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_program(form):
    """P = 0: filled from the cheapest on."""
    rng = np.random.default_rng(3)
    q, upper = rng.standard_normal(60), rng.uniform(0.5, 1.5, 60)
    case = Case(np.zeros((60, 1)), np.zeros(60), q, np.zeros(60), upper, np.zeros(60), 10.0)
    result = solved(case, form)
    order = np.argsort(q)
    filled = np.clip(10.0 - np.concatenate([[0], np.cumsum(upper[order])[:-1]]), 0, upper[order])
    np.testing.assert_allclose(result.x[order], filled, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_program_over_groups_and_ranges(form):
    from scipy.optimize import linprog

    rng = np.random.default_rng(4)
    q, groups = rng.standard_normal(40), rng.integers(-1, 3, 40)
    totals = [3.0, (1.0, 4.0), (None, 2.0)]
    case = Case(np.zeros((40, 1)), np.zeros(40), q, np.zeros(40), np.ones(40), np.zeros(40), totals, None, groups)
    result = solved(case, form)
    A = case.sums[0]
    found = linprog(q, np.concatenate([A[1:], -A[1:2]]), [4, 2, -1], A[:1], [3], bounds=(0, 1))
    np.testing.assert_allclose(result.objective, found.fun, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_minimise(form):
    """P = 0, q = 0: any feasible point."""
    case = Case(np.zeros((5, 1)), np.zeros(5), np.zeros(5), np.zeros(5), np.full(5, np.inf), np.ones(5), 3.0)
    assert solved(case, form).violation == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_least_norm_on_a_plane(form):
    """No linear term, no bounds."""
    case = Case(
        np.zeros((50, 1)), np.ones(50), np.zeros(50), np.full(50, -np.inf), np.full(50, np.inf), np.ones(50), 1.0
    )
    np.testing.assert_allclose(solved(case, form).x, 1 / 50, rtol=1e-12)


@pytest.mark.parametrize("form", ["low rank", "sparse factors"])
def test_factors_that_are_zero(form):
    rng = np.random.default_rng(5)
    F = rng.standard_normal((30, 6))
    F[:, [0, 3]] = 0.0
    F[7] = 0.0
    D = np.where(np.arange(30) == 7, 0.0, 0.5)
    case = Case(F, D, rng.standard_normal(30), np.zeros(30), np.full(30, 0.2), np.full(30, 0.1), 2.0)
    solved(case, form)


@pytest.mark.parametrize("form", FORMS)
def test_ties_everywhere(form):
    """Equal coordinates, totals at multiples of the bounds: multipliers are 0 and sides are any."""
    for total in (0.0, 1.0, 4.0, 7.5, 8.0):
        case = Case(np.ones((8, 1)), np.full(8, 0.5), np.full(8, -1.0), np.zeros(8), np.ones(8), np.zeros(8), total)
        np.testing.assert_allclose(solved(case, form).x, total / 8, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("form", FORMS)
def test_units_do_not_matter(form, scale):
    """f, or x, in other units."""
    rng = np.random.default_rng(6)
    n = 25
    F, D, q = rng.standard_normal((n, 5)), rng.uniform(0.3, 1, n), rng.standard_normal(n)
    base = Case(F, D, q, np.zeros(n), np.full(n, 0.2), np.full(n, 0.04), 1.0)
    plain = solved(base, form)
    root = math.sqrt(scale)
    steep = Case(root * F, scale * D, scale * q, base.lower, base.upper, base.inside, 1.0)
    result = bcd.solve_qp(forms(steep)[form], steep.q, **steep.options, tol=1e-8 * min(scale, 1.0))
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result.x, plain.x, atol=1e-6)
    long = Case(F / scale, D / scale**2, q / scale, base.lower, scale * base.upper, scale * base.inside, scale)
    result = bcd.solve_qp(forms(long)[form], long.q, **long.options, tol=1e-8 * min(1 / scale, 1.0))
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result.x / scale, plain.x, atol=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "operator"])
def test_scales_far_apart(form):
    """A large curvature beside a small one: neither is taken for rounding of the other.

    Not for operators: products alone do not tell a curvature of 1e-6 from the rounding of one of 1e12.
    """
    case = Case(np.zeros((3, 1)), np.array([1e12, 1.0, 1e-6]), np.array([0.0, -1.0, -1e-3]), np.full(3, -np.inf),
                np.full(3, np.inf), np.zeros(3))  # fmt: skip
    result = solved(case, form)
    np.testing.assert_allclose(result.x, [0, 1, 1e3], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "operator"])
def test_flat_coordinates_take_up_the_rounding_of_a_sum(form):
    """Entries up to 4e5 round by 6e-11, which times a curvature of 1.5e6 would be 1e-4 in the gradient."""
    case = make_case(104, 29, "scaled", "normal", "free", "total", "none")
    result = solved(case, form)
    assert np.abs(result.x).max() > 1e5
    assert case.P.diagonal().max() > 1e6
    assert result.iterations <= 5
    assert math.fsum(result.x) == case.total


# -- hard problems -------------------------------------------------------------------------------


def counted(P):
    """An operator, and a list that grows by the number of columns of every product."""
    columns = []

    def product(X):
        columns.append(1 if X.ndim == 1 else X.shape[1])
        return P @ X

    return LinearOperator(P.shape, matvec=product, matmat=product, dtype=np.float64), columns


def test_an_operator_on_which_conjugate_gradients_fail_is_formed(monkeypatch):
    case = make_case(0, 100, "scaled", "normal", "simplex", "total", "none")
    operator, columns = counted(case.P)
    result = bcd.solve_qp(operator, case.q, **case.options)
    assert result.status is Status.CONVERGED
    judge(case, result)
    assert max(columns) == case.n
    monkeypatch.setattr(faces, "MOST_FORMED", case.n - 1)
    operator, columns = counted(case.P)
    other = bcd.solve_qp(operator, case.q, **case.options)
    assert max(columns) == 1
    assert other.objective >= result.objective - 1e-9 * case.size(result.x)


@pytest.mark.parametrize("stop", ["time limit", "Ctrl-C"])
def test_conjugate_gradients_are_halted(stop):
    """A step of an operator may take thousands of products: limits are looked at between those."""
    rng = np.random.default_rng(5)
    n = 2500  # beyond what is formed
    P = np.geomspace(1e-8, 1, n)
    seen = []

    def slow(v):
        seen.append(time.sleep(0.005))
        if stop == "Ctrl-C" and len(seen) == 40:
            signal.raise_signal(signal.SIGINT)
        return P * v

    operator = LinearOperator((n, n), matvec=slow, dtype=np.float64)
    limit = 0.3 if stop == "time limit" else None
    result = bcd.solve_qp(operator, rng.standard_normal(n), total=1, lower=-1e9, time_limit=limit)
    assert result.status is (Status.TIME_LIMIT if limit else Status.INTERRUPTED)
    assert len(seen) < 200
    assert result.certificate.infeasibility == 0


def test_an_operator_in_good_condition_is_never_formed():
    case = make_case(0, 100, "definite", "normal", "simplex", "total", "none")
    operator, columns = counted(case.P)
    assert bcd.solve_qp(operator, case.q, **case.options).status is Status.CONVERGED
    assert max(columns) == 1


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e10])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_ill_conditioned_with_many_free(form, condition):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n = 150
        P = rotated(rng, np.geomspace(1, condition, n))
        case = case_of(P, 10 / n * rng.standard_normal(n), 1.0, 0.0, 5 / n)
        result = solved(case, form)
        assert 0.1 * n < np.count_nonzero((result.x > 0) & (result.x < 5 / n))


@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_ill_conditioned_downwards(condition):
    """Largest eigenvalue 1: flat directions of curvature 1 / condition."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        P = rotated(rng, np.geomspace(1, 1 / condition, 120))
        x = rng.uniform(-0.5, 1.5, 120)
        solved(case_of(P, -P @ x, float(x.sum()), 0.0, 1.0))
        solved(case_of(P, -P @ x, None, -1.0, 1.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 5, 60])
def test_singular_with_many_free(form, rank):
    """Many solutions: any will do."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n = 120
        F = rng.standard_normal((n, rank))
        x = rng.uniform(0.2, 0.8, n)
        for q in (-F @ (F.T @ x), -F @ (F.T @ x) + 0.1 * rng.standard_normal(n)):
            solved(Case(F, np.zeros(n), q, np.zeros(n), np.ones(n), x, float(x.sum())), form)


@pytest.mark.parametrize("form", FORMS)
def test_least_squares_on_the_simplex(form):
    """More coordinates than rows, and a target inside the hull: the minimum is 0 and not unique."""
    rng = np.random.default_rng(8)
    A = rng.random((10, 60))
    target = A @ rng.dirichlet(np.ones(60))
    case = Case(A.T, np.zeros(60), -A.T @ target, np.zeros(60), np.full(60, np.inf), np.full(60, 1 / 60), 1.0)
    result = solved(case, form)
    assert abs(result.objective + 0.5 * target @ target) <= 1e-8


FAMILIES = {
    "wishart": qp_problems.wishart,
    "mostly free": qp_problems.mostly_free,
    "ill-conditioned": qp_problems.ill_conditioned,
    "factors": lambda n, seed: qp_problems.factor_model(n, seed, 10),
    "huge": qp_problems.huge,
}


def family_case(family, n, seed):
    """A problem of the experiments as a case."""
    problem = FAMILIES[family](n, seed)
    lower, upper = (np.array(np.broadcast_to(b, n), float) for b in (problem.lower, problem.upper))
    inside = np.full(n, problem.total / n)
    if isinstance(problem.P, qp_problems.Factors):
        return Case(problem.P.F, problem.P.D, problem.q, lower, upper, inside, problem.total)
    made = Case(np.linalg.cholesky(problem.P), np.zeros(n), problem.q, lower, upper, inside, problem.total)
    made.__dict__["P"] = problem.P
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [20, 200])
def test_families_of_the_experiments(family, n):
    for seed in range(3):
        case = family_case(family, n, seed)
        dense = solved(case)
        if family in ("factors", "huge"):
            low = solved(case, "low rank")
            room = low.gap + dense.gap + 1e-13 * case.size(low.x)
            assert abs(low.objective - dense.objective) <= room


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("family", ["most free", "ill-conditioned"])
def test_pair_steps_come_first_while_they_go_fast(monkeypatch, family, groups):
    """On an easy problem they leave one factorisation, on an ill-conditioned one they soon give way to damped steps."""
    n = 600
    make = qp_problems.mostly_free if family == "most free" else qp_problems.ill_conditioned
    problem, orders = make(n, 0), []
    factor = faces._cholesky

    def counted(K, damping):
        orders.append((len(K), damping is not None))
        return factor(K, damping)

    monkeypatch.setattr(faces, "_cholesky", counted)
    labels = None if groups == 1 else np.repeat(np.arange(groups), n // groups)
    total = 1.0 if groups == 1 else [1.0 / groups] * groups
    result = solve_qp(problem.P, problem.q, total=total, groups=labels, lower=0, upper=problem.upper)
    assert result.status is Status.CONVERGED
    damped = [order for order, with_damping in orders if with_damping]
    if family == "most free":
        assert not damped
        assert len(orders) == 1
        assert n // 2 <= result.iterations <= 5 * n // 2 + 5
    else:
        assert damped
        assert n // 2 <= result.iterations <= 3 * n // 2 + 20


def test_pair_steps_end_at_no_saddle_point():
    """Negative curvature that no pair has is an error, or gone at the answer, where pair steps come first as well."""
    n, errors = 400, 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        v = rng.choice([-1.0, 1.0], n)
        v -= v.mean()
        P = np.eye(n) - (1 + 10.0**-seed) * np.outer(v, v) / (v @ v)
        q = 0.2 / n * rng.standard_normal(n)
        q -= (v @ q) / (v @ v) * v
        try:
            result = solve_qp(P, q, total=1, lower=0, upper=3 / n)
        except NonConvexError as error:
            judge_direction(case_of(P, q, 1.0), error)
            errors += 1
            continue
        free = np.flatnonzero((result.x > 0) & (result.x < 3 / n))
        Z = np.linalg.qr(np.column_stack([np.ones(len(free)), np.eye(len(free))[:, 1:]]))[0][:, 1:]
        assert np.linalg.eigvalsh(Z.T @ P[np.ix_(free, free)] @ Z)[0] >= -1e-9
    assert errors > 2


@pytest.mark.parametrize("family", ["wishart", "ill-conditioned", "factors"])
def test_a_solve_of_the_next_day_costs_less(family):
    case = family_case(family, 200, 0)
    qp = QP(LowRank(case.F, case.D) if family == "factors" else case.P)
    first = qp.solve(case.q, **case.constraints)
    again = qp.solve(case.q, **case.constraints)
    assert again.iterations <= min(2, first.iterations)
    rng = np.random.default_rng(0)
    moved = qp.solve(case.q * (1 + 0.01 * rng.standard_normal(200)), **case.constraints)
    assert moved.status is Status.CONVERGED
    assert moved.iterations <= first.iterations


@pytest.mark.parametrize("n", [20_000])
def test_many_coordinates_and_few_factors(n):
    """Certified without a matrix."""
    rng = np.random.default_rng(9)
    F, D = rng.standard_normal((n, 5)), rng.uniform(0.5, 1, n)
    result = solve_qp(LowRank(F, D), rng.standard_normal(n) / n, total=1, lower=0, upper=10 / n)
    assert result.status is Status.CONVERGED
    g = F @ (F.T @ result.x) + D * result.x
    assert result.violation <= 1e-8 * max(1, np.abs(g).max())
    assert result.gap <= 1e-7


# -- weights, groups, ranges ---------------------------------------------------------------------


def test_weights_are_a_change_of_variables():
    rng = np.random.default_rng(10)
    w = rng.uniform(0.5, 2, 15) * rng.choice([-1, 1], 15)
    case = make_case(1, 15, "definite", "normal", "box", "none")
    P, q = case.P, case.q
    a = solve_qp(P, q, total=0.3, weights=w, lower=-1, upper=2)
    lower, upper = np.minimum(-w, 2 * w), np.maximum(-w, 2 * w)
    S = P / np.outer(w, w)
    b = solve_qp(0.5 * (S + S.T), q / w, total=0.3, lower=lower, upper=upper)
    np.testing.assert_allclose(a.x, b.x / w, atol=1e-8)
    np.testing.assert_allclose(a.total_multipliers, b.total_multipliers, atol=1e-7)


def test_a_weight_of_zero_is_no_part_of_the_sum():
    result = solve_qp(np.eye(3), [0.0, 0.0, -5.0], total=1, weights=[1.0, 1.0, 0.0])
    np.testing.assert_allclose(result.x, [0.5, 0.5, 5.0])
    np.testing.assert_allclose(result.bound_multipliers, 0, atol=1e-12)


@pytest.mark.parametrize("last", [0.0, (None, 1.0), (-1.0, 1.0), None])
def test_a_group_whose_weights_are_all_zero(last):
    """Its sum is 0 whatever x is."""
    result = solve_qp(np.eye(3), -1.0, total=[1.0, last], weights=[1.0, 1.0, 0.0], groups=[0, 0, 1])
    np.testing.assert_allclose(result.x, [0.5, 0.5, 1.0])
    assert result.total_multipliers.shape == (2,)


def test_a_group_without_members():
    result = solve_qp(np.eye(3), total=[1.0, 0.0, (0.0, 2.0)], groups=[0, 0, 2])
    np.testing.assert_allclose(result.x, [0.5, 0.5, 0.0], atol=1e-12)
    with pytest.raises(InfeasibleError, match=r"total\[1\] = 1.0 cannot be reached"):
        solve_qp(np.eye(3), total=[1.0, 1.0, 0.0], groups=[0, 0, 2])


def test_labels_that_are_all_negative():
    np.testing.assert_allclose(solve_qp(np.eye(2), -1.0, total=[], groups=[-1, -3]).x, 1.0)


def test_an_open_total_is_no_sum():
    for total in (None, (None, None), (-np.inf, np.inf)):
        result = solve_qp(np.eye(2), [-1.0, -3.0], total=total)
        np.testing.assert_allclose(result.x, [1, 3])
        assert (result.total_multipliers == 0).all()


def test_violation_in_x_with_weights():
    """Small weights stretch t = w x: the tolerance holds for the gradient in x all the same."""
    rng = np.random.default_rng(11)
    for seed in range(20):
        w = 10.0 ** rng.uniform(-6, 0, 30)
        case = make_case(seed, 30, "definite", "normal", "box", "none")
        total = float(w @ case.inside)
        result = solve_qp(case.P, case.q, total=total, weights=w, lower=case.lower, upper=case.upper)
        assert result.status is Status.CONVERGED
        g = case.gradient(result.x)
        residual = g + w * result.total_multipliers[0] + result.bound_multipliers
        assert np.abs(residual).max() <= 0.5e-8 * max(1, np.abs(g).max()) + rounding(case, result.x).max()


def test_multipliers_with_weights_are_those_that_the_tolerance_is_of():
    """Weights over four powers of ten and a residual near the tolerance: in x the best y is not the best in t."""
    solved(replace(make_case(642, 14, "scaled", "zero", "box", "total", "wide"), dent=0.1))
    solved(make_case(145, 21, "diagonal", "zero", "box", "total", "wide"), "operator")
    solved(make_case(265, 30, "zero rows", "tiny", "simplex", "groups", "wide"), "operator")


# -- what is wrong with the problem --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 5}, r"total = 5.* cannot be reached: the bounds allow sums from 0.* to 3.*, which misses it by 2;"),
        ({"total": (4, 5)}, r"total = \(4.*, 5.*\) cannot be reached.*misses it by 1;"),
        ({"total": -1}, "misses it by 1;"),
        ({"total": [1, 2.5], "groups": [0, 0, 1]}, r"total\[1\] = 2.5 .*misses it by 1.5;"),
        ({"total": 20, "weights": [2, 2, 4]}, r"total = 20.* allow sums from 0.* to 8.*, which misses it by 12;"),
        ({"total": 5, "weights": [2, -2, 0]}, r"allow sums from -2.* to 2.*, which misses it by 3;"),
    ],
)
def test_an_infeasible_total(options, message):
    with pytest.raises(InfeasibleError, match=message):
        solve_qp(np.eye(3), lower=0, upper=1, **options)


def test_after_an_error_a_qp_goes_on():
    qp = QP(np.eye(3))
    with pytest.raises(InfeasibleError):
        qp.solve(total=5, lower=0, upper=1)
    np.testing.assert_allclose(qp.solve(total=1, lower=0, upper=1).x, 1 / 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("total", [None, 0.0, (None, 3.0), (0.0, None)])
def test_a_ray(form, total):
    F = np.array([[1.0], [1.0], [0.0]])
    case = Case(
        F,
        np.array([0, 0, 1.0]),
        np.array([-1.0, 1.0, 0.0]),
        np.full(3, -np.inf),
        np.full(3, np.inf),
        np.zeros(3),
        total,
    )
    result = bcd.solve_qp(forms(case)[form], case.q, **case.options)
    assert result.status is Status.UNBOUNDED
    judge_ray(case, result)
    assert "falls without end" in result.status.value
    one_sided = Case(*(case.F, case.D, case.q), np.zeros(3), np.full(3, np.inf), np.zeros(3), total)
    if total in (0.0, (None, 3.0)):
        solved(one_sided, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_ray_through_weights(form):
    """In the sum 2 x_0 - x_1 both rise together."""
    zero = np.zeros(2)
    case = Case(zero[:, None], zero, np.full(2, -1.0), zero, np.full(2, np.inf), zero, 0.0, np.array([2.0, -1.0]))
    result = bcd.solve_qp(forms(case)[form], case.q, **case.options)
    assert result.status is Status.UNBOUNDED
    judge_ray(case, result)
    np.testing.assert_allclose(result.ray / result.ray.max(), [0.5, 1.0])


def test_no_ray_leaves_a_sum():
    """P is strictly convex on the sum, and f would fall without end across it."""
    case = replace(make_case(405, 2, "definite", "ties", "mixed", "total", "signed"), dent=1000.0)
    solved(case)


def bent(P, form):
    return {"dense": P, "sparse": sp.csc_array(P), "operator": aslinearoperator(P)}[form]


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
@pytest.mark.parametrize("sums", ["none", "total", "groups", "weights"])
def test_no_saddle_point_is_an_answer(form, sums):
    """Started at, or led to, a stationary point that is no minimum."""
    rng = np.random.default_rng(12)
    options = {"none": {}, "total": {"total": 0.0}, "groups": {"total": [0.0, 0.0], "groups": [0] * 5 + [1] * 5},
               "weights": {"total": 0.0, "weights": rng.uniform(0.5, 2, 10)}}[sums]  # fmt: skip
    P = rotated(rng, np.linspace(1, 3, 10)) + 0.0
    v = np.concatenate([[1, -2, 1, 0, 0], [2, -1, -1, 0, 0]]).astype(float)
    if sums == "weights":
        v -= options["weights"] * (options["weights"] @ v) / (options["weights"] @ options["weights"])
    v /= np.linalg.norm(v)
    P -= (v @ P @ v + 2.0) * np.outer(v, v)
    P = 0.5 * (P + P.T)
    case = case_of(P, rng.standard_normal(10), **options)
    for start in (None, np.zeros(10)):
        with pytest.raises(NonConvexError) as caught:
            solve_qp(bent(P, form), case.q, **options, x0=start)
        judge_direction(case, caught.value)


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
def test_the_curvature_told_is_that_of_the_matrix(form):
    """Not that of a problem with damped steps, in which it may show first."""
    shown = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        v = rng.standard_normal(12)
        P = rotated(rng, np.geomspace(0.1, 1, 12)) - 1.2 * np.outer(v, v) / (v @ v)
        case = case_of(0.5 * (P + P.T), rng.standard_normal(12), lower=0.0)
        try:
            bcd.solve_qp(bent(case.P, form), case.q, **case.options)
        except NonConvexError as error:
            judge_direction(case, error)
            shown += 1
    assert shown > 20


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_negative_curvature_of_a_pair_or_alone_is_named(form):
    """It is read off the entries, whether or not it matters at the solution; an operator shows none."""
    P = np.diag([1.0, 1.0, 1.0, -3.0])
    with pytest.raises(NonConvexError, match="positive semidefinite on the feasible directions") as caught:
        solve_qp(bent(P, form), total=1, lower=-1, upper=1)
    judge_direction(case_of(P, total=1), caught.value)
    with pytest.raises(NonConvexError) as caught:
        solve_qp(bent(P, form), lower=-1, upper=1)
    judge_direction(case_of(P), caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
def test_a_fixed_coordinate_may_have_any_curvature(form):
    """It is no feasible direction."""
    P = np.diag([1.0, 1.0, -5.0])
    upper = np.array([1.0, 1.0, 0.2])
    lower = np.array([0.0, 0.0, 0.2])
    for total in (1.0, None):
        result = solve_qp(bent(P, form), total=total, lower=lower, upper=upper)
        np.testing.assert_allclose(result.x, [0.4, 0.4, 0.2] if total else [0, 0, 0.2], atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
def test_convex_on_the_sum_with_others_alone(form):
    """Indefinite where the sum changes only; one coordinate is in no sum."""
    P = np.zeros((5, 5))
    P[:4, :4] = np.eye(4) - 2.0
    P[4, 4] = 1.0
    case = case_of(P, [0.1, 0.2, 0.3, 0.4, -1.0], [1.0], groups=np.array([0, 0, 0, 0, -1]))
    result = solve_qp(bent(P, form), case.q, **case.options)
    assert result.status is Status.CONVERGED
    judge(case, result)
    np.testing.assert_allclose(result.x, [0.4, 0.3, 0.2, 0.1, 1.0], atol=1e-7)


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
def test_rounding_is_no_negative_curvature(form):
    """A diagonal entry, an eigenvalue, a pair of -1e-17 where zero is meant."""
    P = np.diag([1.0, 1.0, -1e-17])
    np.testing.assert_allclose(solve_qp(bent(P, form), [-1, -1, 1], lower=0, upper=1).x, [1, 1, 0], atol=1e-8)
    P = np.ones((3, 3)) - np.diag([0, 1e-16, 0])
    solve_qp(bent(P, form), total=1, lower=0)


# -- limits and Ctrl-C ---------------------------------------------------------------------------


@pytest.fixture
def hard():
    """A problem that takes a number of rounds."""
    rng = np.random.default_rng(13)
    n = 60
    P = rotated(rng, np.geomspace(1, 1e-4, n))
    return case_of(P, -P @ rng.uniform(-1, 2, n), 0.5 * n, 0.0, 1.0)


def test_no_iterations_at_all(hard):
    start = np.full(hard.n, 0.5)
    result = hard.solve(max_iter=0, x0=start)
    assert result.status is Status.ITERATION_LIMIT
    assert result.iterations == 0
    np.testing.assert_array_equal(result.x, start)
    assert np.isfinite(result.gap)
    assert hard.solve(max_iter=0, x0=hard.solve().x).violation <= 1e-8


def test_no_time_at_all(hard):
    result = hard.solve(time_limit=0)
    assert result.status is Status.TIME_LIMIT
    assert abs(result.x.sum() - 0.5 * hard.n) <= 1e-12 * hard.n
    assert result.gap >= hard.value(result.x) - hard.solve().objective - 1e-12


def test_time_limits_are_kept():
    """Each step is short; the clock is looked at between them."""
    rng = np.random.default_rng(14)
    P = rotated(rng, np.geomspace(1, 1e-8, 300))
    solve_qp(np.eye(3), total=1, lower=0)
    started = time.perf_counter()
    result = solve_qp(P, -P @ rng.uniform(-1, 2, 300), total=150, lower=0, upper=1, tol=0, time_limit=0.2)
    assert time.perf_counter() - started < 2
    assert result.status in (Status.TIME_LIMIT, Status.STAGNATED, Status.CONVERGED)


def test_the_callback_sees_the_run_and_stops_it(hard):
    seen = []
    full = hard.solve(callback=lambda progress: seen.append(progress) and None)
    assert full.status is Status.CONVERGED
    assert [p.iteration for p in seen] == sorted(p.iteration for p in seen)
    assert all(p.seconds >= 0 and p.columns >= 0 and p.violation >= 0 for p in seen)
    points = []
    result = hard.solve(callback=lambda progress: points.append(progress.x) or True)
    assert result.status is Status.CALLBACK
    assert not result.status.ok
    np.testing.assert_array_equal(result.x, points[0])


def test_the_callback_sees_x_itself_with_weights_and_slacks():
    w, q, start = np.array([2.0, -0.5, 0.0, 1.0]), np.array([-1, 2, 0.3, 0.1]), [0.3, 0.1, 0.2, 0.0]
    seen = []
    solve_qp(
        np.eye(4), q, total=(0.5, 0.8), weights=w, lower=-1, upper=1, x0=start,
        callback=lambda p: seen.append((p.x, p.objective)),
    )  # fmt: skip
    x, told = seen[0]
    np.testing.assert_allclose(x, start, atol=1e-12)
    assert abs(told - (0.5 * x @ x + q @ x)) <= 1e-12


def test_an_error_in_the_callback_passes_through(hard):
    def broken(progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hard.solve(callback=broken)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def press(progress):
    signal.raise_signal(signal.SIGINT)


def press_twice(progress):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_keeps_the_point(hard):
    result = hard.solve(x0=np.full(hard.n, 0.5), callback=press, tol=0)  # no round ends at violation 0
    assert result.status is Status.INTERRUPTED
    assert hard.value(result.x) <= hard.value(np.full(hard.n, 0.5)) + 1e-12
    assert np.isfinite(result.gap)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts(hard):
    with pytest.raises(KeyboardInterrupt):
        hard.solve(callback=press_twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_needs_no_signals(hard):
    results = []
    thread = threading.Thread(target=lambda: results.append(hard.solve()))
    thread.start()
    thread.join()
    assert results[0].status is Status.CONVERGED


def kernel_problem(n=400):
    rng = np.random.default_rng(15)
    X = rng.standard_normal((n, 3))
    return Gram(X, Kernel("rbf", gamma=0.3)), {"q": -rng.random(n), "total": 1, "lower": 0, "upper": 5 / n}


def test_ctrl_c_with_a_kernel_matrix():
    gram, options = kernel_problem()
    looks = []

    def press_once(progress):
        looks.append(progress)
        if len(looks) == 1:
            signal.raise_signal(signal.SIGINT)

    result = solve_qp(gram, **options, callback=press_once)
    assert result.status is Status.INTERRUPTED
    assert len(looks) == 1
    assert abs(result.x.sum() - 1) <= 1e-12
    with pytest.raises(KeyboardInterrupt):
        solve_qp(gram, **options, callback=press_twice)


# -- kernel matrices -----------------------------------------------------------------------------


def kernel_case(gram, options, n):
    K = gram.kernel(gram.rows.source, gram.rows.source)
    return case_of(0.5 * (K + K.T), options["q"], options["total"], options["lower"], options["upper"])


@pytest.mark.parametrize("n", [1, 2, 60, 400])
def test_a_kernel_matrix(n):
    gram, options = kernel_problem(n)
    result = solve_qp(gram, **options)
    assert result.status is Status.CONVERGED
    judge(kernel_case(gram, options, n), result)


def test_kernel_matrices_again_from_the_last_point():
    gram, options = kernel_problem(200)
    qp = QP(gram)
    first = qp.solve(**options)
    again = qp.solve(**options)
    assert again.iterations <= first.iterations / 5
    assert abs(again.objective - first.objective) <= first.gap + again.gap + 1e-14


def test_a_gap_is_reached_with_a_kernel_matrix():
    gram, options = kernel_problem(200)
    rough = solve_qp(gram, **options, tol=1e-2)
    target = 1e-10
    assert rough.gap > target
    assert solve_qp(gram, **options, tol=1e-2, tol_gap=target).gap <= target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": None}, "every coordinate must be in a sum whose total is a number"),
        ({"total": (0, 1)}, "every coordinate must be in a sum whose total is a number"),
        ({"lower": None, "upper": None}, "lower or upper must be finite"),
        ({"total": 100, "upper": 1}, "cannot be reached"),
        ({"q": np.zeros(3)}, r"q must have shape \(20,\)"),
    ],
)
def test_what_a_kernel_matrix_cannot_have(options, message):
    gram, fine = kernel_problem(20)
    with pytest.raises(ValueError, match=message):
        solve_qp(gram, **(fine | options))
    with pytest.raises(ValueError, match="weights need a matrix P"):
        solve_qp(gram, total=1, weights=np.ones(20))


def test_a_kernel_that_is_not_convex_is_an_error():
    """A saddle point: stationary, and negative curvature between the free coordinates."""
    K = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(NonConvexError) as caught:
        solve_qp(Gram(K, Kernel("precomputed")), total=1, lower=-1, upper=3, x0=np.array([0.3, 0.3, 0.4]), tol=10)
    assert caught.value.direction @ K @ caught.value.direction == pytest.approx(caught.value.curvature)
    assert caught.value.curvature < 0
    assert abs(caught.value.direction.sum()) < 1e-12


# -- longer --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("matrix", ["definite", "low rank", "mixed", "duplicates", "zero", "scaled", "ill"])
def test_larger_ones(form, matrix):
    """A few hundred coordinates, all kinds of bounds and sums."""
    for seed, bounds in enumerate(("simplex", "box", "ties", "wide")):
        for sums in ("none", "total", "range", "groups"):
            for linear in ("normal", "ties", "zero"):
                case = make_case(seed, 250, matrix, linear, bounds, sums, ("none", "signed")[seed % 2])
                result = bcd.solve_qp(forms(case)[form], case.q, **case.options)
                if result.status is Status.UNBOUNDED:
                    judge_ray(case, result)
                else:
                    assert result.status is Status.CONVERGED, (matrix, linear, bounds, sums, seed)
                    judge(case, result)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e6, 1e10])
@pytest.mark.parametrize("n", [500, 1000])
def test_large_and_ill_conditioned(n, condition):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        P = rotated(rng, np.geomspace(1, condition, n))
        solved(case_of(P, 10 / n * rng.standard_normal(n), 1.0, 0.0, 5 / n))


@pytest.mark.slow
def test_large_families():
    for family in FAMILIES:
        case = family_case(family, 1000, 0)
        solved(case, "low rank" if family in ("factors", "huge") else "dense")
