# SPDX-License-Identifier: BSD-3-Clause
"""Quadratic programs under sums and bounds, by second-order steps on all free coordinates.

    minimise 1/2 x'Px + q'x   subject to   sum of x over every group = its total,   l <= x <= u

Block principal pivoting (Judice and Pires 1994) solves for the free coordinates F as if their bounds did not exist,

    [ P_FF  E' ] [ d ]   [ -g_F                ]
    [ E     0  ] [ y ] = [ totals - sums of x  ]        (E: which sum a coordinate belongs to)

puts all that leave their bounds there, frees all whose gradient pulls inwards, and again until nothing changes sides.
All change sides at once, and a change of few updates the last factorisation (:mod:`bcd.faces`). Where the first step
goes too far, because the start is poor or P ill conditioned, a path of problems with damped steps leads there. Where P
is explicit, many coordinates are free and greedy pair steps (WSS2) go fast, these lead there instead: each costs two
rows of P.

Pivoting need not descend on its way, and in degenerate cases it may cycle. So its result replaces the point only where
f has fallen, and where it ends at no solution greedy blocks (GS-1, docs/theory.md), proximal steps and then steps of
the primal active-set method, all of which descend, take turns with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from bcd import _compiled
from bcd.constraints import FeasibleSet, Moves, project_sum
from bcd.objectives import DenseHessian, NonConvexError
from bcd.result import Status

__all__ = ["Watch", "descend", "start_point"]

Array = np.ndarray

BLOCK = 256  # coordinates of a greedy block
PIVOTS = 60  # pivoting steps at most
PATIENCE = 8  # of them without fewer coordinates changing sides than ever before
CROWD = 0.25  # share of the coordinates that changes sides in the first step where that step goes too far
FAST, SETTLED = 3.0, 0.01  # what N / 2 pair steps divide the violation by, and the share that changes sides in the last
SPRINTS = 5  # times N / 2 pair steps at most
MANY = 200  # free coordinates whose factorisation is cheap
DAMPING = (0.01, 1e-10, 0.316)  # first and least, relative to the diagonal, and what it is multiplied by
NEARLY = 0.05  # share of the coordinates that changes sides in the last damped step
STALLED, ROUNDS = 6, 40  # rounds without progress, and in all
STEPS, MOST_STEPS = 1000, 64_000  # pair steps of the first greedy block, doubled for every further one, and at most
LEVELS = 8  # coordinates, ever smaller ones, that take up the rounding of a sum
PATIENT = 2  # rounds before active-set steps, which are slow but sure
EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)


@dataclass
class Watch:
    """Limits of a run and what it has cost so far.

    Attributes
    ----------
    tol : float
        Violation to reach, relative to max(1, largest |gradient|).
    tol_gap : float or None
        Frank-Wolfe gap to reach as well.
    pressed : list
        Not empty after Ctrl-C.
    tell : callable or None
        Called with the point before every round; a true return value stops the run.
    scale : ndarray, shape (n,), or None
        Weights of the sums, relative to the largest: times the gradient in t = scale * x it is that in x.
    to_x : callable
        From t to x.
    """

    tol: float
    tol_gap: float | None = None
    max_iter: int | None = None
    time_limit: float | None = None
    pressed: list[bool] = field(default_factory=list)
    tell: Callable[[Walk], Any] | None = None
    scale: Array | None = None
    to_x: Callable[[Array], Array] = lambda t: t
    started: float = field(default_factory=time.perf_counter)
    iterations: int = 0
    columns: int = 0

    def stop(self) -> Status | None:
        """The limit that is met."""
        if self.pressed:
            return Status.INTERRUPTED
        if self.max_iter is not None and self.iterations >= self.max_iter:
            return Status.ITERATION_LIMIT
        if self.time_limit is not None and time.perf_counter() - self.started >= self.time_limit:
            return Status.TIME_LIMIT
        return None

    def left(self, steps: int) -> int:
        """At most so many steps, or what the limit leaves."""
        return steps if self.max_iter is None else min(steps, self.max_iter - self.iterations)


class Walk:
    """The point, its gradient, and the steps it takes.

    Parameters
    ----------
    hessian : Hessian
        P, n x n.
    face : Face
        Solves with P_FF.
    linear : ndarray, shape (n,)
        q.
    feasible : FeasibleSet
        N >= n coordinates, slacks last; P and q are 0 there.
    x : ndarray, shape (n,)
        A feasible start.
    watch : Watch
    """

    def __init__(self, hessian: Any, face: Any, linear: Array, feasible: FeasibleSet, x: Array, watch: Watch):
        self.hessian, self.face, self.watch, self.feasible = hessian, face, watch, feasible
        face.halted = watch.stop
        self.moves = Moves(feasible, x)
        self.n, self.N = len(linear), len(self.moves.x)
        self.linear = np.concatenate([linear, np.zeros(self.N - self.n)])
        self.sums = np.maximum(feasible.labels, -1)  # of every coordinate, -1: none
        self.stretch = np.ones(self.N)  # the gradient in x is so many times the one in t
        if watch.scale is not None:
            self.stretch[: self.n] = np.abs(watch.scale)
        self.diagonal = np.concatenate([hessian.diagonal, np.zeros(self.N - self.n)])
        self.unit = float(np.abs(hessian.diagonal).max(initial=0.0)) or 1.0
        self.curvature = np.where(self.diagonal > 0, self.diagonal, self.unit)  # what steps are damped in proportion to
        self.curvature[self.n :] = 0.0
        self.block = np.empty(0, np.int64)
        self.origin = self.moves.x.copy()
        self.ray: Array | None = None
        self.examined = b""  # the free coordinates that were last solved for, which finds negative curvature
        self.strictness = 0.25  # of the test for changing sides, relative to the tolerance
        self.grad = np.zeros(self.N)
        self.place_at(self._restored(self.moves.x))

    # -- the point --

    def place_at(self, x: Array) -> None:
        """Go to a feasible point."""
        self.moves.place_at(self._levelled(x))
        self.moves.settle()
        self.rebuild()

    def rebuild(self) -> None:
        """The gradient from x alone."""
        self.grad[: self.n] = self.hessian.product(self.moves.x[: self.n]) + self.linear[: self.n]

    @property
    def objective(self) -> float:
        """f(x)."""
        return float(0.5 * self.moves.x @ (self.grad + self.linear))

    @property
    def scale(self) -> float:
        """What the violation is relative to: max(1, largest |gradient|)."""
        return max(1.0, float(np.abs(self.grad * self.stretch).max(initial=0.0)))

    def excess(self) -> float:
        """Violation, and gap, over what is allowed: at most 1 where the tolerances are met."""
        violation = self.violation / max(self.watch.tol * self.scale, TINY)
        if self.watch.tol_gap is None or violation > 1:
            return violation
        return max(violation, self.moves.gap(self.grad) / max(self.watch.tol_gap, TINY))

    @property
    def violation(self) -> float:
        """V(x); with weights twice the largest residual of the gradient in x, which V is without them."""
        if self.watch.scale is None:
            return self.moves.violation(self.grad)
        moves = self.moves
        y = self.multipliers(self.grad, (moves.rise > 0) & (moves.fall > 0))
        reduced = (self.grad + np.append(y, 0.0)[self.sums]) * self.stretch
        rises, falls = np.where(moves.rise > 0, -reduced, 0.0), np.where(moves.fall > 0, reduced, 0.0)
        return 2 * float(max(rises.max(initial=0.0), falls.max(initial=0.0)))

    def prices(self) -> tuple[Array, Array]:
        """Multipliers of the sums and of the bounds with which the residuals are those of :attr:`violation`."""
        moves, n = self.moves, self.n
        y = self.multipliers(self.grad, (moves.rise > 0) & (moves.fall > 0))
        reduced = (self.grad + np.append(y, 0.0)[self.sums])[:n]
        pulls_up, pulls_down = np.minimum(reduced, 0.0), np.maximum(reduced, 0.0)
        return y, -np.where(moves.rise[:n] == 0, pulls_up, 0.0) - np.where(moves.fall[:n] == 0, pulls_down, 0.0)

    @cached_property
    def recedes(self) -> bool:
        """Whether a feasible point may go on without end in some direction."""
        up, down = self.moves.upper == np.inf, self.moves.lower == -np.inf
        alone = self.sums < 0
        both = np.intersect1d(self.sums[~alone & up], self.sums[~alone & down])
        return bool((alone & (up | down)).any() or len(both))

    @cached_property
    def greedy_helps(self) -> bool:
        """Whether blocks can be read, and no pair of theirs could step without end where its curvature is rounding."""
        up, down = self.moves.upper == np.inf, self.moves.lower == -np.inf
        endless = np.intersect1d(self.sums[up], self.sums[down])
        flat = (self.sums < 0) & (up | down) & (self.diagonal <= 0)
        return hasattr(self.hessian, "block") and len(endless) == 0 and not flat.any()

    @cached_property
    def lies_ready(self) -> bool:
        """Whether pair steps on all coordinates can use P where it is: explicit, and its rows in the order of sums."""
        explicit = isinstance(self.hessian, DenseHessian) and self.n == self.N
        return explicit and self.greedy_helps and bool((self.sums >= 0).all() and (np.diff(self.sums) >= 0).all())

    def shift(self, grad: Array, index: Array, step: Array) -> None:
        """Bring a gradient after a move; the slacks have no column."""
        real = index < self.n
        if not real.all():
            index, step = index[real], step[real]
        self.watch.columns += len(index)
        if 2 * len(index) > self.n:
            whole = np.zeros(self.n)
            whole[index] = step
            grad[: self.n] += self.hessian.product(whole)
        else:
            self.hessian.add_columns(grad[: self.n], index, step)

    # -- greedy blocks --

    def greedy(self, size: int, steps: int) -> None:
        """WSS2 pair steps on a GS-1 block."""
        pairs = _Pairs(self, size)
        pairs.run(steps)
        pairs.hand_over()
        self.block = pairs.W

    def sprint(self) -> bool:
        """Pair steps on all coordinates while each N / 2 of them divide the violation by FAST; True if they settle.

        Then few have changed sides lately, and pivoting needs one factorisation or two, which also tell whether P is
        convex there. Where they are slow, P is ill conditioned and little is lost: they read 2 N entries a step.
        """
        pairs, before = _Pairs(self, self.N), self.moves.violation(self.grad)
        sides, settled = pairs.sides(), False
        for _ in range(SPRINTS):
            if self.watch.stop() is not None or settled:
                break
            violation, old, sides = pairs.run(-(-self.N // 2)), sides, pairs.sides()
            if FAST * violation > before and violation > pairs.tol:
                break
            changed, before = int(np.count_nonzero(sides != old)), violation
            settled = changed <= SETTLED * self.N or violation <= pairs.tol
        pairs.hand_over()
        return settled

    def _choose(self, size: int) -> Array:
        """All coordinates, or the GS-1 block with the free ones of the last block in up to half of its places."""
        moves = self.moves
        if size >= self.N:
            return np.arange(self.N)
        kept = self.block[(moves.rise[self.block] > 0) & (moves.fall[self.block] > 0)][: size // 2]
        block = _compiled.steepest(
            self.grad, moves.rise, moves.fall, moves.labels, moves.groups, 0.5 * self.unit, size
        )[0]  # fmt: skip
        taken = np.zeros(self.N, bool)
        taken[kept] = True
        return np.concatenate([block[~taken[block]][: size - len(kept)], kept])

    def _by_sum(self, W: Array) -> tuple[Array, Array]:
        """The block ordered by sums, those in none last, and where each sum's coordinates begin."""
        if not len(self.moves.labels):
            return W, np.array([0, len(W)])
        sums = np.where(self.sums[W] < 0, self.moves.groups, self.sums[W])
        order = np.argsort(sums, kind="stable")
        return W[order], np.searchsorted(sums[order], np.arange(self.moves.groups + 1))

    def _dense_block(self, W: Array, count: int) -> Array:
        """Rows and columns W of P, zeros for slacks."""
        real = np.flatnonzero(self.n > W)
        if len(real) == count:
            return self.hessian.block(W)
        K = np.zeros((count, count))
        K[np.ix_(real, real)] = self.hessian.block(W[real])
        return K

    def _concave_pair(self, W: Array, K: Array, start: Array) -> None:
        """Raise NonConvexError for the pair of the block with the least curvature."""
        curvature = K.diagonal()[:, None] + K.diagonal() - 2 * K
        for a, b in pairwise(start):
            curvature[a:b, :a] = curvature[a:b, b:] = np.inf
        np.fill_diagonal(curvature, np.inf)
        i, j = np.unravel_index(int(curvature.argmin()), K.shape)
        d = np.zeros(self.N)
        d[W[[k for k in (i, j) if k < len(W)]]] = 1.0
        if max(i, j) < len(W):
            d[W[j]] = -1.0
        raise NonConvexError(d[: self.n] / np.linalg.norm(d[: self.n]), float(curvature[i, j] / (d @ d)))

    # -- all free coordinates at once --

    def pivoting(self, fresh: bool) -> bool:
        """Block principal pivoting from here; the point moves if f falls. True if it ended at a solution.

        Where it would be dear, pair steps come before it, if this is the ``fresh`` start and P lies ready for them.
        """
        at = _Pivoting(self)
        crowded = max(at.changed, int(np.count_nonzero(at.state == 0)) - MANY) > CROWD * self.N
        if crowded and fresh and self.lies_ready and self.sprint():
            at = _Pivoting(self)
        elif crowded or at.step() > CROWD * self.N:  # too far, or too dear: a path of easier problems leads there
            at = _Pivoting(self)
            at.follow()
        return self._accept(at, at.run())

    def examine(self) -> None:
        """NonConvexError where the free coordinates have negative curvature."""
        free = np.flatnonzero((self.moves.rise > 0) & (self.moves.fall > 0))
        if free[self.n > free].tobytes() != self.examined:
            self.newton(free, self.moves.x, self.grad, None)

    def damped(self, damping: float) -> bool:
        """The same for the problem with damped steps (a proximal step); True if it was solved."""
        at = _Pivoting(self, damping)
        return self._accept(at, at.run())

    def multipliers(self, grad: Array, free: Array) -> Array:
        """Of every sum: 0 with a free slack, else minus the mean gradient of its free coordinates or of its ends.

        With weights in the sums the mean makes the residuals in x small: it weighs by the square of the scale.
        """
        y = np.zeros(self.moves.groups)
        first, last = _compiled.violating_ends(
            grad, self.moves.rise, self.moves.fall, self.moves.labels, self.moves.groups
        )
        inside = free & (self.sums >= 0)
        share = self.stretch[inside] ** 2
        count = np.bincount(self.sums[inside], share, minlength=len(y))
        total = np.bincount(self.sums[inside], share * grad[inside], minlength=len(y))
        for s in range(len(y)):
            ends = [grad[k] for k in (first[s], last[s]) if k >= 0]
            y[s] = -total[s] / count[s] if count[s] else (-np.mean(ends) if ends else 0.0)
        y[self.sums[self.n :][free[self.n :]]] = 0.0
        return y

    def newton(self, free: Array, x: Array, grad: Array, damped: tuple[float, Array] | None) -> tuple[Array, Array]:
        """The step to the minimiser over the free coordinates that restores the sums, and the multipliers."""
        groups, sums = self.moves.groups, self.sums
        y = np.zeros(groups)
        real, slack = free[free < self.n], free[free >= self.n]
        held = sums[real].copy()
        off = self.feasible.totals - np.bincount(sums[sums >= 0], x[sums >= 0], minlength=groups)
        if len(slack):
            held[np.isin(held, sums[slack])] = -1  # the slack takes up what the sum lacks
        count = np.bincount(held + 1, minlength=groups + 1)[1:]
        y0 = -np.bincount(held + 1, grad[real], minlength=groups + 1)[1:] / np.maximum(count, 1)
        h, damping = -(grad[real] + np.append(y0, 0.0)[held]), None  # so that d is small where x is nearly right
        if damped is not None:
            damping = damped[0] * self.curvature[real]
            h -= damping * (x[real] - damped[1][real])
        step = np.zeros(0)
        if len(real):
            step, y = self.face.kkt(real, h, held, off, damping)
            self.examined = real.tobytes() if damped is None else self.examined
            y += y0
        if len(slack):
            gained = np.bincount(sums[real] + 1, step, minlength=groups + 1)[1:]
            step = np.concatenate([step, (off - gained)[sums[slack]]])
        return step, y

    def _accept(self, at: _Pivoting, solved: bool) -> bool:
        """Go to the point found, or the feasible one next to it, if f is lower there; notes a ray that leads there."""
        moves, room, kept, old = self.moves, 8 * EPS * abs(self.objective), self.moves.x.copy(), self.grad.copy()
        if not np.isfinite(at.x).all():
            return False
        if self.recedes:
            last, whole = self._ray(at.x - moves.x), self._ray(at.x - self.origin)
            self.ray = whole if last is None else last
        self.place_at(self._restored(at.x) if solved else self._nearest(at.x))
        change = 0.5 * float((old + self.grad) @ (moves.x - kept))  # a difference of values would lose small ones
        if change <= room:
            return solved
        moves.place_at(kept)
        self.grad[:] = old
        return False

    def _ray(self, d: Array) -> Array | None:
        """D cleaned, if f falls without end along it."""
        size = float(np.abs(d).max(initial=0.0))
        d = np.where(np.abs(d) > 1e-9 * size, d, 0.0) / (size or 1.0)
        blocked = ((d > 0) & (self.moves.upper < np.inf)) | ((d < 0) & (self.moves.lower > -np.inf))
        inside = self.sums >= 0
        gained, moved = (np.bincount(self.sums[inside], v[inside], minlength=self.moves.groups) for v in (d, np.abs(d)))
        if blocked.any() or not d.any() or (np.abs(gained) > 1e-9 * moved).any():
            return None
        curvature = float(d[: self.n] @ self.hessian.product(d[: self.n]))
        most = float(np.sqrt(np.maximum(self.diagonal, 0.0)) @ np.abs(d)) ** 2  # of |d|'|P||d|, P semidefinite
        slope = float(self.grad @ d)
        flat = curvature <= 8 * EPS * most and 8 * curvature * size < -slope  # else it explains the length of d
        falls = slope < -self.watch.tol * self.scale * float(np.abs(d).sum())
        return d[: self.n] if flat and falls else None

    def _restored(self, x: Array) -> Array:
        """X within its bounds, with what a sum then lacks spread over the coordinates inside of theirs."""
        moves = self.moves
        x = np.clip(x, moves.lower, moves.upper)
        off = np.bincount(self.sums[self.sums >= 0], x[self.sums >= 0], minlength=moves.groups) - self.feasible.totals
        for s in np.flatnonzero(np.abs(off) > self.feasible.slop):
            m = self.feasible.members(int(s))
            room = np.minimum(np.minimum(x[m] - moves.lower[m], moves.upper[m] - x[m]), 1.0 + np.abs(x[m]))
            if room.sum() <= abs(off[s]):
                return self._nearest(x)
            x[m] = np.clip(x[m] - off[s] * room / room.sum(), moves.lower[m], moves.upper[m])
        return x

    def _levelled(self, x: Array) -> Array:
        """X with what rounding has added to a sum taken out of flat coordinates, where a steep one's would feel it."""
        inside = self.sums >= 0
        lost = EPS * np.bincount(self.sums[inside], np.abs(x[inside]), minlength=self.moves.groups)
        for s in np.flatnonzero(lost * self.curvature.max() > 0.1 * self.watch.tol * self.scale):
            m = self.feasible.members(int(s))
            for _ in range(LEVELS):
                off = _compiled.exact_sum(x[m]) - self.feasible.totals[s]
                room = np.minimum(x[m] - self.moves.lower[m], self.moves.upper[m] - x[m])
                able = (room > abs(off)) & (np.spacing(np.abs(x[m])) <= 2 * abs(off))
                if off == 0 or not able.any():
                    break
                x[m[np.where(able, self.curvature[m], np.inf).argmin()]] -= off
        return x

    def _nearest(self, x: Array) -> Array:
        """The closest feasible point, slacks included."""
        moves = self.moves
        out = np.clip(x, moves.lower, moves.upper)
        for s in range(moves.groups):
            m = self.feasible.members(s)
            out[m] = project_sum(x[m], moves.lower[m], moves.upper[m], float(self.feasible.totals[s]))
        return out


