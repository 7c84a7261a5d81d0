# SPDX-License-Identifier: BSD-3-Clause
"""One judge for every SVM solver: NumPy and float64 only, from the coefficients that a solver returned.

    minimise 1/2 b'Kb + c'b + epsilon |b|_1   subject to   sum(b) = total,   lower <= b <= upper

is every dual of the comparison: C-SVC (c = -y, b = y alpha), epsilon-SVR (c = -y, b = the difference of the two
multipliers) and one-class SVM (c = 0). The kernel entries are computed anew, tile by tile, so that n x n_sv of them
are never in memory at once.

A coordinate within 1e-12 C of a bound counts as at that bound: it may not move further. A solver that leaves one
at 0.999 C or at 1e-9 C keeps it free, and its gradient there counts in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from experiments.svm_cases import Case

TOL = 1e-3
SLACK = 1e-6  # a violation up to (1 + SLACK) tol counts as converged
AT_BOUND = 1e-12  # relative to C
INFEASIBLE = 1e-6  # relative to C; for the sum: times the root of the number of support vectors (float32 solvers)
THREADS = 2
TILE = 256  # rows
SPARSE = 0.01  # below this share of entries the products are those of a sparse matrix

Array = np.ndarray


class Machine(NamedTuple):
    """What a solver returned for one dual.

    Attributes
    ----------
    pair : tuple of two floats or None
        The two classes, the smaller label first; None: no classes.
    support : ndarray of int
        Rows of the whole data set.
    beta : ndarray of float64
        Their coefficients, positive where the larger label is.
    intercept : float
        b of the decision value (K beta)_i + b.
    """

    pair: tuple[float, float] | None
    support: Array
    beta: Array
    intercept: float


@dataclass(frozen=True)
class Dual:
    """The data of a dual besides its kernel matrix; ``rows`` of the data set take part."""

    rows: Array
    linear: Array
    lower: Array
    upper: Array
    total: float = 0.0
    epsilon: float = 0.0

    @property
    def scale(self) -> float:
        """C: the widest room of a coordinate."""
        return float(max(np.abs(self.lower).max(), np.abs(self.upper).max()))


@dataclass
class Verdict:
    """What the judge found; over several machines the sums (objective, counts) or the worst (errors)."""

    objective: float
    violation: float
    sum_error: float
    bound_error: float
    intercept_error: float
    feasible: bool
    n_sv: int
    n_bound: int

    @property
    def converged(self) -> bool:
        """Feasible, and the violation within the tolerance."""
        return self.feasible and self.violation <= TOL * (1 + SLACK)


# -- problems -----------------------------------------------------------------------------------


def duals(case: Case, y: Array) -> dict[tuple[float, float] | None, Dual]:
    """The duals of a case, by pair of classes."""
    n = len(y)
    if case.task == "regress":
        return {None: Dual(np.arange(n), -y, np.full(n, -case.C), np.full(n, case.C), epsilon=case.epsilon)}
    if case.task == "one-class":
        return {None: Dual(np.arange(n), np.zeros(n), np.zeros(n), np.ones(n), total=case.nu * n)}
    pairs = combinations(np.unique(y).tolist(), 2)
    return {(low, high): _two_classes(y, low, high, case.C) for low, high in pairs}


def _two_classes(y: Array, low: float, high: float, C: float) -> Dual:
    rows = np.flatnonzero((y == low) | (y == high))
    sign = np.where(y[rows] == high, 1.0, -1.0)
    return Dual(rows, -sign, np.where(sign > 0, 0.0, -C), np.where(sign > 0, C, 0.0))


# -- products with the kernel matrix ------------------------------------------------------------


def in_tiles(work: Any, n: int, rows: int = TILE) -> None:
    """Call ``work(start, stop)`` for every tile of rows, on THREADS threads with single-threaded BLAS."""
    with _one_blas_thread(), ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda start: work(start, min(n, start + rows)), range(0, n, rows)))


def _one_blas_thread() -> Any:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(1, "blas")


def kernel_times(X: Any, support: Array, B: Array, gamma: float | None) -> Array:
    """K(X, X[support]) @ B in float64, shape (n, columns of B); gamma None: linear."""
    n, d = X.shape
    sparse = sp.issparse(X) and X.nnz < SPARSE * n * d
    Z = X[support]
    Z = Z if sparse or not sp.issparse(Z) else Z.toarray()
    squares = np.asarray(X.multiply(X).sum(axis=1)).ravel() if sp.issparse(X) else np.einsum("ij,ij->i", X, X)
    out = np.empty((n, B.shape[1]))

    def tile(start: int, stop: int) -> None:
        rows = X[start:stop].toarray() if sp.issparse(X) else X[start:stop]
        K = (Z @ rows.T).T if sparse else rows @ Z.T
        if gamma is not None:
            K = squares[start:stop, None] + squares[support] - 2.0 * K
            np.exp(np.multiply(np.maximum(K, 0.0, out=K), -gamma, out=K), out=K)
        out[start:stop] = K @ B

    in_tiles(tile, n)
    return out


# -- verdicts -----------------------------------------------------------------------------------


def judge(X: Any, y: Array, case: Case, models: dict[str, list[Machine]]) -> dict[str, Verdict]:
    """Judge what several solvers returned for the same data.

    Parameters
    ----------
    X : ndarray or csr_matrix of float64, shape (n, d)
        The numbers that the solvers saw.
    y : ndarray, shape (n,)
    case : Case
    models : dict of str to list of Machine
        For every solver a machine for every dual of the case.

    Returns
    -------
    dict of str to Verdict

    Raises
    ------
    ValueError
        If a solver lacks a machine or gives an unknown one.
    """
    problems = duals(case, y)
    for name, machines in models.items():
        if sorted(map(str, problems)) != sorted(str(m.pair) for m in machines):
            raise ValueError(f"{name} returned {len(machines)} machines where {len(problems)} were expected")
    found: dict[str, list[Verdict]] = {name: [] for name in models}
    for pair, dual in problems.items():
        chosen = {name: next(m for m in machines if m.pair == pair) for name, machines in models.items()}
        for name, verdict in _judge_dual(X, dual, case, chosen):
            found[name].append(verdict)
    unique = {name: len(np.unique(np.concatenate([m.support for m in models[name]]))) for name in models}
    return {name: merged(verdicts, unique[name]) for name, verdicts in found.items()}


def _judge_dual(X: Any, dual: Dual, case: Case, machines: dict[str, Machine]) -> Iterator[tuple[str, Verdict]]:
    """All machines of one dual from one pass over the kernel entries that any of them needs."""
    place = np.full(X.shape[0], -1)
    place[dual.rows] = np.arange(len(dual.rows))
    betas = np.zeros((len(dual.rows), len(machines)))
    stray = []
    for k, machine in enumerate(machines.values()):
        at = place[machine.support]
        np.add.at(betas[:, k], at[at >= 0], machine.beta[at >= 0])
        stray.append(bool((at < 0).any() and (machine.beta[at < 0] != 0).any()))
    support = np.flatnonzero((betas != 0).any(axis=1))
    part = X if len(dual.rows) == X.shape[0] else X[dual.rows]
    products = kernel_times(part, support, betas[support], case.gamma)
    for k, (name, machine) in enumerate(machines.items()):
        verdict = certify(dual, betas[:, k], products[:, k], machine.intercept)
        verdict.feasible &= not stray[k]
        yield name, verdict


def certify(dual: Dual, beta: Array, product: Array, intercept: float = 0.0) -> Verdict:
    """The verdict on coefficients, given K beta."""
    C = dual.scale
    rising, falling = _one_sided(dual, beta, product, AT_BOUND * C)
    least, most = rising.min(initial=np.inf), falling.max(initial=-np.inf)
    used = np.flatnonzero(beta)
    bounds = np.maximum(dual.lower - beta, beta - dual.upper).max(initial=0.0)
    total = abs(beta.sum() - dual.total)
    objective = 0.5 * beta @ product + dual.linear @ beta + dual.epsilon * np.abs(beta).sum()
    low, high = sorted((least, most))
    sound = bounds <= INFEASIBLE * C and total <= INFEASIBLE * C * max(1.0, np.sqrt(len(used)))
    return Verdict(
        objective=float(objective),
        violation=float(max(0.0, most - least)),
        sum_error=float(total),
        bound_error=float(bounds),
        intercept_error=float(max(0.0, low + intercept, -intercept - high)),
        feasible=bool(sound and np.isfinite(product).all()),
        n_sv=len(used),
        n_bound=int((np.abs(beta[used]) >= C - AT_BOUND * C).sum()),
    )


def _one_sided(dual: Dual, beta: Array, product: Array, edge: float) -> tuple[Array, Array]:
    """Derivatives of what can rise and of what can fall (SVR: of both multipliers of a row)."""
    slope = product + dual.linear
    if dual.epsilon == 0:
        return slope[beta < dual.upper - edge], slope[beta > dual.lower + edge]
    above, below = slope + dual.epsilon, slope - dual.epsilon
    rising = np.concatenate([above[beta < dual.upper - edge], below[beta < -edge]])
    falling = np.concatenate([above[beta > edge], below[beta > dual.lower + edge]])
    return rising, falling


def merged(verdicts: list[Verdict], n_sv: int) -> Verdict:
    """One verdict on all machines of a model."""
    if len(verdicts) == 1:
        return verdicts[0]
    worst = {
        name: max(getattr(v, name) for v in verdicts)
        for name in ("violation", "sum_error", "bound_error", "intercept_error")
    }
    return Verdict(
        objective=sum(v.objective for v in verdicts),
        feasible=all(v.feasible for v in verdicts),
        n_sv=n_sv,
        n_bound=sum(v.n_bound for v in verdicts),
        **worst,
    )
