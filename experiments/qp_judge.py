# SPDX-License-Identifier: BSD-3-Clause
"""One judge for every QP solver: NumPy and float64 only, from the problem and the point that a solver returned.

    minimise 1/2 x'Px + q'x   subject to   sum(x) = total,   lower <= x <= upper

The point is made feasible first, in the least harmful way: values beyond a bound go to that bound, and what the sum
then lacks is spread evenly over the coordinates that are strictly between their bounds (over all with room where that
does not suffice). Its KKT residual is the violation

    max of g_i over the x_i that can fall - min of g_j over the x_j that can rise,     g = P x + q,

0 at a solution, relative to max(1, |g|_inf). Solvers whose points stay strictly inside get the benefit of the doubt
twice. A coordinate within AT_BOUND of its width from a bound counts as at that bound. And the point is also tried with
every coordinate within a snap distance of a bound moved onto it, for each of SNAPS (relative to the width), and the
least residual counts. The judged point is feasible either way, so whoever has the returned one has that one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.qp_problems import Problem

TOL = 1e-8
REACHED = 1.01 * TOL  # a residual computed twice differs by rounding
AT_BOUND = 1e-9
SNAPS = (0.0, *(float(f"1e{k}") for k in range(-12, -3)))
PASSES = 100  # of spreading what the sum lacks; each fills a bound or is the last

Array = np.ndarray


class Bounds(NamedTuple):
    """Arrays of shape (n,); ``width`` is what distances from a bound are relative to."""

    lower: Array
    upper: Array
    width: Array


@dataclass
class Verdict:
    """What the judge found.

    Attributes
    ----------
    residual : float
        Violation over max(1, |g|_inf); inf if there is no feasible point near x.
    objective, gap : float
        At the judged point; the Frank-Wolfe gap bounds what the objective is above its minimum.
    infeasibility : float
        Of the point as it was returned: the larger of what it exceeds a bound by, relative to the width, and what
        its sum misses, relative to max(1, |total|).
    snap : float
        The distance at which the residual was least.
    free : float
        Share of coordinates strictly between their bounds.
    gradient : float
        |g|_inf.
    """

    residual: float
    objective: float
    gap: float
    infeasibility: float
    snap: float
    free: float
    gradient: float

    @property
    def reached(self) -> bool:
        """Whether the residual is within the tolerance."""
        return bool(self.residual <= REACHED)


def judge(problem: Problem, x: Array, snaps: tuple[float, ...] = SNAPS) -> Verdict:
    """What can be said of a point.

    Parameters
    ----------
    problem : Problem
    x : ndarray of float, shape (n,)
        Need not be feasible.
    snaps : tuple of float
        Distances to try.

    Returns
    -------
    Verdict
        The one with the least residual.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.shape != (problem.n,) or not np.isfinite(x).all():
        return Verdict(np.inf, np.nan, np.inf, np.inf, 0.0, np.nan, np.nan)
    bounds = bounds_of(problem)
    verdicts = [_at(problem, bounds, feasible_point(problem, bounds, x, snap), snap) for snap in snaps]
    least = min(verdicts, key=lambda verdict: verdict.residual)
    least.infeasibility = infeasibility(problem, bounds, x)
    return least


def bounds_of(problem: Problem) -> Bounds:
    """The bounds as arrays; a coordinate without one of them has width 1."""
    lower, upper = (np.broadcast_to(np.float64(b), problem.n) for b in (problem.lower, problem.upper))
    width = upper - lower
    return Bounds(lower, upper, np.where(np.isfinite(width), width, 1.0))


def infeasibility(problem: Problem, bounds: Bounds, x: Array) -> float:
    """How far the point is from satisfying its constraints."""
    excess = np.maximum(bounds.lower - x, x - bounds.upper)
    beyond = (excess[excess > 0] / np.maximum(bounds.width, 1e-300)[excess > 0]).max(initial=0.0)
    return float(max(beyond, abs(x.sum() - problem.total) / max(1.0, abs(problem.total))))


def feasible_point(problem: Problem, bounds: Bounds, x: Array, snap: float) -> Array:
    """The point with what is near a bound moved onto it, and the sum repaired."""
    lower, upper, width = bounds
    y = np.clip(x, lower, upper)
    y = np.where(y - lower <= snap * width, lower, np.where(upper - y <= snap * width, upper, y))
    for _ in range(PASSES):
        lack = problem.total - y.sum()
        if abs(lack) <= 4 * np.finfo(float).eps * max(1.0, np.abs(y).sum()):
            break
        inside = (y > lower) & (y < upper)
        room = (y < upper) if lack > 0 else (y > lower)
        moved = inside if inside.any() else room
        if not moved.any():
            break
        y[moved] = np.clip(y[moved] + lack / moved.sum(), lower[moved], upper[moved])
    return y


def _at(problem: Problem, bounds: Bounds, y: Array, snap: float) -> Verdict:
    lower, upper, width = bounds
    product = problem.P @ y
    g = product + problem.q
    largest = float(np.abs(g).max())
    can_fall, can_rise = (y - lower > AT_BOUND * width), (upper - y > AT_BOUND * width)
    violation = max(0.0, g[can_fall].max(initial=-np.inf) - g[can_rise].min(initial=np.inf))
    if abs(y.sum() - problem.total) > 1e-12 * max(1.0, np.abs(y).sum()):
        violation = np.inf
    return Verdict(
        residual=float(violation / max(1.0, largest)),
        objective=float(0.5 * y @ product + problem.q @ y),
        gap=float(g @ y - g @ best_vertex(problem, bounds, g)),
        infeasibility=0.0,
        snap=snap,
        free=float((can_fall & can_rise).mean()),
        gradient=largest,
    )


def best_vertex(problem: Problem, bounds: Bounds, g: Array) -> Array:
    """The feasible point with the least g'v: the coordinates with the least g are filled one after another."""
    order = np.argsort(g, kind="stable")
    room = (bounds.upper - bounds.lower)[order]
    filled = np.concatenate([[0.0], np.cumsum(room)[:-1]])
    v = bounds.lower.copy()
    v[order] += np.clip(problem.total - bounds.lower.sum() - filled, 0.0, room)
    return v
