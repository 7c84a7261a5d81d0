# SPDX-License-Identifier: BSD-3-Clause
"""Euclidean projections onto a sum and bounds, one or many at a time.

    minimise 1/2 |x - v|^2   subject to   sum(x) = total,   x >= 0                           project_simplex
                                          sum of weights_i x_i = total,   lower <= x <= upper    project_sum_box

Both are x = clip(v - t weights, lower, upper) for the t at which the sum is right. The sum is piecewise linear in t and
falls: Newton's method on the coordinates that may still change sides finds t without sorting, in expected O(n)
(Michelot 1986, Kiwiel 2008, Condat 2016).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bcd import _compiled
from bcd._check import check_numeric
from bcd.constraints import InfeasibleError

__all__ = ["project_simplex", "project_sum_box"]

Array = np.ndarray


def project_simplex(V: Any, total: Any = 1.0, axis: int = -1) -> Array:
    """The closest points with non-negative entries of a given sum, in expected O(n) each.

    Parameters
    ----------
    V : array of float, shape (..., n)
        The points; every vector along ``axis`` is projected. float32 stays float32, all else becomes float64.
    total : float or array of float
        The sum, not negative; an array has one entry a vector (the shape of V without ``axis``, or one that
        broadcasts to it).
    axis : int
        The axis that is summed over.

    Returns
    -------
    ndarray
        Of the shape of V. The sums are right to rounding in its precision, zeros are exact.

    Raises
    ------
    ValueError
        Entries of V that are not finite; InfeasibleError (a ValueError) for a negative total.

    Examples
    --------
    >>> project_simplex([0.5, 1.0, -2.0])
    array([0.25, 0.75, 0.  ])
    >>> project_simplex([[3.0, 0.0], [1.0, 1.0]], total=[1.0, 4.0])
    array([[1., 0.],
           [2., 2.]])
    """
    V, rows = _vectors(V, axis)
    totals = _totals(total, V.shape, axis)
    if (totals < 0).any():
        k = int(np.argmax(totals < 0))
        raise _infeasible(k, totals, 0.0, np.inf)
    out = np.empty_like(rows)
    _compiled.simplex_rows(rows, totals, out, np.empty(rows.shape[1]))
    return _restore(out, V.shape, axis)


def project_sum_box(
    V: Any, total: Any, lower: Any = None, upper: Any = None, weights: Any = None, axis: int = -1
) -> Array:
    """The closest points within bounds whose (weighted) sum is given, in expected O(n) each.

    Parameters
    ----------
    V : array of float, shape (..., n)
        The points; every vector along ``axis`` is projected. float32 stays float32, all else becomes float64.
    total : float or array of float
        The sum; an array has one entry a vector (the shape of V without ``axis``, or one that broadcasts to it).
    lower, upper : float or array of float, optional
        Bounds, which broadcast against V; infinite entries are no bound. Default: none. They are rounded to the
        precision of V.
    weights : array of float, shape (n,), optional
        The sum is that of ``weights_i x_i``; negative weights and zeros are allowed. Default: ones.
    axis : int
        The axis that is summed over.

    Returns
    -------
    ndarray
        Of the shape of V. The sums are right to rounding in its precision, bounds are hit exactly.

    Raises
    ------
    ValueError
        Entries that are not finite, shapes that do not fit. InfeasibleError (a ValueError) where the bounds cross or
        do not allow the total; the message says by how much.

    Examples
    --------
    >>> project_sum_box([0.9, 0.4, 0.1], total=1, lower=0, upper=0.5)
    array([0.5, 0.4, 0.1])
    >>> project_sum_box([1.0, 2.0], total=0)  # no bounds
    array([-0.5,  0.5])
    >>> project_sum_box([0.0, 0.0], total=1, weights=[1.0, 2.0])
    array([0.2, 0.4])
    """
    V, rows = _vectors(V, axis)
    totals = _totals(total, V.shape, axis)
    low = _bound_rows("lower", lower, -np.inf, V, axis)
    high = _bound_rows("upper", upper, np.inf, V, axis)
    _check_bounds(low, high)
    out = np.empty_like(rows)
    if weights is None:
        _project(rows, np.empty(0), low, high, totals, out)
        return _restore(out, V.shape, axis)
    a = _weights(weights, rows.shape[1])
    inside = a != 0
    out[:, ~inside] = np.clip(rows[:, ~inside], low[:, ~inside], high[:, ~inside])
    some, low, high = (np.ascontiguousarray(part[:, inside]) for part in (rows, low, high))
    part = np.empty_like(some)
    _project(some, a[inside], low, high, totals, part)
    out[:, inside] = part
    return _restore(out, V.shape, axis)


def _project(rows: Array, weights: Array, lower: Array, upper: Array, totals: Array, out: Array) -> None:
    """Fill out, or say which total cannot be reached and by how much it misses."""
    largest = float(np.abs(weights).max(initial=0.0))  # weights of size 1, so that their squares exist
    scale = largest if largest > 0 else 1.0
    slop = 8 * float(np.finfo(rows.dtype).eps)
    n = rows.shape[1]
    scratch, index = np.empty((4 if len(weights) else 1, n)), np.empty(n, np.int64)  # NumPy's: on huge pages
    bad = _compiled.project_rows(rows, weights / scale, lower, upper, totals / scale, slop, out, scratch, index)
    if bad >= 0:
        ends = [bound[bad if len(bound) > 1 else 0] for bound in (lower, upper)]
        if len(weights):
            ends = [np.where(weights > 0, weights * a, weights * b) for a, b in (ends, ends[::-1])]
        raise _infeasible(bad, totals, *(_compiled.exact_sum(end) for end in ends))


def _infeasible(k: int, totals: Array, least: float, most: float) -> InfeasibleError:
    name = "total" if len(totals) == 1 else f"total of vector {k}"
    miss = max(least - totals[k], totals[k] - most)
    return InfeasibleError(
        f"{name} = {totals[k]} cannot be reached: the bounds allow sums from {least} to {most}, "
        f"which misses it by {miss:.6g}; change the bounds or the total"
    )


def _vectors(V: Any, axis: int) -> tuple[Array, Array]:
    """V as an array of float, and its vectors along the axis as contiguous rows."""
    check_numeric("V", V)
    V = np.asarray(V)
    V = V if V.dtype == np.float32 else V.astype(np.float64, copy=False)
    if V.ndim == 0 or not -V.ndim <= axis < V.ndim:
        raise ValueError(f"V must have an axis {axis} to sum over; found shape {V.shape}")
    if V.shape[axis] == 0:
        raise ValueError(f"V must have entries along axis {axis}; found shape {V.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = not np.isfinite(V.sum())  # quick; a sum may overflow although every entry is finite
    if suspect and not np.isfinite(V).all():
        k = tuple(int(i) for i in np.argwhere(~np.isfinite(V))[0])
        raise ValueError(f"V must be finite; V[{', '.join(map(str, k))}] is {V[k]}")
    return V, _rows(V, axis)


def _rows(A: Array, axis: int) -> Array:
    """The vectors along an axis as rows of a contiguous matrix."""
    moved = A if axis in (-1, A.ndim - 1) else np.moveaxis(A, axis, -1)
    return np.ascontiguousarray(moved).reshape(-1, A.shape[axis])


def _restore(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Rows back in the shape of V."""
    if axis in (-1, len(shape) - 1):
        return rows.reshape(shape)
    moved = [*shape[:axis], *shape[axis % len(shape) + 1 :], shape[axis]]
    return np.moveaxis(rows.reshape(moved), -1, axis)


