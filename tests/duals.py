"""Kernel matrices by scikit-learn, the SVM duals of docs/theory.md written out, independent certificates."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from sklearn.metrics.pairwise import pairwise_kernels

from bcd.dual import Dual
from bcd.gram import Kernel

Array = np.ndarray
BY_NAME = {
    "linear": Kernel("linear"),
    "rbf": Kernel("rbf", gamma=0.2),
    "poly": Kernel("poly", gamma=0.1, degree=3, coef0=1.0),
    "sigmoid": Kernel("sigmoid", gamma=0.02, coef0=-0.5),
    "laplacian": Kernel("laplacian", gamma=0.1),
    "cosine": Kernel("cosine"),
}
MACHINES = ("svc", "svr", "nu-svc", "nu-svr", "one-class", "svdd")


def float64(X: Any) -> Any:
    """The same numbers in double precision, dense."""
    return np.asarray(X.toarray() if sp.issparse(X) else X, np.float64)


def kernel_matrix(kernel: Kernel, X: Any, Z: Any = None) -> Array:
    """k(x_i, z_j) in float64, by scikit-learn."""
    if kernel.name == "precomputed":
        return float64(X)
    names = {
        "rbf": ["gamma"],
        "laplacian": ["gamma"],
        "poly": ["gamma", "degree", "coef0"],
        "sigmoid": ["gamma", "coef0"],
    }
    options = {name: getattr(kernel, name) for name in names.get(kernel.name, [])}
    return pairwise_kernels(float64(X), None if Z is None else float64(Z), metric=kernel.name, **options)


def machine(kind: str, n: int, seed: int = 0, K: Array | None = None, scale: float = 1.0) -> Dual:
    """The dual of a machine on n rows with random labels or targets and unequal weights; SVDD asks for K."""
    rng = np.random.default_rng(seed)
    weight = scale * rng.uniform(0.5, 1.5, n)
    y = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    y[0] = 1.0
    y[-1] = -1.0 if n > 1 else 1.0
    target = rng.normal(size=n)
    none, zero = np.empty(0, np.int64), np.zeros(n)
    two = np.repeat([0, 1], n)
    if kind == "svc":
        return Dual(-y, np.minimum(y, 0) * weight, np.maximum(y, 0) * weight, np.zeros(1), none)
    if kind == "nu-svc":
        total = 0.6 * min(weight[y > 0].sum(), weight[y < 0].sum())
        return Dual(
            zero,
            np.minimum(y, 0) * weight,
            np.maximum(y, 0) * weight,
            np.array([total, -total]),
            (y < 0).astype(np.int64),
        )
    if kind == "svr":
        linear = np.concatenate([0.1 - target, -0.1 - target])
        return Dual(linear, np.concatenate([zero, -weight]), np.concatenate([weight, zero]), np.zeros(1), none)
    if kind == "nu-svr":
        total = 0.3 * weight.sum()
        bounds = np.concatenate([zero, -weight]), np.concatenate([weight, zero])
        return Dual(np.concatenate([-target, -target]), *bounds, np.array([total, -total]), two)
    if kind == "one-class":
        return Dual(zero, zero, weight, np.array([0.4 * weight.sum()]), none)
    linear = -0.5 * (np.ones(n) if K is None else K.diagonal())
    return Dual(linear, zero, np.full(n, 3.0 / n), np.array([1.0]), none)


def hessian(K: Array, dual: Dual) -> Array:
    """K, or [[K, K], [K, K]]."""
    return np.tile(K, (len(dual.linear) // len(K),) * 2)


def labels(dual: Dual) -> Array:
    return dual.labels if len(dual.labels) else np.zeros(len(dual.linear), np.int64)


class Certificate(NamedTuple):
    objective: float
    violation: float
    gap: float
    outside: float  # of the bounds
    missed: float  # of a total, relative to what was summed


def certify(K: Array, dual: Dual, x: Array) -> Certificate:
    """Everything from the float64 matrix and x alone; loops and sorts, nothing of the package."""
    Q = hessian(np.asarray(K, np.float64), dual)
    grad = Q @ x + dual.linear
    violation, gap, missed = 0.0, 0.0, 0.0
    for s, total in enumerate(dual.totals):
        member = labels(dual) == s
        up, low = member & (x < dual.upper), member & (x > dual.lower)
        if up.any() and low.any():
            violation = max(violation, grad[low].max() - grad[up].min())
        gap += grad[member] @ x[member] - least_linear(grad[member], dual.lower[member], dual.upper[member], total)
        weight = np.abs(dual.lower[member]).sum() + np.abs(dual.upper[member]).sum() + abs(total)
        missed = max(missed, abs(float(np.sum(x[member].astype(np.longdouble)) - total)) / (weight or 1.0))
    outside = max(0.0, float((dual.lower - x).max()), float((x - dual.upper).max()))
    return Certificate(float(0.5 * x @ Q @ x + dual.linear @ x), violation, gap, outside, missed)


def least_linear(grad: Array, lower: Array, upper: Array, total: float) -> float:
    """Minimum of <grad, v> over the box with the sum: fill from the smallest gradient up."""
    order = np.argsort(grad)
    room = (upper - lower)[order]
    amount = np.clip(total - lower.sum() - (np.cumsum(room) - room), 0.0, room)
    return float(grad @ lower + grad[order] @ amount)


def clarabel_dual(K: Array, dual: Dual) -> tuple[float, float]:
    """The optimal value by cvxpy and Clarabel, and how accurate that is, in units of 1 + its size."""
    root = np.linalg.eigh(np.asarray(K, np.float64))
    real = root.eigenvalues > 1e-14 * max(1e-300, root.eigenvalues.max())
    factor = (root.eigenvectors[:, real] * np.sqrt(root.eigenvalues[real])).T
    N, s = len(dual.linear), labels(dual)
    x, f = cp.Variable(N), cp.Variable(len(factor))
    b = x if len(K) == N else x[: len(K)] + x[len(K) :]
    objective = (0.5 * cp.sum_squares(f) if len(factor) else 0.0) + dual.linear @ x
    sums = [(s == k).astype(float) @ x == total for k, total in enumerate(dual.totals)]
    problem = cp.Problem(cp.Minimize(objective), [x >= dual.lower, x <= dual.upper, f == factor @ b, *sums])
    tight = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, **tight)
    return float(problem.value), {"optimal": 1e-8, "optimal_inaccurate": 1e-5}[problem.status]


def feasible_within_rounding(found: Certificate) -> bool:
    return found.outside == 0.0 and found.missed <= 1e-15
