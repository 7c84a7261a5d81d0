# SPDX-License-Identifier: BSD-3-Clause
"""BlockLLM: fine-tune and pre-train language models with a small, changing set of active parameters.

>>> import torch, llm
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = llm.BlockLLM(model, lr=1e-3, budget=0.5)
>>> model(torch.ones(1, 4)).sum().backward()
>>> _ = optimizer.step()
>>> optimizer.report()["active entries"] <= 5
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.adam import adamw_
    from llm.blocks import Blocks
    from llm.compact import CompactGrad, Part
    from llm.optimizer import BlockLLM

__all__ = ["BlockLLM", "Blocks", "CompactGrad", "Part", "adamw_"]
_HOME = {"BlockLLM": "optimizer", "Blocks": "blocks", "CompactGrad": "compact", "Part": "compact", "adamw_": "adam"}


def __getattr__(name: str) -> Any:
    """Import torch when something is first asked for, so that the command line answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
