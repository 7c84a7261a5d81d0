# SPDX-License-Identifier: BSD-3-Clause
"""Problems whose minimum is known without bcd.

    minimise f(x)   subject to   sum(x) = s,   l <= x <= u          (either constraint may be absent)

Every entry of :data:`CATALOGUE` builds a :class:`Case`: the problem, its minimum, and the minimiser where
it is unique. The minimum comes from a closed form, from the enumeration of every active set (n <= 6), from
Clarabel through cvxpy at tight settings, from scipy's linprog, or from scikit-learn's SVC; ``accuracy``
says how far that number can be trusted. Nothing here calls a solver of bcd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import brentq, linprog

import bcd

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """A problem and what is known of its solution.

    ``mu`` is a lower bound of the curvature along feasible directions (0 where f is not strongly convex):
    with no bounds, where the Frank-Wolfe gap is infinite, it turns a violation into a bound on f - f*.
    """

    problem: bcd.Problem
    minimum: float
    minimiser: Array | None = None
    accuracy: float = 1e-9
    mu: float = 0.0

    @property
    def smooth(self) -> bool:
        """Whether the objective is a pair of callables, without second derivatives."""
        return isinstance(self.problem.objective, bcd.Smooth)

    @property
    def bounded(self) -> bool:
        """Whether any coordinate, or any slack, has a bound (which rule "gs" refuses)."""
        feasible = self.problem.feasible
        return bool(np.isfinite(feasible.lower).any() or np.isfinite(feasible.upper).any())


# -- independent solvers ------------------------------------------------------------------------


def simplex_projection(z: Array, total: float = 1.0) -> Array:
    """Argmin |x - z| with x >= 0, sum(x) = total (Held, Wolfe, Crowder 1974)."""
    falling = np.sort(z)[::-1]
    price = (np.cumsum(falling) - total) / np.arange(1, len(z) + 1)
    k = np.flatnonzero(falling > price)[-1]
    return np.maximum(z - price[k], 0.0)


def enumerate_active_sets(Q: Array, c: Array, lower: Array, upper: Array, total: float | None) -> tuple[float, Array]:
    """Minimum of 1/2 x'Qx + c'x over box and sum, by trying every assignment of bounds; n <= 6.

    For every choice of coordinates fixed at a bound, the rest minimises f under the sum alone; the best
    feasible of these points is the minimum of a convex f.
    """
    n, best, argmin = len(c), np.inf, np.zeros(len(c))
    for sides in itertools.product(*([s for s in (-1, 0, 1) if s == 0 or np.isfinite((lower, upper)[s > 0][i])]
                                     for i in range(n))):  # fmt: skip
        fixed = np.array(sides) != 0
        x = np.where(np.array(sides) > 0, upper, lower)
        free = ~fixed
        x[free] = 0.0
        k = int(free.sum())
        rows = k + (total is not None)
        kkt, rhs = np.zeros((rows, rows)), np.zeros(rows)
        kkt[:k, :k], rhs[:k] = Q[np.ix_(free, free)], -(c + Q @ x)[free]
        if total is not None:
            kkt[k, :k] = kkt[:k, k] = 1.0
            rhs[k] = total - x.sum()
        solution = np.linalg.lstsq(kkt, rhs, rcond=None)[0]
        x[free] = solution[:k]
        if (x < lower - 1e-11).any() or (x > upper + 1e-11).any():
            continue
        if total is not None and abs(x.sum() - total) > 1e-10:
            continue
        value = 0.5 * x @ Q @ x + c @ x
        if value < best:
            best, argmin = value, x
    return float(best), argmin


def clarabel(n: int, objective: Callable[[Any], Any], constraints: Callable[[Any], list[Any]]) -> tuple[float, Array]:
    """Minimum and minimiser from cvxpy with Clarabel at tight settings."""
    import cvxpy as cp

    x = cp.Variable(n)
    problem = cp.Problem(cp.Minimize(objective(x)), constraints(x))
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    problem.solve(solver=cp.CLARABEL, **tight)
    assert problem.status == "optimal", problem.status
    return float(problem.value), np.asarray(x.value)


def clarabel_qp(Q: Array, c: Array, constraints: Callable[[Any], list[Any]]) -> tuple[float, Array]:
    """The same for 1/2 x'Qx + c'x, Q positive semidefinite."""
    import cvxpy as cp

    root = np.linalg.eigh(Q)
    factor = (root.eigenvectors * np.sqrt(np.maximum(root.eigenvalues, 0.0))).T
    return clarabel(len(c), lambda x: 0.5 * cp.sum_squares(factor @ x) + c @ x, constraints)


def random_qp(seed: int, n: int, cond: float = 10.0) -> tuple[Array, Array]:
    """A symmetric positive definite Q with eigenvalues from 1/cond to 1, and a linear term."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    Q = (basis * np.geomspace(1.0 / cond, 1.0, n)) @ basis.T
    return 0.5 * (Q + Q.T), rng.normal(size=n)


