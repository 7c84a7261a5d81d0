# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules for blocks that cost something, under a budget: the knapsack side of :mod:`bcd.selection`.

Given scores ``s_b`` (how much descent block b promises), costs ``n_b`` (its parameters) and a budget B, a rule puts
the blocks in an order, and :func:`fill_budget` walks that order and takes what fits. For a single block this is
steepest descent in a sum of block norms; filling a budget with several is the greedy heuristic of the knapsack
problem, not its optimum (docs/theory.md).

==============  ===========================================  ==================================
rule            order of the walk                            known as
==============  ===========================================  ==================================
``greedy``      score over visit frequency, largest first    BlockLLM (arXiv 2406.17296)
``cyclic``      round and round                              BAdam (arXiv 2404.02827)
``random``      new at every selection                       LISA (arXiv 2403.17919)
``half``        the same, at most half of everything         HFT (arXiv 2404.18466)
``importance``  drawn in proportion to exp(average score)    MISA
==============  ===========================================  ==================================

A rule is any object with the attribute ``scored`` (whether it reads scores) and two methods; state is a value made
of whole numbers and arrays, so that it can be saved::

    init(cost, seed) -> state
    select(score, cost, budget, state, divisible) -> (Fill, state)

Arrays may be NumPy's or those of any array-API library, torch's on any device included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import array_api_compat
import numpy as np

__all__ = [
    "BLOCK_RULES",
    "BlockRule",
    "CyclicBlocks",
    "Fill",
    "GreedyBlocks",
    "ImportanceBlocks",
    "RandomBlocks",
    "fill_budget",
]


class Fill(NamedTuple):
    """The blocks that a budget was spent on.

    Attributes
    ----------
    index : array of int64, shape (k,)
        Distinct blocks in the order of the walk.
    amount : array of int64, shape (k,)
        What was spent on each: its cost, or less for the last one, if that was divisible.
    """

    index: Any
    amount: Any


class BlockRule(Protocol):
    """What fills a budget: see the head of this module."""

    @property
    def scored(self) -> bool:
        """Whether it reads scores."""

    def init(self, cost: Any, seed: int) -> Any:
        """The state before the first selection."""

    def select(self, score: Any, cost: Any, budget: int, state: Any, divisible: Any = None) -> tuple[Fill, Any]:
        """The next blocks and the state after them; ``score`` means nothing to a rule that is not ``scored``."""


def fill_budget(score: Any, cost: Any, budget: int, divisible: Any = None) -> Fill:
    """Walk the blocks from the largest score down and take each one that still fits the budget.

    Parameters
    ----------
    score : array of float, shape (n,)
        Ties are broken by index. May be infinite (inf: first, -inf: last), not NaN.
    cost : array of int64, shape (n,)
        Positive; same library and device as ``score``.
    budget : int
        Never exceeded, and never under-filled by a block that fits.
    divisible : array of bool, shape (n,), optional
        Blocks of which a part may be taken: the first of the walk that does not fit whole takes all that is left.
        Default: none, and a block that does not fit is passed over.

    Returns
    -------
    Fill
        Empty where nothing fits.

    Raises
    ------
    ValueError
        If shapes differ, a score is NaN or a cost is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> fill_budget(np.array([3.0, 9.0, 5.0]), np.array([2, 4, 4]), 7)
    Fill(index=array([1, 0]), amount=array([4, 2]))
    >>> fill_budget(np.array([3.0, 9.0, 5.0]), np.array([2, 4, 4]), 7, np.array([True, True, True]))
    Fill(index=array([1, 2]), amount=array([4, 3]))
    """
    xp = _checked(score, cost)
    left = xp.argsort(-score, stable=True)
    room, part, taken = int(budget), 0, [left[:0]]
    while left.shape[0] and room > 0:
        total = xp.cumulative_sum(xp.take(cost, left))
        fits = int(xp.sum(xp.astype(total <= room, xp.int64)))
        taken.append(left[:fits])
        room -= int(total[fits - 1]) if fits else 0
        if fits == left.shape[0]:
            break
        if room > 0 and divisible is not None and bool(divisible[int(left[fits])]):
            taken.append(left[fits : fits + 1])
            room, part = 0, room
        left = left[fits + 1 :]
        useful = xp.take(cost, left) <= room
        left = left[useful if divisible is None else useful | xp.take(divisible, left)]
    index = xp.concat(taken)
    amount = xp.take(cost, index)
    if part:
        amount = xp.concat([amount[:-1], xp.full_like(amount[-1:], part)])
    return Fill(index, amount)


