# SPDX-License-Identifier: BSD-3-Clause
"""The loop.

    minimise f(x)   subject to   sum(x) = s,   l <= x <= u

    while V(x) > tol:  a rule selects coordinates,  an update says how far,  x and its gradient move

The violation V stops it, after the gradient was rebuilt from x. On an explicit dense Hessian the same
steps are taken many at a time in compiled code (``_burst``), with the same choices up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bcd import _compiled
from bcd._check import as_vector
from bcd._interrupt import interrupts
from bcd.constraints import Moves
from bcd.objectives import DenseHessian, Quadratic
from bcd.problem import Point, Problem
from bcd.result import Result, Status, Trace, certify
from bcd.selection import (
    GS,
    GS1,
    GSL,
    WSS2,
    Cyclic,
    Drawn,
    GS1Block,
    GSq,
    GSs,
    RandomPair,
    RandomPermutation,
    Rule,
    Selection,
    resolve_rule,
)
from bcd.updates import LineSearch, PairStep, UnboundedError, Update, resolve_update

__all__ = ["Progress", "minimize"]

BURST_WORK = 2e7  # coordinates visited in one burst of compiled steps, about 20 ms: Ctrl-C waits no longer
STEP_WORK = 100  # what a step costs besides, in coordinates
MOST_REJECTED = 200  # doublings of the constant without one accepted step
STALLS = 3  # looks in a row without progress before the run is called stagnated


@dataclass(frozen=True)
class Progress:
    """What a callback sees. ``x`` is a copy of the present feasible point, shape (n,), made when asked for."""

    iteration: int
    columns: int
    seconds: float
    objective: float
    violation: float
    _x: np.ndarray

    @property
    def x(self) -> np.ndarray:
        """The present point."""
        return self._x.copy()


def minimize(
    problem: Problem,
    rule: str | Rule = "gs1",
    update: str | Update | None = None,
    x0: Any = None,
    tol: float = 1e-6,
    tol_gap: float | None = None,
    max_iter: int | None = None,
    time_limit: float | None = None,
    callback: Callable[[Progress], Any] | None = None,
    random_state: int | None = None,
    trace: bool = False,
) -> Result:
    """Minimise a smooth function under a sum and bounds by block coordinate descent.

    Parameters
    ----------
    problem : Problem
    rule : str or Rule
        A name from ``bcd.RULES`` (``bcd rules`` prints them) or an object with ``init`` and ``select``.
    update : str or callable, optional
        A name from ``bcd.updates.UPDATES`` or a callable. Default: exact pair steps for pair rules, GS-1
        with exact line search, a compiled solve for blocks, backtracking where no constant is known.
    x0 : array of float, shape (n,), optional
        Start; the closest feasible point to it is taken. Default: the closest to 0.
    tol : float
        Stop when the violation V(x) is at most this (absolute, in units of the gradient, as in LIBSVM).
    tol_gap : float, optional
        Besides, the Frank-Wolfe gap, a bound on f(x) - f* for convex f, must be at most this.
        ``tol=inf`` leaves the decision to the gap alone.
    max_iter : int, optional
        Steps at most.
    time_limit : float, optional
        Seconds at most.
    callback : callable, optional
        Called with a :class:`Progress` before every step (compiled rules: before every burst of steps);
        a true return value stops the run.
    random_state : int, optional
        Seed of the rules that draw. Default 0: runs repeat exactly.
    trace : bool
        Record iterations, columns, seconds, objective, violation and gap along the way.

    Returns
    -------
    Result
        Always with a feasible point, the last one: the best wherever no step raises f, as with every
        update here given a valid constant. ``result.status.value`` says why it stopped.
        Ctrl-C ends the run with status INTERRUPTED (a second one raises KeyboardInterrupt).

    Raises
    ------
    ValueError
        For arguments that do not fit, naming the argument.

    Examples
    --------
    >>> import numpy as np, bcd
    >>> problem = bcd.Problem(bcd.Quadratic(np.diag([1.0, 2.0, 4.0])), bcd.SumBox(lower=0, total=7))
    >>> bcd.minimize(problem, tol=1e-10).x.round(6)
    array([4., 2., 1.])
    """
    if not isinstance(problem, Problem):
        raise ValueError(f"problem must be a bcd.Problem; found {type(problem).__name__}")
    rule = resolve_rule(rule)
    update = resolve_update(update, rule, problem)
    _check_limits(tol, tol_gap, max_iter, time_limit, callback)
    with interrupts() as interrupted:  # compilation included
        moves = Moves(problem.feasible, problem.feasible.project(_start_point(problem, x0)))
        at = Point(problem, moves)
        state = rule.init(moves, _seed(random_state))
        burst = _burst(rule, update, problem)
        if problem.objective.hessian is not None and isinstance(rule, GS1 | GS1Block | GSq):
            _ = at.lipschitz  # a property of the problem, computed once: before the clock starts, as is compilation
        moves.violation(at.grad)
        if burst is not None:
            burst(at, moves, state, _Watch(at, moves, np.inf, None, 0, None, None, False))
        watch = _Watch(at, moves, tol, tol_gap, max_iter, time_limit, callback, trace)
        # a rule without a state depends on the point alone; one with a state may have to go through all pairs
        watch.window = max(1000, 10 * len(moves.x) if state is None else len(moves.x) ** 2)
        while (status := watch.verdict(interrupted)) is None:
            try:
                if burst is not None:
                    state = burst(at, moves, state, watch)
                    continue
                chosen, after = rule.select(at, moves, state)
                step = update(at, chosen, moves) if len(chosen.index) else Selection(chosen.index, np.zeros(0))
                if step is None:  # at.lipschitz was too small and has been raised
                    watch.rejected += 1
                else:
                    watch.carry_out(step, repeats=after is state)
                state = after
            except UnboundedError as unbounded:
                return watch.result(Status.UNBOUNDED, unbounded.chosen)
    return watch.result(status)


def _start_point(problem: Problem, x0: Any) -> np.ndarray:
    if x0 is None:
        return np.zeros(problem.n)
    return as_vector("x0", x0, problem.n)


def _seed(random_state: int | None) -> int:
    if random_state is not None and not isinstance(random_state, int | np.integer):
        raise ValueError(f"random_state must be an integer or None; found {random_state!r}")
    return 0 if random_state is None else int(random_state) % 2**63


def _check_limits(
    tol: float, tol_gap: float | None, max_iter: int | None, time_limit: float | None, callback: Any
) -> None:
    for name, value in (("tol", tol), ("tol_gap", tol_gap), ("max_iter", max_iter), ("time_limit", time_limit)):
        if value is not None and (not isinstance(value, int | float | np.number) or not value >= 0):
            raise ValueError(f"{name} must be a non-negative number; found {value!r}")
    if max_iter is not None and max_iter % 1 != 0:
        raise ValueError(f"max_iter must be an integer; found {max_iter}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be callable; found {callback!r}")


class _Watch:
    """Looks at the run between two steps: has it converged, met a limit, stalled? Keeps the trace."""

    def __init__(
        self,
        at: Point,
        moves: Moves,
        tol: float,
        tol_gap: float | None,
        max_iter: int | None,
        time_limit: float | None,
        callback: Callable[[Progress], Any] | None,
        trace: bool,
    ):
        self.at, self.moves, self.tol, self.tol_gap = at, moves, tol, tol_gap
        self.max_iter = np.inf if max_iter is None else max_iter
        self.time_limit = np.inf if time_limit is None else time_limit
        self.callback, self.trace = callback, Trace() if trace else None
        self.started, self.recording = time.perf_counter(), 0.0
        self.steps = 0
        self.undo: tuple[Any, np.ndarray] | None = None  # what the last step replaced: (where, old values)
        self.stuck = False  # nothing moved, and the rule would choose the same again
        self.next_gap = self.next_trace = self.next_check = 0
        self.best_violation, self.last_value, self.stalls = np.inf, np.inf, 0
        self.rejected = 0  # steps in a row that the update did not accept
        self.window = 0  # steps within which there must be progress

    def verdict(self, interrupted: list[bool]) -> Status | None:
        """Why to stop now, or None to go on."""
        violation = self.moves.violation(self.at.grad)
        if np.isnan(violation):
            return self._retreat()
        if violation <= self.tol and self._certified():
            self._record(self.moves.violation(self.at.grad), last=True)
            return Status.CONVERGED
        self._record(violation)
        if interrupted:
            return Status.INTERRUPTED
        if self.steps >= self.max_iter:
            return Status.ITERATION_LIMIT
        if self.seconds >= self.time_limit:
            return Status.TIME_LIMIT
        if self._stalled(violation):
            return Status.STAGNATED if np.isfinite(self.at.value) else Status.NOT_FINITE
        if self.callback is not None and self.callback(self._progress(violation)):
            return Status.CALLBACK
        return None

    @property
    def seconds(self) -> float:
        """Since the start, without the time spent on the trace."""
        return time.perf_counter() - self.started - self.recording

    def carry_out(self, step: Selection, repeats: bool) -> None:
        """Move x and its gradient by one step."""
        self.rejected = 0
        self.undo = step.index, self.moves.x[step.index].copy()
        changed = self.moves.shift(step)
        self.at.move(step)
        self.steps += 1
        self.stuck = repeats and changed == 0

    def took(self, steps: int, columns: int, grad: np.ndarray, stuck: bool) -> None:
        """A compiled loop has moved x and ``grad`` by this many steps."""
        self.at.adopt(grad)
        self.at.columns += columns
        self.steps += steps
        self.stuck = stuck

    def burst_length(self, work: float) -> int:
        """How many compiled steps of ``work`` coordinates each may be taken before the next look."""
        most = int(min(max(1.0, BURST_WORK / (STEP_WORK + work)), self.max_iter - self.steps))
        if self.trace is None and self.callback is None and self.tol_gap is None:
            return most
        return min(most, 1 + self.steps // 32)

    def result(self, status: Status, ray: Selection | None = None) -> Result:
        """The present point with its certificate."""
        n, seconds = self.at.n, self.seconds
        self.moves.settle()
        x = self.moves.x[:n].copy()
        direction = None
        if ray is not None:
            direction = np.zeros(len(self.moves.x))
            direction[ray.index] = ray.step
        return Result(
            x=x,
            certificate=certify(self.at.problem, x),
            iterations=self.steps,
            columns=self.at.columns,
            seconds=seconds,
            status=status,
            trace=self.trace,
            ray=None if direction is None else direction[:n],
        )

    def _certified(self) -> bool:
        """Whether the tolerances hold for the gradient rebuilt from x."""
        if self.steps < self.next_gap:
            return False
        self.moves.settle()
        self.at.rebuild()
        if self.moves.violation(self.at.grad) > self.tol:
            return False
        if self.tol_gap is None or self.moves.gap(self.at.grad) <= self.tol_gap:
            return True
        self.next_gap = self.steps + 1 + self.steps // 16
        return False

    def _retreat(self) -> Status:
        """Take the last step back: it led to a gradient that is not finite."""
        if self.undo is None:
            where = np.argmin(np.isfinite(self.at.grad))
            raise ValueError(f"the gradient must be finite at the start; entry {where} is {self.at.grad[where]}")
        where, old = self.undo
        x = self.moves.x.copy()
        x[where] = old
        self.moves.place_at(x)
        return Status.NOT_FINITE

    def _stalled(self, violation: float) -> bool:
        """Whether rounding is all that still changes."""
        value_matters = self.steps >= self.next_check
        if self.rejected > MOST_REJECTED:
            return True
        if not self.stuck and not value_matters:
            return False
        self.moves.settle()
        self.at.rebuild()  # what a gradient has drifted would look like progress
        violation, value = self.moves.violation(self.at.grad), self.at.value
        better = violation < 0.99 * self.best_violation or value < self.last_value - 4 * _compiled.EPS * abs(value)
        self.best_violation = min(self.best_violation, violation)
        self.last_value = min(self.last_value, value)
        self.next_check = self.steps + self.window
        self.stalls = 0 if better and not self.stuck else self.stalls + 1
        self.stuck = False
        return self.stalls >= STALLS

    def _progress(self, violation: float) -> Progress:
        return Progress(self.steps, self.at.columns, self.seconds, self.at.value, violation, self.moves.x[: self.at.n])

    def _record(self, violation: float, last: bool = False) -> None:
        if self.trace is None or (self.steps < self.next_trace and not last):
            return
        self.next_trace = self.steps + 1 + self.steps // 64
        seconds = self.seconds
        row = (
            self.steps, self.at.columns, seconds, self.at.value, violation, self.moves.gap(self.at.grad)
        )  # fmt: skip
        for column, entry in zip(vars(self.trace).values(), row, strict=True):
            column.append(entry)
        self.recording += self.seconds - seconds


Burst = Callable[[Point, Moves, Any, _Watch], Any]

_GREEDY: dict[type, int] = {
    GS: _compiled.MAXIMAL,
    GSs: _compiled.MAXIMAL,
    WSS2: _compiled.SECOND_ORDER,
    GSq: _compiled.MODEL,
    GSL: _compiled.WEIGHTED,
}
_DRAWN: dict[type, int] = {
    Cyclic: _compiled.CYCLIC,
    RandomPair: _compiled.RANDOM,
    RandomPermutation: _compiled.PERMUTED,
}


def _burst(rule: Rule, update: Update, problem: Problem) -> Burst | None:
    """The compiled loop that takes the same steps as rule and update, if there is one."""
    kind, objective = type(rule), problem.objective
    if not isinstance(objective, Quadratic) or not isinstance(objective.hessian, DenseHessian):
        return None
    if update != (LineSearch() if kind is GS1 else PairStep()):
        return None
    Q = objective.hessian.matrix
    if kind in _DRAWN:
        return _drawn_burst(_DRAWN[kind], Q)
    return _greedy_burst(rule, update, Q) if kind in _GREEDY or kind is GS1 else None


def _greedy_burst(rule: Rule, update: Update, Q: np.ndarray) -> Burst:
    work = Q.shape[0] if isinstance(rule, GSq) else 1

    def run(at: Point, moves: Moves, state: Any, watch: _Watch) -> Any:
        """A burst of compiled steps from this point."""
        grad, tol = at.grad, watch.tol if watch.tol_gap is None else 0.0
        watch.undo = slice(None), moves.x.copy()
        room = (grad, moves.x, moves.rise, moves.fall, moves.lower, moves.upper, moves.labels, moves.groups)
        most = watch.burst_length(work * len(moves.x))
        if isinstance(rule, WSS2) and len(moves.labels) == 0:
            steps, ended = _compiled.pair_steps(Q, *room[:6], at.diagonal, tol, most)
            columns = 2 * steps
        elif isinstance(rule, GS1):
            steps, columns, ended = _compiled.steepest_loop(Q, at.lipschitz, *room, tol, most)
        else:
            weight = at.weight if isinstance(rule, GSL) else at.diagonal
            lipschitz = at.lipschitz if isinstance(rule, GSq) else 0.0
            steps, columns, ended = _compiled.greedy_loop(
                _GREEDY[type(rule)], Q, at.diagonal, weight, lipschitz, *room, tol, most
            )
        watch.took(steps, columns, grad, stuck=ended == _compiled.STUCK or steps == 0)
        if ended in (_compiled.FLAT, _compiled.CONCAVE):  # the update raises what is to be said
            step = update(at, rule.select(at, moves, state)[0], moves)
            assert step is not None  # pair steps and line searches are never rejected
            watch.carry_out(step, repeats=True)
        return state

    return run


def _drawn_burst(kind: int, Q: np.ndarray) -> Burst:
    def run(at: Point, moves: Moves, state: Drawn, watch: _Watch) -> Drawn:
        """A burst of compiled steps from this point, by drawn pairs."""
        grad, alone = at.grad, len(moves.labels) > 0 and moves.start[-1] > moves.start[-2]
        watch.undo = slice(None), moves.x.copy()
        room = (grad, moves.x, moves.rise, moves.fall, moves.lower, moves.upper, moves.where, moves.start, moves.place)
        # draws do not look at the violation: stop to do so before many more were made than it took
        most = min(watch.burst_length(len(moves.x)), max(len(moves.x), watch.steps // 32))
        draws, columns, ended, pair = _compiled.drawn_loop(
            kind, Q, at.diagonal, *room, alone, state.drawn, state.seed, most
        )
        watch.took(draws, columns, grad, stuck=False)
        if ended != _compiled.RAN:  # the update raises what is to be said
            PairStep()(at, Selection(pair[pair >= 0]), moves)
        return Drawn(state.seed, state.drawn + draws)

    return run
