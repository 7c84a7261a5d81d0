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

from llm.adam import adamw_
from llm.blocks import Blocks
from llm.compact import CompactGrad, Part
from llm.optimizer import BlockLLM

__all__ = ["BlockLLM", "Blocks", "CompactGrad", "Part", "adamw_"]
