# SPDX-License-Identifier: BSD-3-Clause
"""Updates: how far to move the coordinates that a rule has chosen.

An update is a callable ``update(at, chosen, moves) -> Selection`` whose result has a step that keeps
every sum and stays within the rooms, or None to have the rule choose again (after the update has raised
``at.lipschitz``). ``UnboundedError`` says that nothing limits the step.

================  ==============================================================================
PairStep          exact minimiser along e_i - e_j (or e_i alone), or the step of the constant L2
ModelStep         the step the rule proposes
LineSearch        the best multiple of it
Backtracking      the step of an estimated constant; doubled until f agrees, slowly lowered
SolveBlock        minimises the quadratic model over the chosen block
================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bcd import _compiled
from bcd._check import concave_message
from bcd.constraints import Moves
from bcd.problem import Point, Problem
from bcd.selection import GS1, GSL, WSS2, GS1Block, GSq, GSs, Rule, Selection, _Draws

__all__ = [
    "UPDATES",
    "Backtracking",
    "LineSearch",
    "ModelStep",
    "PairStep",
    "SolveBlock",
    "UnboundedError",
    "resolve_update",
]

Update = Callable[[Point, Selection, Moves], Selection | None]


class UnboundedError(Exception):
    """f falls without end along a feasible direction.

    Attributes
    ----------
    chosen : Selection
        The direction.
    """

    def __init__(self, chosen: Selection):
        self.chosen = chosen
        super().__init__("the objective falls without end along a feasible direction")


@dataclass(frozen=True)
class PairStep:
    """Move a pair (or a coordinate alone) to the minimum along it, within the rooms.

    Parameters
    ----------
    curvature : {"exact", "l2"}
        The Hessian's own curvature ``Q_ii + Q_jj - 2 Q_ij``, or the constant L2 = 2 L1 for all.
    """

    curvature: str = "exact"

    def __post_init__(self) -> None:
        if self.curvature not in ("exact", "l2"):
            raise ValueError(f'curvature must be "exact" or "l2"; found {self.curvature!r}')

    def __call__(self, at: Point, chosen: Selection, moves: Moves) -> Selection:
        """The pair with its step; the first coordinate rises if it can descend that way."""
        i, j = self._orient(at, chosen, moves)
        gap = (at.grad[j] if j >= 0 else 0.0) - (at.grad[i] if i >= 0 else 0.0)
        pair = Selection(np.array([k for k in (i, j) if k >= 0]), np.array([1.0] * (i >= 0) + [-1.0] * (j >= 0)))
        if self.curvature == "exact":
            block = at.block(pair.index)
            curvature = block[0, 0] if len(block) == 1 else block[0, 0] + block[1, 1] - 2 * block[0, 1]
            if _compiled.concave(curvature, i, j, at.diagonal):
                raise ValueError(concave_message(i, j, curvature))
        else:
            curvature = at.lipschitz * len(pair.index) ** 2
        mass = _compiled.pair_mass(i, j, gap, curvature, moves.rise, moves.fall)
        if mass == np.inf:
            raise UnboundedError(pair)
        return Selection(pair.index, mass * pair.step)

    @staticmethod
    def _orient(at: Point, chosen: Selection, moves: Moves) -> tuple[int, int]:
        a = int(chosen.index[0])
        if len(chosen.index) == 1:
            return (a, -1) if at.grad[a] < 0 else (-1, a)
        if len(chosen.index) != 2:
            raise ValueError(f"PairStep moves 1 or 2 coordinates; the rule chose {len(chosen.index)}; use SolveBlock()")
        b = int(chosen.index[1])
        return (a, b) if at.grad[a] <= at.grad[b] else (b, a)


@dataclass(frozen=True)
class ModelStep:
    """Take the step that the rule proposes."""

    def __call__(self, at: Point, chosen: Selection, moves: Moves) -> Selection:
        """The same selection."""
        if chosen.step is None:
            raise ValueError(
                "ModelStep needs a rule that proposes a step; this one leaves it to the update: use PairStep()"
            )
        if not np.isfinite(chosen.step).all():
            raise UnboundedError(Selection(chosen.index, np.where(np.isinf(chosen.step), np.sign(chosen.step), 0.0)))
        return chosen


@dataclass(frozen=True)
class LineSearch:
    """The multiple of the rule's step that minimises f along it, within the rooms."""

    def __call__(self, at: Point, chosen: Selection, moves: Moves) -> Selection:
        """The selection with its step multiplied."""
        chosen = ModelStep()(at, chosen, moves)
        cap = _compiled.largest_multiple(chosen.index, chosen.step, moves.rise, moves.fall)
        if cap <= 1:  # a coordinate is at its bound: with a valid constant the step is already the best multiple
            return chosen
        scale = np.abs(chosen.step).max()  # the curvature of a tiny step could underflow
        unit = Selection(chosen.index, chosen.step / scale)
        t = _root(at.along(unit), scale, cap * scale, at.problem.objective.exact)
        if t == np.inf:
            raise UnboundedError(unit)
        return Selection(unit.index, _compiled.stretched(unit.index, unit.step, moves.rise, moves.fall, t))