# -- the problems -------------------------------------------------------------------------------


def _projection() -> Case:
    z = np.random.default_rng(1).normal(size=20)
    x = simplex_projection(z)
    problem = bcd.Problem(bcd.Quadratic(np.eye(20), -z), bcd.SumBox(lower=0, total=1))
    return Case(problem, float(0.5 * x @ x - z @ x), x, accuracy=1e-14, mu=1.0)


def _sum_only() -> Case:
    Q, c = random_qp(2, 12)
    kkt = np.block([[Q, np.ones((12, 1))], [np.ones((1, 12)), np.zeros((1, 1))]])
    x = np.linalg.solve(kkt, np.concatenate([-c, [3.0]]))[:12]
    problem = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(total=3))
    return Case(problem, float(0.5 * x @ Q @ x + c @ x), x, accuracy=1e-13, mu=0.1)


def _enumerated(seed: int, n: int, lower: Any, upper: Any, total: float | None, rank: int | None = None) -> Case:
    Q, c = random_qp(seed, n)
    if rank is not None:
        F = np.random.default_rng(seed).normal(size=(n, rank))
        Q = F @ F.T
    low, high = np.broadcast_to(lower, (n,)).astype(float), np.broadcast_to(upper, (n,)).astype(float)
    value, x = enumerate_active_sets(Q, c, low, high, total)
    problem = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(low, high, total))
    return Case(problem, value, x if rank is None else None, accuracy=1e-10, mu=0.1 if rank is None else 0.0)


def _half_bounds() -> Case:
    inf = np.inf
    return _enumerated(5, 6, [0, -inf, -1, -inf, 0, -inf], [inf, 0.5, 1, inf, 2, 0], 1.5)


def _fixed() -> Case:
    return _enumerated(6, 6, [0, 0.25, -1, -1, 0, 0.5], [1, 0.25, 1, 1, 0, 0.5], 1.0)


def _boxed_sum() -> Case:
    Q, c = random_qp(7, 40, cond=300.0)
    value, x = clarabel_qp(Q, c, lambda x: [x >= -0.2, x <= 0.3, sum(x) == 1])
    return Case(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-0.2, 0.3, 1)), value, x, mu=1 / 300)


def _low_rank() -> Case:
    rng = np.random.default_rng(8)
    F, D, c = rng.normal(size=(24, 3)), rng.uniform(0.5, 1.5, 24), rng.normal(size=24)
    value, x = clarabel_qp(F @ F.T + np.diag(D), c, lambda x: [x >= 0, x <= 0.2, sum(x) == 1])
    problem = bcd.Problem(bcd.Quadratic(bcd.LowRank(F, D), c), bcd.SumBox(0, 0.2, 1))
    return Case(problem, value, x, mu=0.5)


def _sparse() -> Case:
    n = 24
    Q = sp.diags_array([np.full(n - 1, -1.0), np.full(n, 2.5), np.full(n - 1, -1.0)], offsets=[-1, 0, 1], format="csr")
    c = np.sin(np.arange(n))
    value, x = clarabel_qp(Q.toarray(), c, lambda x: [x >= -0.5, x <= 0.5, sum(x) == 2])
    return Case(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-0.5, 0.5, 2)), value, x, mu=0.5)


def _least_squares_data() -> tuple[Array, Array]:
    rng = np.random.default_rng(9)
    A = rng.normal(size=(30, 10))
    return A, A @ rng.dirichlet(np.ones(10)) + 0.5 * rng.normal(size=30)


