# SPDX-License-Identifier: BSD-3-Clause
"""The constraint set: bounds and sums.

    l <= x <= u   and, for every group of coordinates,   sum of x over the group = s   (or in [s_lo, s_hi])

A range, or one side, for a total becomes an equality by one slack coordinate with gradient 0 and its own
room, appended behind x; so everything else knows equalities only. A coordinate in no sum moves alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bcd import _compiled
from bcd._check import check_numeric, group_labels
from bcd.selection import Selection

__all__ = ["InfeasibleError", "Moves", "SumBox"]


class InfeasibleError(ValueError):
    """The bounds and totals contradict each other."""


@dataclass(frozen=True)
class SumBox:
    """Bounds and sum constraints; any of them may be absent.

    Parameters
    ----------
    lower, upper : float or array of float, shape (n,), optional
        Bounds; scalars apply to every coordinate; infinite entries are no bound. Default: none.
    total : optional
        None: no sum constraint, coordinates move one at a time. A float: ``sum(x) = total``. A pair
        ``(lo, hi)``: ``lo <= sum(x) <= hi``; None or an infinity leaves a side open. With ``groups``: a
        list with one such entry for each group (an array of floats, if all are equalities).
    groups : array of int, shape (n,), optional
        Label 0, 1, ... of the group of each coordinate; a negative label: in no sum.

    Examples
    --------
    >>> SumBox(lower=0, total=1)  # the simplex
    SumBox(lower=0, upper=None, total=1, groups=None)
    >>> SumBox(-1, 1).bind(3).project([2.0, 0.5, -7.0])
    array([ 1. ,  0.5, -1. ])
    """

    lower: Any = None
    upper: Any = None
    total: Any = None
    groups: Any = None

    def bind(self, n: int) -> FeasibleSet:
        """Check everything against n coordinates and append the slacks.

        Raises
        ------
        ValueError
            Wrong shapes, NaN, crossed bounds, labels without a total.
        InfeasibleError
            No point satisfies bounds and totals; the message says by how much.
        """
        lower = _bound("lower", self.lower, n, -np.inf)
        upper = _bound("upper", self.upper, n, np.inf)
        if (lower > upper).any():
            k = int(np.argmax(lower > upper))
            raise InfeasibleError(f"lower must not exceed upper; lower[{k}] = {lower[k]} and upper[{k}] = {upper[k]}")
        if (lower == np.inf).any() or (upper == -np.inf).any():
            raise InfeasibleError("lower must not be +inf, nor upper -inf")
        return _with_slacks(lower, upper, *parse_sums(self.total, self.groups, n))


def _bound(name: str, value: Any, n: int, absent: float) -> np.ndarray:
    if value is None:
        return np.full(n, absent)
    check_numeric(name, value)
    bound = np.asarray(value, dtype=np.float64)
    if bound.shape not in ((), (n,)):
        raise ValueError(f"{name} must be a scalar or have shape ({n},); found shape {bound.shape}")
    if np.isnan(bound).any():
        raise ValueError(
            f"{name} must not be NaN (use an infinity for no bound); found NaN at {np.argmax(np.isnan(bound))}"
        )
    return np.array(np.broadcast_to(bound, (n,)))


def _range(value: Any, name: str) -> tuple[float, float]:
    """A total as (lo, hi)."""
    if value is None:
        return -np.inf, np.inf
    ends = value if isinstance(value, tuple | list) else [value]
    if len(ends) != (2 if ends is value else 1) or not all(
        end is None or isinstance(end, int | float | np.number) for end in ends
    ):
        raise ValueError(f"{name} must be a number or a pair (lo, hi); found {value!r}")
    lo = -np.inf if ends[0] is None else float(ends[0])
    hi = np.inf if ends[-1] is None else float(ends[-1])
    if len(ends) == 1 and not np.isfinite(lo):
        raise ValueError(f"{name} must be finite; found {value!r}")
    if np.isnan(lo) or np.isnan(hi) or lo > hi or lo == np.inf or hi == -np.inf:
        raise ValueError(f"{name} must be a number or a pair (lo, hi) with lo <= hi; found {value!r}")
    return lo, hi


def parse_sums(total: Any, groups: Any, n: int) -> tuple[np.ndarray, list[tuple[float, float]], np.ndarray]:
    """Labels (negative: no sum), the range of every sum, and which sum each total as given has become (or -1).

    A group whose total is open on both sides is no sum.
    """
    if groups is None:
        ranges = [] if total is None else [_range(total, "total")]
        labels = np.zeros(n, np.int64) if ranges else np.full(n, -1)
    else:
        labels, count = group_labels(groups, n)
        if not hasattr(total, "__len__"):
            raise ValueError(f"total must list one entry for each of the {count} groups; found {total!r}")
        if len(total) != count:
            raise ValueError(f"total must have one entry for each group; found {len(total)} totals, {count} groups")
        ranges = [_range(t, f"total[{s}]") for s, t in enumerate(total)]
    closed = [s for s, (lo, hi) in enumerate(ranges) if lo > -np.inf or hi < np.inf]
    renumber = np.full(len(ranges) + 1, -1)  # the last entry serves label -1
    renumber[closed] = np.arange(len(closed))
    return renumber[np.maximum(labels, -1)], [ranges[s] for s in closed], renumber[:-1]


def _with_slacks(
    lower: np.ndarray, upper: np.ndarray, labels: np.ndarray, ranges: list[tuple[float, float]], given: np.ndarray
) -> FeasibleSet:
    """Sum + slack = hi with 0 <= slack <= hi - lo (or sum + slack = lo with slack <= 0 if hi is open)."""
    n = len(lower)
    slack_of, slack_upper, slack_lower, totals = [], [], [], []
    for s, (lo, hi) in enumerate(ranges):
        totals.append(hi if hi < np.inf else lo)
        if lo < hi:
            slack_of.append(s)
            slack_lower.append(0.0 if hi < np.inf else -np.inf)
            slack_upper.append(hi - lo if hi < np.inf else 0.0)
    feasible = FeasibleSet(
        n=n,
        lower=np.concatenate([lower, slack_lower]),
        upper=np.concatenate([upper, slack_upper]),
        totals=np.array(totals),
        labels=np.concatenate([labels, np.array(slack_of, dtype=np.int64)]),
        ranges=ranges,
        given=given,
    )
    feasible.check()
    return feasible


@dataclass(frozen=True)
class FeasibleSet:
    """A :class:`SumBox` bound to n coordinates, every total an equality.

    Attributes
    ----------
    n : int
        Coordinates of x; the arrays have length N = n + number of slacks.
    lower, upper : ndarray, shape (N,)
        Bounds.
    totals : ndarray, shape (m,)
        Right-hand sides of the m sums.
    labels : ndarray of int64, shape (N,)
        The sum of each coordinate; negative: none.
    ranges : list of (lo, hi)
        The totals.
    given : ndarray of int64
        For each total that the user gave, which of these sums it is; -1: left open, no sum.
    """

    n: int
    lower: np.ndarray
    upper: np.ndarray
    totals: np.ndarray
    labels: np.ndarray
    ranges: list[tuple[float, float]]
    given: np.ndarray

    @property
    def plain(self) -> bool:
        """One equality over all coordinates: the labels say nothing."""
        return len(self.totals) == 1 and len(self.lower) == self.n and not (self.labels != 0).any()

    @cached_property
    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """(where, start): the coordinates of sum s are ``where[start[s]:start[s+1]]``; those in none come last."""
        return _compiled.segments(self.labels, len(self.totals))

    def members(self, s: int) -> np.ndarray:
        """The coordinates of sum s, ascending, a slack last."""
        where, start = self.segments
        return where[start[s] : start[s + 1]]

    def check(self) -> None:
        """Raise InfeasibleError unless every total lies between the sums of its bounds."""
        for s, (lo, hi) in enumerate(self.ranges):
            member = self.members(s)
            member = member[member < self.n]
            least, most = (_compiled.exact_sum(bound[member]) for bound in (self.lower, self.upper))
            miss = max(least - hi, lo - most)
            if miss > self.rounding(s):
                name = "total" if len(self.totals) == 1 else f"total[{s}]"
                wanted = f"{lo}" if lo == hi else f"({lo}, {hi})"
                raise InfeasibleError(
                    f"{name} = {wanted} cannot be reached: the bounds allow sums from {least} to {most}, "
                    f"which misses it by {miss:.6g}; change the bounds or the total"
                )

    def rounding(self, s: int) -> float:
        """How far sum s may be from its total by rounding alone."""
        member = self.members(s)
        ends = np.abs(np.concatenate([self.lower[member], self.upper[member], [self.totals[s]]]))
        return 4 * _compiled.EPS * float(ends[np.isfinite(ends)].sum())

    @cached_property
    def slop(self) -> np.ndarray:
        """:meth:`rounding` of every sum."""
        return np.array([self.rounding(s) for s in range(len(self.totals))])

    def lift(self, x: np.ndarray) -> np.ndarray:
        """Append the slacks that fit x, within their bounds."""
        out = np.concatenate([x, np.zeros(len(self.lower) - self.n)])
        for k in range(self.n, len(out)):
            s = self.labels[k]
            real = x[self.members(s)[:-1]]
            slack = self.totals[s] - _compiled.exact_sum(real)
            slop = self.rounding(s) + 4 * _compiled.EPS * float(np.abs(real).sum())
            near = [bound for bound in (self.lower[k], self.upper[k]) if abs(slack - bound) <= slop]
            out[k] = near[0] if near else slack  # what rounding leaves before a bound is no room
        return np.clip(out, self.lower, self.upper)

    def as_given(self, y: np.ndarray) -> np.ndarray:
        """Multipliers in the order of the totals as given, 0 for those left open."""
        out = np.zeros(len(self.given))
        out[self.given >= 0] = y[self.given[self.given >= 0]]
        return out

    def project(self, point: Any) -> np.ndarray:
        """The closest feasible point to ``point`` (shape (n,)) in the Euclidean norm, exactly, in a few passes."""
        x = np.clip(np.asarray(point, dtype=np.float64), self.lower[: self.n], self.upper[: self.n])
        for s, (lo, hi) in enumerate(self.ranges):
            member = self.members(s)
            member = member[member < self.n]
            now = _compiled.exact_sum(x[member])
            if not lo <= now <= hi:
                target = np.asarray(point, dtype=np.float64)[member]
                x[member] = project_sum(target, self.lower[member], self.upper[member], hi if now > hi else lo)
        return x


def project_sum(z: np.ndarray, lower: np.ndarray, upper: np.ndarray, total: float) -> np.ndarray:
    """Argmin |x - z| subject to sum(x) = total, lower <= x <= upper: x = clip(z - t, lower, upper)."""
    x = z.copy()
    _compiled.project_row(x, np.empty(0), lower, upper, total, 1e-15, np.empty(len(z), np.int64))
    x = np.clip(x, lower, upper)
    slop = 4 * _compiled.EPS * float(np.abs(x).sum())  # what rounding leaves before a bound is no room
    x = np.where(x - lower <= slop, lower, x)
    return np.where(upper - x <= slop, upper, x)


class Moves:
    """The current point and the moves the constraint allows from it.

    Attributes
    ----------
    x : ndarray, shape (N,)
        The point, slacks last; always within the bounds, each bound hit exactly.
    rise, fall : ndarray, shape (N,)
        Rooms ``upper - x`` and ``x - lower``.
    lower, upper : ndarray, shape (N,)
        Bounds.
    labels : ndarray of int64
        Sum of each coordinate, negative: none; length 0 when one sum covers all.
    groups : int
        Number of sums.
    """

    def __init__(self, feasible: FeasibleSet, x: np.ndarray, settle: bool = True):
        self.feasible = feasible
        self.lower, self.upper = feasible.lower, feasible.upper
        self.groups = len(feasible.totals)
        self.labels = np.empty(0, np.int64) if feasible.plain else feasible.labels
        self.x = feasible.lift(x)
        self.rise, self.fall = self.upper - self.x, self.x - self.lower
        labels = feasible.labels
        self.where, self.start = feasible.segments
        self.place = np.empty((2, len(labels)), np.int64)  # segment of a coordinate, and its position there
        self.place[0] = np.where(labels < 0, self.groups, labels)
        self.place[1, self.where] = np.arange(len(labels)) - self.start[self.place[0, self.where]]
        if settle:
            self.settle()

    def violation(self, grad: np.ndarray) -> float:
        """V(x): 0 exactly at a KKT point; the largest first-order gain per unit of mass (docs/theory.md)."""
        return float(_compiled.violation(grad, self.rise, self.fall, self.labels, self.groups))

    def shift(self, chosen: Selection) -> int:
        """Carry out a step; returns how many coordinates changed."""
        return int(_compiled.shift(self.x, self.rise, self.fall, self.lower, self.upper, chosen.index, chosen.step))

    def place_at(self, x: np.ndarray) -> None:
        """Go to another point of the set (shape (N,))."""
        self.x[:] = x
        np.subtract(self.upper, self.x, out=self.rise)
        np.subtract(self.x, self.lower, out=self.fall)

    def settle(self) -> None:
        """Take out of the sums what rounding has added."""
        _compiled.settle(
            self.x, self.rise, self.fall, self.lower, self.upper, self.where, self.start,
            self.feasible.totals, self.feasible.slop,
        )  # fmt: skip

    def gap(self, grad: np.ndarray) -> float:
        """Frank-Wolfe gap ``max over feasible v of <g, x - v>`` (inf when unbounded), O(n log n)."""
        _, _, drop, _, _ = _compiled.steepest(grad, self.rise, self.fall, self.labels, self.groups, 0.0, 0)
        return float(drop)
