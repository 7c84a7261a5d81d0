# SPDX-License-Identifier: BSD-3-Clause
"""Quadratic programs under one sum, or one for every group, and bounds.

    minimise 1/2 x'Px + q'x   subject to   sum of w_i x_i over every group = its total (or in a range),   l <= x <= u

Portfolios, regression on the simplex, mixture weights, unmixing, projections. P may be dense, sparse, low rank plus
diagonal, a linear operator or a kernel matrix; it must be positive semidefinite on the feasible directions. The
solver is :mod:`bcd.subspace`; here is what users see.

Sums with weights are sums of t_i = w_i x_i, with P, q and the bounds rescaled; the largest |w_i| is made 1, so that
the gradient in x is nowhere further from optimal than the one in t.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import aslinearoperator

from bcd import _compiled
from bcd._check import as_vector, group_labels
from bcd._interrupt import interrupts
from bcd.constraints import FeasibleSet, InfeasibleError, SumBox, parse_sums
from bcd.dual import Dual, solve_dual
from bcd.faces import MOST_DENSE, examine_block, make_face, one_thread_below
from bcd.gram import Gram
from bcd.minimize import Progress
from bcd.objectives import DenseHessian, LowRank, NonConvexError, OperatorHessian, Quadratic, SparseHessian, as_hessian
from bcd.problem import Problem
from bcd.result import Result, Status, certificate_at, certify
from bcd.subspace import Walk, Watch, descend, start_point

__all__ = ["QP", "LowRank", "NonConvexError", "solve_qp"]

Array = np.ndarray
LEAST_WEIGHT = 1e-10  # relative to the largest one: smaller ones make P and q too large


_ELSEWHERE = {"CvxpySolver": "qp_cvxpy", "register_with_qpsolvers": "qp_qpsolvers", "frontier": "frontier"}


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: the interfaces to cvxpy and qpsolvers, the efficient frontier."""
    if name in _ELSEWHERE:
        return getattr(import_module(f"bcd.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def solve_qp(
    P: Any,
    q: Any = 0.0,
    *,
    total: Any = None,
    weights: Any = None,
    lower: Any = None,
    upper: Any = None,
    groups: Any = None,
    x0: Any = None,
    tol: float = 1e-8,
    tol_gap: float | None = None,
    max_iter: int | None = None,
    time_limit: float | None = None,
    callback: Callable[[Progress], Any] | None = None,
) -> Result:
    """Minimise ``1/2 x'Px + q'x`` under sums and bounds.

    Parameters
    ----------
    P : matrix of shape (n, n)
        Symmetric, positive semidefinite on the feasible directions: an array (C-contiguous float64 is used in place),
        a scipy sparse matrix, :class:`bcd.LowRank` (``F F' + diag(D)``, never formed), a
        scipy.sparse.linalg.LinearOperator (up to 2000 coordinates its matrix is formed where conjugate gradients do not
        converge), or a :class:`bcd.gram.Gram` (columns of a kernel matrix on demand; every
        coordinate in a sum that is a number, bounds finite where the sums do not make them so).
    q : float or array of float, shape (n,)
        Linear term.
    total : optional
        None: no sum. A number: ``sum(weights * x) = total``. A pair (lo, hi): a range; None or an infinity leaves a
        side open. With ``groups``: a list with one such entry for each group.
    weights : array of float, shape (n,), optional
        Coefficients in the sums, zero (in no sum) and negative ones too. Default 1.
    lower, upper : float or array of float, shape (n,), optional
        Bounds; infinite entries are no bound.
    groups : array of int, shape (n,), optional
        Label 0, 1, ... of the sum of each coordinate; negative: in none.
    x0 : array of float, shape (n,), optional
        Start; made feasible first.
    tol : float
        Violation to reach, relative to max(1, largest absolute entry of the gradient): with y the multipliers of the
        sums, no coordinate that can move has a gradient ``Px + q + weights * y`` worse than that.
    tol_gap : float, optional
        Frank-Wolfe gap (bound on f - f*) to reach as well, absolute.
    max_iter : int, optional
        Second-order steps and pair steps at most, together.
    time_limit : float, optional
        Seconds at most.
    callback : callable, optional
        Called with a :class:`bcd.minimize.Progress` before every round; a true return value stops the run.

    Returns
    -------
    Result
        ``x``, ``objective``, ``violation`` (absolute), ``gap``, ``total_multipliers`` y and ``bound_multipliers`` z
        with ``Px + q + weights * y[groups] + z = 0`` (z_i >= 0 at the upper bound, <= 0 at the lower one),
        ``iterations``, ``columns``, ``seconds``, ``status``; ``ray`` where the objective falls without end. With
        weights, violation is that of t = w x, w scaled to a largest weight of 1; what ``tol`` bounds is then twice the
        largest residual of the identity above over the moves that the bounds allow, as V is without weights.

    Raises
    ------
    ValueError
        Wrong shapes, types, NaN, an asymmetric P; InfeasibleError (a ValueError) says by how much bounds and totals
        miss each other; NonConvexError (a ValueError) has the direction of negative curvature. Pairs of coordinates
        and the free coordinates at the solution are examined; a P that is not convex elsewhere may go unnoticed, and
        the gap is then no bound.

    Notes
    -----
    Ctrl-C ends the run with status INTERRUPTED and the best point so far.

    Examples
    --------
    A portfolio of least variance:

    >>> covariance = np.array([[0.04, 0.01, 0.0], [0.01, 0.09, 0.02], [0.0, 0.02, 0.16]])
    >>> result = solve_qp(covariance, total=1, lower=0, upper=0.5)
    >>> result.x.round(4)
    array([0.5   , 0.3095, 0.1905])
    >>> bool(result.gap < 1e-12)
    True

    Factors that are never multiplied out, returns, and a short position:

    >>> F = np.array([[1.0], [2.0], [0.5], [1.5]])
    >>> solve_qp(LowRank(F, 0.5), [-0.1, -0.4, 0.0, -0.2], total=1, lower=-0.2, upper=1).x.round(4)
    array([ 0.3714, -0.1143,  0.7143,  0.0286])
    """
    return QP(P, weights=weights, groups=groups).solve(
        q, total=total, lower=lower, upper=upper, x0=x0, tol=tol, tol_gap=tol_gap, max_iter=max_iter,
        time_limit=time_limit, callback=callback,
    )  # fmt: skip


class _Weights:
    """t_i = scale_i x_i: the sums of x with weights are ``unit`` times sums of t."""

    def __init__(self, weights: Any, n: int):
        self.given = as_vector("weights", weights, n)
        self.unit = float(np.abs(self.given).max(initial=0.0))
        if self.unit == 0:
            raise ValueError("weights must not all be 0; for no sum leave total and weights out")
        small = (self.given != 0) & (np.abs(self.given) < LEAST_WEIGHT * self.unit)
        if small.any():
            k = int(np.argmax(small))
            raise ValueError(
                f"weights must be 0 or at least {LEAST_WEIGHT:g} times the largest one, {self.unit:g}; "
                f"weights[{k}] is {self.given[k]:g}"
            )
        self.scale = np.where(self.given != 0, self.given / self.unit, 1.0)

    def matrix(self, hessian: Any) -> Any:
        """The Hessian in t."""
        inverse = 1.0 / self.scale
        if isinstance(hessian, LowRank):
            F = hessian.factors
            F = sp.diags_array(inverse) @ F if sp.issparse(F) else inverse[:, None] * F
            return LowRank(F, hessian.shift * inverse**2)
        if isinstance(hessian, OperatorHessian):
            diagonal = aslinearoperator(sp.diags(inverse))
            return OperatorHessian(diagonal @ hessian.operator @ diagonal)
        if isinstance(hessian, SparseHessian):
            return SparseHessian(sp.csc_array(sp.diags_array(inverse) @ hessian.matrix @ sp.diags_array(inverse)))
        return DenseHessian(inverse[:, None] * hessian.matrix * inverse)

    def box(self, total: Any, groups: Any, lower: Any, upper: Any) -> tuple[SumBox, Callable[[Array], Array]]:
        """Bounds and totals of t, and the function that turns their multipliers into those of the totals given."""
        n = len(self.scale)
        SumBox(lower, upper).bind(n)  # errors name the bounds as they were given
        labels, ranges, given = parse_sums(total, groups, n)
        labels = np.where(self.given != 0, labels, -1)
        count = np.bincount(labels + 1, minlength=len(ranges) + 1)[1:]
        for s in np.flatnonzero(count == 0):
            miss = max(ranges[s][0], -ranges[s][1])
            if miss > 0:
                raise InfeasibleError(
                    f"a total in {ranges[s]} cannot be reached: the weights of its group are all 0, "
                    f"which misses it by {miss:.6g}; change the weights or the total"
                )
        kept = np.flatnonzero(count)
        number = np.full(len(ranges) + 1, -1)
        number[kept] = np.arange(len(kept))
        low, high = self._bounds(lower, upper)
        wanted = [ranges[s] for s in kept]
        try:
            box = SumBox(low, high, [(a / self.unit, b / self.unit) for a, b in wanted], number[labels])
            box.bind(n)
        except InfeasibleError:
            SumBox(self.unit * low, self.unit * high, wanted, number[labels]).bind(n)  # in units of the totals given
            raise

        def as_given(y: Array) -> Array:
            """Multipliers of the totals in their order, 0 for those left open."""
            out = np.zeros(len(given))
            known = np.append(given, -1)[:-1] >= 0
            place = number[given[known]]
            out[known] = np.where(place >= 0, np.append(y, 0.0)[place], 0.0) / self.unit
            return out

        return box, as_given

    def _bounds(self, lower: Any, upper: Any) -> tuple[Array, Array]:
        """Bounds of t: where the scale is negative they change places."""
        low, high = self._arrays(lower, upper)
        turned = self.scale < 0
        return self.scale * np.where(turned, high, low), self.scale * np.where(turned, low, high)

    def _arrays(self, lower: Any, upper: Any) -> tuple[Array, Array]:
        n = len(self.scale)
        low = np.full(n, -np.inf) if lower is None else np.array(np.broadcast_to(np.asarray(lower, np.float64), n))
        high = np.full(n, np.inf) if upper is None else np.array(np.broadcast_to(np.asarray(upper, np.float64), n))
        return low, high

    def to_x(self, lower: Any, upper: Any) -> Callable[[Array], Array]:
        """The function from t to x, with the bounds hit exactly."""
        low_t, high_t = self._bounds(lower, upper)
        low, high = self._arrays(lower, upper)
        first, last = np.where(self.scale < 0, high, low), np.where(self.scale < 0, low, high)

        def turn(t: Array) -> Array:
            x = np.clip(t / self.scale, low, high)
            return np.where(t == low_t, first, np.where(t == high_t, last, x))

        return turn

    def back(self, result: Result, as_given: Callable[[Array], Array], x: Array) -> Result:
        """The result in x."""
        certificate = replace(
            result.certificate,
            total_multipliers=as_given(result.certificate.total_multipliers),
            bound_multipliers=result.certificate.bound_multipliers * self.scale,
        )
        ray = None if result.ray is None else result.ray / self.scale
        return replace(result, x=x, certificate=certificate, ray=ray)

    def turned(self, error: NonConvexError) -> NonConvexError:
        """The error with its direction in x."""
        d = error.direction / self.scale
        length = float(np.linalg.norm(d))
        return NonConvexError(d / length, error.curvature / length**2)


class QP:
    """The matrix of quadratic programs made ready once, to be solved again and again.

    Every solve starts at the last point, with the sides of its coordinates and, for dense matrices, its last
    factorisation: after a small change it costs a fraction of the first one.

    Parameters
    ----------
    P, weights, groups
        As for :func:`solve_qp`.

    Examples
    --------
    >>> qp = QP(np.diag([1.0, 2.0, 3.0]))
    >>> for total in (1.0, 2.0):
    ...     print(qp.solve(total=total, lower=0).x.round(4))
    [0.5455 0.2727 0.1818]
    [1.0909 0.5455 0.3636]
    """

    def __init__(self, P: Any, *, weights: Any = None, groups: Any = None):
        self.groups = groups
        self._weights: _Weights | None = None
        self._last: Array | None = None
        self._gram = P if isinstance(P, Gram) else None
        if self._gram is not None:
            if weights is not None:
                raise ValueError("weights need a matrix P; found a Gram: scale the rows instead")
            self.n = self._gram.n
            return
        hessian = as_hessian("P", P)
        self.n = hessian.n
        labels = group_labels(groups, self.n)[0]
        if weights is not None:
            self._weights = _Weights(weights, self.n)
            hessian = self._weights.matrix(hessian)
            labels = np.where(self._weights.given != 0, labels if len(labels) else 0, -1)
        self.quadratic = Quadratic(hessian)
        self._labels, self._least = labels, _least_pair(hessian, labels)
        self._face = make_face(hessian)

    def solve(
        self,
        q: Any = 0.0,
        *,
        total: Any = None,
        lower: Any = None,
        upper: Any = None,
        x0: Any = None,
        tol: float = 1e-8,
        tol_gap: float | None = None,
        max_iter: int | None = None,
        time_limit: float | None = None,
        callback: Callable[[Progress], Any] | None = None,
    ) -> Result:
        """Solve with this linear term, these totals and bounds; see :func:`solve_qp`.

        Returns
        -------
        Result
        """
        _check_limits(tol=tol, tol_gap=tol_gap, max_iter=max_iter, time_limit=time_limit)
        c, w = as_vector("q", q, self.n), self._weights
        start = self._last if x0 is None else as_vector("x0", x0, self.n)
        watch = Watch(tol, tol_gap, max_iter, time_limit)
        if self._gram is not None:
            result = _solve_gram(self._gram, c, SumBox(lower, upper, total, self.groups), start, watch, callback)
        elif w is None:
            result = self._solve(c, SumBox(lower, upper, total, self.groups), start, watch, callback)
        else:
            box, as_given = w.box(total, self.groups, lower, upper)
            watch.scale, watch.to_x = w.scale, w.to_x(lower, upper)
            try:
                result = self._solve(c / w.scale, box, None if start is None else start * w.scale, watch, callback)
            except NonConvexError as error:
                raise w.turned(error) from None
            result = w.back(result, as_given, watch.to_x(result.x))
        self._last = result.x.copy()
        return result

    def _solve(
        self, c: Array, box: SumBox, start: Array | None, watch: Watch, callback: Callable[[Progress], Any] | None
    ) -> Result:
        """Solve in the variables whose sums have no weights."""
        self.quadratic.c = c
        problem = Problem(self.quadratic, box)
        hessian = self.quadratic.hessian
        self._check_convex(problem.feasible)
        if start is None:
            x = start_point(hessian, c, problem.feasible)
        else:  # the walk brings the sums in order, at the coordinates inside of their bounds
            x = np.clip(start, problem.feasible.lower[: self.n], problem.feasible.upper[: self.n])

        def tell(walk: Walk) -> Any:
            """Ask the user's callback."""
            seconds = time.perf_counter() - watch.started
            x = watch.to_x(walk.moves.x[: self.n])
            counts = watch.iterations, watch.columns
            return callback(Progress(*counts, seconds, walk.objective, walk.violation, x))  # type: ignore[misc]

        watch.tell = None if callback is None else tell
        with interrupts() as watch.pressed, one_thread_below(self._face.flops(self.n)):
            walk = Walk(hessian, self._face, c, problem.feasible, x, watch)
            status = descend(walk)
        x = walk.moves.x[: self.n] + 0.0  # no negative zeros
        certificate = certify(problem, x)
        if watch.scale is not None:  # residuals of the identity are measured in x, not in t
            walk.rebuild()
            y, z = walk.prices()
            certificate = replace(certificate, total_multipliers=problem.feasible.as_given(y), bound_multipliers=z)
        return Result(
            x, certificate, watch.iterations, watch.columns,
            time.perf_counter() - watch.started, status, ray=walk.ray,
        )  # fmt: skip

    def _check_convex(self, feasible: FeasibleSet) -> None:
        """NonConvexError where coordinates that may move alone, or two that may move together, have negative curvature.

        Alone moves what is in no sum or in one with a range.
        """
        hessian, n = self.quadratic.hessian, self.n
        if isinstance(hessian, OperatorHessian | LowRank):
            return
        movable = feasible.lower[:n] < feasible.upper[:n]
        labels, open_sums = feasible.labels[:n], feasible.labels[n:]
        alone = np.flatnonzero(movable & ((labels < 0) | np.isin(labels, open_sums)))
        least, i, j = self._least
        if least < 0 and not (movable[i] and movable[j]):  # what is fixed pairs with nothing
            own = self._labels if len(self._labels) else np.zeros(n, np.int64)
            least, i, j = _least_pair(hessian, np.where(movable, own, n + np.arange(n)))
        d = np.zeros(n)
        if len(alone):
            single, k = _least_alone(hessian, alone)
            together, a, b = _least_sum(hessian, alone)
            if min(single, together) < min(least, -_compiled.CONCAVITY):
                d[[k] if single <= together else [a, b]] = 1.0
                d /= np.linalg.norm(d)
                raise NonConvexError(d, float(d @ hessian.product(d)))
        if least < -_compiled.CONCAVITY:
            d[i], d[j] = np.sqrt(0.5), -np.sqrt(0.5)
            raise NonConvexError(d, float(d @ hessian.product(d)))


def _least_alone(hessian: Any, alone: Array) -> tuple[float, int]:
    """The least diagonal entry, relative to the largest, and where it is."""
    k = int(alone[hessian.diagonal[alone].argmin()])
    return float(hessian.diagonal[k] / (np.abs(hessian.diagonal).max() or 1.0)), k


def _least_sum(hessian: Any, alone: Array) -> tuple[float, int, int]:
    """The least curvature along e_i + e_j of two that may move alone, relative to the entries; i and j."""
    d, best = hessian.diagonal, (0.0, -1, -1)
    if isinstance(hessian, SparseHessian):
        entries = sp.coo_array(hessian.matrix[alone][:, alone])
        i, j, value = alone[entries.row], alone[entries.col], entries.data
        size = np.abs(d[i]) + np.abs(d[j]) + np.abs(value)
        curvature = np.where(i != j, d[i] + d[j] + 2 * value, 0.0) / np.where(size > 0, size, 1.0)
        k = int(curvature.argmin()) if len(i) else -1
        return (float(curvature[k]), int(i[k]), int(j[k])) if k >= 0 else best
    for rows in np.array_split(alone, -(-len(alone) // 256)):
        value = hessian.matrix[np.ix_(rows, alone)]
        size = np.abs(d[rows])[:, None] + np.abs(d[alone]) + np.abs(value)
        curvature = (d[rows][:, None] + d[alone] + 2 * value) / np.where(size > 0, size, 1.0)
        curvature[rows[:, None] == alone] = 0.0
        i, j = np.unravel_index(int(curvature.argmin()), curvature.shape)
        best = min(best, (float(curvature[i, j]), int(rows[i]), int(alone[j])))
    return best


def _check_limits(*, tol: float, tol_gap: float | None, max_iter: int | None, time_limit: float | None) -> None:
    for name, value in {"tol": tol, "tol_gap": tol_gap, "max_iter": max_iter, "time_limit": time_limit}.items():
        if value is not None and not isinstance(value, int | float | np.number):
            raise ValueError(f"{name} must be a number; found {value!r}")
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0; found {value!r}")


def _least_pair(hessian: Any, labels: Array) -> tuple[float, int, int]:
    """The least curvature along e_i - e_j of one label (empty: all are of one), relative to the diagonal; i and j."""
    if isinstance(hessian, DenseHessian):
        return _compiled.least_pair(hessian.matrix, hessian.diagonal, labels)
    if not isinstance(hessian, SparseHessian):
        return 0.0, -1, -1
    entries, d = sp.coo_array(hessian.matrix), hessian.diagonal
    i, j, value = entries.row, entries.col, entries.data
    pair = (i > j) & ((labels[i] == labels[j]) if len(labels) else True)
    i, j, value = i[pair], j[pair], value[pair]
    if not len(i):
        return 0.0, -1, -1
    size = np.abs(d[i]) + np.abs(d[j]) + np.abs(value)  # an entry between zeros on the diagonal is curvature, too
    curvature = (d[i] + d[j] - 2 * value) / np.where(size > 0, size, 1.0)
    k = int(curvature.argmin())
    return float(curvature[k]), int(i[k]), int(j[k])


def _solve_gram(
    gram: Gram, c: Array, box: SumBox, start: Array | None, watch: Watch, callback: Callable[[Progress], Any] | None
) -> Result:
    """Columns on demand: the block solver of the SVMs."""
    feasible = box.bind(gram.n)
    if len(feasible.lower) > gram.n or (feasible.labels < 0).any():
        raise ValueError("with a Gram matrix every coordinate must be in a sum whose total is a number")
    lower, upper = _implied(feasible)
    dual = Dual(c, lower, upper, feasible.totals, np.empty(0, np.int64) if feasible.plain else feasible.labels)
    if not gram.exact:
        gram.raise_precision()

    def tell(p: Any) -> Any:
        return callback(Progress(p.iteration, round(p.columns), p.seconds, p.objective, p.violation, p.x))  # type: ignore[misc]

    tol, pairs = watch.tol, 0
    while True:
        left = None if watch.time_limit is None else watch.time_limit - (time.perf_counter() - watch.started)
        found = solve_dual(
            gram, dual, start, tol=tol, max_iter=None if watch.max_iter is None else watch.max_iter - pairs,
            time_limit=left, callback=None if callback is None else tell,
        )  # fmt: skip
        pairs, start = pairs + found.iterations, found.x
        if watch.tol_gap is None or found.gap <= watch.tol_gap or found.status is not Status.CONVERGED:
            break
        tol *= 0.1
    grad, status = found.product + c, found.status
    certificate = certificate_at(feasible, found.x, found.objective, grad)
    close = certificate.violation <= watch.tol * max(1.0, float(np.abs(grad).max()))
    if close and (watch.tol_gap is None or certificate.gap <= watch.tol_gap):
        status = Status.CONVERGED
    if status.ok:
        _check_kernel(gram, feasible, found.x)
    seconds = time.perf_counter() - watch.started
    return Result(found.x, certificate, pairs, round(found.columns), seconds, status)


def _check_kernel(gram: Gram, feasible: FeasibleSet, x: Array) -> None:
    """NonConvexError where the kernel matrix of the free coordinates has negative curvature."""
    F = np.flatnonzero((x > feasible.lower) & (x < feasible.upper))
    if 0 < len(F) <= MOST_DENSE:
        examine_block(gram.block(F, np.float64), gram.n, F, feasible.labels[F])


def _implied(feasible: FeasibleSet) -> tuple[Array, Array]:
    """The bounds, made finite by what the other bounds of a sum leave."""
    lower, upper = feasible.lower.copy(), feasible.upper.copy()
    for s, total in enumerate(feasible.totals):
        m = feasible.members(s)
        if np.isfinite(feasible.lower[m]).all():
            upper[m] = np.minimum(upper[m], total - (feasible.lower[m].sum() - feasible.lower[m]))
        elif np.isfinite(feasible.upper[m]).all():
            lower[m] = np.maximum(lower[m], total - (feasible.upper[m].sum() - feasible.upper[m]))
    upper = np.maximum(upper, lower)
    if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
        raise ValueError("with a Gram matrix lower or upper must be finite for all coordinates of a sum")
    return lower, upper
