# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules: which of the moves allowed now promise the most descent, and how far they go.

For ``minimise f(x) subject to sum(x) = s, l <= x <= u`` a rule looks at the gradient ``g``, the rooms
``rise = u - x`` and ``fall = x - l``, and names the coordinates to move. The classical algorithms are
instances of the loop in :mod:`bcd.minimize`:

================================  =======================  ===========================
algorithm                         rule                     update
================================  =======================  ===========================
greedy 2-coordinate descent       ``GS()``                 ``PairStep()``
SMO, maximal violating pair       ``GSs()``                ``PairStep()``
LIBSVM                            ``WSS2()``               ``PairStep()``
steepest descent in the 1-norm    ``GS1()``                ``ModelStep()``
random 2-coordinate descent       ``RandomPair()``         ``PairStep("l2")``
decomposition, working set of q   ``GS1Block(q)``          ``SolveBlock()``
================================  =======================  ===========================

A rule is any object with two methods (state is a value: a rule never changes itself)::

    init(moves, seed) -> state
    select(at, moves, state) -> (Selection, state)

``at`` is the current :class:`bcd.problem.Point` (``grad``, ``lipschitz``, ``diagonal``, ``column(i)``),
``moves`` the :class:`bcd.constraints.Moves` (``rise``, ``fall``, ``labels``).

Rules for blocks of parameters that share a budget (BlockLLM and its kin) are in :mod:`bcd.budget` and can be
imported from here.

Sources: Ramesh, Mishkin, Schmidt, Zhou, Lavington, She (arXiv 2307.01169), sections 2 to 4; Fan, Chen,
Lin (JMLR 6, 2005) for WSS2; Beck (JOTA 162, 2014) for GS-s; Nutini, Laradji, Schmidt (JMLR 23, 2022)
for GS-q and GSL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import array_api_compat
import numpy as np

from bcd import _compiled
from bcd._check import group_labels, groups_message, not_finite
from bcd.budget import (
    BLOCK_RULES,
    BlockRule,
    CyclicBlocks,
    Fill,
    GreedyBlocks,
    ImportanceBlocks,
    RandomBlocks,
    fill_budget,
)

if TYPE_CHECKING:
    from bcd.constraints import Moves
    from bcd.problem import Point

__all__ = [
    "BLOCK_RULES",
    "GS",
    "GS1",
    "GSL",
    "RULES",
    "WSS2",
    "BlockRule",
    "Cyclic",
    "CyclicBlocks",
    "Fill",
    "GS1Block",
    "GSq",
    "GSs",
    "GreedyBlocks",
    "ImportanceBlocks",
    "RandomBlocks",
    "RandomPair",
    "RandomPermutation",
    "Rule",
    "Selection",
    "fill_budget",
    "resolve_rule",
    "steepest_l1",
]


class Selection(NamedTuple):
    """The coordinates to move and, where the rule has a model, how far.

    Attributes
    ----------
    index : ndarray of int64, shape (k,)
        Distinct coordinates. A pair rule names first the coordinate that rises, then the one that falls.
    step : ndarray of float, shape (k,), or None
        Proposed change of each of them; None leaves it to the update.
    """

    index: Any
    step: Any = None


class Rule(Protocol):
    """What :func:`bcd.minimize` asks of a selection rule."""

    def init(self, moves: Moves, seed: int) -> Any:
        """The state before the first selection; ``seed`` is for rules that draw."""

    def select(self, at: Point, moves: Moves, state: Any) -> tuple[Selection, Any]:
        """The next selection, and the state after it."""


