# SPDX-License-Identifier: BSD-3-Clause
"""The options of :class:`llm.BlockLLM`, checked once, with what to do about each mistake."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from bcd.selection import BLOCK_RULES, BlockRule, CyclicBlocks, GreedyBlocks
from llm.blocks import GRANULARITIES
from llm.moments import STATES

__all__ = ["RULES", "Settings", "check_rates", "is_number", "is_whole", "resolve_block_rule"]

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
        self._check_each()
        self._check_together()
        return self._full() if self.rule == "full" else replace(self, budget=self._budget())

    def _check_each(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        for name in ("per_parameter", "mask", "in_backward", "cautious"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; found {getattr(self, name)!r}")
        for name in ("patience", "switch_every"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 1):
                raise ValueError(f"{name} must be a positive number of steps, or None; found {value!r}")
        for name in ("visit_power", "inactive_scale"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number, at least 0; found {value!r}")
        for name in ("max_grad_norm", "reach"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, or None; found {value!r}")
        if not (is_whole(self.ramp) and self.ramp >= 0):
            raise ValueError(f"ramp must be a number of steps, at least 0; found {self.ramp!r}")
        if not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1; found {self.seed!r}")
        for name in ("always", "never"):
            names = getattr(self, name)
            if not (isinstance(names, Collection) and all(isinstance(each, str) for each in names)):
                raise ValueError(f"{name} must be names of parameters or modules; found {names!r}")

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


def check_rates(group: Mapping[str, Any]) -> None:
    """Check the numbers of a parameter group, as :class:`torch.optim.AdamW` does; those that it lacks are fine.

    Parameters
    ----------
    group : mapping
        Perhaps with ``lr``, ``betas``, ``eps`` and ``weight_decay``, which may be tensors of one entry.

    Raises
    ------
    ValueError
        If one of them is no number, or out of range.

    Examples
    --------
    >>> check_rates({"lr": 1e-3, "betas": (0.9, 1.0)})
    Traceback (most recent call last):
    ValueError: betas must be two numbers, at least 0 and below 1; found (0.9, 1.0)
    """
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name, 0.0)
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name} must be a number, at least 0; found {value!r}")
    betas = group.get("betas", (0.9, 0.999))
    pair = list(betas) if isinstance(betas, Iterable) else []
    if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise ValueError(f"betas must be two numbers, at least 0 and below 1; found {betas!r}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, or a tensor of one entry; True and False are none."""
    one = isinstance(value, Tensor) and value.numel() == 1
    return one or (isinstance(value, Real) and not isinstance(value, bool))


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
