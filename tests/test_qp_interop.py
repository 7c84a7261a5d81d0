"""bcd inside cvxpy and qpsolvers: values, multipliers and statuses against other solvers and their own checks."""

import importlib
import sys
import warnings
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import qpsolvers
import scipy.sparse as sp
from cvxpy.error import SolverError
from hypothesis import given, settings
from hypothesis import strategies as st

import bcd
from bcd.qp import QP
from bcd.qp_cvxpy import CvxpySolver
from bcd.qp_qpsolvers import register_with_qpsolvers

register_with_qpsolvers()
CLARABEL = dict(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)


# -- cvxpy --------------------------------------------------------------------------------------------

n, k = 20, 3
rng = np.random.default_rng(0)
F, d, mu = rng.standard_normal((n, k)), rng.uniform(0.3, 1, n), rng.random(n)
S = F @ F.T + np.diag(d**2)
Omega = np.array([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1]])
bench = np.full(n, 1 / n)
A, target = rng.standard_normal((40, n)), rng.standard_normal(40)


def quadratic(w):
    return cp.Maximize(mu @ w - cp.quad_form(w, cp.psd_wrap(S))), [cp.sum(w) == 1, w >= 0, w <= 0.3]


def squares(w):
    return cp.Minimize(cp.sum_squares(F.T @ w) + cp.sum_squares(cp.multiply(d, w)) - mu @ w), [cp.sum(w) == 1, w >= 0]


def factors(w):
    y = cp.Variable(k)
    risk = cp.quad_form(y, Omega) + cp.sum_squares(cp.multiply(d, w))
    return cp.Minimize(risk - 0.5 * mu @ w), [y == F.T @ w, cp.sum(w) == 1, w >= 0, w <= 0.2]


def covariance_of_factors(w):
    return cp.Minimize(cp.quad_form(F.T @ w, Omega) + cp.sum_squares(w) - mu @ w), [2 * cp.sum(w) == 2, -3 * w <= 0]


def sectors(w):
    limits = [cp.sum(w[:7]) <= 0.4, cp.sum(w[7:14]) >= 0.35, cp.sum(w[14:]) == 0.3, w >= 0, w <= 0.2]
    return cp.Minimize(cp.quad_form(w, cp.psd_wrap(S)) - mu @ w), limits


def nested(w):
    return cp.Minimize(cp.quad_form(w, cp.psd_wrap(S)) - mu @ w), [cp.sum(w) == 1, cp.sum(w[:5]) == 0.4, w >= 0]


def regression(w):
    return cp.Minimize(cp.sum_squares(A @ w - target) + 3), [cp.sum(w) == 1, w >= 0]


def flat_regression(w):
    misfit = 0.5 * cp.sum_squares(A[:5] @ w - target[:5])
    return cp.Minimize(misfit + 1e-2 * cp.sum_squares(w)), [cp.sum(w) == 1, w >= 0]


def tracking(w):
    deviation = cp.quad_form(w - bench, cp.psd_wrap(S))
    return cp.Minimize(5 * deviation - mu @ w), [cp.sum(w) == 1, w >= 0, w <= 0.2]


def trading(w):
    trade = cp.Variable(n)
    cost = cp.sum_squares(cp.multiply(np.sqrt(d), trade))
    limits = [w == bench + trade, cp.sum(w) == 1, w >= 0, trade <= 0.1]
    return cp.Minimize(cp.sum_squares(F.T @ w) + cost - mu @ w), limits


def budget_range(w):
    return cp.Minimize(cp.quad_form(w, cp.psd_wrap(S)) - 2 * mu @ w), [cp.sum(w) <= 1, cp.sum(w) >= 0.5, w >= 0]


def long_short(w):
    return cp.Minimize(cp.sum_squares(F.T @ w) + cp.sum_squares(cp.multiply(d, w)) - mu @ w), [cp.sum(w) == 0]