def steepest_l1(grad: Any, rise: Any, fall: Any, lipschitz: float, groups: Any = None) -> Selection:
    """Steepest feasible descent in the 1-norm: the GS-1 step.

    Solves ``min <g, d> + lipschitz / 2 ||d||_1^2  subject to  sum(d) = 0, -fall <= d <= rise`` exactly
    (with ``groups``: the sum over every group is 0). Moves mass from the largest gradients that can fall
    to the smallest that can rise until the price of the next unit reaches zero. Ties break by index.

    Parameters
    ----------
    grad : array of float, shape (n,)
        Gradient; NumPy, or any array of an array-API library such as a torch tensor on any device.
    rise, fall : array of float, shape (n,)
        Rooms ``u - x >= 0`` and ``x - l >= 0``; may be inf; same library and device as ``grad``.
    lipschitz : float
        L1 > 0, the Lipschitz constant of the gradient for the 1-norm (docs/theory.md); an RBF kernel
        matrix has L1 <= 1/2.
    groups : array of int, shape (n,), optional
        Label of the sum constraint of each coordinate, 0, 1, ...; negative: in none, so that it moves
        alone. Default: one sum over all coordinates.

    Returns
    -------
    Selection
        ``index`` (int64) in the order of the walk and ``step`` (the dtype of the inputs), on the device of
        ``grad``. A coordinate whose room is used up moves by exactly ``rise`` or ``-fall``. Empty exactly
        where no feasible direction descends.

    Raises
    ------
    ValueError
        If shapes differ, lipschitz is not positive, a room is negative or NaN, or a gradient is not finite.

    Notes
    -----
    NumPy arrays: compiled, O(n + k log n) for k moved coordinates. Other arrays: both ends are sorted on
    their device, and the same compiled walk runs on the few entries it needs, so results are identical.

    Source: arXiv 2307.01169, section 4 (GS-1).

    Examples
    --------
    >>> import numpy as np
    >>> steepest_l1(np.array([3.0, 1.0, -1.0]), np.ones(3), np.ones(3), lipschitz=2.0)
    Selection(index=array([2, 0]), step=array([ 0.5, -0.5]))
    """
    _check_rooms(grad, rise, fall, lipschitz)
    if array_api_compat.is_numpy_array(grad):
        labels, count = group_labels(groups, grad.shape[0])
        index, step, _, _, finite = _compiled.steepest(grad, rise, fall, labels, count, float(lipschitz), 0)
        if not finite:
            raise ValueError(not_finite(grad))
        return Selection(index, step.astype(np.result_type(grad, rise, fall)))
    return _steepest_on_device(grad, rise, fall, float(lipschitz), groups)


def _check_rooms(grad: Any, rise: Any, fall: Any, lipschitz: float) -> None:
    xp = array_api_compat.array_namespace(grad, rise, fall)
    if grad.ndim != 1 or grad.shape != rise.shape or grad.shape != fall.shape:
        raise ValueError(
            "grad, rise and fall must be vectors of one length; "
            f"found shapes {tuple(grad.shape)}, {tuple(rise.shape)} and {tuple(fall.shape)}"
        )
    for name, array in (("grad", grad), ("rise", rise), ("fall", fall)):
        if array.dtype not in (xp.float32, xp.float64):
            raise ValueError(f"{name} must be float32 or float64; found dtype {array.dtype}")
    if not 0 < lipschitz < np.inf:
        raise ValueError(f"lipschitz must be positive and finite; found {lipschitz}")
    for name, room in (("rise", rise), ("fall", fall)):
        if room.shape[0] and not bool(xp.min(room) >= 0):
            raise ValueError(
                f"{name} must be non-negative (a room left before a bound); its minimum is {float(xp.min(room))}"
            )


def _on_host(array: Any) -> np.ndarray:
    """Copy an array of any library and device into NumPy."""
    try:
        return np.array(np.from_dlpack(array))
    except (BufferError, RuntimeError, TypeError):  # it lives on another device
        return np.array(np.from_dlpack(array_api_compat.to_device(array, "cpu")))


def _steepest_on_device(grad: Any, rise: Any, fall: Any, lipschitz: float, groups: Any) -> Selection:
    """steepest_l1 for array-API inputs: sort both ends where they are, walk their beginnings on the host."""
    xp = array_api_compat.array_namespace(grad, rise, fall)
    if not bool(xp.all(xp.isfinite(grad))):
        raise ValueError(not_finite(_on_host(grad)))
    if groups is not None:  # every group has ends of its own: all are walked on the host
        if array_api_compat.is_array_api_obj(groups):
            if not array_api_compat.array_namespace(groups).isdtype(groups.dtype, "integral"):
                raise ValueError(groups_message(grad.shape[0], groups))
            groups = _on_host(groups)
        chosen = steepest_l1(_on_host(grad), _on_host(rise), _on_host(fall), lipschitz, groups)
    else:
        chosen = _walk_prefixes(xp, grad, rise, fall, lipschitz)
    device = array_api_compat.device(grad)
    return Selection(xp.asarray(chosen.index, device=device), xp.asarray(chosen.step, device=device))


