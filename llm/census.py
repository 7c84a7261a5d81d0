# SPDX-License-Identifier: BSD-3-Clause
"""Scores of all blocks from one backward pass without ever holding the whole gradient.

For a slice b with gradient g_b the census stores ``||G~_b||^2``, where G~ is the gradient itself (``score="grad"``)
or Adam's direction (``score="adam"``): ``m^ / (sqrt(v^) + eps)`` where there are moments, else ``g / (|g| + eps)``.
With ``score="l1"`` it stores ``||g_b||_1``: what a step of length 1 in the max-norm promises, and Adam's steps are
nearly of one length in every entry. A post-accumulate hook hands in one tensor's gradient at a time and frees it
afterwards.

For single entries it also stores a histogram of |G~| per tensor. A bin holds the floats that agree in sign, exponent
and four bits of the fraction, so that bins are log-spaced (1/16 apart) and their numbers are ordered like the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm.adam import Hyper, first_direction
from llm.blocks import Blocks
from llm.compact import Part
from llm.moments import CHUNK, Cohort, active_directions

__all__ = ["BINS", "Census", "entry_counts"]

BINS = 1 << 12
_SHIFT = 19  # 8 bits of exponent and 4 of the fraction are left of a float32 without its sign
PROBED = 8  # census="probe": one in so many inactive tensors has its turn
AGEING = 0.9  # factor on a score for every census in which its tensor had no turn


def _bins(size: Tensor) -> Tensor:
    """How many of these non-negative values fall in each bin, int64 of shape (BINS,)."""
    codes = size.float().contiguous().view(torch.int32) >> _SHIFT
    return torch.bincount(codes, minlength=BINS)[:BINS]


def _pieces(size: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` entries into runs of whole slices, or into pieces of one slice where that is too large."""
    step = CHUNK // unit * unit
    for lo in range(0, size, step or unit):
        hi = min(size, lo + (step or unit))
        yield from ((a, min(hi, a + CHUNK)) for a in range(lo, hi, step or CHUNK))


