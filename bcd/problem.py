# SPDX-License-Identifier: BSD-3-Clause
"""The problem, and the point that moves through it.

minimise f(x)   subject to   sum(x) = s,   l <= x <= u          (either constraint may be absent)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from bcd import _compiled
from bcd.constraints import FeasibleSet, Moves, SumBox
from bcd.objectives import GradientState, Hessian, Objective, Smooth
from bcd.selection import Selection

__all__ = ["Point", "Problem"]


class Problem:
    """An objective and its constraint.

    Parameters
    ----------
    objective : Objective
        :class:`~bcd.Quadratic`, :class:`~bcd.LeastSquares`, :class:`~bcd.Logistic`, :class:`~bcd.Smooth`,
        or any object with the same methods.
    constraint : SumBox, optional
        Default: none.

    Raises
    ------
    ValueError
        If the constraint does not fit the objective's number of coordinates; InfeasibleError (a
        ValueError) if no point satisfies it.

    Examples
    --------
    >>> import numpy as np
    >>> from bcd import Quadratic, SumBox
    >>> Problem(Quadratic(np.eye(3)), SumBox(lower=0, total=1)).n
    3
    """

    def __init__(self, objective: Objective, constraint: SumBox | None = None):
        for needed in ("n", "value", "gradient", "start"):
            if not hasattr(objective, needed):
                raise ValueError(
                    f"objective must have {needed!r}, as bcd.Quadratic has; found {type(objective).__name__}"
                )
        if constraint is not None and not isinstance(constraint, SumBox):
            raise ValueError(f"constraint must be a SumBox; found {type(constraint).__name__}")
        self.objective = objective
        self.constraint = constraint or SumBox()
        self.n = objective.n
        self.feasible: FeasibleSet = self.constraint.bind(self.n)

    @cached_property
    def lipschitz(self) -> float | None:
        """L1 (docs/theory.md), or an upper bound of it; None where the objective knows no curvature."""
        if isinstance(self.objective, Smooth) or self.objective.hessian is None:
            return getattr(self.objective, "lipschitz", None)
        labels = np.empty(0, np.int64) if self.feasible.plain else self.feasible.labels
        bound = self.objective.hessian.lipschitz(labels[: self.n])
        # a slack has no curvature of its own: a pair with it is one coordinate seen in the 1-norm of two
        slacked = np.isin(self.feasible.labels[: self.n], self.feasible.labels[self.n :])
        return max(bound, 0.25 * float(self.objective.hessian.diagonal[slacked].max(initial=0.0)))


class Point:
    """Where the solver is: x with its gradient, slacks last (their gradient is 0).

    Attributes
    ----------
    x : ndarray, shape (N,)
        The same array as ``moves.x``.
    columns : int
        Coordinates moved so far, each counted every time: for a quadratic, columns of its Hessian read.
    """

    def __init__(self, problem: Problem, moves: Moves):
        self.problem, self.x, self._moves, self.columns = problem, moves.x, moves, 0
        self.n = problem.n
        self._state: GradientState = problem.objective.start(self.x[: self.n])
        self._lifted = np.zeros(len(self.x)) if len(self.x) > self.n else None

    @property
    def grad(self) -> np.ndarray:
        """Gradient, shape (N,)."""
        if self._lifted is None:
            return self._state.grad
        self._lifted[: self.n] = self._state.grad
        return self._lifted

    @property
    def value(self) -> float:
        """f(x)."""
        return self._state.value

    @cached_property
    def lipschitz(self) -> float:
        """L1 of the problem; where it knows none, an estimate that an update may change."""
        known = self.problem.lipschitz
        return self._estimate() if known is None else known

    def _estimate(self) -> float:
        """Curvature of a small move along the maximal violating pair; only a start for backtracking."""
        grad, moves = self.grad.copy(), self._moves
        i, j, _ = _compiled.maximal_pair(grad, moves.rise, moves.fall, moves.labels, moves.groups)
        ends = np.array([k for k in (i, j) if 0 <= k < self.n], dtype=np.int64)
        if len(ends) == 0:
            return 1.0
        step = np.where(ends == i, 1.0, -1.0)
        rooms = np.where(ends == i, moves.rise[ends], moves.fall[ends])
        size = min(1e-4 * max(1.0, float(np.abs(self.x).max())), 0.5 * float(rooms.min()))
        slope = self._state.along(ends, step)
        curvature = (slope(size) - slope(0.0)) / size / len(ends) ** 2
        return float(curvature) if curvature > 0 and np.isfinite(curvature) else 1.0

    def adopt(self, grad: np.ndarray) -> None:
        """Take over a gradient that followed x elsewhere."""
        if self._lifted is not None:
            self._state.grad[:] = grad[: self.n]

    @cached_property
    def diagonal(self) -> np.ndarray:
        """Diagonal of the Hessian (bound), shape (N,)."""
        return self._append_zeros(self._hessian().diagonal)

    @cached_property
    def weight(self) -> np.ndarray:
        """``sqrt(L_i)``, kept positive; shape (N,)."""
        return np.sqrt(np.maximum(self.diagonal, 1e-12 * self.diagonal.max(initial=0.0) + np.finfo(float).tiny))

    def column(self, i: int) -> np.ndarray:
        """Column i of the Hessian (bound), shape (N,)."""
        if i >= self.n:
            return np.zeros(len(self.x))
        return self._append_zeros(self._hessian().column(i))

    def block(self, index: np.ndarray) -> np.ndarray:
        """Rows and columns ``index`` of the Hessian (bound)."""
        out = np.zeros((len(index), len(index)))
        real = np.flatnonzero(index < self.n)
        out[np.ix_(real, real)] = self._hessian().block(index[real])
        return out

    def along(self, chosen: Selection) -> Callable[[float], float]:
        """Slope of f along ``chosen.step``, as a function of the multiple taken."""
        return self._state.along(*self._real(chosen))

    def move(self, chosen: Selection) -> None:
        """X has moved; bring the gradient after it."""
        self._state.move(*self._real(chosen))
        self.columns += len(chosen.index)

    def rebuild(self) -> None:
        """Gradient and value anew from x."""
        self._state.rebuild()

    def _real(self, chosen: Selection) -> tuple[np.ndarray, np.ndarray]:
        if self._lifted is None:
            return chosen.index, chosen.step
        real = chosen.index < self.n
        return chosen.index[real], chosen.step[real]

    def _append_zeros(self, a: np.ndarray) -> np.ndarray:
        return a if self._lifted is None else np.concatenate([a, np.zeros(len(self.x) - self.n)])

    def _hessian(self) -> Hessian:
        hessian = self.problem.objective.hessian
        if hessian is None:
            raise ValueError(
                "this rule or update reads second derivatives and the objective has none; "
                'use rule "gs1", "gss", "gs", "random" or "cyclic" with it'
            )
        return hessian