def _least_squares() -> Case:
    import cvxpy as cp

    A, b = _least_squares_data()
    value, x = clarabel(10, lambda x: 0.5 * cp.sum_squares(A @ x - b), lambda x: [x >= 0, sum(x) == 1])
    mu = float(np.linalg.eigvalsh(A.T @ A)[0])
    return Case(bcd.Problem(bcd.LeastSquares(A, b), bcd.SumBox(0, None, 1)), value, x, mu=mu)


def _smooth_least_squares(lipschitz: bool) -> Case:
    known, (A, b) = _least_squares(), _least_squares_data()
    L1 = float((A * A).sum(axis=0).max()) if lipschitz else None  # L1 <= max_i Q_ii (THEORY section 1)
    objective = bcd.Smooth(lambda x: 0.5 * float((A @ x - b) @ (A @ x - b)), lambda x: A.T @ (A @ x - b), 10, L1)
    return Case(bcd.Problem(objective, bcd.SumBox(0, None, 1)), known.minimum, known.minimiser, mu=known.mu)


def _ridge() -> Case:
    A, b = _least_squares_data()
    H = A.T @ A + 2.0 * np.eye(10)
    x = np.linalg.solve(H, A.T @ b)
    value = 0.5 * float((A @ x - b) @ (A @ x - b)) + x @ x
    return Case(bcd.Problem(bcd.LeastSquares(A, b, l2=2.0)), float(value), x, accuracy=1e-13, mu=2.0)


def _logistic() -> Case:
    import cvxpy as cp

    rng = np.random.default_rng(10)
    A, b = rng.normal(size=(30, 8)), np.where(rng.random(30) < 0.5, -1.0, 1.0)
    value, _ = clarabel(
        8,
        lambda x: cp.sum(cp.logistic(cp.multiply(-b, A @ x))) + 0.25 * cp.sum_squares(x),
        lambda x: [x >= -0.1, x <= 0.4, sum(x) == 0.5],
    )
    # exponential cones: Clarabel's own tolerances hold for a scaled problem, so trust it less
    return Case(bcd.Problem(bcd.Logistic(A, b, l2=0.5), bcd.SumBox(-0.1, 0.4, 0.5)), value, accuracy=1e-7, mu=0.5)


def _smooth_exponential() -> Case:
    """sum_i exp(a_i x_i) with sum(x) = 1: a_i exp(a_i x_i) is one number for all i, found by a root search."""
    a = np.array([0.5, 0.75, 1.0, 1.25, 1.5])
    price = brentq(lambda p: (np.log(p / a) / a).sum() - 1.0, 1e-3, 1e3, xtol=1e-15, rtol=1e-14)
    x = np.log(price / a) / a
    objective = bcd.Smooth(lambda x: float(np.exp(a * x).sum()), lambda x: a * np.exp(a * x), 5)
    # f'' = a^2 exp(a x) > 0.1 near the minimiser, where the violation is small
    return Case(bcd.Problem(objective, bcd.SumBox(total=1)), float(np.exp(a * x).sum()), x, accuracy=1e-13, mu=0.1)


def _groups() -> Case:
    Q, c = random_qp(11, 15)
    groups = np.arange(15) % 3
    totals = np.array([1.0, 0.0, -0.5])
    value, x = clarabel_qp(
        Q, c, lambda x: [x >= -1, x <= 0.5] + [sum(x[groups == s]) == totals[s] for s in range(3)]
    )  # fmt: skip
    return Case(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-1, 0.5, totals, groups)), value, x, mu=0.1)


def _ranged(total: Any, seed: int = 12) -> Case:
    Q, c = random_qp(seed, 10)
    lo, hi = (t if t is not None else s * np.inf for t, s in zip(total, (-1, 1), strict=True))
    within = ([lambda x: sum(x) >= lo] if np.isfinite(lo) else []) + (
        [lambda x: sum(x) <= hi] if np.isfinite(hi) else []
    )
    value, x = clarabel_qp(Q, c, lambda x: [x >= -2, x <= 2] + [f(x) for f in within])
    return Case(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-2, 2, total)), value, x, mu=0.1)


def _some_free() -> Case:
    """Two groups, one of them ranged, and coordinates in none."""
    Q, c = random_qp(13, 12)
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1])
    value, x = clarabel_qp(
        Q, c, lambda x: [x >= -1, x <= 1, sum(x[:4]) == 1, sum(x[4:8]) >= -0.5, sum(x[4:8]) <= 0.1]
    )  # fmt: skip
    return Case(bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(-1, 1, [1, (-0.5, 0.1)], groups)), value, x, mu=0.1)


