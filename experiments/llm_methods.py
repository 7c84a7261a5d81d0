# SPDX-License-Identifier: BSD-3-Clause
"""Ways to train a model, by name: BlockLLM, and its peers from their own packages.

A method takes a model and gives back what to train (the model, or adapters around it) and an optimizer whose groups
all have the same learning rate. No method decays weights or clips gradients. Where a head has just been put on the
model (a classifier), every method trains it at every step.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llm import BlockLLM

Built = tuple[nn.Module, torch.optim.Optimizer]
LAYER = re.compile(r"^(.*\.layers?\.\d+\.)")
SHORT = 3  # steps between switches while memory is measured
TIMED = 12  # steps between switches while time is measured; most are as in a run that has none
COST_STEPS = 15  # that are timed, after one that warms up
ROWS = {
    "granularity": "rows",
    "budget": 0.05,
    "score": "l1",
    "per_parameter": True,
    "states": "bf16",
}  # "BlockLLM rows"
CAUTIOUS = ROWS | {"cautious": True}  # "BlockLLM rows, cautious"
NEURONS = CAUTIOUS | {"granularity": "neurons"}  # "BlockLLM neurons"
NAMED = NEURONS | {"embeddings": "never"}  # "BlockLLM neurons, frozen table": the named configuration
SIGNS = NAMED | {"inactive": "sign"}  # "BlockLLM neurons, frozen table, sign": of the rest
FEW = CAUTIOUS | {"embeddings": "never", "reach": 2.0}  # "BlockLLM rows of few tensors"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes
    ----------
    kind : str
        A key of :data:`BUILDERS`.
    grid : tuple of float
        Learning rates, ascending.
    options : dict
        Arguments of the builder.
    """

    kind: str
    grid: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is BlockLLM with its own rule, not a peer that runs through the same class."""
        return self.kind == "blockllm" and self.options.get("rule", "greedy") == "greedy"

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there."""
        package = PACKAGES.get(self.kind)
        return package is None or find_spec(package) is not None

    def settings(self) -> dict[str, Any]:
        """All that defines it but the learning rate; for BlockLLM with the defaults of the optimizer."""
        defaults: dict[str, Any] = {}
        if self.kind == "blockllm":
            arguments = inspect.signature(BlockLLM.__init__).parameters.values()
            defaults = {a.name: a.default for a in arguments if a.default is not a.empty and a.name not in UNNAMED}
        return {"kind": self.kind} | defaults | self.options

    def build(self, model: nn.Module, lr: float, seed: int = 0, head: Sequence[str] = ()) -> Built:
        """The model to train and its optimizer.

        Parameters
        ----------
        model : Module
            A transformers model; changed.
        lr : float
        seed : int
            Of what the method draws; seeds torch as well.
        head : sequence of str
            Names of the modules that are new and always trained.

        Raises
        ------
        ModuleNotFoundError
            If the method's package is missing.
        """
        torch.manual_seed(seed)
        return BUILDERS[self.kind](model, lr, seed, list(head), **self.options)

    def with_timed_periods(self) -> Method:
        """The same with BAdam switching at every step, or BlockLLM after a dozen steps, if it switches by steps."""
        if self.kind == "badam":
            return replace(self, options=self.options | {"switch_every": 1})
        if self.kind == "blockllm" and self.options.get("rule") != "full":
            return replace(self, options=self.options | {"switch_every": TIMED, "patience": None})
        return self

    def timed_steps(self, steps: int, layers: int) -> int:
        """How many steps to time: of BAdam one in each layer that a run of so many steps reaches."""
        return min(layers, -(-steps // self.options["switch_every"])) if self.kind == "badam" else COST_STEPS

    def with_short_periods(self) -> Method:
        """The same with switches every few steps, and BAdam at its worst place: the lowest layer."""
        if self.kind == "badam":
            return replace(self, options=self.options | {"switch_every": SHORT, "start": 0})
        if self.kind == "blockllm" and self.options.get("rule") != "full":
            return replace(self, options=self.options | {"switch_every": SHORT, "patience": None})
        return self


OWN = ("self", "params", "lr", "model", "seed", "weight_decay")  # set here, or by the unit
UNNAMED = (*OWN, "cautious", "process_group")  # at their defaults; results before the last two do not name them


# -- peers --------------------------------------------------------------------------------------


def adamw(model: nn.Module, lr: float, seed: int, head: list[str], *, fused: bool = True) -> Built:
    """Every parameter, in torch's fastest version, which also needs no temporary memory."""
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=fused)


def lora(model: nn.Module, lr: float, seed: int, head: list[str], *, r: int, alpha: int) -> Built:
    """Adapters on all linear layers (arXiv 2106.09685), from peft."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=head or None,
    )
    adapted = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return adapted, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def badam(model: nn.Module, lr: float, seed: int, head: list[str], *, switch_every: int, start: int = -1) -> Built:
    """One layer at a time, from the top down (arXiv 2404.02827); embeddings stay as they are."""
    from badam import BlockOptimizer

    blocks = [[prefix] for prefix in layers(model)]
    optimizer = BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
        list(model.named_parameters()),
        block_prefix_list=blocks,
        switch_block_every=switch_every,
        start_block=start % len(blocks),
        switch_mode="descending",
        active_modules=[f"{name}." for name in head],
        verbose=0,
    )
    return model, optimizer


def galore(
    model: nn.Module, lr: float, seed: int, head: list[str], *, rank: int, scale: float, update_proj_gap: int
) -> Built:
    """AdamW on projected gradients of the layers' matrices (arXiv 2403.03507), plain AdamW on the rest."""
    from galore_torch import GaLoreAdamW

    own = {"rank": rank, "scale": scale, "update_proj_gap": update_proj_gap, "proj_type": "std"}
    return model, GaLoreAdamW(low_rank_groups(model, own), lr=lr, no_deprecation_warning=True)


def apollo(
    model: nn.Module,
    lr: float,
    seed: int,
    head: list[str],
    *,
    rank: int,
    scale: float,
    update_proj_gap: int,
    scale_type: str = "channel",
) -> Built:
    """Gradients scaled by channel, from a random projection (arXiv 2412.05270); plain AdamW on the rest."""
    from apollo_torch import APOLLOAdamW

    own = {"rank": rank, "scale": scale, "update_proj_gap": update_proj_gap, "proj_type": "std"}
    own |= {"proj": "random", "scale_type": scale_type}
    return model, APOLLOAdamW(low_rank_groups(model, own), lr=lr)


def blockllm(model: nn.Module, lr: float, seed: int, head: list[str], **options: Any) -> Built:
    """:class:`llm.BlockLLM`, also with the rules of LISA, HFT and MISA."""
    always = [*options.pop("always", ()), *head]
    return model, BlockLLM(model, lr, weight_decay=0.0, always=always, seed=seed, **options)


BUILDERS: dict[str, Callable[..., Built]] = {
    "adamw": adamw,
    "lora": lora,
    "badam": badam,
    "galore": galore,
    "apollo": apollo,
    "blockllm": blockllm,
}
PACKAGES = {"lora": "peft", "badam": "badam", "galore": "galore_torch", "apollo": "apollo_torch"}


# -- parts of a model ---------------------------------------------------------------------------


def layers(model: nn.Module) -> list[str]:
    """Prefixes of the parameters of each transformer layer, from the input upwards.

    Raises
    ------
    ValueError
        If no parameter is called like one of a layer.
    """
    found = dict.fromkeys(m[1] for name, _ in model.named_parameters() if (m := LAYER.match(name)))
    if not found:
        raise ValueError("the model must have parameters named '...layers.0...' or '...layer.0...'; found none")
    return list(found)


def low_rank_groups(model: nn.Module, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups: the rest, and the matrices inside the layers with the options ``own``."""
    named = list(model.named_parameters())
    inside = [p for name, p in named if p.dim() == 2 and LAYER.match(name)]
    known = {id(p) for p in inside}
    return [{"params": [p for _, p in named if id(p) not in known]}, {"params": inside} | own]