def _walk_prefixes(xp: Any, grad: Any, rise: Any, fall: Any, lipschitz: float) -> Selection:
    infinity = xp.full_like(grad, xp.inf)
    ends = [
        xp.argsort(xp.where(rise > 0, grad, infinity), stable=True),
        xp.argsort(xp.where(fall > 0, -grad, infinity), stable=True),
    ]
    sizes = [int(xp.sum(xp.astype(room > 0, xp.int64))) for room in (rise, fall)]
    m = _compiled.FIRST_PREFIX
    while True:
        length = np.array([[min(m, size)] for size in sizes])
        taken = xp.concat([end[: int(k)] for end, k in zip(ends, length[:, 0], strict=True)])
        g, up, down = (_on_host(xp.take(a, taken)) for a in (grad, rise, fall))
        order = np.zeros((2, len(g)), np.int64)  # the first end stands first, then the second
        order[0, : length[0, 0]] = np.arange(length[0, 0])
        order[1, : length[1, 0]] = length[0, 0] + np.arange(length[1, 0])
        whole = length >= np.array(sizes)[:, None]
        start = np.array([0, len(g)])
        index, step, _, _, enough = _compiled.walk(g, up, down, order, start, length, whole, False, lipschitz)
        if enough:
            return Selection(_on_host(taken)[index], step.astype(np.result_type(g, up, down)))
        m *= _compiled.GROW_PREFIX


def _selection(i: int, j: int, mass: float | None = None) -> Selection:
    """A pair (i rises, j falls), or one coordinate where i or j is -1; empty where both are."""
    index = np.array([k for k in (i, j) if k >= 0], dtype=np.int64)
    if mass is None:
        return Selection(index)
    return Selection(index, np.array([mass if k == i else -mass for k in index.tolist()]))


@dataclass(frozen=True)
class GS1:
    """Steepest descent in the 1-norm under the sum and the bounds (GS-1); moves as many as it pays."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """The minimiser of ``<g, d> + lipschitz / 2 ||d||_1^2`` over the feasible directions."""
        index, step, _, _, _ = _compiled.steepest(
            at.grad, moves.rise, moves.fall, moves.labels, moves.groups, at.lipschitz, 0
        )
        return Selection(index, step), state


@dataclass(frozen=True)
class GS1Block:
    """The q coordinates nearest the two ends in the order GS-1 visits them (docs/theory.md).

    Holds every coordinate that GS-1 would move when those are at most q.
    """

    q: int = 256

    def __post_init__(self) -> None:
        if self.q < 2:
            raise ValueError(f"GS1Block(q) must have q >= 2, a pair; found {self.q}")

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """The block, with the GS-1 step (0 elsewhere) if that fits in it and without a step if not."""
        index, step, _, _, _ = _compiled.steepest(
            at.grad, moves.rise, moves.fall, moves.labels, moves.groups, at.lipschitz, self._size(at)
        )
        return Selection(index, np.pad(step, (0, len(index) - len(step))) if len(step) else None), state

    def _size(self, at: Point) -> int:
        """q; without second derivatives nothing can be solved on a block, and 0 asks for the GS-1 step."""
        return 0 if at.problem.objective.hessian is None else self.q


@dataclass(frozen=True)
class GSs:
    """GS-s, the maximal violating pair: the largest gradient that can fall, the smallest that can rise."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """The pair, with the clipped step of the model of constant L2 = 2 lipschitz."""
        i, j, _ = _compiled.maximal_pair(at.grad, moves.rise, moves.fall, moves.labels, moves.groups)
        return _model_step(i, j, at, moves), state


def _model_step(i: int, j: int, at: Point, moves: Moves) -> Selection:
    gap = (at.grad[j] if j >= 0 else 0.0) - (at.grad[i] if i >= 0 else 0.0)
    curvature = (4.0 if i >= 0 and j >= 0 else 1.0) * at.lipschitz
    return _selection(i, j, _compiled.pair_mass(i, j, gap, curvature, moves.rise, moves.fall))


@dataclass(frozen=True)
class GS(GSs):
    """Greedy 2-coordinate rule for a problem without bounds: argmin g rises, argmax g falls."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state; refuses bounds, under which argmax g may have no room."""
        if np.isfinite(moves.lower).any() or np.isfinite(moves.upper).any():
            raise ValueError('rule "gs" ignores bounds, and this problem has some; use "gss" or "gs1"')


