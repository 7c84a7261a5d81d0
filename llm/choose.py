# SPDX-License-Identifier: BSD-3-Clause
"""From scores to the active part of every parameter: the rules of :mod:`bcd.selection` under one budget.

Blocks that are always active are paid for first; the others compete for what is left. Rows and entries are chosen in
two stages: the rule takes tensors that hold up to ``reach`` times the budget (the rest of the model costs no weight
gradients), and inside those the rows with the largest norm, or the entries with the largest |G~|, fill the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bcd.selection import BlockRule, Fill, fill_budget
from llm.blocks import Blocks, embeddings, entries_of_budget, matching
from llm.census import Census, entry_counts
from llm.compact import Part
from llm.moments import bytes_per_entry
from llm.settings import Settings, resolve_block_rule

__all__ = ["Chooser", "make_chooser"]

Parts = list[Part | None]


@dataclass(frozen=True)
class Chooser:
    """Who competes for what.

    Attributes
    ----------
    blocks : Blocks
    rule : BlockRule
    budget : int
        Active entries, those of ``always`` included.
    reach : float or None
        Rows and entries: see above; None: they compete across the whole model.
    mask : bool
        Whether a tensor that does not fit may be active in part.
    always, never : frozenset of int
        Positions of parameters.
    """

    blocks: Blocks
    rule: BlockRule
    budget: int
    reach: float | None
    mask: bool
    always: frozenset[int]
    never: frozenset[int]

    def __post_init__(self) -> None:
        needed = sum(self.blocks.sizes[p] for p in self.always)
        if needed > self.budget:
            raise ValueError(
                f"budget allows {self.budget} active entries, but the parameters that are always active have {needed}; "
                'raise budget, or let them compete (embeddings="compete", always=())'
            )
        cost = self.blocks.cost[self._competing]
        if not len(self._positions) and not self.always:
            raise ValueError('no parameter is left to train; name fewer in never, or drop embeddings="never"')
        if len(cost) and not (self.always or self._divisible.any() or self._by_entry or cost.min() <= self._room):
            block = int(self._competing[cost.argmin()])
            raise ValueError(
                f"budget allows {self._room} active entries, but the smallest block, {self.blocks.name(block)}, has "
                f'{int(cost.min())}; raise budget, or use mask=True or granularity="rows"'
            )

    @property
    def _room(self) -> int:
        return self.budget - sum(self.blocks.sizes[p] for p in self.always)

    @cached_property
    def _positions(self) -> list[int]:
        return [p for p, size in enumerate(self.blocks.sizes) if size and p not in self.always | self.never]

    @cached_property
    def _competing(self) -> Tensor:
        """Numbers of the competing blocks."""
        ranges = [
            torch.arange(self.blocks.first[p], self.blocks.first[p] + self.blocks.slices(p)) for p in self._positions
        ]
        return torch.cat(ranges).unique() if ranges else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def _divisible(self) -> Tensor:
        """Which competing blocks may be taken in part: whole tensors and layers, not slices of a tensor."""
        alone = torch.zeros(len(self.blocks.cost), dtype=torch.bool)
        alone[[self.blocks.first[p] for p in self._positions if self.blocks.slices(p) == 1]] = self.mask
        return alone[self._competing]

    @property
    def _by_entry(self) -> bool:
        return self.blocks.granularity == "entries"

    @property
    def _tensors_first(self) -> bool:
        fine = self._by_entry or self.blocks.fine
        return fine and self.rule.scored and self.reach is not None

    def _tensor_cost(self) -> Tensor:
        return torch.tensor([self.blocks.sizes[p] for p in self._positions], dtype=torch.int64)

    def init(self, seed: int) -> Any:
        """State of the rule before the first choice."""
        return self.rule.init(self._tensor_cost() if self._tensors_first else self.blocks.cost[self._competing], seed)

    def choose(self, census: Census, state: Any) -> tuple[Parts, Any]:
        """The active part of every parameter, and the state of the rule after this choice.

        Parameters
        ----------
        census : Census
            Means nothing to a rule that reads no scores.
        state
            As :meth:`init` or the last choice gave it.

        Returns
        -------
        parts : list of Part or None
            By position; at most ``budget`` entries in all. Parts by entry have no index yet.
        state
        """
        parts: Parts = [None] * len(self.blocks.sizes)
        for position in self.always:
            parts[position] = Part.whole(self.blocks.sizes[position])
        inside = self._positions
        if self._tensors_first:
            cost = self._tensor_cost()
            reach = max(self._room, int((self.reach or 1.0) * self._room))
            whole = torch.ones(len(cost), dtype=torch.bool)  # a tensor that the reach cuts is inside all the same
            fill, state = self.rule.select(census.norms()[inside], cost, reach, state, whole)
            inside = sorted(inside[k] for k in fill.index.tolist())
        if self._by_entry:
            self._take_entries(parts, inside, census)
        elif self._tensors_first:
            blocks = torch.cat([torch.arange(self.blocks.slices(p)) + self.blocks.first[p] for p in inside])
            fill = fill_budget(census.scores()[blocks], self.blocks.cost[blocks], self._room)
            self._take(parts, Fill(blocks[fill.index], fill.amount), census)
        else:
            blocks = self._competing
            cost = self.blocks.cost[blocks]
            fill, state = self.rule.select(census.scores()[blocks], cost, self._room, state, self._divisible)
            self._take(parts, Fill(blocks[fill.index], fill.amount), census)
        return parts, state

    def _take_entries(self, parts: Parts, inside: list[int], census: Census) -> None:
        counts = entry_counts([census.histogram(p) for p in inside], self._room)
        for position, count in zip(inside, counts, strict=True):
            if count:
                parts[position] = Part(1, count, None)

    def _take(self, parts: Parts, fill: Fill, census: Census) -> None:
        """Turn blocks and amounts into parts."""
        if self.blocks.granularity == "layer":
            self._take_layers(parts, fill, census)
            return
        first = torch.tensor(self.blocks.first)
        index, order = fill.index.sort()
        owner = torch.searchsorted(first, index, right=True) - 1
        for position in owner.unique().tolist():
            mine = owner == position
            unit = self.blocks.units[position]
            slices = index[mine] - first[position]
            spent = int(fill.amount[order][mine].sum())
            cut = spent < unit * len(slices)
            parts[position] = Part(1, spent, None) if cut else self.blocks.part(position, slices)

    def _take_layers(self, parts: Parts, fill: Fill, census: Census) -> None:
        """A layer that is taken in part is filled by its tensors, the largest norm first."""
        norms = census.norms()
        for block, amount in zip(fill.index.tolist(), fill.amount.tolist(), strict=True):
            mine = [p for p in self._positions if self.blocks.first[p] == block]
            cost = torch.tensor([self.blocks.sizes[p] for p in mine])
            inner = fill_budget(norms[mine], cost, amount, torch.ones(len(mine), dtype=torch.bool))
            for k, spent in zip(inner.index.tolist(), inner.amount.tolist(), strict=True):
                size = self.blocks.sizes[mine[k]]
                parts[mine[k]] = Part.whole(size) if spent == size else Part(1, spent, None)


# -- from settings ---------------------------------------------------------------------------------


def make_chooser(
    settings: Settings, names: Sequence[str], params: Sequence[Tensor], model: nn.Module | None
) -> Chooser:
    """The blocks, budget and rule that settings ask for.

    Raises
    ------
    ValueError
        If a name is unknown, the budget holds no block, or ``embeddings`` needs a model that is not there.
    """
    always = matching(names, settings.always, "always")
    never = matching(names, settings.never, "never")
    if always & never:
        raise ValueError(f"always and never both name {names[min(always & never)]!r}; drop one of them")
    total = sum(p.numel() for p in params)
    budget = entries_of_budget(settings.budget, total, _entry_bytes(settings, params))
    if settings.embeddings != "compete":
        tables = _tables(settings, names, model) - always - never  # what is named has been decided
        always |= tables if settings.embeddings == "always" else set()
        large = {k for k in tables if params[k].numel() > budget}
        never |= {"always": set(), "never": tables, "auto": large}[settings.embeddings]
    never |= {k for k, p in enumerate(params) if not (p.is_floating_point() and p.numel())}
    return Chooser(
        Blocks.of(names, [p.shape for p in params], settings.granularity, always | never),
        resolve_block_rule(settings.rule, settings.visit_power, settings.per_parameter),
        budget,
        settings.reach,
        settings.mask,
        frozenset(always - never),
        frozenset(never),
    )


def _tables(settings: Settings, names: Sequence[str], model: nn.Module | None) -> set[int]:
    """Positions of embeddings and output layers."""
    if model is None:
        raise ValueError(
            f"embeddings={settings.embeddings!r} needs the model to find them: pass model=, or name the parameters "
            "with always= or never="
        )
    found = set(embeddings(model))
    return {k for k, name in enumerate(names) if name in found}


def _entry_bytes(settings: Settings, params: Sequence[Tensor]) -> float:
    """Memory of an active entry beside its weight."""
    size = max(p.element_size() for p in params)
    gradient = 0 if settings.in_backward else size
    index = 4 if settings.granularity == "entries" else 0
    master = 4 if size < 4 and settings.precision == "fp32-active" else 0
    return bytes_per_entry(settings.states) + gradient + index + master
