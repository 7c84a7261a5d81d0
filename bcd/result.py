# SPDX-License-Identifier: BSD-3-Clause
"""Answers that carry their own proof: status, certificates, result.

Everything in a :class:`Certificate` is computed from the problem and x alone (docs/theory.md):

* violation V(x), 0 exactly at a KKT point;
* Frank-Wolfe gap ``max over feasible v of <g, x - v>``, for convex f a bound on ``f(x) - f*``;
* multipliers y (one a sum) and z (one a coordinate) with ``g + y[sum of i] + z_i = 0`` where x is optimal:
  ``z_i >= 0`` at the upper bound, ``z_i <= 0`` at the lower one, 0 between. Raising the total by a unit
  changes the optimal value by -y.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcd import _compiled
from bcd.constraints import FeasibleSet, Moves
from bcd.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Certificate", "Result", "Status", "Trace", "certify"]


class Status(enum.Enum):
    """Why the solver stopped; the value is the sentence the user reads."""

    CONVERGED = "Converged: every tolerance asked for is met."
    ITERATION_LIMIT = "Stopped at max_iter with the best point so far; allow more, or go on from x0=result.x."
    TIME_LIMIT = "Stopped at time_limit with the best point so far; allow more, or go on from x0=result.x."
    INTERRUPTED = "Interrupted; the best point so far is kept: go on from x0=result.x."
    CALLBACK = "Stopped by the callback with the best point so far."
    STAGNATED = "No further progress in this precision; the point is as good as rounding allows: use a larger tol."
    UNBOUNDED = "The objective falls without end along result.ray; add bounds, or check the signs."
    NOT_FINITE = (
        "The objective or its gradient became NaN or infinite; the last good point is kept: check the functions there."
    )

    @property
    def ok(self) -> bool:
        """Whether the tolerances asked for were met."""
        return self is Status.CONVERGED


@dataclass(frozen=True)
class Certificate:
    """What can be said of a point, from the problem alone.

    Attributes
    ----------
    objective : float
        f(x).
    violation : float
        V(x); inf if x is not feasible.
    gap : float
        Frank-Wolfe gap; inf if the feasible set is unbounded in a descent direction or x is not feasible.
    infeasibility : float
        Largest amount by which x misses a bound or a total; rounding of a sum counts as 0.
    total_multipliers : ndarray, shape (m,)
        y, one for each sum (0 for an open total).
    bound_multipliers : ndarray, shape (n,)
        z.
    """

    objective: float
    violation: float
    gap: float
    infeasibility: float
    total_multipliers: np.ndarray
    bound_multipliers: np.ndarray


def certify(problem: Problem, x: Any) -> Certificate:
    """Compute objective, violation, gap and multipliers of x from the problem.

    Parameters
    ----------
    problem : Problem
    x : array of float, shape (n,)

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        If x has the wrong shape or is not finite.

    Examples
    --------
    >>> from bcd import Problem, Quadratic, SumBox
    >>> problem = Problem(Quadratic(np.eye(2)), SumBox(lower=0, total=1))
    >>> certify(problem, [0.5, 0.5]).gap
    0.0
    >>> certify(problem, [1.0, 0.0]).violation
    1.0
    """
    x = np.array(x, dtype=np.float64)
    if x.shape != (problem.n,) or not np.isfinite(x).all():
        raise ValueError(f"x must be finite with shape ({problem.n},); found shape {x.shape} and {x.dtype}")
    return certificate_at(problem.feasible, x, problem.objective.value(x), problem.objective.gradient(x))


def certificate_at(feasible: FeasibleSet, x: np.ndarray, value: float, gradient: np.ndarray) -> Certificate:
    """The same from f(x) and its gradient, each of which must have been computed from the problem and x alone."""
    miss = _infeasibility(feasible, x)
    moves = Moves(feasible, x, settle=False)
    grad = np.zeros(len(moves.x))
    grad[: feasible.n] = gradient
    total, bound = _multipliers(moves, grad)
    lost = miss > 0 or not np.isfinite(grad).all()
    return Certificate(
        objective=value,
        violation=np.inf if lost else moves.violation(grad),
        gap=np.inf if lost else moves.gap(grad),
        infeasibility=miss,
        total_multipliers=total,
        bound_multipliers=bound,
    )


def _infeasibility(feasible: FeasibleSet, x: np.ndarray) -> float:
    n = feasible.n
    worst = max(0.0, float((feasible.lower[:n] - x).max()), float((x - feasible.upper[:n]).max()))
    for s, (lo, hi) in enumerate(feasible.ranges):
        member = feasible.members(s)
        value = _compiled.exact_sum(x[member[member < n]])
        slop = feasible.rounding(s) + 4 * _compiled.EPS * float(np.abs(x[member[member < n]]).sum())
        off = max(lo - value, value - hi)
        worst = max(worst, off if off > slop else 0.0)
    return worst


def _multipliers(moves: Moves, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    feasible, n = moves.feasible, moves.feasible.n
    i, j = _compiled.violating_ends(grad, moves.rise, moves.fall, moves.labels, moves.groups)
    y = np.zeros(moves.groups)
    for s in range(moves.groups):
        ends = [grad[k] for k in (i[s], j[s]) if k >= 0]
        y[s] = -np.mean(ends) if ends else 0.0
    labels = feasible.labels[:n]
    reduced = grad[:n] + np.where(labels >= 0, y[labels] if len(y) else 0.0, 0.0)
    at_upper, at_lower = (room[:n] == 0 for room in (moves.rise, moves.fall))
    z = np.where(at_upper & (reduced < 0), -reduced, 0.0) + np.where(at_lower & (reduced > 0), -reduced, 0.0)
    return feasible.as_given(y), z


@dataclass
class Trace:
    """Progress of a run, one entry a look; looks grow rarer as the run grows longer."""

    iteration: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    violation: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.iteration)


@dataclass
class Result:
    """What :func:`bcd.minimize` returns.

    Attributes
    ----------
    x : ndarray, shape (n,)
        The last feasible point; the best one wherever no step raised f.
    objective, violation, gap : float
        f(x), V(x) and the Frank-Wolfe gap, recomputed from the problem by :func:`certify`.
    total_multipliers : ndarray, shape (m,)
    bound_multipliers : ndarray, shape (n,)
        Signs: see :mod:`bcd.result`.
    iterations, columns : int
        Steps taken (for rules that draw: pairs drawn), and coordinates moved in all of them.
    seconds : float
        Wall-clock time of the steps, without compilation, the constant L1, and the trace.
    status : Status
        Why it stopped; ``status.value`` is a sentence.
    trace : Trace or None
        If asked for.
    ray : ndarray, shape (n,), or None
        With status UNBOUNDED, the direction along which f falls without end.
    """

    x: np.ndarray
    certificate: Certificate
    iterations: int
    columns: int
    seconds: float
    status: Status
    trace: Trace | None = None
    ray: np.ndarray | None = None

    @property
    def objective(self) -> float:
        """f(x)."""
        return self.certificate.objective

    @property
    def violation(self) -> float:
        """V(x)."""
        return self.certificate.violation

    @property
    def gap(self) -> float:
        """Frank-Wolfe gap."""
        return self.certificate.gap

    @property
    def total_multipliers(self) -> np.ndarray:
        """Y."""
        return self.certificate.total_multipliers

    @property
    def bound_multipliers(self) -> np.ndarray:
        """Z."""
        return self.certificate.bound_multipliers

    def __str__(self) -> str:
        rows = [
            ("status", self.status.name.lower().replace("_", " ")),
            ("objective", f"{self.objective:.10g}"),
            ("violation", f"{self.violation:.3g}"),
            ("gap (f - f* is at most)", f"{self.gap:.3g}"),
            ("iterations", f"{self.iterations:,}"),
            ("columns", f"{self.columns:,}"),
            ("seconds", f"{self.seconds:.3g}"),
            ("coordinates", f"{len(self.x):,}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows) + f"\n{self.status.value}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the trace, as plain Python values, for JSON."""
        plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in asdict(self.certificate).items()}
        plain |= {"iterations": self.iterations, "columns": self.columns, "seconds": self.seconds}
        plain |= {"status": self.status.name.lower(), "message": self.status.value, "x": self.x.tolist()}
        return plain | ({} if self.ray is None else {"ray": self.ray.tolist()})

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw violation and gap against iterations and columns.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.

        Raises
        ------
        ValueError
            If the run kept no trace.
        """
        from bcd.pictures import plot_traces

        if self.trace is None:
            raise ValueError("this result has no trace; call minimize(..., trace=True)")
        return plot_traces({"violation": self.trace}, path, gap=True)