class _Pairs:
    """WSS2 pair steps on a GS-1 block of the walk, or on all coordinates; it hears of them at the end."""

    def __init__(self, walk: Walk, size: int):
        self.walk, moves = walk, walk.moves
        self.W, self.start = walk._by_sum(walk._choose(size))
        W, alone = self.W, self.start[-1] < len(self.W)  # those in no sum pair with a coordinate that nothing holds
        count = len(W) + alone
        self.K = walk.hessian.matrix if walk.lies_ready and size >= walk.n else walk._dense_block(W, count)
        self.x, self.grad, self.lower, self.upper, self.diagonal = (np.zeros(count) for _ in range(5))
        self.x[: len(W)], self.grad[: len(W)], self.diagonal[: len(W)] = moves.x[W], walk.grad[W], walk.diagonal[W]
        self.lower[: len(W)], self.upper[: len(W)] = moves.lower[W], moves.upper[W]
        if alone:
            self.lower[-1], self.upper[-1], self.start = -np.inf, np.inf, np.append(self.start, count)
        self.tol = 0.5 * walk.watch.tol * walk.scale

    def run(self, steps: int) -> float:
        """So many steps at most, or to the tolerance; returns the violation."""
        watch = self.walk.watch
        done, violation, ended = _compiled.segment_pairs(
            self.K, self.grad, self.x, self.lower, self.upper, self.diagonal, self.start, self.tol,
            watch.left(steps), _compiled.CONCAVITY,
        )  # fmt: skip
        watch.iterations += done
        watch.columns += 2 * done
        if ended == _compiled.CONCAVE:
            self.walk._concave_pair(self.W, self.K, self.start)
        return violation

    def sides(self) -> Array:
        """-1 at the lower bound, 0 between, 1 at the upper one."""
        return np.where(self.x >= self.upper, 1, np.where(self.x <= self.lower, -1, 0))

    def hand_over(self) -> None:
        """The walk goes there."""
        walk, W = self.walk, self.W
        walk.moves.x[W] = self.x[: len(W)]
        walk.place_at(walk.moves.x)