def weighted(w):
    return cp.Minimize(cp.sum_squares(w - mu)), [np.arange(1, n + 1) @ w == 3, w >= 0, w[0] == 0.05]


def unconstrained(w):
    return cp.Minimize(cp.sum_squares(A @ w - target)), []


def two_variables(w):
    v = cp.Variable((2, 3))
    return cp.Minimize(cp.sum_squares(w - mu) + cp.sum_squares(v - 1)), [cp.sum(w) == 1, cp.sum(v) == 2, v <= 0.5]


def scaled(w):
    x = cp.Variable(n)
    return cp.Minimize(cp.quad_form(w, cp.psd_wrap(S)) - mu @ w), [x == 100 * w, cp.sum(x) == 100, x >= 0, x <= 30]


MODELS = [
    quadratic, squares, factors, covariance_of_factors, sectors, nested, regression, flat_regression, tracking, trading,
    budget_range, long_short, weighted, unconstrained, two_variables, scaled,
]  # fmt: skip


def values(problem):
    """What a user reads off a solved problem."""
    return (
        problem.value,
        {v.id: v.value for v in problem.variables()},
        [c.dual_value for c in problem.constraints],
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_values_and_multipliers_are_those_of_clarabel(model):
    objective, constraints = model(cp.Variable(n))
    problem = cp.Problem(objective, constraints)
    problem.solve(**CLARABEL)
    theirs = values(problem)
    problem.solve(solver=CvxpySolver(), tol=1e-10)
    assert problem.status == cp.OPTIMAL
    ours = values(problem)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-7, atol=1e-8)
    for key, value in theirs[1].items():
        np.testing.assert_allclose(ours[1][key], value, atol=2e-5)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4, rtol=1e-4)
    for c in problem.constraints:
        assert np.max(c.violation(), initial=0) <= 1e-9


def compiled(model, solver=None):
    objective, constraints = model(cp.Variable(n))
    data, _, _ = cp.Problem(objective, constraints).get_problem_data(solver or CvxpySolver())
    return bcd.recognise.recognise(
        data["P"], data["q"], data["A"], data["b"], data["F"], data["G"], data["lower_bounds"], data["upper_bounds"]
    )


@pytest.mark.parametrize(
    ("model", "rank"), [(squares, k), (factors, k), (covariance_of_factors, k), (flat_regression, 5), (trading, k)]
)
def test_factors_reach_the_solver_as_factors(model, rank):
    form = compiled(model)
    assert isinstance(form.P, bcd.LowRank)
    assert form.P.factors.shape == (n, rank)


def test_more_squares_than_variables_become_a_matrix():
    assert isinstance(compiled(regression).P, np.ndarray)


def test_bounds_of_variables_stay_bounds():
    w = cp.Variable(n, bounds=[0, 0.3])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w - mu)), [cp.sum(w) == 1])
    data, _, _ = problem.get_problem_data(CvxpySolver())
    assert data["F"].shape[0] == 0
    problem.solve(solver=CvxpySolver())
    assert problem.status == cp.OPTIMAL
    value = problem.value
    np.testing.assert_allclose(value, problem.solve(**CLARABEL), rtol=1e-7)


def test_linear_objective():
    w = cp.Variable(n, nonneg=True)
    problem = cp.Problem(cp.Maximize(mu @ w), [cp.sum(w) == 1, w <= 0.4])
    top = np.sort(mu)[::-1]
    np.testing.assert_allclose(problem.solve(solver=CvxpySolver()), 0.4 * top[0] + 0.4 * top[1] + 0.2 * top[2])


def test_infeasible():
    w = cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w)), [cp.sum(w) == 1, w >= 0, w <= 0.01])
    assert problem.solve(solver=CvxpySolver()) == np.inf
    assert problem.status == cp.INFEASIBLE
    assert w.value is None
    assert "misses it by 0.8" in problem.solver_stats.extra_stats
    assert cp.Problem(problem.objective, [w >= 1, w <= 0]).solve(solver=CvxpySolver()) == np.inf