@dataclass(frozen=True)
class WSS2:
    """LIBSVM's rule: the smallest gradient that can rise, and against it the best second-order partner."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """I by gradient, then j by ``gap^2 / curvature``, which reads one column of the Hessian."""
        i, j, group = _compiled.maximal_pair(at.grad, moves.rise, moves.fall, moves.labels, moves.groups)
        if group == moves.groups:
            k = _compiled.best_alone(at.grad, moves.rise, moves.fall, moves.labels, at.diagonal)
            return _selection(*((k, -1) if at.grad[k] < 0 else (-1, k))), state
        if i >= 0:
            j = _compiled.partner(at.grad, moves.fall, moves.labels, group, i, at.column(i), at.diagonal)
        return _selection(i, j), state


@dataclass(frozen=True)
class GSq:
    """GS-q: the feasible pair whose step decreases the model of constant L2 most; O(n^2), for reference."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """The pair with its model step."""
        i, j, mass = _compiled.best_model_pair(at.grad, moves.rise, moves.fall, moves.labels, at.lipschitz)
        return _selection(i, j, mass), state


@dataclass(frozen=True)
class GSL:
    """Greedy pair in the norm ``sum_i sqrt(L_i) |d_i|``, found by Dinkelbach's iteration; convex f only."""

    def init(self, moves: Moves, seed: int) -> None:
        """No state."""

    def select(self, at: Point, moves: Moves, state: None) -> tuple[Selection, None]:
        """The pair with its model step ``gap / (w_i + w_j)^2``, clipped to the rooms."""
        i, j, mass, _ = _compiled.dinkelbach_pair(
            at.grad, moves.rise, moves.fall, moves.labels, moves.groups, at.weight
        )
        mass = min(mass, moves.rise[i] if i >= 0 else mass, moves.fall[j] if j >= 0 else mass)
        return _selection(i, j, mass), state


class Drawn(NamedTuple):
    """State of the rules that draw: the stream, and how many pairs were drawn from it."""

    seed: np.uint64
    drawn: int


class _Draws:
    """Shared by the rules that draw pairs without looking at the gradient."""

    _draw: Any

    def init(self, moves: Moves, seed: int) -> Drawn:
        """Draw number 0 of stream ``seed``."""
        return Drawn(np.uint64(seed), 0)

    def select(self, at: Point, moves: Moves, state: Drawn) -> tuple[Selection, Drawn]:
        """The next pair, oriented by its two gradients; empty when it cannot descend."""
        n = len(moves.x)
        order = _compiled.shuffled(~state.seed, state.drawn // n, n)
        a, b = self._draw(state.drawn, state.seed, order, moves.where, moves.start, moves.place)
        i, j = _compiled.orient(a, b, len(moves.labels) > 0 and moves.labels[a] < 0, at.grad)
        chosen = _selection(i, j) if _compiled.can_gain(i, j, at.grad, moves.rise, moves.fall) else _selection(-1, -1)
        return chosen, Drawn(state.seed, state.drawn + 1)


@dataclass(frozen=True)
class Cyclic(_Draws):
    """All pairs in turn."""

    _draw = staticmethod(_compiled.draw_cyclic)


@dataclass(frozen=True)
class RandomPair(_Draws):
    """Uniformly random pairs (within a group)."""

    _draw = staticmethod(_compiled.draw_random)


@dataclass(frozen=True)
class RandomPermutation(_Draws):
    """Coordinates in a fresh random order every epoch, each with a random partner."""

    _draw = staticmethod(_compiled.draw_permuted)


class RuleRow(NamedTuple):
    """One row of the table that ``bcd rules`` prints."""

    rule: Rule
    title: str
    choice: str
    cost: str
    note: str


RULES: dict[str, RuleRow] = {
    "gs1": RuleRow(GS1(), "GS-1", "steepest descent in the 1-norm", "O(n + k log n)", "moves k >= 2 coordinates"),
    "block": RuleRow(GS1Block(), "GS-1 block", "the q first that GS-1 visits", "O(n + q log n)", "compiled solve"),
    "wss2": RuleRow(WSS2(), "WSS2", "i by gradient, j by gap^2 / curvature", "O(n) + a column", "LIBSVM's rule"),
    "gss": RuleRow(GSs(), "GS-s (MVP)", "largest g that can fall, smallest that can rise", "O(n)", "SMO"),
    "gsq": RuleRow(GSq(), "GS-q", "best bounded pair under one constant", "O(n^2)", "for reference"),
    "gsl": RuleRow(GSL(), "GSL", "largest gap / (sqrt(L_i) + sqrt(L_j))", "O(n), a few rounds", "Dinkelbach; convex f"),
    "gs": RuleRow(GS(), "GS", "argmax g, argmin g", "O(n)", "without bounds, where it is GS-1"),
    "random": RuleRow(RandomPair(), "random", "uniform pairs", "O(1)", "baseline"),
    "permutation": RuleRow(RandomPermutation(), "permutation", "random order, new each epoch", "O(1)", "baseline"),
    "cyclic": RuleRow(Cyclic(), "cyclic", "all pairs in turn", "O(1)", "baseline"),
}


def resolve_rule(rule: str | Rule) -> Rule:
    """The rule of a name in :data:`RULES`, or the object itself if it has the methods of a rule."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)} or an object with select(); found {rule!r}")
        return RULES[rule].rule
    if not callable(getattr(rule, "select", None)) or not callable(getattr(rule, "init", None)):
        raise ValueError(f"rule must be a name or an object with init() and select(); found {rule!r}")
    return rule