class _ActiveSet:
    """The primal active-set method: to the least f over the free coordinates or to the first bound on the way.

    Where the free coordinates are at their least, the bound with the worst multiplier is let go. f never rises.
    """

    def __init__(self, walk: Walk):
        self.walk, moves = walk, walk.moves
        self.state = np.where(moves.rise == 0, 1, np.where(moves.fall == 0, -1, 0)).astype(np.int8)
        self.slack = walk.strictness * walk.watch.tol * walk.scale

    def run(self, most: int) -> None:
        """So many steps at most."""
        walk = self.walk
        for _ in range(most):
            if walk.watch.stop() is not None or walk.ray is not None or not (self.step() or self.release()):
                break
            walk.watch.iterations += 1
        walk.place_at(walk.moves.x)

    def step(self) -> bool:
        """Along the Newton direction; False if that is no way down, or went all the way."""
        walk, moves, x = self.walk, self.walk.moves, self.walk.moves.x
        free = np.flatnonzero(self.state == 0)
        d, self.y = walk.newton(free, x, walk.grad, None)
        slope = float(walk.grad[free] @ d)
        room = np.where(d > 0, moves.upper[free] - x[free], x[free] - moves.lower[free])
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(d != 0, room / np.abs(d), np.inf)
        t = min(1.0, float(reach.min(initial=np.inf)))
        if not slope < 0 or not np.isfinite(d).all():
            return False
        met = free[reach <= t]
        moved = x[free] + t * d
        step = np.clip(moved, moves.lower[free], moves.upper[free]) - x[free]
        x[free] += step
        x[met] = np.where(d[reach <= t] > 0, moves.upper[met], moves.lower[met])
        self.state[met] = np.where(d[reach <= t] > 0, 1, -1)
        walk.shift(walk.grad, free, step)
        return len(met) > 0

    def release(self) -> bool:
        """Let the bound with the worst multiplier go; False if none pulls inwards."""
        walk = self.walk
        y = walk.multipliers(walk.grad, self.state == 0)
        reduced = walk.grad + np.append(y, 0.0)[walk.sums]
        pull = np.where(walk.moves.lower < walk.moves.upper, self.state * reduced, 0.0)
        k = int(pull.argmax())
        if pull[k] <= self.slack:
            return False
        self.state[k] = 0
        if walk.sums[k] >= 0 and np.count_nonzero((walk.sums == walk.sums[k]) & (self.state == 0)) == 1:
            other = np.where(
                (walk.sums == walk.sums[k]) & (self.state != 0), self.state * (reduced - reduced[k]), -np.inf
            )
            self.state[int(other.argmax())] = 0
        return True