class Census:
    """What is known of the blocks since the last switch.

    Attributes
    ----------
    sums : dict of int to Tensor of float32, shape (slices,)
        By position: the sum over every slice of the squares of G~, or of the absolute values of g ("l1").
    counts : dict of int to Tensor of int64, shape (BINS,)
        By position: the histogram of |G~|; only with ``entries``.
    age : dict of int to int
        Censuses since that position's turn.
    turns : set of int
        Inactive positions whose gradients this census wants.
    turn : int
        Where the next probe begins.
    """

    def __init__(self, blocks: Blocks, score: str) -> None:
        self.blocks, self.score, self.entries = blocks, score, blocks.granularity == "entries"
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        self.age: dict[int, int] = {}
        self.turns: set[int] = set()
        self.turn = 0
        self._seen: set[int] = set()
        self._keep()

    def begin(self, idle: list[int], probe: bool) -> None:
        """Start anew.

        Parameters
        ----------
        idle : list of int
            Positions of the inactive parameters.
        probe : bool
            Only some of them have a turn, and the scores of the others stay, a census older.
        """
        self.age = {position: age + 1 for position, age in self.age.items()} if probe else {}
        if not probe:
            self.sums, self.counts = {}, {}
        order = [k for k in idle if k >= self.turn] + [k for k in idle if k < self.turn]
        turns = order[: -(-len(order) // PROBED)] if probe else order
        self.turn = turns[-1] + 1 if turns else self.turn
        self.turns, self._seen = set(turns), set()
        self._keep()

    def _keep(self) -> None:
        self._before = dict(self.sums), dict(self.counts), dict(self.age)

    def restart(self) -> None:
        """Forget the gradients of this census, because they were thrown away."""
        sums, counts, age = self._before
        self.sums, self.counts, self.age = dict(sums), dict(counts), dict(age)
        self._seen = set()

    def add(
        self,
        position: int,
        grad: Tensor,
        part: Part | None = None,
        cohorts: list[Cohort] | None = None,
        *,
        hyper: Hyper,
    ) -> None:
        """Reduce a gradient to scores; only the first of a window counts, unless it was not finite.

        Parameters
        ----------
        position : int
            Of the parameter.
        grad : Tensor
            Dense, of the parameter's shape; not changed.
        part, cohorts
            Its active part and the moments of that, for ``score="adam"``.
        hyper : Hyper
            Of its group.
        """
        self.enter(position, *self._reduced(position, grad, part, cohorts or [], hyper))

    def enter(self, position: int, new: Tensor, counts: Tensor | None = None, *, more: bool = False) -> None:
        """Take over sums (and counts) of a parameter, unless an earlier gradient of the window gave finite ones.

        Parameters
        ----------
        position : int
        new, counts : Tensor
            As in :attr:`sums` and :attr:`counts`.
        more : bool
            They are of a part of this gradient, and will be entered again.
        """
        if position in self._seen:
            keep = self.sums[position].isfinite().all()
            new = torch.where(keep, self.sums[position], new)
            counts = counts if counts is None else torch.where(keep, self.counts[position], counts)
        self.sums[position], self.age[position] = new, 0
        if counts is not None:
            self.counts[position] = counts
        if not more:
            self._seen.add(position)

    def replace(self, position: int, sums: Tensor) -> None:
        """Put other sums in the place of this window's."""
        self.sums[position], self.age[position] = sums, 0
        self._seen.add(position)

    def seen(self, position: int) -> bool:
        """Whether a gradient of this window has been scored."""
        return position in self._seen

    def of_rows(self, grad: Tensor, hyper: Hyper) -> Tensor:
        """Sums of a few rows without moments: float32 of shape (rows,)."""
        return self._terms(self._processed(grad, hyper)).sum(1)

    def correct_rows(self, position: int, grad: Tensor, part: Part, cohorts: list[Cohort], hyper: Hyper) -> None:
        """Score active rows by their moments, from the gradient of these rows in the order of the part."""
        if self.score == "adam":
            where = part.where.long()
            sums = self.of_rows(grad, hyper)
            inside = Part(part.unit, part.count, torch.arange(part.count, device=grad.device))
            self._correct(sums, sums.new_zeros(0, dtype=torch.int64), grad, inside, cohorts, hyper)
            self.sums[position][where] = sums

    def _reduced(
        self, position: int, grad: Tensor, part: Part | None, cohorts: list[Cohort], hyper: Hyper
    ) -> tuple[Tensor, Tensor | None]:
        sums = grad.new_zeros(self.blocks.slices(position), dtype=torch.float32)
        counts = grad.new_zeros(BINS if self.entries else 0, dtype=torch.int64)
        if self.blocks.columns[position]:
            for rows in grad.split(max(1, CHUNK // grad.shape[1])):
                sums += self._terms(self._processed(rows, hyper)).sum(0)
        else:
            self._sum_slices(sums, counts, grad.reshape(-1), self.blocks.units[position], hyper)
        if self.score == "adam" and part is not None:
            self._correct(sums, counts, grad, part, cohorts, hyper)
        return sums, counts if self.entries else None

    def _sum_slices(self, sums: Tensor, counts: Tensor, entries: Tensor, unit: int, hyper: Hyper) -> None:
        """Add what slices of consecutive entries give."""
        for a, b in _pieces(entries.numel(), unit):
            piece = self._processed(entries[a:b], hyper)
            found = self._terms(piece).view(-1, min(unit, b - a)).sum(1)
            sums[a // unit : a // unit + len(found)] += found
            if self.entries:
                counts += _bins(piece.abs())

    def _processed(self, grad: Tensor, hyper: Hyper) -> Tensor:
        grad = grad.float()
        return first_direction(grad, hyper.eps) if self.score == "adam" else grad

    def _terms(self, processed: Tensor) -> Tensor:
        """What is summed over a slice."""
        return processed.abs() if self.score == "l1" else processed.square()

    def _correct(
        self, sums: Tensor, counts: Tensor, grad: Tensor, part: Part, cohorts: list[Cohort], hyper: Hyper
    ) -> None:
        """Replace what was counted for entries that have moments by Adam's direction there."""
        unit = grad.numel() // len(sums)
        for a, b, direction, where, raw in active_directions(grad, part, cohorts, hyper):
            naive = first_direction(raw, hyper.eps).float()
            gain = (direction.float().square() - naive.square()).view(-1, min(part.unit, b - a)).sum(1)
            if isinstance(where, slice):
                sums[where.start // unit] += gain[0]
            else:
                sums.index_add_(0, where.long() * part.unit // unit, gain)
            if self.entries:
                counts += _bins(direction.abs()) - _bins(naive.abs())
        sums.clamp_(min=0)

    def norms(self) -> Tensor:
        """Scores of every parameter as if it were a block, float32 of shape (parameters,) on the CPU."""
        total = torch.zeros(len(self.blocks.names))
        for position, found in _on_host({p: self._aged(p).sum().view(1) for p in self.sums}).items():
            total[position] = found[0]
        return self._as_score(total, torch.tensor(self.blocks.sizes))

    def scores(self) -> Tensor:
        """Scores of all blocks, float32 of shape (blocks,) on the CPU; 0 where nothing was seen.

        ``||G~_b||``, or ``||g_b||_1 / sqrt(|b|)`` ("l1"), which is the same where all entries are equally large.
        """
        total = torch.zeros(len(self.blocks.cost))
        for position, sums in _on_host({p: self._aged(p) for p in self.sums}).items():
            first = self.blocks.first[position]
            total[first : first + len(sums)] += sums
        return self._as_score(total, self.blocks.cost)

    def _as_score(self, sums: Tensor, size: Tensor) -> Tensor:
        return sums / size.clamp(min=1).sqrt() if self.score == "l1" else sums.sqrt()

    def _aged(self, position: int) -> Tensor:
        power = 1 if self.score == "l1" else 2
        return self.sums[position] * AGEING ** (power * self.age[position])

    def histogram(self, position: int) -> Tensor:
        """Counts of |G~| of a parameter, on the CPU; every entry in the lowest bin where nothing was seen."""
        if position in self.counts:
            return self.counts[position].cpu()
        none = torch.zeros(BINS, dtype=torch.int64)
        none[0] = self.blocks.sizes[position]
        return none

    def not_finite(self) -> list[str]:
        """Names of parameters with a NaN or infinity in their gradient."""
        largest = [sums.max() for sums in self.sums.values()]
        if not largest or bool(torch.stack([value.to(largest[0].device) for value in largest]).isfinite().all()):
            return []  # one question to the device, not one for every parameter
        return [self.blocks.names[p] for p, sums in self.sums.items() if not bool(sums.isfinite().all())]

    def state_dict(self) -> dict[str, Any]:
        """Scores, ages and turns (a census is taken within one step, so that nothing else outlives it)."""
        return {"sums": dict(self.sums), "age": dict(self.age), "turns": sorted(self.turns), "turn": self.turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.sums, self.age = dict(state["sums"]), dict(state["age"])
        self.turns, self.turn = set(state["turns"]), state["turn"]
        self.counts, self._seen = {}, set()
        self._keep()


def _on_host(vectors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Copies on the CPU, with one transfer, which waits for all that was asked of a device, from each of them."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(vector.device for vector in vectors.values()):
        there = {position: vector for position, vector in vectors.items() if vector.device == device}
        copies = torch.cat(list(there.values())).cpu().split([len(vector) for vector in there.values()])
        found |= dict(zip(there, copies, strict=True))
    return {position: found[position] for position in vectors}


def entry_counts(histograms: list[Tensor], budget: int) -> list[int]:
    """How many entries of each tensor are among the ``budget`` largest of all.

    Parameters
    ----------
    histograms : list of Tensor of int64, shape (BINS,)
    budget : int

    Returns
    -------
    list of int
        They add up to ``budget``, or to all entries if those are fewer. Of the bin that the threshold cuts, tensors
        are served in order.

    Examples
    --------
    >>> entry_counts([torch.tensor([5, 2, 1]), torch.tensor([0, 3, 2])], 6)
    [3, 3]
    """
    table = torch.stack(histograms)
    above = table.flip(1).cumsum(1).flip(1)  # entries in this bin or a higher one
    total = above.sum(0)
    enough = (total >= budget).nonzero().squeeze(1)
    cut = int(enough[-1]) if len(enough) else 0
    sure = above[:, cut + 1] if cut + 1 < table.shape[1] else torch.zeros_like(table[:, 0])
    room = max(0, budget - int(sure.sum()))
    level = table[:, cut]
    before = level.cumsum(0) - level
    return (sure + (room - before).clamp(min=torch.zeros_like(level), max=level)).tolist()
