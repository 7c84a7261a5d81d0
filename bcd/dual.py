# SPDX-License-Identifier: BSD-3-Clause
"""Problems whose Hessian is a kernel matrix, and the block solver for them.

    minimise 1/2 b'Kb + c'x   subject to   sum of x over every group = its total,   l <= x <= u

with b = x, or b = x[:n] + x[n:] where every row of the kernel matrix has two coordinates (SVR).

GS-1 blocks (docs/theory.md), nested: a part of some thousand rows is solved by blocks of some hundred
coordinates, these by compiled WSS2 pair steps on their own small kernel matrix. Columns of K are computed for
the coordinates that have moved, and first for the rows of the part only; the other rows follow, once, when
the part is done. That is what shrinking is for, and the gradient of every row is known before the next part
is chosen. Blocks on which pair steps crawl are finished by an interior-point method.

Entries are float32 and sums float64: whenever rounding may matter, the gradient is rebuilt from float64
entries, and where that does not suffice all entries become float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bcd import _compiled
from bcd._interrupt import interrupts
from bcd.constraints import FeasibleSet, Moves, SumBox
from bcd.gram import Gram, single_threaded_blas
from bcd.interior import newton, solve_interior
from bcd.result import Status

__all__ = [
    "Dual",
    "DualProgress",
    "DualResult",
    "nu_svc_dual",
    "nu_svr_dual",
    "one_class_dual",
    "solve_dual",
    "svc_dual",
    "svdd_dual",
    "svr_dual",
]

Array = np.ndarray

PART = 8192  # rows of a part; problems of at most twice as many are solved by blocks alone
LEAST, MOST = 256, 2048  # coordinates of a block: it grows while most of them move; a quarter where entries are dear
WHOLE = 2048  # coordinates up to which one block holds all of them, if their matrix is at hand
ACCURACY = 0.1  # a block or part is solved to this fraction of the violation
FEW = 5e6  # entries that are computed in float64 without a second thought, to certify
MANY = 1e8  # entries that are computed in float64 after a limit was met: about a fifth of a second
REBUILDS = 4  # of the gradient in float64 before all entries become float64
SAMPLE = 256  # rows on which the rounding of the others is measured
BLUR = 0.3  # of the violation: with that much rounding in the gradient, steps are no longer worth taking
MARGIN = 10.0  # times the largest error of the sample: how far from an end a row's gradient is certainly no end
EPS32 = 2.0**-24
STALLED = 10  # outer steps in a row without progress


@dataclass(frozen=True)
class Dual:
    """The data of the problem besides the kernel matrix.

    Attributes
    ----------
    linear, lower, upper : ndarray of float64, shape (N,)
        c and the bounds, which must be finite. N = n, or 2 n: coordinates k and n + k share row k.
    totals : ndarray of float64, shape (m,)
        Right-hand sides of the sums.
    labels : ndarray of int64, shape (N,) or (0,)
        The sum that a coordinate belongs to, 0 .. m - 1; empty: all belong to one.
    """

    linear: Array
    lower: Array
    upper: Array
    totals: Array
    labels: Array

    def bind(self) -> FeasibleSet:
        """Check bounds and totals; InfeasibleError (a ValueError) where nothing satisfies them."""
        one = len(self.labels) == 0
        total = float(self.totals[0]) if one else list(self.totals)
        return SumBox(self.lower, self.upper, total, None if one else self.labels).bind(len(self.linear))


# -- the SVMs: see the table at the top of bcd/svm.py ----------------------------------------------

ONE_SUM = np.empty(0, np.int64)


def svc_dual(y: Array, upper: Array) -> Dual:
    """C-SVC.

    Parameters
    ----------
    y : ndarray of float64, shape (n,)
        +1 and -1.
    upper : ndarray of float64, shape (n,)
        C_i.

    Returns
    -------
    Dual

    Examples
    --------
    >>> svc_dual(np.array([1.0, -1.0]), np.full(2, 3.0)).lower
    array([ 0., -3.])
    """
    positive = y > 0
    return Dual(-y, np.where(positive, 0.0, -upper), np.where(positive, upper, 0.0), np.zeros(1), ONE_SUM)


def nu_svc_dual(y: Array, weight: Array, nu: float) -> Dual:
    """nu-SVC; sum 0 is that of class +1, sum 1 that of class -1.

    Parameters
    ----------
    y : ndarray of float64, shape (n,)
        +1 and -1.
    weight : ndarray of float64, shape (n,)
        w_i.
    nu : float
        At most twice the share of the smaller class in the weights.

    Returns
    -------
    Dual
    """
    positive = y > 0
    half = min(nu * weight.sum() / 2, weight[positive].sum(), weight[~positive].sum())
    lower, upper = np.where(positive, 0.0, -weight), np.where(positive, weight, 0.0)
    return Dual(np.zeros(len(y)), lower, upper, np.array([half, -half]), (~positive).astype(np.int64))


def svr_dual(y: Array, upper: Array, epsilon: float) -> Dual:
    """epsilon-SVR; coordinates k and n + k are p_k and m_k.

    Parameters
    ----------
    y, upper : ndarray of float64, shape (n,)
        Targets and C_i.
    epsilon : float

    Returns
    -------
    Dual
        With 2 n coordinates.
    """
    zero = np.zeros(len(y))
    linear = np.concatenate([epsilon - y, -epsilon - y])
    return Dual(linear, np.concatenate([zero, -upper]), np.concatenate([upper, zero]), np.zeros(1), ONE_SUM)


def nu_svr_dual(y: Array, upper: Array, nu: float) -> Dual:
    """nu-SVR; sum 0 is that of p, sum 1 that of m.

    Parameters
    ----------
    y, upper : ndarray of float64, shape (n,)
        Targets and C_i.
    nu : float

    Returns
    -------
    Dual
        With 2 n coordinates.
    """
    half = nu * upper.sum() / 2
    labels = np.repeat(np.array([0, 1], np.int64), len(y))
    return replace(svr_dual(y, upper, 0.0), totals=np.array([half, -half]), labels=labels)


def one_class_dual(weight: Array, nu: float) -> Dual:
    """One-class SVM.

    Parameters
    ----------
    weight : ndarray of float64, shape (n,)
        w_i.
    nu : float

    Returns
    -------
    Dual
    """
    zero = np.zeros(len(weight))
    return Dual(zero, zero, weight, np.array([nu * weight.sum()]), ONE_SUM)


def svdd_dual(diagonal: Array, upper: Array) -> Dual:
    """Support vector data description, halved.

    Parameters
    ----------
    diagonal, upper : ndarray of float64, shape (n,)
        k(x_i, x_i) and C_i.

    Returns
    -------
    Dual
    """
    return Dual(-diagonal / 2, np.zeros(len(upper)), upper, np.ones(1), ONE_SUM)


# -- the solver ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DualProgress:
    """What a callback sees before every outer step.

    Attributes
    ----------
    iteration : int
        Pair steps so far.
    columns : float
        Kernel entries computed so far, in units of n.
    seconds, violation, objective : float
    x : ndarray of float64, shape (N,)
        The point itself, not a copy.
    """

    iteration: int
    columns: float
    seconds: float
    violation: float
    objective: float
    x: Array


@dataclass(frozen=True)
class DualResult:
    """The last point, feasible and no worse than any before it, with its certificate.

    Attributes
    ----------
    x : ndarray of float64, shape (N,)
    coefficients : ndarray of float64, shape (n,)
        b.
    product : ndarray of float64, shape (n,)
        K b.
    offset : ndarray of float64, shape (m,)
        y of every sum, with gradient + y = 0 at its free coordinates (their mean; where none is free, the
        middle of the two ends). For a C-SVC it is the intercept.
    violation : float
        Largest gradient that can fall minus smallest that can rise, the largest over the sums.
    gap : float
        Frank-Wolfe gap: for a positive semidefinite K, objective - optimum is at most this.
    objective : float
        With float32 entries (``dtype``) both carry a rounding of a few 1e-7 of the objective where the gradient was
        made exact only at the rows that decide the violation, or not at all because a limit was met.
    iterations : int
        Pair steps.
    columns : float
        Kernel entries computed, in units of n.
    seconds : float
    status : Status
    dtype : numpy.dtype
        Of the kernel entries at the end.
    """

    x: Array
    coefficients: Array
    product: Array
    offset: Array
    violation: float
    gap: float
    objective: float
    iterations: int
    columns: float
    seconds: float
    status: Status
    dtype: Any


def solve_dual(
    gram: Gram,
    dual: Dual,
    x0: Array | None = None,
    *,
    tol: float = 1e-3,
    max_iter: int | None = None,
    time_limit: float | None = None,
    callback: Callable[[DualProgress], Any] | None = None,
    shrinking: bool = True,
) -> DualResult:
    """Solve the dual to a violation of ``tol``.

    Parameters
    ----------
    gram : Gram
    dual : Dual
    x0 : ndarray of float64, shape (N,), optional
        Start; it is projected onto the feasible set.
    tol : float
        Violation to reach, in units of the gradient.
    max_iter : int, optional
        Pair steps at most.
    time_limit : float, optional
        Seconds at most.
    callback : callable, optional
        Called with a :class:`DualProgress`; a true return value stops the run.
    shrinking : bool
        Whether large problems are solved in parts.

    Returns
    -------
    DualResult
        Ctrl-C ends the run with status INTERRUPTED (a second one raises KeyboardInterrupt).

    Raises
    ------
    InfeasibleError
        A ValueError: no point satisfies the bounds and totals.
    ValueError
        If a diagonal entry of the matrix is not finite.

    Examples
    --------
    >>> from bcd.gram import Gram, Kernel
    >>> y = np.array([1.0, 1.0, -1.0])
    >>> dual = Dual(-y, np.minimum(y, 0), np.maximum(y, 0), np.zeros(1), np.empty(0, np.int64))
    >>> solve_dual(Gram(np.array([[2.0], [1.0], [-1.0]]), Kernel("linear")), dual).x.round(3) + 0.0
    array([ 0. ,  0.5, -0.5])
    """
    feasible = dual.bind()
    if not np.isfinite(gram.diagonal).all():
        k = int(np.argmin(np.isfinite(gram.diagonal)))
        raise ValueError(f"k(x, x) must be finite; at row {k} it is {gram.diagonal[k]}: scale the features")
    alone = nullcontext() if gram.kernel.function is not None else single_threaded_blas
    with interrupts() as pressed, alone:
        watch = _Watch(tol, max_iter, time_limit, callback, pressed)
        try:
            x = _first_point(dual, feasible) if x0 is None else _near(feasible, x0)
            point = _Point(gram, Moves(feasible, x), dual.linear, np.zeros(gram.n), watch)
            point.parts = shrinking and gram.divisible
            point.start()
            status = point.solve()
            if not status.ok:
                point.finish()
            point.moves.settle()
        finally:
            gram.team.close()
    return _result(point, status)


def _result(point: _Point, status: Status) -> DualResult:
    moves, watch = point.moves, point.watch
    grad = point.gradient()
    low, high = _ends(grad, moves)
    offset = np.array([-0.5 * (a + b) if a > -np.inf and b < np.inf else -b if a == -np.inf else -a
                       for a, b in zip(high, low, strict=True)])  # fmt: skip
    free = (moves.rise > 0) & (moves.fall > 0)
    labels = moves.labels if len(moves.labels) else np.zeros(point.N, np.int64)
    count = np.bincount(labels[free], minlength=moves.groups)
    mean = np.bincount(labels[free], grad[free], minlength=moves.groups) / np.maximum(count, 1)
    return DualResult(
        x=moves.x,
        coefficients=point.coefficients(),
        product=point.product,
        offset=np.where(count > 0, -mean, offset),
        violation=moves.violation(grad),
        gap=moves.gap(grad),
        objective=point.objective(grad),
        iterations=watch.pairs,
        columns=point.gram.entries / point.n,
        seconds=time.perf_counter() - watch.started,
        status=status,
        dtype=point.gram.dtype,
    )


def _ends(grad: Array, moves: Moves) -> tuple[Array, Array]:
    """For every sum the smallest gradient that can rise (inf: none) and the largest that can fall (-inf: none)."""
    i, j = _compiled.violating_ends(grad, moves.rise, moves.fall, moves.labels, moves.groups)
    low, high = np.full(moves.groups, np.inf), np.full(moves.groups, -np.inf)
    for s in range(moves.groups):
        low[s] = grad[i[s]] if i[s] >= 0 else np.inf
        high[s] = grad[j[s]] if j[s] >= 0 else -np.inf
    return low, high


@dataclass
class _Watch:
    """Limits and counts of a run, shared by all its levels."""

    tol: float
    max_iter: int | None
    time_limit: float | None
    callback: Callable[[DualProgress], Any] | None
    pressed: list[bool]
    started: float = field(default_factory=lambda: time.perf_counter())
    pairs: int = 0
    stopped: Status | None = None

    def stop(self) -> bool:
        """Whether a limit is met; ``stopped`` says which."""
        if self.pressed:
            self.stopped = Status.INTERRUPTED
        elif self.max_iter is not None and self.pairs >= self.max_iter:
            self.stopped = Status.ITERATION_LIMIT
        elif self.time_limit is not None and time.perf_counter() - self.started >= self.time_limit:
            self.stopped = Status.TIME_LIMIT
        return self.stopped is not None

    def report(self, point: _Point, violation: float, objective: float) -> None:
        """Tell the callback, which may stop the run."""
        if self.callback is not None and self.stopped is None:
            seconds = time.perf_counter() - self.started
            progress = DualProgress(
                self.pairs, point.gram.entries / point.n, seconds, violation, objective, point.moves.x
            )  # fmt: skip
            if self.callback(progress):
                self.stopped = Status.CALLBACK


class _Progress:
    """Whether the outer steps of one level still get anywhere."""

    def __init__(self) -> None:
        self.violation, self.objective, self.idle = np.inf, np.inf, 0

    def stalled(self, violation: float, objective: float) -> bool:
        """Note a step; True after STALLED of them without progress."""
        better = violation < 0.9 * self.violation or objective < self.objective - 1e-14 * abs(objective)
        self.idle = 0 if better else self.idle + 1
        if better:  # small gains add up until they count
            self.violation, self.objective = min(violation, self.violation), min(objective, self.objective)
        return self.idle >= STALLED


class _Point:
    """The problem on some rows, and the point that moves through it."""

    def __init__(self, gram: Gram, moves: Moves, linear: Array, product: Array, watch: _Watch):
        self.gram, self.moves, self.linear, self.product, self.watch = gram, moves, linear, product, watch
        self.n, self.N = gram.n, len(linear)
        self.parts = False
        self.block = np.empty(0, np.int64)  # the last one
        self.whole = self.N <= WHOLE and (gram.stored or gram.through_weights)  # one block holds all
        self.least = LEAST // 4 if gram.dear else LEAST
        self.size = self.N if self.whole else 2 * self.least  # of the next one
        self.lipschitz = max(0.5 * float(gram.diagonal.max(initial=0.0)), np.finfo(float).tiny)
        self.unit = float(np.abs(linear).max(initial=0.0)) or self.lipschitz  # of a gradient
        self.noise = 0.0  # variance of the gradient by the rounding of entries, since the gradient was exact

    def gradient(self) -> Array:
        """K b + c, shape (N,)."""
        return (self.product if self.n == self.N else np.tile(self.product, self.N // self.n)) + self.linear

    def coefficients(self) -> Array:
        """B, shape (n,)."""
        return self.moves.x.reshape(-1, self.n).sum(axis=0)

    def objective(self, grad: Array) -> float:
        """The dual objective."""
        return float(0.5 * self.moves.x @ (grad + self.linear))

    def start(self) -> None:
        """Compute the product at the first point."""
        b = self.coefficients()
        index = np.flatnonzero(b)
        if len(index):
            self._add(index, b[index], np.zeros(len(index), bool))

    # -- the whole problem --

    def solve(self) -> Status:
        """Outer steps until the violation, certified, is at most tol, or something stops them."""
        progress, rebuilds, pairs = _Progress(), 0, -1
        while True:
            grad = self.gradient()
            violation, objective = self.moves.violation(grad), self.objective(grad)
            self.watch.report(self, violation, objective)
            if self.watch.stop():
                return self.watch.stopped  # type: ignore[return-value]
            if not np.isfinite(violation) and self.gram.exact:
                return Status.NOT_FINITE
            done, fresh = violation <= self.watch.tol, pairs == self.watch.pairs  # fresh: nothing moved since a rebuild
            if done and fresh:
                return Status.CONVERGED
            stalled = progress.stalled(violation, objective) and not done
            if not (done or stalled or (self._blurred(violation) and self._measured(violation))):
                self.step(grad, violation)
                continue
            if stalled or (rebuilds > REBUILDS and not self.gram.exact) or rebuilds > 20 * REBUILDS:
                if not self._sharpen():
                    return Status.STAGNATED
                progress = _Progress()
            self._rebuild(violation)
            rebuilds, pairs, progress.objective = rebuilds + 1, self.watch.pairs, np.inf

    def finish(self) -> None:
        """Make the gradient of a point that a limit has left exact, where that does not take long."""
        b = self.coefficients()
        if not self.gram.exact and self.n * np.count_nonzero(b) <= MANY:
            self._rebuild(np.inf)

    def _blurred(self, violation: float) -> bool:
        """Whether the rounding of float32 entries could hide the violation."""
        return self.noise > 0 and np.sqrt(self.noise) > BLUR * violation

    def _measured(self, violation: float) -> bool:
        """Whether it does, once the rounding is measured."""
        b = self.coefficients()
        index = np.flatnonzero(b)
        self.noise = self._error(index, b[index]) ** 2
        return self._blurred(violation)

    def _sharpen(self) -> bool:
        """Raise the precision; False where it is as high as it gets."""
        if self.gram.exact:
            return False
        self.gram.raise_precision()
        return True

    def _rebuild(self, violation: float) -> None:
        """Make the gradient exact: everywhere, or at the rows that decide the violation if the rest is near enough."""
        self.moves.settle()
        b = self.coefficients()
        index = np.flatnonzero(b)
        rows: Any = slice(None)
        if not self.gram.exact and self.n * len(index) > FEW and violation <= self.watch.tol:
            rows = self._decisive(index, b[index])
        self.product[rows] = self.gram.exact_product(index, b[index], rows)
        self.noise = 0.0

    def _decisive(self, index: Array, b: Array) -> Any:
        """Rows whose exact gradient could be an end, judged by the rounding measured on a sample of all rows."""
        error = self._error(index, b)
        grad, moves = self.gradient(), self.moves
        low, high = _ends(grad, moves)
        s = moves.labels if len(moves.labels) else np.zeros(self.N, np.int64)
        margin = MARGIN * error
        near = ((grad <= low[s] + margin) & (moves.rise > 0)) | ((grad >= high[s] - margin) & (moves.fall > 0))
        rows = np.flatnonzero(near.reshape(-1, self.n).any(axis=0))
        return rows if 2 * len(rows) < self.n else slice(None)

    def _error(self, index: Array, b: Array) -> float:
        """The largest error of the gradient on a sample of the rows, with those of the largest size among them."""
        count = min(self.n, SAMPLE)
        evenly = np.linspace(0, self.n - 1, count).astype(np.int64)
        sample = np.union1d(evenly, np.argpartition(self.gram.sizes(), -count)[-count:])
        return float(np.abs(self.gram.exact_product(index, b, sample) - self.product[sample]).max())

    # -- one outer step --

    def step(self, grad: Array, violation: float) -> None:
        """Solve a part or a block to a fraction of the violation."""
        tol = 0.5 * self.watch.tol if self.whole else max(0.5 * self.watch.tol, ACCURACY * violation)
        if self.parts and self.n > 2 * PART:
            self._solve_part(grad, tol)
        else:
            self._solve_block(grad, tol)

    def _choose(self, grad: Array, size: int, previous: Array) -> Array:
        """The GS-1 block, with free ones of the coordinates ``previous`` in up to half of its places."""
        moves = self.moves
        kept = previous[(moves.rise[previous] > 0) & (moves.fall[previous] > 0)][: size // 2]
        block = _compiled.steepest(
            grad, moves.rise, moves.fall, moves.labels, moves.groups, self.lipschitz, size
        )[0]  # fmt: skip
        if not len(previous):  # at the start gradients tie: a sample says more than the first of them
            block = np.concatenate([block[: size // 8], _spread(grad, moves, size)])
            block = block[np.sort(np.unique(block, return_index=True)[1])]
        taken = np.zeros(self.N, bool)
        taken[kept] = True
        return np.concatenate([block[~taken[block]][: size - len(kept)], kept])

    def _solve_part(self, grad: Array, tol: float) -> None:
        """Solve the problem restricted to some rows; then bring the gradient of all rows after it."""
        moves = self.moves
        free = np.flatnonzero((moves.rise > 0) & (moves.fall > 0))
        size = max(PART, min(2 * len(free), 3 * self.n // 4))  # room for all that are free
        rows = np.unique(self._choose(grad, size, free) % self.n)
        index = (rows + self.n * np.arange(self.N // self.n)[:, None]).ravel()
        labels = moves.labels[index] if len(moves.labels) else np.zeros(len(index), np.int64)
        totals = np.bincount(labels, moves.x[index], minlength=moves.groups)
        inside = FeasibleSet(
            *(len(index), moves.lower[index], moves.upper[index], totals, labels),
            *([(total, total) for total in totals], np.arange(moves.groups)),
        )
        part = _Point(
            self.gram.restrict(rows),
            Moves(inside, moves.x[index], settle=False),
            self.linear[index],
            self.product[rows].copy(),
            self.watch,
        )
        part.descend(tol)
        self._carry(index, part.moves.x)

    def descend(self, tol: float) -> None:
        """Blocks until the violation is at most tol, a limit is met or nothing moves any more."""
        progress = _Progress()
        while not self.watch.stop():
            grad = self.gradient()
            violation = self.moves.violation(grad)
            if violation <= tol or self._blurred(violation) or progress.stalled(violation, self.objective(grad)):
                return
            self._solve_block(grad, max(tol, ACCURACY * violation))

    def _solve_block(self, grad: Array, tol: float) -> None:
        """Pair steps on a block; where they crawl, second-order steps and then pair steps again."""
        W = self._choose(grad, self.size, self.block) if self.size < self.N else np.arange(self.N)
        W, start = self._by_sum(W)
        moves, rows = self.moves, W % self.n
        K, diagonal = self.gram.block(rows), self.gram.diagonal[rows]
        x, g, box = moves.x[W], grad[W], (moves.lower[W], moves.upper[W])
        left = np.inf if self.watch.max_iter is None else self.watch.max_iter - self.watch.pairs
        budget = int(min(left, 20 * len(W) + 0.2 * len(W) ** 2))  # as many as take the time of an interior-point run
        done, worst, _ = _compiled.segment_pairs(K, g, x, *box, diagonal, start, tol, budget, np.inf)
        if worst > tol and done == budget < left:
            done += self._second_order(W, x, grad[W], start, tol, int(min(left - done, 20 * len(W))))
        self.watch.pairs += done
        moved = self._carry(W, x)
        self.block = W
        if len(W) < self.N and moved > 0.5 * len(W):
            self.size = min(2 * self.size, MOST)
        elif len(W) < self.N and moved < 0.125 * len(W):
            self.size = max(self.size // 2, self.least)

    def _second_order(self, W: Array, x: Array, g: Array, start: Array, tol: float, steps: int) -> int:
        """Finish a block whose gradient was g before it went to x; moves x, returns the pair steps taken."""
        moves, rows = self.moves, W % self.n
        K, diagonal = self.gram.block(rows, np.float64), self.gram.diagonal[rows]
        lower, upper = moves.lower[W], moves.upper[W]
        done, worst = 0, np.inf
        for method in (newton, self._interior, newton):
            now = g + K @ (x - moves.x[W])
            method(K, now, x, lower, upper, start)
            taken, worst, _ = _compiled.segment_pairs(K, now, x, lower, upper, diagonal, start, tol, steps, np.inf)
            done += taken
            if worst <= tol or self.watch.stop():
                break
        return done

    def _interior(self, K: Array, g: Array, x: Array, lower: Array, upper: Array, start: Array) -> None:
        """The interior-point solution, where it is better; moves x and its gradient g."""
        found = solve_interior(K, g, x, lower, upper, start, self.unit)
        if found is not None:
            g += K @ (found - x)
            x[:] = found

    def _by_sum(self, W: Array) -> tuple[Array, Array]:
        """The block ordered by sums, and where each sum's coordinates begin."""
        labels = self.moves.labels
        if len(labels) == 0:
            return W, np.array([0, len(W)])
        W = W[np.argsort(labels[W], kind="stable")]
        return W, np.searchsorted(labels[W], np.arange(self.moves.groups + 1))

    def _carry(self, W: Array, x: Array) -> int:
        """Put the coordinates W at x; returns how many changed."""
        moves = self.moves
        step = x - moves.x[W]
        changed = np.flatnonzero(step)
        W, x, step = W[changed], x[changed], step[changed]
        moves.x[W], moves.rise[W], moves.fall[W] = x, moves.upper[W] - x, x - moves.lower[W]
        free = (moves.rise[W] > 0) & (moves.fall[W] > 0)
        if self.n < self.N:
            W, where = np.unique(W % self.n, return_inverse=True)
            step, free = np.bincount(where, step), np.bincount(where, free) > 0
        self._add(W, step, free)
        return len(changed)

    def _add(self, rows: Array, step: Array, free: Array) -> None:
        """``product += K[:, rows] step``; columns of free coordinates are worth keeping."""
        self.gram.add_product(self.product, rows, step, free)
        if not self.gram.exact:
            scale = float(np.abs(self.gram.diagonal).max(initial=0.0))
            self.noise += EPS32**2 * scale * float((step * step) @ np.abs(self.gram.diagonal[rows]))