def _checked(score: Any, cost: Any) -> Any:
    """The namespace of both, after a look at what was passed."""
    xp = array_api_compat.array_namespace(score, cost)
    if score.ndim != 1 or score.shape != cost.shape:
        raise ValueError(
            f"score and cost must be vectors of one length; found shapes {tuple(score.shape)} and {tuple(cost.shape)}"
        )
    if cost.dtype != xp.int64:
        raise ValueError(f"cost must be int64, whole numbers of parameters; found dtype {cost.dtype}")
    if cost.shape[0] and not bool(xp.min(cost) > 0):
        raise ValueError(f"cost must be positive; its minimum is {int(xp.min(cost))}")
    if bool(xp.any(xp.isnan(score))):
        first = int(xp.argmax(xp.astype(xp.isnan(score), xp.int64)))
        raise ValueError(f"score must not be NaN; score[{first}] is")
    return xp


def _member(index: Any, n: int) -> Any:
    """Bool of shape (n,): which of 0, ..., n - 1 occur in ``index`` (distinct)."""
    xp = array_api_compat.array_namespace(index)
    every = xp.arange(n, dtype=xp.int64, device=array_api_compat.device(index))
    ordered = xp.concat([xp.sort(index), every[:1] + n])
    return xp.take(ordered, xp.searchsorted(ordered, every)) == every


class Visits(NamedTuple):
    """State of the greedy rule: how often each block was taken, in how many selections."""

    visits: Any
    selections: int


@dataclass(frozen=True)
class GreedyBlocks:
    """Score over visit frequency, largest first: BlockLLM's choice.

    The frequency is ``(visits + 1) / (selections + 1)``, positive from the start.

    Attributes
    ----------
    power : float
        The score is divided by the frequency to this power; 0: visits do not matter.
    per_parameter : bool
        Divide the score, a norm, by the root of the cost as well: then blocks are walked by their root mean square,
        which makes the squared norms taken in large for the budget.
    """

    power: float = 1.0
    per_parameter: bool = False
    scored: ClassVar[bool] = True

    def init(self, cost: Any, seed: int) -> Visits:
        """Nothing was visited."""
        return Visits(array_api_compat.array_namespace(cost).zeros_like(cost), 0)

    def priority(self, score: Any, cost: Any, state: Visits) -> Any:
        """What the walk sorts by; falls as visits rise."""
        xp = array_api_compat.array_namespace(score, cost)
        frequency = xp.astype(state.visits + 1, score.dtype) / (state.selections + 1)
        weighted = score / frequency**self.power
        return weighted / xp.astype(cost, score.dtype) ** 0.5 if self.per_parameter else weighted

    def select(self, score: Any, cost: Any, budget: int, state: Visits, divisible: Any = None) -> tuple[Fill, Visits]:
        """Fill by priority and count a visit of every block that was taken, in part or whole."""
        xp = array_api_compat.array_namespace(score, cost)
        chosen = fill_budget(self.priority(score, cost, state), cost, budget, divisible)
        hits = xp.astype(_member(chosen.index, cost.shape[0]), xp.int64)
        return chosen, Visits(state.visits + hits, state.selections + 1)


class Cursor(NamedTuple):
    """State of the cyclic rule: the block whose turn it is."""

    turn: int