class _Pivoting:
    """Sides of the coordinates (-1 at the lower bound, 0 free, 1 at the upper one), and the point that belongs to them.

    With ``damping`` m > 0 the problem is ``f(x) + 1/2 sum_i m_i (x_i - centre_i)^2``, m a multiple of the diagonal.
    """

    def __init__(self, walk: Walk, damping: float = 0.0):
        self.walk, moves = walk, walk.moves
        self.x, self.grad = moves.x.copy(), walk.grad.copy()
        self.state = np.where(moves.rise == 0, 1, np.where(moves.fall == 0, -1, 0)).astype(np.int8)
        self.y = walk.multipliers(self.grad, self.state == 0)
        self.slack = walk.strictness * walk.watch.tol * walk.scale
        self.damping, self.centre = damping, moves.x
        self.changed = self.pivot()

    def run(self) -> bool:
        """Steps until nothing changes sides; False where they get nowhere."""
        seen, fewest, patience = {self.state.tobytes()}, np.inf, PATIENCE
        for _ in range(PIVOTS):
            if self.walk.watch.stop() is not None:
                return False
            changed = self.step()
            if changed == 0:
                return True
            patience = PATIENCE if changed < fewest else patience - 1
            fewest = min(fewest, changed)
            key = self.state.tobytes()
            if patience == 0 or key in seen:
                return False
            seen.add(key)
        return False

    def follow(self) -> None:
        """Lower the damping step by step to nothing."""
        walk = self.walk
        self.damping, least = DAMPING[:2]
        while self.damping > least and walk.watch.stop() is None:
            self.centre = np.clip(self.x, walk.moves.lower, walk.moves.upper)
            if self.step() <= NEARLY * walk.N:
                break
            self.damping *= DAMPING[2]
        self.damping = 0.0

    def pivot(self) -> int:
        """Change sides; returns how many coordinates did."""
        moves, grad = self.walk.moves, self.grad
        if self.damping:
            grad = grad + self._pull()
        before = self.state.copy()
        _compiled.pivot(self.state, self.x, grad, self.y, self.walk.sums, moves.lower, moves.upper, 0.0, self.slack)
        self._supply(grad)
        return int(np.count_nonzero(self.state != before))

    def step(self) -> int:
        """Put what is bound on its bound, solve for the rest, and change sides."""
        walk, moves, x = self.walk, self.walk.moves, self.x
        bound = np.flatnonzero(self.state)
        target = np.where(self.state[bound] < 0, moves.lower[bound], moves.upper[bound])
        off = np.flatnonzero(x[bound] != target)
        walk.shift(self.grad, bound[off], target[off] - x[bound[off]])
        x[bound] = target
        free = np.flatnonzero(self.state == 0)
        step, self.y = walk.newton(free, x, self.grad, (self.damping, self.centre) if self.damping else None)
        x[free] += step
        walk.shift(self.grad, free, step)
        walk.watch.iterations += 1
        self.changed = self.pivot()
        return self.changed

    def _pull(self) -> Array:
        """Gradient of the damping."""
        return self.damping * self.walk.curvature * (self.x - self.centre)

    def _supply(self, grad: Array) -> None:
        """Free some coordinates of a sum that has none, where a gradient step on that sum alone ends between bounds."""
        walk, moves = self.walk, self.walk.moves
        inside = (self.state == 0) & (walk.sums >= 0)
        for s in np.flatnonzero(np.bincount(walk.sums[inside], minlength=moves.groups) == 0):
            m = walk.feasible.members(int(s))
            weight = 1.0 / np.where(walk.diagonal[m] > 0, walk.diagonal[m], walk.unit)
            point = self.x[m] - grad[m] * weight
            self.y[s] = _compiled.price(point, weight, moves.lower[m], moves.upper[m], walk.feasible.totals[s])
            point -= self.y[s] * weight
            self.state[m] = np.where(point <= moves.lower[m], -1, np.where(point >= moves.upper[m], 1, 0))


