# SPDX-License-Identifier: BSD-3-Clause
"""Quadratic programs of every kind, and a judge of answers that uses nothing of bcd.

    minimise 1/2 x'Px + q'x   subject to   lo_s <= a_s'x <= hi_s for every sum s,   lower <= x <= upper

A :class:`Case` is drawn by a seed and the names of its parts. :func:`judge` recomputes everything that a certificate
says; the Frank-Wolfe gap comes from the breakpoints of the linear program's dual.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog
from scipy.sparse.linalg import aslinearoperator

import bcd

Array = np.ndarray
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Case:
    """A problem with P = F F' + diag(D) - dent a a', a of shape (n,) the coefficients in the sums (dent: mostly 0)."""

    F: Array
    D: Array
    q: Array
    lower: Array
    upper: Array
    inside: Array  # a feasible point
    total: Any = None
    weights: Array | None = None
    groups: Array | None = None
    dent: float = 0.0

    @property
    def n(self) -> int:
        return len(self.q)

    @cached_property
    def P(self) -> Array:
        P = self.F @ self.F.T + np.diag(self.D)
        a = np.ones(self.n) if self.weights is None else self.weights
        return P - self.dent * np.outer(a, a) if self.dent else P

    @property
    def constraints(self) -> dict[str, Any]:
        """As arguments of solve_qp and QP.solve, but for those of QP."""
        return {"total": self.total, "lower": self.lower, "upper": self.upper}

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of solve_qp."""
        return self.constraints | {"weights": self.weights, "groups": self.groups}

    @cached_property
    def sums(self) -> tuple[Array, Array, Array]:
        """(A, lo, hi): row s of A holds the coefficients of the total that was given at place s."""
        if self.total is None:
            return np.zeros((0, self.n)), np.zeros(0), np.zeros(0)
        a = np.ones(self.n) if self.weights is None else self.weights
        totals = [self.total] if self.groups is None else list(self.total)
        labels = np.zeros(self.n, int) if self.groups is None else self.groups
        A = np.array([np.where(labels == s, a, 0.0) for s in range(len(totals))]).reshape(len(totals), self.n)
        ends = [end if isinstance(end, tuple) else (end, end) for end in totals]
        lo = np.array([-np.inf if low is None else low for low, _ in ends], dtype=float)
        hi = np.array([np.inf if high is None else high for _, high in ends], dtype=float)
        return A, lo, hi

    @property
    def bounded(self) -> bool:
        """Whether all bounds are finite."""
        return bool(np.isfinite(self.lower).all() and np.isfinite(self.upper).all())

    def value(self, x: Array) -> float:
        return float(0.5 * x @ self.P @ x + self.q @ x)

    def gradient(self, x: Array) -> Array:
        return self.P @ x + self.q

    def size(self, x: Array) -> float:
        """Of the numbers that f(x) is the sum of."""
        return float(0.5 * np.abs(x) @ np.abs(self.P) @ np.abs(x) + np.abs(self.q) @ np.abs(x))

    def solve(self, **options: Any) -> bcd.Result:
        return bcd.solve_qp(self.P, self.q, **self.options, **options)


def forms(case: Case) -> dict[str, Any]:
    """The same P in all forms of a matrix."""
    return {
        "dense": case.P,
        "sparse": sp.csc_array(case.P),
        "operator": aslinearoperator(case.P),
        **({} if case.dent else {"low rank": bcd.LowRank(case.F, case.D)}),
        **({} if case.dent else {"sparse factors": bcd.LowRank(sp.csr_array(case.F), case.D)}),
    }


# -- cases ---------------------------------------------------------------------------------------

MATRICES = ("definite", "low rank", "mixed", "zero rows", "duplicates", "zero", "diagonal", "integers", "scaled", "ill")
LINEAR = ("zero", "normal", "ties", "tiny", "huge")
BOUNDS = ("simplex", "box", "mixed", "fixed", "free", "ties", "wide")
SUMS = ("none", "total", "vertex", "range", "side", "groups")
WEIGHTS = ("none", "none", "positive", "signed", "wide")