def test_unbounded():
    w = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.square(w[0]) + w[1] - w[2]), [cp.sum(w) == 1])
    assert problem.solve(solver=CvxpySolver()) == -np.inf
    assert problem.status == cp.UNBOUNDED
    problem = cp.Problem(cp.Maximize(w[0]), [w[1] >= 0])
    assert problem.solve(solver=CvxpySolver()) == np.inf


def test_limits_return_the_point_reached():
    objective, constraints = quadratic(cp.Variable(n))
    problem = cp.Problem(objective, constraints)
    with pytest.warns(UserWarning, match="inaccurate"):
        problem.solve(solver=CvxpySolver(), max_iter=0)
    assert problem.status == cp.USER_LIMIT
    assert max(np.max(c.violation(), initial=0) for c in constraints) < 1e-9
    with pytest.warns(UserWarning, match="inaccurate"):
        problem.solve(solver=CvxpySolver(), time_limit=0.0, warm_start=False)
    assert problem.status == cp.USER_LIMIT


def test_integers_are_refused():
    w = cp.Variable(3, integer=True)
    with pytest.raises(SolverError, match="mixed-integer"):
        cp.Problem(cp.Minimize(cp.sum_squares(w)), [cp.sum(w) == 1]).solve(solver=CvxpySolver())


def test_cones_are_refused():
    w = cp.Variable(3)
    with pytest.raises(SolverError, match="BCD cannot solve"):
        cp.Problem(cp.Minimize(cp.sum_squares(w)), [cp.norm(w) <= 1]).solve(solver=CvxpySolver())


def test_a_constraint_outside_is_named():
    w, name = cp.Variable(3, name="weights"), r"row 1 of A .* belongs to the constraint .*weights.* == 0"
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w)), [w >= 0, cp.sum(w) == 1, np.array([1.0, 2, 3]) @ w == 2])
    with pytest.raises(SolverError, match=name):
        problem.solve(solver=CvxpySolver())
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w)), [w >= 0, cp.sum(w) == 1, cp.sum(w[:2]) <= 0.5])
    with pytest.raises(SolverError, match=r"row 3 of G .* belongs to the constraint .*0.5.*weights"):
        problem.solve(solver=CvxpySolver())


def test_unknown_options_are_refused():
    objective, constraints = quadratic(cp.Variable(n))
    with pytest.raises(ValueError, match="no option eps_abs; it takes tol"):
        cp.Problem(objective, constraints).solve(solver=CvxpySolver(), eps_abs=1e-3)


def test_an_objective_that_is_not_convex():
    """psd_wrap promises what is not so."""
    w = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.quad_form(w, cp.psd_wrap(np.array([[1.0, 2], [2, 1]])))), [cp.sum(w) == 1])
    with pytest.raises(SolverError, match="curvature is -2"):
        problem.solve(solver=CvxpySolver())


def test_parameters_are_compiled_once_and_solves_start_from_the_last():
    w, gamma, cap = cp.Variable(n), cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    risk = cp.sum_squares(F.T @ w) + cp.sum_squares(cp.multiply(d, w))
    problem = cp.Problem(cp.Minimize(risk - gamma * (mu @ w)), [cp.sum(w) == 1, w >= 0, w <= cap])
    settings, seen = ((0.1, 0.5), (1.0, 0.5), (1.0, 0.3), (4.0, 0.3)), []
    for gamma.value, cap.value in settings:
        problem.solve(solver=CvxpySolver())
        memory = problem._solver_cache["BCD"]
        seen.append((memory.qp, problem.value))
        assert problem.status == cp.OPTIMAL
    assert all(qp is seen[0][0] for qp, _ in seen)
    for (gamma.value, cap.value), (_, value) in zip(settings, seen, strict=True):
        np.testing.assert_allclose(problem.solve(**CLARABEL), value, rtol=1e-7, atol=1e-8)