def start_point(hessian: Any, linear: Array, feasible: FeasibleSet) -> Array:
    """The solution with P replaced by its diagonal: a start with about the right bounds. Shape (n,)."""
    n = len(linear)
    unit = float(np.abs(hessian.diagonal).max(initial=0.0)) or 1.0
    weight = 1.0 / np.where(hessian.diagonal > 0, hessian.diagonal, unit)
    point = -linear * weight
    x = np.clip(point, feasible.lower[:n], feasible.upper[:n])
    for s, (lo, hi) in enumerate(feasible.ranges):
        m = feasible.members(s)
        m = m[m < n]
        now = x[m].sum()
        if not lo <= now <= hi:
            ends = feasible.lower[m], feasible.upper[m]
            t = _compiled.price(point[m], weight[m], *ends, hi if now > hi else lo)
            x[m] = np.clip(point[m] - t * weight[m], *ends)
    return x


def descend(walk: Walk) -> Status:
    """Pivot; where that does not end at a solution, greedy blocks, proximal and active-set steps take turns with it."""
    watch, damping, idle, best, lowest = walk.watch, DAMPING[0], 0, np.inf, np.inf
    for turn in range(ROUNDS):
        if walk.excess() <= 1.0:
            walk.examine()
            return Status.CONVERGED
        stopped = watch.stop() or (Status.CALLBACK if watch.tell and watch.tell(walk) else None)
        if stopped is not None:
            return stopped
        solved = walk.pivoting(turn == 0)
        solved = solved and turn < PATIENT  # once more refines a solution; then it is no longer to be trusted
        if not solved and walk.ray is None and walk.excess() > 1.0:
            if walk.greedy_helps:
                walk.greedy(BLOCK, min(STEPS << min(turn, 16), MOST_STEPS))
            damping *= 0.1 if walk.damped(damping) else 10.0
            if turn >= PATIENT:
                _ActiveSet(walk).run(2 * min(walk.n, BLOCK))
        if walk.ray is not None:
            return Status.UNBOUNDED
        excess, objective = walk.excess(), walk.objective
        better = excess < 0.9 * best or objective < lowest - 1e-6 * abs(lowest)
        idle = 0 if better else idle + 1
        best, lowest = min(best, excess), min(lowest, objective)
        walk.strictness *= 0.1
        if idle > STALLED:
            return Status.STAGNATED
    return Status.ITERATION_LIMIT