def _matrix(rng: np.random.Generator, n: int, style: str) -> tuple[Array, Array]:
    rank = int(rng.integers(0, n + 1))
    F, D = rng.standard_normal((n, rank)) if rank else np.zeros((n, 1)), np.zeros(n)
    if style in ("definite", "scaled"):
        F, D = rng.standard_normal((n, n)) / np.sqrt(n), rng.uniform(0.1, 1, n)
    if style == "mixed":
        D = np.where(rng.random(n) < 0.5, rng.random(n), 0.0)
    if style == "zero rows":
        F[rng.random(n) < 0.4] = 0.0
    if style == "duplicates":
        F = F[rng.integers(0, max(n // 2, 1), n)]
    if style in ("zero", "diagonal"):
        F, D = np.zeros((n, 1)), rng.uniform(0.1, 2, n) * (style == "diagonal")
    if style == "integers":
        F, D = rng.integers(-2, 3, F.shape).astype(float), rng.integers(0, 3, n).astype(float)
    if style == "scaled":
        scale = 10.0 ** rng.uniform(-3, 3, n)
        F, D = scale[:, None] * F, scale**2 * D
    if style == "ill":
        F = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.sqrt(np.geomspace(1, 1e-6, n))
    return F, D


def _linear(rng: np.random.Generator, n: int, style: str) -> Array:
    size = {"zero": 0.0, "normal": 1.0, "ties": 1.0, "tiny": 1e-9, "huge": 1e7}[style]
    return size * (rng.integers(-1, 2, n).astype(float) if style == "ties" else rng.standard_normal(n))


def _bounds(rng: np.random.Generator, n: int, style: str) -> tuple[Array, Array]:
    lower, upper = np.zeros(n), np.full(n, np.inf)
    if style == "box":
        upper = rng.uniform(0.1, 1, n)
    if style == "ties":
        upper = np.ones(n)
    if style == "wide":
        lower, upper = np.full(n, -1e4), np.full(n, 1e4)
    if style in ("mixed", "fixed"):
        lower, upper = np.sort(rng.standard_normal((2, n)), axis=0)
        fixed = rng.random(n) < (0.2 if style == "mixed" else 1.0)
        upper[fixed] = lower[fixed]
    if style == "mixed":
        loose = ~fixed
        lower[loose & (rng.random(n) < 0.3)] = -np.inf
        upper[loose & (rng.random(n) < 0.3)] = np.inf
    if style == "free":
        lower = np.full(n, -np.inf)
    return lower, upper


def _weights(rng: np.random.Generator, n: int, style: str) -> Array | None:
    if style == "none":
        return None
    weights = 10.0 ** rng.uniform(-2, 2, n) if style == "wide" else rng.uniform(0.5, 2, n)
    if style == "signed":
        weights *= rng.choice([-1.0, 0.0, 1.0], n)
    weights[0] = weights[0] or 1.0
    return weights


def _total(rng: np.random.Generator, value: float, style: str) -> Any:
    """A total that a point with this sum satisfies."""
    if style == "range":
        return (value - rng.choice([0.0, 1.0]) * rng.random(), value + rng.choice([0.0, 1.0]) * rng.random())
    if style == "side":
        return [(None, value + rng.random()), (value - rng.random(), None), (-np.inf, value), None][rng.integers(4)]
    return value


def make_case(seed: int, n: int, matrix: str, linear: str, bounds: str, sums: str, weights: str = "none") -> Case:
    """A feasible problem."""
    rng = np.random.default_rng(seed)
    F, D = _matrix(rng, n, matrix)
    lower, upper = _bounds(rng, n, bounds)
    a = None if sums == "none" else _weights(rng, n, weights)
    inside = np.clip(rng.standard_normal(n), lower, upper)
    if sums == "vertex":  # the only feasible point where every bound is finite
        turned = np.zeros(n, bool) if a is None else a < 0
        inside = np.where(turned & np.isfinite(upper) | ~np.isfinite(lower), np.minimum(upper, 1e3), lower)
        inside = np.where(np.isfinite(inside), inside, 0.0)
    case = Case(F, D, _linear(rng, n, linear), lower, upper, inside, None, a, None)
    if sums == "none":
        return case
    if sums != "groups":
        style = "total" if sums == "vertex" else sums
        return replace(case, total=_total(rng, sum_of(a, inside), style))
    groups = rng.integers(-1, int(rng.integers(1, 5)), n)
    if groups.max() < 0:
        return replace(case, weights=None)
    members = [groups == s for s in range(groups.max() + 1)]
    values = [sum_of(None if a is None else a[m], inside[m]) for m in members]
    return replace(
        case, groups=groups, total=[_total(rng, v, str(rng.choice(["total", "range", "side"]))) for v in values]
    )


def sum_of(weights: Array | None, x: Array) -> float:
    return math.fsum(x if weights is None else weights * x)


# -- the judge -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What holds of a point: everything recomputed."""

    value: float
    violation: float
    scale: float  # max(1, largest |gradient|), of what the solver scales the variables to
    gap: float
    noise: float  # rounding of a gradient in x


def _scale(case: Case) -> Array:
    """Of the variables t = scale x in which the solver measures."""
    if case.weights is None:
        return np.ones(case.n)
    return np.where(case.weights != 0, case.weights / np.abs(case.weights).max(), 1.0)


def sum_misses(case: Case, x: Array) -> Array:
    """How far every sum is from its range, less what rounding explains; 0 where it is in it."""
    A, lo, hi = case.sums
    ends = np.where(np.isfinite(case.lower), np.abs(case.lower), 0) + np.where(
        np.isfinite(case.upper), np.abs(case.upper), 0
    )
    values = np.array([math.fsum(row * x) for row in A])
    slop = 16 * EPS * np.array([np.abs(row) @ (np.abs(x) + ends) for row in A])
    slop += 16 * EPS * (np.where(np.isfinite(lo), np.abs(lo), 0) + np.where(np.isfinite(hi), np.abs(hi), 0))
    return np.maximum(np.maximum(lo - values, values - hi) - slop, 0.0)


def violation(case: Case, x: Array) -> float:
    """Largest first-order gain of a unit of mass moved in a sum, or of one coordinate in no sum."""
    A, lo, hi = case.sums
    scale = _scale(case)
    g = case.gradient(x) / scale
    turned = scale < 0
    rises, falls = x < case.upper, x > case.lower
    rises, falls = np.where(turned, falls, rises), np.where(turned, rises, falls)
    closed = [s for s in range(len(A)) if np.isfinite(lo[s]) or np.isfinite(hi[s])]
    alone = ~(A[closed] != 0).any(axis=0)
    worst = max(g[alone & falls].max(initial=0.0), (-g[alone & rises]).max(initial=0.0))
    for s in closed:
        member = A[s] != 0
        down, up = g[member & falls].max(initial=-np.inf), g[member & rises].min(initial=np.inf)
        if lo[s] < hi[s]:  # a slack with gradient 0: it rises while the sum may fall
            value, slop = (
                math.fsum(A[s] * x),
                64 * EPS * (np.abs(A[s]) @ np.abs(x) + abs(np.nan_to_num(hi[s], posinf=0))),
            )
            down = max(down, 0.0) if value < hi[s] - slop else down
            up = min(up, 0.0) if value > lo[s] + slop else up
        worst = max(worst, down - up)
    return float(worst)


def frank_wolfe_gap(case: Case, x: Array) -> float:
    """Max over feasible v of g'(x - v), from the dual: the least bound over the breakpoints of its multiplier."""
    A, lo, hi = case.sums
    g = case.gradient(x)

    def most(c: Array, member: Array) -> float:
        with np.errstate(invalid="ignore"):
            rooms = np.maximum(c * (x - case.lower)[member], c * (x - case.upper)[member])
        return float(np.where(c == 0, 0.0, rooms).sum())

    gap = most(g[~(A != 0).any(axis=0)], ~(A != 0).any(axis=0))
    for row, low, high in zip(A, lo, hi, strict=True):
        member = row != 0
        a, gm, value = row[member], g[member], math.fsum(row * x)
        bounds = []
        for y in np.concatenate([-gm / a, [0.0]]):
            c = gm + y * a
            c = np.where(np.abs(c) <= 4 * EPS * (np.abs(gm) + np.abs(y * a)), 0.0, c)
            room = (high - value) if y > 0 else (low - value)
            bounds.append(most(c, member) + (y * room if y else 0.0))
        gap += min(bounds)
    return gap


def rounding(case: Case, x: Array) -> Array:
    """Of every entry of a gradient: a bound on the errors of its sums of products, and on what rounding x changes."""
    return 4 * EPS * (case.n + 4) * (np.abs(case.P) @ np.abs(x) + np.abs(case.q))


def judge(case: Case, result: bcd.Result, tol: float = 1e-8, allowed: float = 0.0) -> Verdict:
    """Assert everything that a converged result claims, from the problem alone; residuals may be larger by allowed."""
    x, y, z = result.x, result.total_multipliers, result.bound_multipliers
    A, lo, hi = case.sums
    assert x.shape == z.shape == (case.n,)
    assert y.shape == (len(A),)
    assert (x >= case.lower).all()
    assert (x <= case.upper).all()
    assert not sum_misses(case, x).any(), sum_misses(case, x)
    assert result.certificate.infeasibility == 0
    g, scale = case.gradient(x), _scale(case)
    size = max(1.0, float(np.abs(g).max()))
    noise, noise_scaled = float(rounding(case, x).max()), float((rounding(case, x) / np.abs(scale)).max())
    assert abs(result.objective - case.value(x)) <= 4 * EPS * (case.n + 4) * case.size(x)
    # Px + q + A'y + z = 0, with the signs of z and y
    share = 1.0 if case.weights is None else 0.5
    assert np.abs(g + A.T @ y + z).max() <= share * tol * size + noise + allowed
    assert (z[x < case.upper] <= 0).all()
    assert (z[x > case.lower] >= 0).all()
    for s, (row, low, high) in enumerate(zip(A, lo, hi, strict=True)):
        if not np.isfinite(low) and not np.isfinite(high):
            assert y[s] == 0
        value, slop = math.fsum(row * x), 64 * EPS * float(np.abs(row) @ np.abs(x) + 1)
        unit = 1.0 if case.weights is None else float(np.abs(case.weights).max())
        if low < high:
            assert value >= high - slop or y[s] * unit <= tol * size + noise_scaled + allowed
            assert value <= low + slop or y[s] * unit >= -tol * size - noise_scaled - allowed
    worst = violation(case, x)
    assert abs(result.violation - worst) <= noise_scaled
    if case.weights is None:  # with weights tol bounds the residuals above
        assert worst <= tol * size + noise + 2 * allowed
    gap = frank_wolfe_gap(case, x)
    if case.bounded or np.isfinite(result.gap):
        rooms = np.where(np.isfinite(case.upper - case.lower), case.upper - case.lower, np.abs(x)).sum()
        errors = noise * (rooms + 1) + noise_scaled * (np.abs(scale) @ np.abs(x))
        assert abs(result.gap - gap) <= 1e-9 * gap + errors + 4 * EPS * (np.abs(y) @ np.abs(A) @ np.abs(x))
    return Verdict(case.value(x), worst, size, gap, noise)


def judge_end(case: Case, result: bcd.Result, form: str = "dense") -> Verdict | None:
    """Assert that a result has converged, as far as rounding allows; or is unbounded, as a linear program confirms."""
    if result.status is bcd.Status.UNBOUNDED:
        judge_ray(case, result)
        assert recession(case) < -1e-9
        return None
    assert result.status in (bcd.Status.CONVERGED, bcd.Status.STAGNATED)
    if result.status is bcd.Status.CONVERGED:
        return judge(case, result)
    # an operator does not tell which coordinate is the one to take up the rounding of a sum
    scale, root = np.abs(_scale(case)), np.sqrt(np.maximum(case.P.diagonal(), 0.0))
    blind = float(EPS * (scale @ np.abs(result.x)) * (root / scale).max() * root.max()) if form == "operator" else 0.0
    return judge(case, result, tol=0.0, allowed=blind)


def recession(case: Case) -> float:
    """The least q'd over directions d in [-1, 1]^n along which P is flat and a feasible point stays feasible.

    Negative: f falls without end.
    """
    A, lo, hi = case.sums
    flat = np.concatenate([case.F.T, np.eye(case.n)[case.D > 0]])
    equal = (lo == hi) | (np.isfinite(lo) & np.isfinite(hi))
    falls, rises = ~equal & np.isfinite(hi), ~equal & np.isfinite(lo)
    E, G = np.concatenate([flat, A[equal]]), np.concatenate([A[falls], -A[rises]])
    bounds = np.column_stack([np.where(np.isfinite(case.lower), 0, -1), np.where(np.isfinite(case.upper), 0, 1)])
    q = case.q / max(1e-300, float(np.abs(case.q).max()))
    rows = [M if len(M) else None for M in (G, E)]
    zeros = [np.zeros(len(M)) if len(M) else None for M in (G, E)]
    found = linprog(q, rows[0], zeros[0], rows[1], zeros[1], bounds=bounds, method="highs")
    assert found.status == 0, found.message
    return float(found.fun)


def judge_ray(case: Case, result: bcd.Result) -> None:
    """Assert that f falls without end along the ray, and that every point on it is feasible."""
    d, x = result.ray, result.x
    A, lo, hi = case.sums
    assert d.shape == (case.n,)
    size = float(np.abs(d).max())
    assert size > 0
    assert np.isinf(case.lower[d < 0]).all()
    assert np.isinf(case.upper[d > 0]).all()
    gain, slop = A @ d, 1e-8 * np.abs(A) @ np.abs(d)
    assert (gain <= slop)[np.isfinite(hi)].all()
    assert (gain >= -slop)[np.isfinite(lo)].all()
    assert d @ case.P @ d <= 1e-10 * np.trace(case.P) * (d @ d)
    assert case.gradient(x) @ d < 0
    assert case.q @ d < 0
    assert (x >= case.lower).all()
    assert (x <= case.upper).all()
    assert not sum_misses(case, x).any()


def judge_direction(case: Case, error: bcd.NonConvexError, movable: Array | None = None) -> None:
    """Assert that the direction keeps every sum that is a number and has the negative curvature that is claimed."""
    d = error.direction
    A, lo, hi = case.sums
    assert d.shape == (case.n,)
    np.testing.assert_allclose(np.linalg.norm(d), 1, rtol=1e-9)
    assert (np.abs(A @ d) <= 1e-9 * np.abs(A) @ np.abs(d))[lo == hi].all()
    if movable is not None:
        assert (d[~movable] == 0).all()
    assert error.curvature < 0
    np.testing.assert_allclose(d @ case.P @ d, error.curvature, rtol=1e-6, atol=1e-12 * np.abs(case.P).max())


# -- other solvers -------------------------------------------------------------------------------


def through_cvxpy(case: Case) -> tuple[str, float]:
    """Status and value from Clarabel, the objective as sums of squares (dent: 0)."""
    import cvxpy as cp

    x = cp.Variable(case.n)
    A, lo, hi = case.sums
    fixed, low, high = case.lower == case.upper, np.isfinite(case.lower), np.isfinite(case.upper)
    constraints = [x[fixed] == case.lower[fixed]] if fixed.any() else []
    for mine, sign, bound in ((low & ~fixed, 1, case.lower), (high & ~fixed, -1, case.upper)):
        constraints += [sign * x[mine] >= sign * bound[mine]] if mine.any() else []
    for row, a, b in zip(A, lo, hi, strict=True):
        if a == b:
            constraints.append(row @ x == a)
            continue
        constraints += ([row @ x >= a] if np.isfinite(a) else []) + ([row @ x <= b] if np.isfinite(b) else [])
    squares = 0.5 * cp.sum_squares(np.concatenate([case.F.T, np.diag(np.sqrt(case.D))]) @ x)
    problem = cp.Problem(cp.Minimize(squares + case.q @ x), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an inaccurate solution, which the status says
        try:
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        except cp.SolverError:
            return "failed", math.nan
    return problem.status, problem.value


def through_qpsolvers(case: Case, solver: str, **options: Any) -> Array | None:
    """The point that a solver of qpsolvers finds, None if it finds none or refuses the problem."""
    import qpsolvers

    A, lo, hi = case.sums
    fixed, identity = case.lower == case.upper, np.eye(case.n)
    equal = lo == hi
    low, high = np.isfinite(case.lower) & ~fixed, np.isfinite(case.upper) & ~fixed
    below, above = np.isfinite(lo) & ~equal, np.isfinite(hi) & ~equal
    E, e = np.concatenate([A[equal], identity[fixed]]), np.concatenate([lo[equal], case.lower[fixed]])
    G = np.concatenate([A[above], -A[below], identity[high], -identity[low]])
    h = np.concatenate([hi[above], -lo[below], case.upper[high], -case.lower[low]])
    problem = qpsolvers.Problem(
        case.P, case.q, G if len(G) else None, h if len(h) else None, E if len(E) else None, e if len(e) else None
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a conversion to sparse matrices
            solution = qpsolvers.solve_problem(problem, solver=solver, **options)
    except qpsolvers.exceptions.QPError:
        return None
    return solution.x if solution.found else None