def _one(total: float | None) -> Case:
    x = 2.0 if total is None else total
    problem = bcd.Problem(bcd.Quadratic([[2.0]], [-4.0]), bcd.SumBox(-5, 5, total))
    return Case(problem, x * x - 4 * x, np.array([x]), accuracy=1e-15, mu=2.0)


def _two() -> Case:
    """1/2 (x^2 + 4 y^2) - y with x + y = 1: x = 4 y - 1, so y = 2/5."""
    x = np.array([0.6, 0.4])
    problem = bcd.Problem(bcd.Quadratic(np.diag([1.0, 4.0]), [0.0, -1.0]), bcd.SumBox(total=1))
    return Case(problem, 0.5 * (0.36 + 0.64) - 0.4, x, accuracy=1e-15, mu=1.0)


def _linear() -> Case:
    c = np.random.default_rng(14).normal(size=12)
    known = linprog(c, A_eq=np.ones((1, 12)), b_eq=[2.3], bounds=[(-0.5, 1.0)] * 12)
    problem = bcd.Problem(bcd.Quadratic(np.zeros((12, 12)), c), bcd.SumBox(-0.5, 1, 2.3))
    return Case(problem, float(known.fun), np.asarray(known.x), accuracy=1e-12)


def svm_dual(rows: int) -> tuple[Array, Array]:
    """Kernel matrix (RBF, gamma = 1/30) and labels of the first rows of the breast cancer data, standardised."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    X, y = X[:rows], np.where(y[:rows] == 1, 1.0, -1.0)
    square = (X * X).sum(axis=1)
    distance = np.maximum(square[:, None] + square - 2 * X @ X.T, 0.0)
    np.fill_diagonal(distance, 0.0)
    K = np.exp(-distance / 30)
    return 0.5 * (K + K.T), y


def svm_case(rows: int, C: float = 1.0) -> Case:
    """1/2 b'Kb - y'b, sum(b) = 0, b between 0 and y C (THEORY section 7); the value is that of SVC's solution."""
    from sklearn.svm import SVC

    K, y = svm_dual(rows)
    machine = SVC(C=C, kernel="precomputed", tol=1e-10).fit(K, y)
    beta = np.zeros(rows)
    beta[machine.support_] = machine.dual_coef_[0]
    problem = bcd.Problem(bcd.Quadratic(K, -y), bcd.SumBox(np.minimum(0, y * C), np.maximum(0, y * C), 0))
    return Case(problem, float(0.5 * beta @ K @ beta - y @ beta))


CATALOGUE: dict[str, Callable[[], Case]] = {
    "simplex projection": _projection,
    "sum, no bounds": _sum_only,
    "sum and box, enumerated": lambda: _enumerated(3, 6, -0.3, 0.6, 1.0),
    "sum and box, condition 300": _boxed_sum,
    "box, no sum": lambda: _enumerated(4, 6, -1.0, 0.8, None),
    "half bounds": _half_bounds,
    "fixed coordinates": _fixed,
    "singular": lambda: _enumerated(15, 6, -1.0, 1.0, 0.5, rank=2),
    "linear": _linear,
    "low rank": _low_rank,
    "sparse": _sparse,
    "least squares": _least_squares,
    "ridge, no constraint": _ridge,
    "logistic": _logistic,
    "smooth, known constant": lambda: _smooth_least_squares(True),
    "smooth, no constant": lambda: _smooth_least_squares(False),
    "smooth, exponential": _smooth_exponential,
    "groups": _groups,
    "range, upper end": lambda: _ranged((-3.0, -2.0)),
    "range, inside": lambda: _ranged((-20.0, 19.0)),
    "one side, active": lambda: _ranged((11.0, None)),
    "one side, slack": lambda: _ranged((None, 19.0)),
    "some in no sum": _some_free,
    "one coordinate": lambda: _one(None),
    "one coordinate, fixed by its sum": lambda: _one(1.5),
    "two coordinates": _two,
    "SVM dual": lambda: svm_case(50),
}


@cache
def case(name: str) -> Case:
    """The entry of this name; built once a session."""
    return CATALOGUE[name]()


# -- what the tests share -----------------------------------------------------------------------