def test_a_second_solve_costs_less():
    objective, constraints = quadratic(cp.Variable(n))
    problem = cp.Problem(objective, constraints)
    problem.solve(solver=CvxpySolver())
    first = problem.solver_stats.num_iters
    problem.solve(solver=CvxpySolver())
    assert problem.solver_stats.num_iters < first
    problem.solve(solver=CvxpySolver(), warm_start=False)
    assert problem.solver_stats.num_iters == first


def test_a_new_matrix_is_noticed():
    w, D = cp.Variable(n), cp.Parameter(n, nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.multiply(D, w)) - mu @ w), [cp.sum(w) == 1, w >= 0])
    for D.value in (np.ones(n), np.linspace(1, 2, n)):
        value = problem.solve(solver=CvxpySolver())
        np.testing.assert_allclose(problem.solve(**CLARABEL), value, rtol=1e-7)


def test_statistics_and_verbose(capsys):
    objective, constraints = squares(cp.Variable(n))
    problem = cp.Problem(objective, constraints)
    problem.solve(solver=CvxpySolver(), solver_verbose=True)
    stats = problem.solver_stats
    assert stats.solver_name == "BCD"
    assert stats.solve_time > 0
    assert stats.setup_time > 0
    assert isinstance(stats.extra_stats, bcd.Result)
    assert "Converged" in capsys.readouterr().out
    assert "2307.01169" in CvxpySolver().cite({})


# -- qpsolvers ----------------------------------------------------------------------------------------


def simplex_problem(rng, size, sparse=False):
    root = rng.standard_normal((size, size))
    P, q = root @ root.T, rng.standard_normal(size)
    ones = np.ones((1, size))
    if sparse:
        P, ones = sp.csc_matrix(P), sp.csc_matrix(ones)
    return qpsolvers.Problem(P, q, A=ones, b=np.ones(1), lb=np.zeros(size), ub=np.full(size, 0.5))


@pytest.mark.parametrize("sparse", [False, True])
def test_qpsolvers_checks_pass(sparse):
    problem = simplex_problem(np.random.default_rng(0), 30, sparse)
    solution = qpsolvers.solve_problem(problem, "bcd")
    assert solution.found
    assert solution.is_optimal(1e-6)
    assert solution.y.shape == (1,)
    assert solution.z.shape == (0,)
    assert solution.extras["status"] == "converged"
    assert solution.extras["violation"] <= 1e-8 * max(1, np.abs(problem.P @ solution.x + problem.q).max())
    assert solution.extras["gap"] >= -1e-12
    assert solution.build_time >= 0
    other = qpsolvers.solve_problem(simplex_problem(np.random.default_rng(0), 30, True), "clarabel")
    np.testing.assert_allclose(solution.obj, other.obj, rtol=1e-6)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(2, 25))
