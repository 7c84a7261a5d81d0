# SPDX-License-Identifier: BSD-3-Clause
"""The options of :class:`llm.BlockLLM`, checked once, with what to do about each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bcd.selection import BLOCK_RULES, BlockRule, CyclicBlocks, GreedyBlocks
from llm.blocks import GRANULARITIES
from llm.moments import STATES

__all__ = ["RULES", "Settings", "resolve_block_rule"]

RULES = (*BLOCK_RULES, "full")
_CHOICES: dict[str, tuple[str, ...]] = {
    "score": ("grad", "l1", "adam"),
    "census": ("stream", "probe"),
    "moments": ("reset", "offload", "keep"),
    "embeddings": ("auto", "always", "never", "compete"),
    "granularity": GRANULARITIES,
    "inactive": ("freeze", "sign", "sgd", "spectral"),
    "precision": ("auto", "fp32-active", "stochastic"),
    "states": STATES,
}


@dataclass(frozen=True)
class Settings:
    """What the user asked for; :class:`llm.BlockLLM` documents each."""

    budget: Any
    patience: int | None
    switch_every: int | None
    rule: Any
    score: str
    visit_power: float
    per_parameter: bool
    mask: bool
    census: str
    moments: str
    embeddings: str
    always: Sequence[str]
    never: Sequence[str]
    granularity: str
    reach: float | None
    inactive: str
    inactive_scale: float
    precision: str
    states: str
    max_grad_norm: float | None
    in_backward: bool
    ramp: int
    cautious: bool
    seed: int

    def checked(self) -> Settings:
        """These settings if they make sense together, with the budget of the rule where none was given.

        Raises
        ------
        ValueError
            Otherwise.
        """
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        for name in ("per_parameter", "mask", "in_backward", "cautious"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; found {getattr(self, name)!r}")
        for name in ("patience", "switch_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive number of steps, or None; found {value!r}")
        for name in ("visit_power", "inactive_scale", "ramp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; found {getattr(self, name)!r}")
        for name in ("max_grad_norm", "reach"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, or None; found {getattr(self, name)!r}")
        self._check_together()
        return self._full() if self.rule == "full" else replace(self, budget=self._budget())

    def _check_together(self) -> None:
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "max_grad_norm needs all gradients before the first update, in_backward=True frees each at once; "
                "drop one of them"
            )
        scored = self.rule != "full" and resolve_block_rule(self.rule, self.visit_power, self.per_parameter).scored
        if self.granularity == "entries" and self.rule != "full" and not scored:
            raise ValueError(
                f'granularity="entries" needs scores, which rule={self.rule!r} does not take; use rule="greedy", or '
                'granularity="tensor", "layer" or "rows"'
            )
        if self.census == "probe" and self.granularity == "entries":
            raise ValueError(
                'census="probe" keeps scores of blocks, not of entries; use granularity="rows" or "tensor"'
            )

    def _budget(self) -> Any:
        default = {"half": 0.5}.get(self.rule, 0.05) if isinstance(self.rule, str) else 0.05
        return default if self.budget is None else self.budget

    def _full(self) -> Settings:
        if self.budget not in (None, 1.0) or self.patience is not None:
            raise ValueError(
                'rule="full" trains every parameter at every step; drop budget and patience, or use rule="greedy"'
            )
        return replace(self, budget=1.0, switch_every=None, granularity="tensor", inactive="freeze")


def resolve_block_rule(rule: Any, visit_power: float, per_parameter: bool) -> BlockRule:
    """The rule of a name, or the object itself if it has what :class:`bcd.selection.BlockRule` asks for.

    Examples
    --------
    >>> resolve_block_rule("greedy", 0.5, False)
    GreedyBlocks(power=0.5, per_parameter=False)
    """
    if rule == "greedy":
        return GreedyBlocks(visit_power, per_parameter)
    if rule == "full":
        return CyclicBlocks()
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)} or an object with select(); found {rule!r}")
        return BLOCK_RULES[rule]
    if not all(hasattr(rule, name) for name in ("scored", "init", "select")):
        raise ValueError(f"rule must be a name or an object with scored, init() and select(); found {rule!r}")
    return rule