def _root(slope: Callable[[float], float], guess: float, cap: float, linear: bool) -> float:
    """The t in (0, cap] where an increasing slope, negative at 0, vanishes; cap if it stays negative."""
    from scipy.optimize import brentq  # a third of a second to import, for a line search on a curve only

    if linear:
        first, second = slope(0.0), slope(1.0)
        return min(cap, first / (first - second)) if second > first else cap
    a, b = 0.0, guess
    while slope(b) < 0:
        if b == cap or b > 1e300:
            return cap
        a, b = b, min(2 * b, cap)
    return float(brentq(slope, a, b, xtol=1e-12 * b, rtol=1e-12)) if slope(a) < 0 else b


@dataclass(frozen=True)
class Backtracking:
    """Steps of an estimated constant ``at.lipschitz``: doubled while f exceeds the model, lowered by a tenth after.

    The test is ``f(x+d) <= f(x) + <g, d> + L/2 ||d||_1^2``; where that difference drowns in rounding, the
    same for the gradients, ``<g(x+d) - g, d> <= L ||d||_1^2``.
    """

    def __call__(self, at: Point, chosen: Selection, moves: Moves) -> Selection | None:
        """The step, or None after doubling the constant."""
        if chosen.step is None:
            chosen = PairStep("l2")(at, chosen, moves)
        chosen = ModelStep()(at, chosen, moves)
        slope, square = float(at.grad[chosen.index] @ chosen.step), float(np.abs(chosen.step).sum()) ** 2
        if self._agrees(at, chosen, slope, square):
            at.lipschitz *= 0.9
            return chosen
        at.lipschitz = 2 * at.lipschitz if at.lipschitz > 0 else -1e-6 * slope / square
        return None

    @staticmethod
    def _agrees(at: Point, chosen: Selection, slope: float, square: float) -> bool:
        there = at.x.copy()
        there[chosen.index] += chosen.step
        objective, n = at.problem.objective, at.n
        value = objective.value(there[:n])
        if np.isnan(value) or value == np.inf:  # outside the domain
            return False
        rounding = 4 * _compiled.EPS * max(abs(at.value), abs(value))
        if abs(slope) > 1e5 * rounding or value == -np.inf:
            return bool(value <= at.value + slope + 0.5 * at.lipschitz * square + rounding)
        change = objective.gradient(there[:n]) - at.grad[:n]
        real = chosen.index < n
        return bool(change[chosen.index[real]] @ chosen.step[real] <= at.lipschitz * square)


