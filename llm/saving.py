# SPDX-License-Identifier: BSD-3-Clause
"""State of the selection as plain values and tensors, so that a run resumes bit for bit.

Moments travel as the state of their parameters. The selection travels inside the first parameter group, because that
is what every checkpoint format keeps, and loads with ``torch.load(weights_only=True)``. A census is taken within one
step, so that between steps there is nothing of it but the scores that ``census="probe"`` keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm.compact import Part

if TYPE_CHECKING:
    from llm.optimizer import BlockLLM

__all__ = ["check_names", "check_settings", "on_device", "pack", "unpack"]

_PLAIN = ("steps", "since", "reason", "seed", "census_on", "history")


def pack(optimizer: BlockLLM) -> dict[str, Any]:
    """The selection of an optimizer."""
    rule = optimizer.rule_state
    return (
        {"settings": _fixed(optimizer)}
        | {name: getattr(optimizer, name) for name in _PLAIN}
        | {
            "census": optimizer.census.state_dict(),
            "losses": list(optimizer.losses.losses),
            "rule": rule._asdict() if hasattr(rule, "_asdict") else rule,
            "parts": None if optimizer.parts is None else [part and dict(vars(part)) for part in optimizer.parts],
        }
    )


def unpack(optimizer: BlockLLM, saved: Mapping[str, Any]) -> None:
    """Put a saved selection in place; the state of the parameters is there already."""
    for name in _PLAIN:
        setattr(optimizer, name, saved[name])
    optimizer.history = list(saved["history"])
    optimizer.census.load_state_dict(saved["census"])
    optimizer.losses.losses = list(saved["losses"])
    kind = type(optimizer.rule_state)
    optimizer.rule_state = kind(**saved["rule"]) if hasattr(kind, "_asdict") else saved["rule"]
    parts = saved["parts"]
    optimizer.parts = None if parts is None else [None if part is None else Part(**part) for part in parts]
    for position, part in enumerate(optimizer.parts or []):
        if part is not None and part.index is not None:
            param = optimizer.param(position)
            index = optimizer.state.get(param, {}).get("index", part.index)  # one copy serves both
            blocks = optimizer.blocks
            if part.unit == blocks.units[position] and part.columns != blocks.columns[position]:
                kinds = ("rows", "columns")
                raise ValueError(
                    f"state_dict has {kinds[part.columns]} of {blocks.names[position]}, which this version cuts into "
                    f"{kinds[blocks.columns[position]]}; begin with a new state"
                )
            slices = optimizer.blocks.sizes[position] // part.unit
            if index.numel() != part.count or index.min() < 0 or index.max() >= slices:
                raise ValueError(
                    f"state_dict must name {part.count} of the {slices} slices of {optimizer.blocks.names[position]}; "
                    f"found {index.numel()} between {int(index.min())} and {int(index.max())}"
                )
            optimizer.parts[position] = part.at(index.to(param.device))  # type: ignore[index]


def _fixed(optimizer: BlockLLM) -> dict[str, Any]:
    """Settings that say what the state of the rule is of; all others may be changed when a run goes on."""
    settings, chooser = optimizer.settings, optimizer._chooser
    rule = settings.rule if isinstance(settings.rule, str) else type(settings.rule).__name__
    fixed: dict[str, Any] = {"rule": rule, "granularity": settings.granularity, "reach": settings.reach}
    for name, positions in (("always", chooser.always), ("never", chooser.never)):  # those of embeddings= among them
        fixed[name] = [optimizer.blocks.names[p] for p in sorted(positions)]
    return fixed


def check_settings(optimizer: BlockLLM, saved: Mapping[str, Any]) -> None:
    """ValueError where a saved selection was made with settings that its state does not fit."""
    for name, ours in _fixed(optimizer).items():
        theirs = saved["settings"][name]
        if theirs != ours:
            raise ValueError(
                f"state_dict was saved with {name}={theirs!r}, but this optimizer has {name}={ours!r}; make it with "
                "the same settings, or begin with a new state"
            )


def check_names(names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where saved groups are of other parameters than ``names``."""
    found = [name for group in groups for name in group.get("param_names", ())]
    for ours, theirs in zip(names, found, strict=False):
        if ours != theirs:
            raise ValueError(
                f"state_dict is of other parameters: it has {theirs!r} where this optimizer has {ours!r}; build it "
                "from the same model with the same groups in the same order"
            )


def on_device(value: Any, device: Any) -> Any:
    """Tensors of nested lists and dicts on the device, except for what lies on the shelf."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: inner if key == "shelf" else on_device(inner, device) for key, inner in value.items()}
    return [on_device(inner, device) for inner in value] if isinstance(value, list) else value