@dataclass(frozen=True)
class CyclicBlocks:
    """Round and round, each turn going on where the one before ended; smaller blocks may fill what is left."""

    descending: bool = False
    scored: ClassVar[bool] = False

    def init(self, cost: Any, seed: int) -> Cursor:
        """Begin at the first block, or at the last if descending."""
        return Cursor(cost.shape[0] - 1 if self.descending else 0)

    def select(self, score: Any, cost: Any, budget: int, state: Cursor, divisible: Any = None) -> tuple[Fill, Cursor]:
        """Fill in the order of the cycle; the next turn is that of the first block left out that could fit alone."""
        xp = array_api_compat.array_namespace(cost)
        n = cost.shape[0]
        place = xp.arange(n, dtype=xp.int64, device=array_api_compat.device(cost))
        distance = (state.turn - place if self.descending else place - state.turn) % n
        chosen = fill_budget(-xp.astype(distance, xp.float64), cost, budget, divisible)
        waits = ~_member(chosen.index, n) & (cost <= budget if divisible is None else (cost <= budget) | divisible)
        nearest = xp.where(waits, distance, xp.full_like(distance, n))
        return chosen, Cursor(int(xp.argmin(nearest)) if bool(xp.any(waits)) else state.turn)


class Draws(NamedTuple):
    """State of the random rule: selection number ``drawn`` has a stream of its own."""

    seed: int
    drawn: int

    def stream(self) -> np.random.Generator:
        """The generator of this selection."""
        return np.random.default_rng((self.seed, self.drawn))


@dataclass(frozen=True)
class RandomBlocks:
    """Uniformly random order, new at every selection; at most ``share`` of all cost whatever the budget."""

    share: float = 1.0
    scored: ClassVar[bool] = False

    def init(self, cost: Any, seed: int) -> Draws:
        """Nothing was drawn."""
        return Draws(seed, 0)

    def select(self, score: Any, cost: Any, budget: int, state: Draws, divisible: Any = None) -> tuple[Fill, Draws]:
        """Fill in a random order."""
        xp = array_api_compat.array_namespace(cost)
        order = xp.asarray(state.stream().random(cost.shape[0]), device=array_api_compat.device(cost))
        most = min(budget, int(self.share * int(xp.sum(cost))))
        return fill_budget(order, cost, most, divisible), Draws(state.seed, state.drawn + 1)


class Averages(NamedTuple):
    """State of the importance rule: average scores, and how often it drew."""

    average: Any
    seed: int
    drawn: int


@dataclass(frozen=True)
class ImportanceBlocks:
    """Blocks drawn without replacement with probability in proportion to exp(sharpness x average score / mean).

    Attributes
    ----------
    decay : float
        Of the moving average of scores; the first scores start it.
    sharpness : float
        0: uniform; large: greedy.
    """

    decay: float = 0.9
    sharpness: float = 1.0
    scored: ClassVar[bool] = True

    def init(self, cost: Any, seed: int) -> Averages:
        """No scores were seen."""
        xp = array_api_compat.array_namespace(cost)
        return Averages(xp.zeros_like(cost, dtype=xp.float32), seed, 0)

    def select(
        self, score: Any, cost: Any, budget: int, state: Averages, divisible: Any = None
    ) -> tuple[Fill, Averages]:
        """Fill by average score plus Gumbel noise, which is a draw from the softmax without replacement."""
        xp = array_api_compat.array_namespace(score, cost)
        decay = self.decay if state.drawn else 0.0
        average = decay * state.average + (1 - decay) * xp.astype(score, xp.float32)
        noise = Draws(state.seed, state.drawn).stream().gumbel(size=cost.shape[0]).astype(np.float32)
        scale = float(xp.mean(average)) or 1.0
        key = self.sharpness * average / scale + xp.asarray(noise, device=array_api_compat.device(cost))
        return fill_budget(key, cost, budget, divisible), Averages(average, state.seed, state.drawn + 1)


BLOCK_RULES: dict[str, BlockRule] = {
    "greedy": GreedyBlocks(),
    "cyclic": CyclicBlocks(),
    "random": RandomBlocks(),
    "half": RandomBlocks(share=0.5),
    "importance": ImportanceBlocks(),
}