@dataclass(frozen=True)
class SolveBlock:
    """Minimise the quadratic (or the quadratic upper bound) over the chosen block, by compiled WSS2 steps.

    Starts from the rule's step, where it has one, and so ends no higher than that step does. Where the
    block is too small to hold the GS-1 step and gains less than that step would, the GS-1 step is taken
    (docs/theory.md).

    Parameters
    ----------
    accuracy : float
        The block is solved to a violation of this fraction of its violation at the start.
    max_steps : int
        Pair steps at most.
    """

    accuracy: float = 0.05
    max_steps: int = 100_000

    def __call__(self, at: Point, chosen: Selection, moves: Moves) -> Selection:
        """The block with its step."""
        index, Q = chosen.index, at.block(chosen.index)
        start = np.zeros(len(index)) if chosen.step is None else ModelStep()(at, chosen, moves).step
        step = self._solve(at, moves, index, Q, start)
        gain = -(at.grad[index] @ step + 0.5 * step @ Q @ step)
        if chosen.step is None:
            steepest, _ = GS1().select(at, moves, None)
            first, size = at.grad[steepest.index] @ steepest.step, np.abs(steepest.step).sum()
            if gain < -(first + 0.5 * at.lipschitz * size**2):
                return LineSearch()(at, steepest, moves)
        return Selection(index[step != 0], step[step != 0])

    def _solve(self, at: Point, moves: Moves, index: np.ndarray, Q: np.ndarray, start: np.ndarray) -> np.ndarray:
        x, rise, fall = moves.x[index], moves.rise[index], moves.fall[index]
        lower, upper = moves.lower[index], moves.upper[index]
        labels = moves.labels[index] if len(moves.labels) else moves.labels
        grad, diagonal = at.grad[index], Q.diagonal().copy()
        least = 4 * _compiled.EPS * float(np.abs(grad).max(initial=0.0))  # below it gradients are rounding
        tol = max(least, self.accuracy * _compiled.violation(grad, rise, fall, labels, moves.groups))
        _compiled.shift(x, rise, fall, lower, upper, np.arange(len(index)), start)
        grad = grad + Q @ start
        if len(labels) == 0:
            _, _, ended = _compiled.pair_loop(Q, grad, x, lower, upper, diagonal, tol, self.max_steps)
        else:
            _, _, ended = _compiled.greedy_loop(
                *(_compiled.SECOND_ORDER, Q, diagonal, diagonal, 0.0, grad, x, rise, fall, lower, upper),
                *(labels, moves.groups, tol, self.max_steps),
            )
        if ended == _compiled.CONCAVE:
            _, low, a, b = _compiled.pair_extremes(Q, labels)
            raise ValueError(concave_message(int(index[a]), int(index[b]), 4 * low))
        if ended == _compiled.FLAT:
            i, j = _compiled.second_order_pair(grad, upper - x, x - lower, labels, moves.groups, Q, diagonal)
            ends = [k for k in (i, j) if k >= 0]
            raise UnboundedError(Selection(index[ends], np.array([1.0 if k == i else -1.0 for k in ends])))
        step = x - moves.x[index]
        step[x == upper] = moves.rise[index][x == upper]  # exactly the room, so that the bound is hit
        step[x == lower] = -moves.fall[index][x == lower]
        return step


UPDATES: dict[str, Any] = {
    "pair": PairStep(),
    "pair-l2": PairStep("l2"),
    "model": ModelStep(),
    "line-search": LineSearch(),
    "backtracking": Backtracking(),
    "block": SolveBlock(),
}


def resolve_update(update: str | Update | None, rule: Rule, problem: Problem) -> Update:
    """The update of a name, the object itself, or what suits the rule and the objective."""
    if isinstance(update, str):
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)} or a callable; found {update!r}")
        return UPDATES[update]
    if update is not None:
        if not callable(update):
            raise ValueError(f"update must be a name or a callable; found {update!r}")
        return update
    if problem.objective.hessian is None:
        return Backtracking() if problem.lipschitz is None else _as_proposed
    if isinstance(rule, GS1Block):
        return SolveBlock()
    if isinstance(rule, GS1):
        return LineSearch()
    if isinstance(rule, GSs | GSq | GSL | WSS2 | _Draws):
        return PairStep()
    return _as_proposed


def _as_proposed(at: Point, chosen: Selection, moves: Moves) -> Selection:
    """The rule's step where it proposes one, else the pair step of the constant L2 or of the Hessian."""
    if chosen.step is not None:
        return ModelStep()(at, chosen, moves)
    return PairStep("l2" if at.problem.objective.hessian is None else "exact")(at, chosen, moves)
