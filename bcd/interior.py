# SPDX-License-Identifier: BSD-3-Clause
"""A small dense quadratic program by second-order steps, for blocks on which pair steps crawl.

    minimise 1/2 x'Kx + c'x   subject to   sum of x over every segment as it is,   l <= x <= u

``newton`` minimises over the free coordinates up to the first bound, again and again: the finish where the
active set is nearly known. ``solve_interior`` needs to know nothing: it is Mehrotra's predictor-corrector
method (Mehrotra 1992; Wright, Primal-Dual Interior-Point Methods, 1997, chapter 10)
in the variables t = (x - l) / (u - l), one Cholesky factorisation of K + diagonal an iteration.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lapack

__all__ = ["newton", "solve_interior"]

Array = np.ndarray
ITERATIONS = 60
NEWTON_STEPS = 8
ACCURACY = 1e-13  # complementarity, in units of gradient times box
EPS = float(np.finfo(np.float64).eps)
NEAR = 1e-7  # of the box: a coordinate so near to a bound that pulls at it is put there


def newton(K: Array, grad: Array, x: Array, lower: Array, upper: Array, start: Array) -> None:
    """Newton steps on the free coordinates, each as far as the bounds allow; moves x and grad in place.

    Parameters are those of :func:`solve_interior`. A step that would not descend is not taken.
    """
    for _ in range(NEWTON_STEPS):
        free = np.flatnonzero((x > lower) & (x < upper))
        member = np.searchsorted(start, free, side="right") - 1 == np.arange(len(start) - 1)[:, None]
        member = member[member.any(axis=1)].astype(np.float64)
        if len(free) <= len(member):
            return
        d = _newton_direction(K[np.ix_(free, free)], grad[free], member)
        curvature = d @ K[np.ix_(free, free)] @ d
        slope = grad[free] @ d
        if not (np.isfinite(slope) and slope < 0):
            return
        room = np.where(d > 0, upper[free] - x[free], x[free] - lower[free])
        cap = float((room[d != 0] / np.abs(d[d != 0])).min())
        multiple = min(cap, -slope / curvature if curvature > 0 else cap)
        moved = np.clip(x[free] + multiple * d, lower[free], upper[free])
        stopped = room <= multiple * np.abs(d) * (1 + 4 * EPS)  # room / |d| times |d| may be less than room
        moved[stopped] = np.where(d > 0, upper[free], lower[free])[stopped]
        grad += K[:, free] @ (moved - x[free])
        x[free] = moved
        if not stopped.any():
            return


def _newton_direction(K: Array, grad: Array, member: Array) -> Array:
    """The minimiser of ``grad'd + 1/2 d'Kd`` with ``member d = 0``; a ridge of rounding's size keeps K regular."""
    f, m = len(grad), len(member)
    scale = float(K.diagonal().max()) or 1.0
    system = np.zeros((f + m, f + m))
    system[:f, :f] = K / scale
    system[f:, :f], system[:f, f:] = member, member.T
    system.flat[: f * (f + m) : f + m + 1] += EPS * f
    _, _, solution, singular = lapack.dsysv(system, np.concatenate([-grad / scale, np.zeros(m)]))
    d = np.zeros(f) if singular else solution[:f]
    return d - member.T @ ((member @ d) / member.sum(axis=1))


def solve_interior(
    K: Array, grad: Array, x: Array, lower: Array, upper: Array, start: Array, unit: float
) -> Array | None:
    """Solve; returns a point better than ``x``, or None where none was found.

    Parameters
    ----------
    K : ndarray of float64, shape (q, q)
        Positive semidefinite.
    grad, x, lower, upper : ndarray of float64, shape (q,)
        x feasible, ``grad = K x + c`` there; the bounds finite.
    start : ndarray of int, shape (m + 1,)
        Segment s is ``start[s] : start[s + 1]``; its sum stays what it is at x.
    unit : float
        Size of a gradient that is not small.

    Returns
    -------
    ndarray of float64, shape (q,), or None
        Within the bounds, with the sums of x to rounding.
    """
    inner = np.flatnonzero(upper > lower)
    if len(inner) < 2:
        return None
    w, wide = (upper - lower)[inner], float((upper - lower).max())
    member = np.zeros((len(start) - 1, len(x)))
    for s in range(len(start) - 1):
        member[s, start[s] : start[s + 1]] = 1
    A = member[:, inner] * (w / wide)
    A = A[A.any(axis=1)]
    t0 = (x - lower)[inner] / w
    scale = wide * unit
    H = w[:, None] * K[np.ix_(inner, inner)] * (w / scale)
    with np.errstate(all="ignore"):  # what is not finite ends the iteration
        t, pulls = _iterate(H, w * grad[inner] / scale - H @ t0, A, A @ t0)
    out = x.copy()
    out[inner] = _landed(t, pulls, lower[inner], upper[inner], w)
    _restore_sums(out, x, lower, upper, start)
    step = out - x
    gain = grad @ step + 0.5 * step @ (K @ step)
    return out if np.isfinite(gain) and gain < 0 else None