def test_random_problems_pass_the_checks_of_qpsolvers(seed, size):
    """Bounds as rows or as box, a sum, a range, a group; singular P."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, max(1, size // 2)))
    cut = size // 2
    P, q = root @ root.T, rng.standard_normal(size)
    A = np.zeros((1, size))
    A[0, cut:] = rng.choice([1.0, 2.0, -1.0], size - cut)
    inside = rng.uniform(0, 1, size)
    G, h = [-np.eye(size)], [np.zeros(size)]
    if cut > 1:
        row = np.zeros(size)
        row[:cut] = 1
        G, h = [*G, [row], [-2 * row]], [*h, [row @ inside + 0.1], [-2 * row @ inside + 0.2]]
    ub = np.where(rng.random(size) < 0.5, 1.5, np.inf)
    ub[:cut] = 1.0
    ub[cut:] = 1.5
    problem = qpsolvers.Problem(P, q, np.vstack(G), np.concatenate(h), A, A @ inside, None, ub)
    order = rng.permutation(len(problem.h))
    problem.G, problem.h = problem.G[order], problem.h[order]
    solution = qpsolvers.solve_problem(problem, "bcd")
    assert solution.found, solution.extras
    assert solution.is_optimal(1e-6)
    assert (solution.z >= 0).all()


def test_factor_form_in_qpsolvers():
    """The sparse formulation that general solvers like: variables w and y = F'w."""
    rng = np.random.default_rng(1)
    F, D, mean = rng.standard_normal((200, 8)), rng.uniform(0.1, 1, 200), rng.random(200)
    P = sp.block_diag([sp.diags_array(D), sp.eye_array(8)], format="csc")
    A = sp.csc_array(np.vstack([np.r_[np.ones(200), np.zeros(8)], np.hstack([F.T, -np.eye(8)])]))
    lb, ub = np.r_[np.zeros(200), np.full(8, -np.inf)], np.r_[np.full(200, 0.05), np.full(8, np.inf)]
    P, A = sp.csc_matrix(P), sp.csc_matrix(A)
    problem = qpsolvers.Problem(P, np.r_[-mean, np.zeros(8)], None, None, A, np.r_[1.0, np.zeros(8)], lb, ub)
    solution = qpsolvers.solve_problem(problem, "bcd")
    assert solution.is_optimal(1e-6)
    np.testing.assert_allclose(solution.x[200:], F.T @ solution.x[:200], atol=1e-12)
    other = qpsolvers.solve_problem(problem, "clarabel")
    np.testing.assert_allclose(solution.y, other.y, atol=1e-4)
    np.testing.assert_allclose(solution.z_box, other.z_box, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e5])
def test_residuals_are_absolute_whatever_the_scale(scale):
    """qpsolvers judges by absolute residuals, bcd stops at relative ones: the default goes on."""
    for seed in range(10):
        problem = simplex_problem(np.random.default_rng(seed), 40)
        problem.P, problem.q = scale * problem.P, scale * problem.q
        assert qpsolvers.solve_problem(problem, "bcd").is_optimal(1e-6)