def _spread(grad: Array, moves: Moves, size: int) -> Array:
    """Coordinates drawn evenly from all that can rise and all that can fall, a share of ``size`` from every end."""
    draw = np.random.default_rng(0)
    labels = moves.labels if len(moves.labels) else np.zeros(len(grad), np.int64)
    share = max(1, size // (2 * moves.groups))
    ends = [
        np.flatnonzero((room > 0) & (labels == s)) for s in range(moves.groups) for room in (moves.rise, moves.fall)
    ]
    return np.concatenate([draw.choice(end, min(share, len(end)), replace=False) for end in ends])


def _near(feasible: FeasibleSet, x0: Array) -> Array:
    """A feasible point near x0 that is zero where x0 is: what a sum lacks is spread over its other coordinates.

    Those inside the bounds give first. Where they do not suffice, the projection of x0.
    """
    x = np.clip(np.asarray(x0, np.float64), feasible.lower, feasible.upper)
    for s in range(len(feasible.totals)):
        member = feasible.members(s)
        excess = _compiled.exact_sum(x[member]) - feasible.totals[s]
        if abs(excess) <= feasible.rounding(s):
            continue
        room = x[member] - feasible.lower[member] if excess > 0 else feasible.upper[member] - x[member]
        inside = (x[member] > feasible.lower[member]) & (x[member] < feasible.upper[member])
        for giving in (room * (inside & (x[member] != 0)), room * (x[member] != 0)):
            if giving.sum() >= abs(excess):
                x[member] -= excess * giving / giving.sum()
                break
        else:
            return feasible.project(x0)
    return np.clip(x, feasible.lower, feasible.upper)


def _first_point(dual: Dual, feasible: FeasibleSet) -> Array:
    """A start with few non-zeros: 0 where it is feasible, else a vertex of the feasible set."""
    x = np.zeros(len(dual.linear))
    if not dual.totals.any() and (dual.lower <= 0).all() and (dual.upper >= 0).all():
        return x
    moves = Moves(feasible, feasible.project(x))
    guess = np.random.default_rng(0).random(len(x))
    index, step, *_ = _compiled.steepest(guess, moves.rise, moves.fall, moves.labels, moves.groups, 0.0, 0)
    _compiled.shift(moves.x, moves.rise, moves.fall, moves.lower, moves.upper, index, step)
    return moves.x