def _landed(t: Array, pulls: Array, lower: Array, upper: Array, width: Array) -> Array:
    """X of t, with coordinates at a bound where the multiplier outweighs the distance."""
    x = np.clip(lower + width * t, lower, upper)
    x[(t < NEAR) & (pulls > t)] = lower[(t < NEAR) & (pulls > t)]
    high = (1 - t < NEAR) & (-pulls > 1 - t)
    x[high] = upper[high]
    return x


def _restore_sums(out: Array, x: Array, lower: Array, upper: Array, start: Array) -> None:
    """Spread what landing has cost a sum over the coordinates inside, in proportion to their room."""
    for a, b in pairwise(start):
        for _ in range(4):
            excess = out[a:b].sum() - x[a:b].sum()
            room = np.minimum(out[a:b] - lower[a:b], upper[a:b] - out[a:b])
            if excess == 0 or not room.sum() > abs(excess):
                break
            out[a:b] = np.clip(out[a:b] - excess * room / room.sum(), lower[a:b], upper[a:b])


class _System(NamedTuple):
    """The Newton system at a point: slacks s, multipliers z, residuals, and its factorisation."""

    s: Array
    z: Array
    dual: Array
    primal: Array
    A: Array
    factor: tuple[Array, bool]
    turned: Array  # (H + diagonal)^-1 A'

    def direction(self, comp: Array) -> tuple[Array, Array, Array, Array]:
        """(dt, dy, dz, ds) that takes ``comp`` from the products s z, to first order, and the residuals to 0."""
        right = -self.dual - comp[0] / self.s[0] + comp[1] / self.s[1]
        free = cho_solve(self.factor, right, check_finite=False)
        dy = np.linalg.lstsq(self.A @ self.turned, -self.primal - self.A @ free, rcond=None)[0]
        dt = free + self.turned @ dy
        ds = np.stack([dt, -dt])
        return dt, dy, -(comp + self.z * ds) / self.s, ds


def _iterate(H: Array, h: Array, A: Array, b: Array) -> tuple[Array, Array]:
    """Minimise 1/2 t'Ht + h't, At = b, 0 <= t <= 1; returns t and the difference of its bounds' multipliers."""
    q = len(h)
    t, y = np.full(q, 0.5), np.zeros(len(b))
    z = np.full((2, q), max(1e-2, float(np.abs(H @ t + h).max())))  # of t >= 0 and of t <= 1
    ridge = EPS * q * float(H.diagonal().max())
    for _ in range(ITERATIONS):
        s = np.stack([t, 1 - t])
        mu = float((s * z).mean())
        if mu < ACCURACY:
            break
        barrier = H.copy()
        barrier.flat[:: q + 1] += (z / s).sum(axis=0) + ridge
        try:
            factor = cho_factor(barrier, lower=True, overwrite_a=True, check_finite=False)
            turned = cho_solve(factor, A.T, check_finite=False)
            system = _System(s, z, H @ t + h - A.T @ y - z[0] + z[1], A @ t - b, A, factor, turned)
            _, _, dz, ds = system.direction(s * z)
            reach = min(_reach(s, ds), _reach(z, dz))
            after = float(((s + reach * ds) * (z + reach * dz)).mean())
            dt, dy, dz, ds = system.direction(s * z + ds * dz - mu * (after / mu) ** 3)
        except LinAlgError:
            break
        reach = 0.995 * min(_reach(s, ds), _reach(z, dz))
        if not np.isfinite(dt).all() or reach < 1e-10:
            break
        t, y, z = t + reach * dt, y + reach * dy, z + reach * dz
    return np.clip(t, 0, 1), z[0] - z[1]


def _reach(v: Array, dv: Array) -> float:
    """The largest multiple up to 1 (over 0.995) that keeps v + multiple dv positive."""
    shrinking = dv < 0
    return min(1 / 0.995, float((-v[shrinking] / dv[shrinking]).min(initial=np.inf)))