class Plain:
    """A rule under another type: minimize() then takes the steps one by one in Python, none compiled in bursts."""

    def __init__(self, rule: Any):
        self.rule = bcd.RULES[rule].rule if isinstance(rule, str) else rule

    def init(self, moves: Any, seed: int) -> Any:
        return self.rule.init(moves, seed)

    def select(self, at: Any, moves: Any, state: Any) -> tuple[Any, Any]:
        return self.rule.select(at, moves, state)


def path(problem: bcd.Problem, rule: Any, update: Any, steps: int, **options: Any) -> tuple[list[Array], bcd.Result]:
    """The points that a run visits, the start first, one a step."""
    points: list[Array] = []
    seen: list[int] = []

    def note(progress: bcd.Progress) -> None:
        if not seen or progress.iteration > seen[-1]:  # a rejected step of Backtracking comes by again
            seen.append(progress.iteration)
            points.append(progress.x)

    rule = Plain(rule) if isinstance(rule, str) else rule
    result = bcd.minimize(problem, rule, update, max_iter=steps, callback=note, **options)
    if not seen or result.iterations > seen[-1]:
        points.append(result.x)
    return points, result


def default_update(rule: str) -> str:
    """What minimize() pairs with a rule on a quadratic."""
    return {"gs1": "line-search", "block": "block"}.get(rule, "pair")


def violation_of(problem: bcd.Problem, x: Array) -> float:
    """V(x) of THEORY section 1, written down again from x, bounds and totals as they stand in the problem."""
    feasible, g, n = problem.feasible, problem.objective.gradient(x), problem.n
    lower, upper, labels = feasible.lower[:n], feasible.upper[:n], feasible.labels[:n]
    rises, falls = x < upper, x > lower
    worst = 0.0
    alone = labels < 0
    worst = max(worst, g[alone & falls].max(initial=0.0), -g[alone & rises].min(initial=0.0))
    for s, (lo, hi) in enumerate(feasible.ranges):
        member, total = labels == s, x[labels == s].sum()
        most, least = g[member & falls].max(initial=-np.inf), g[member & rises].min(initial=np.inf)
        if lo < hi:  # the slack has gradient 0; it can rise where the sum can fall
            slop = 1e-12 * max(1.0, np.abs(x[member]).sum())
            least = min(least, 0.0) if total > lo + slop else least
            most = max(most, 0.0) if total < hi - slop else most
        worst = max(worst, most - least)
    return float(worst)


def infeasibility_of(problem: bcd.Problem, x: Array) -> float:
    """How far x is outside its bounds (exactly) or its totals (beyond rounding, 1e-12 relative)."""
    feasible, n = problem.feasible, problem.n
    worst = max(0.0, (feasible.lower[:n] - x).max(), (x - feasible.upper[:n]).max())
    for s, (lo, hi) in enumerate(feasible.ranges):
        member = feasible.labels[:n] == s
        off = max(lo - x[member].sum(), x[member].sum() - hi)
        worst = max(worst, off if off > 1e-12 * max(np.abs(x[member]).sum(), abs(lo) if lo == hi else 0.0) else 0.0)
    return float(worst)


def frank_wolfe_gap_of(problem: bcd.Problem, x: Array) -> float:
    """max over feasible v of <g, x - v>, from scipy's linprog; inf where that is unbounded."""
    feasible, g, n = problem.feasible, problem.objective.gradient(x), problem.n
    rows = [(feasible.labels[:n] == s).astype(float) for s in range(len(feasible.ranges))]
    upper = [(a, hi) for a, (lo, hi) in zip(rows, feasible.ranges, strict=True) if lo < hi < np.inf]
    upper += [(-a, -lo) for a, (lo, hi) in zip(rows, feasible.ranges, strict=True) if hi > lo > -np.inf]
    equal = [(a, lo) for a, (lo, hi) in zip(rows, feasible.ranges, strict=True) if lo == hi]
    solution = linprog(
        g,
        A_ub=np.array([a for a, _ in upper]) if upper else None,
        b_ub=[b for _, b in upper] if upper else None,
        A_eq=np.array([a for a, _ in equal]) if equal else None,
        b_eq=[b for _, b in equal] if equal else None,
        bounds=np.column_stack([feasible.lower[:n], feasible.upper[:n]]),
    )
    if solution.status == 3:
        return np.inf
    assert solution.status == 0, solution.message
    return float(g @ x - solution.fun)