def _totals(total: Any, shape: tuple[int, ...], axis: int) -> Array:
    """One finite total a vector."""
    check_numeric("total", total)
    given = np.asarray(total, dtype=np.float64)
    axis = axis % len(shape)
    wanted = (*shape[:axis], *shape[axis + 1 :])
    if not np.isfinite(given).all():
        raise ValueError(f"total must be finite; found {total}")
    if given.ndim == 0:
        return np.full(math.prod(wanted), given)
    try:
        return np.ascontiguousarray(np.broadcast_to(given, wanted)).reshape(-1)
    except ValueError:
        raise ValueError(f"total must be a number or have shape {wanted}; found shape {given.shape}") from None


def _bound_rows(name: str, value: Any, absent: float, V: Array, axis: int) -> Array:
    """A bound as float64 in the precision of V: one row if all vectors share it, else one each."""
    value = absent if value is None else value
    check_numeric(name, value)
    with np.errstate(over="ignore"):  # beyond float32 is no bound
        bound = np.asarray(value).astype(V.dtype).astype(np.float64, copy=False)
    if np.isnan(bound).any():
        raise ValueError(f"{name} must not be NaN (use an infinity for no bound)")
    if bound.ndim == 0:
        return np.full((1, V.shape[axis]), bound)
    if bound.shape == V.shape:
        return _rows(bound, axis)
    try:
        full = np.broadcast_to(bound, V.shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the shape {V.shape} of V; found shape {bound.shape}") from None
    if full.size and not np.delete(full.strides, axis).any():
        return np.moveaxis(full, axis, -1)[(0,) * (full.ndim - 1)].copy()[None]
    return _rows(full.copy(), axis)


def _check_bounds(lower: Array, upper: Array) -> None:
    if (lower > upper).any():
        r, k = np.argwhere(np.broadcast_to(lower > upper, np.broadcast_shapes(lower.shape, upper.shape)))[0]
        low, high = lower[min(r, len(lower) - 1), k], upper[min(r, len(upper) - 1), k]
        raise InfeasibleError(f"lower must not exceed upper; in vector {r} they are {low} and {high} at entry {k}")
    if (lower == np.inf).any() or (upper == -np.inf).any():
        raise InfeasibleError("lower must not be +inf, nor upper -inf")


def _weights(weights: Any, n: int) -> Array:
    check_numeric("weights", weights)
    a = np.asarray(weights, dtype=np.float64)
    if a.shape != (n,) or not np.isfinite(a).all():
        raise ValueError(f"weights must be finite with shape ({n},); found shape {a.shape}")
    small = (a != 0) & (np.abs(a) < 1e-100 * np.abs(a).max(initial=0.0))
    if small.any():
        k = int(np.argmax(small))
        raise ValueError(f"weights must be 0 or within a factor of 1e100 of the largest; weights[{k}] is {a[k]}")
    return a