@pytest.mark.parametrize("n", [20, 60])
def test_residuals_are_absolute_where_there_is_no_gap(n):
    """Without bounds the gap is infinite; the violation alone must be brought down, from gradients of 1e6."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
        P, q = 1e6 * (basis * np.geomspace(0.01, 1, n)) @ basis.T, 1e6 * rng.standard_normal(n)
        lb = np.where(np.arange(n) < n // 2, -0.1, -np.inf)
        problem = qpsolvers.Problem((P + P.T) / 2, q, A=np.ones((1, n)), b=np.ones(1), lb=lb)
        solution = qpsolvers.solve_problem(problem, "bcd")
        assert np.abs(problem.P @ solution.x + q).max() > 1e5
        assert solution.extras["gap"] == np.inf
        assert solution.is_optimal(1e-6), (seed, solution.dual_residual(), solution.duality_gap())


@pytest.mark.parametrize("reached", [1e-2, 1e-5])
def test_the_second_run_is_as_strict_as_the_gradient_is_large(monkeypatch, reached):
    """Whatever the first run reached: a violation of 2e-7 is 2e-13 of a gradient of 1e6."""
    solve, asked = QP.solve, []

    def recorded(self, *args, **options):
        result = solve(self, *args, **options)
        asked.append(options.get("tol"))
        if len(asked) == 1:
            result.certificate = replace(result.certificate, violation=reached)
        return result

    monkeypatch.setattr(QP, "solve", recorded)
    q = np.array([1e6, 1e6, 0.0])
    qpsolvers.solve_problem(qpsolvers.Problem(np.eye(3), q, A=np.ones((1, 3)), b=np.ones(1)), "bcd")
    assert asked[0] is None
    assert 0.5e-13 <= asked[1] <= 4e-13


def test_registering_twice_lists_it_once():
    register_with_qpsolvers()
    for names in (qpsolvers.available_solvers, qpsolvers.dense_solvers, qpsolvers.sparse_solvers):
        assert names.count("bcd") == 1


def test_solve_qp_and_initvals():
    problem = simplex_problem(np.random.default_rng(2), 20)
    x = qpsolvers.solve_qp(problem.P, problem.q, A=problem.A, b=problem.b, lb=problem.lb, ub=problem.ub, solver="bcd")
    again = qpsolvers.solve_problem(problem, "bcd", initvals=x)
    np.testing.assert_allclose(again.x, x, atol=1e-9)
    assert again.extras["iterations"] < qpsolvers.solve_problem(problem, "bcd").extras["iterations"]


def test_infeasible_and_unbounded_have_no_solution():
    eye = np.eye(2)
    solution = qpsolvers.solve_problem(
        qpsolvers.Problem(eye, np.ones(2), A=np.ones((1, 2)), b=np.ones(1), ub=np.zeros(2)), "bcd"
    )
    assert not solution.found
    assert solution.x is None
    assert solution.extras["status"] == "infeasible"
    assert not solution.is_optimal(1e-6)
    flat = qpsolvers.Problem(np.zeros((2, 2)), np.array([1.0, 0]), A=np.ones((1, 2)), b=np.ones(1))
    solution = qpsolvers.solve_problem(flat, "bcd")
    assert (solution.found, solution.x, solution.extras["status"]) == (False, None, "unbounded")
    assert qpsolvers.solve_qp(flat.P, flat.q, A=flat.A, b=flat.b, solver="bcd") is None


def test_a_limit_is_no_solution_but_keeps_the_point():
    problem = simplex_problem(np.random.default_rng(3), 30)
    solution = qpsolvers.solve_problem(problem, "bcd", max_iter=0)
    assert not solution.found
    assert solution.extras["status"] == "iteration_limit"
    np.testing.assert_allclose(solution.x.sum(), 1)


def test_problems_outside_and_not_convex_are_problem_errors():
    rows = np.array([[1.0, 1, 1], [1, 2, 3]])
    with pytest.raises(qpsolvers.ProblemError, match="row 1 of A"):
        qpsolvers.solve_qp(np.eye(3), np.zeros(3), A=rows, b=np.ones(2), solver="bcd")
    with pytest.raises(qpsolvers.ProblemError, match="curvature"):
        qpsolvers.solve_qp(-np.eye(3), np.zeros(3), lb=-np.ones(3), ub=np.ones(3), solver="bcd")
    with pytest.raises(qpsolvers.ProblemError, match="q must have shape"):
        qpsolvers.solve_qp(np.eye(3), np.zeros(2), lb=-np.ones(3), solver="bcd")


def test_unknown_keywords_are_refused():
    problem = simplex_problem(np.random.default_rng(4), 5)
    with pytest.raises(qpsolvers.ParamError, match="no option eps_abs; it takes tol"):
        qpsolvers.solve_problem(problem, "bcd", eps_abs=1e-3)


def test_verbose_prints_the_result(capsys):
    qpsolvers.solve_problem(simplex_problem(np.random.default_rng(5), 5), "bcd", verbose=True)
    assert "Converged" in capsys.readouterr().out


def test_unconstrained():
    solution = qpsolvers.solve_problem(qpsolvers.Problem(np.eye(2), np.array([1.0, -2.0])), "bcd")
    np.testing.assert_allclose(solution.x, [-1, 2], atol=1e-7)
    assert solution.is_optimal(1e-6)


# -- installation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "module"), [("cvxpy", "bcd.qp_cvxpy"), ("qpsolvers", "bcd.qp_qpsolvers")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf"needs {package}: in a checkout, pip install '.\[{package}\]'"):
        importlib.import_module(module)


def test_they_are_reached_through_bcd_qp():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bcd.qp.CvxpySolver is CvxpySolver
        assert bcd.qp.register_with_qpsolvers is register_with_qpsolvers
