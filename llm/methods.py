# SPDX-License-Identifier: BSD-3-Clause
"""Ways to train by name: a model and its learning rate in, the model and its optimizer out.

============  =====================================================================================  =========
name          what is trained                                                                        known as
============  =====================================================================================  =========
``blockllm``  the rows and columns with the largest gradients within the budget, by turns            BlockLLM
``adamw``     everything                                                                             AdamW
``lora``      low-rank matrices beside all linear layers (needs the package peft)                    LoRA
``badam``     one layer after the other; what lies in no layer stays as it is                        BAdam
``lisa``      two layers at random, and what lies in no layer                                        LISA
``hft``       a random half of all tensors                                                           HFT
``misa``      tensors drawn by the importance of their gradients                                     MISA
============  =====================================================================================  =========

All but ``adamw`` and ``lora`` are :class:`llm.BlockLLM` with the rule of that method; they are the ideas of those
papers, not the code of their authors. ``blockllm`` has bfloat16 moments and cautious updates, and leaves tables of
tokens and positions and the output layer as they are, unless told otherwise.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import AdamW, Optimizer

from llm.blocks import Blocks
from llm.optimizer import BlockLLM
from llm.settings import check_rates, is_number, is_whole

__all__ = ["METHODS", "NAMED", "Method", "check_options", "default_lr", "make", "plain"]

# What the comparisons call "BlockLLM neurons, frozen table", apart from defaults of the optimizer.
NAMED: dict[str, Any] = {
    "granularity": "neurons",
    "embeddings": "never",
    "score": "l1",
    "per_parameter": True,
    "states": "bf16",
    "cautious": True,
}


class Asked(NamedTuple):
    """The arguments of :func:`make`."""

    model: nn.Module
    lr: float
    weight_decay: float
    budget: Any
    steps: int | None
    options: Mapping[str, Any]


class Method(NamedTuple):
    """How a method is made, with a learning rate to begin with and the names of its options."""

    build: Callable[[Asked], tuple[nn.Module, Optimizer]]
    lr: float
    options: frozenset[str]


def make(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    budget: Any = None,
    steps: int | None = None,
    **options: Any,
) -> tuple[nn.Module, Optimizer]:
    """Prepare a model to be trained.

    Parameters
    ----------
    name : str
        A key of :data:`METHODS`.
    model : Module
        ``lora`` changes it in place; the others change at most ``requires_grad``.
    lr, weight_decay : float
        Biases and other vectors do not decay.
    budget : float, int or str, optional
        As of :class:`llm.BlockLLM`; not of ``adamw`` and ``lora``.
    steps : int, optional
        Length of the run, by which ``badam`` shares its time among the layers.
    **options
        Of :class:`llm.BlockLLM`; of AdamW ``betas`` and ``eps``; of LoRA these and ``rank`` (8), ``alpha`` (twice the
        rank), ``dropout`` (0) and ``targets`` (all linear layers). Its matrices are drawn by torch's generator.

    Returns
    -------
    model : Module
        To be trained from now on.
    optimizer : Optimizer

    Raises
    ------
    ValueError
        If a name, an option or its value is wrong.
    ImportError
        If ``lora`` is asked for and peft is missing.
    """
    check_options(name, options)
    return _method(name).build(Asked(model, lr, weight_decay, budget, steps, options))


def check_options(name: str, options: Iterable[str]) -> None:
    """Check names of options.

    Parameters
    ----------
    name : str
        A key of :data:`METHODS`.
    options : iterable of str

    Raises
    ------
    ValueError
        If a method has no such option, or if that is an argument of :func:`make` with a flag of ``bcd-llm finetune``.
    """
    method = _method(name)
    for option in options:
        if option in _FLAGS:
            raise ValueError(
                f"{option} is an argument by itself (finetune: {_FLAGS[option]}), not one of the options (--set)"
            )
        if option not in method.options:
            raise ValueError(f"method {name} has no option {option!r}; it has {', '.join(sorted(method.options))}")


def default_lr(name: str) -> float:
    """A learning rate to begin with; the best one depends on model, data and batch.

    Examples
    --------
    >>> default_lr("adamw")
    5e-05
    """
    return _method(name).lr


def plain(model: Any) -> Any:
    """The trained model as one of its own kind: with LoRA's matrices added to the weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; found {name!r}")
    return METHODS[name]


# -- how each is made --------------------------------------------------------------------------------


def _groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """One group, or two where matrices decay and vectors do not."""
    named = list(named)
    if not weight_decay:
        return [{"params": named, "weight_decay": 0.0}]
    parts = [[(name, p) for name, p in named if (p.ndim > 1) == decays] for decays in (True, False)]
    rates = (weight_decay, 0.0)
    return [{"params": part, "weight_decay": rate} for part, rate in zip(parts, rates, strict=True) if part]


def _blockllm(asked: Asked, **defaults: Any) -> tuple[nn.Module, Optimizer]:
    options = {"budget": asked.budget, **defaults, **asked.options}
    groups = _groups(asked.model.named_parameters(), asked.weight_decay)
    return asked.model, BlockLLM(groups, asked.lr, model=asked.model, **options)


def _greedy(asked: Asked) -> tuple[nn.Module, Optimizer]:
    """:data:`NAMED`; options of the run come before it."""
    return _blockllm(asked, **NAMED)


def _adamw(asked: Asked) -> tuple[nn.Module, Optimizer]:
    if asked.budget is not None:
        raise ValueError(f"method adamw trains everything and has no budget; found {asked.budget!r}")
    check_rates(asked.options)
    trained = [(name, p) for name, p in asked.model.named_parameters() if p.is_floating_point()]
    return asked.model, AdamW(_groups(trained, asked.weight_decay), asked.lr, **asked.options)


def _lora(asked: Asked) -> tuple[nn.Module, Optimizer]:
    if asked.budget is not None:
        raise ValueError(f"method lora is sized by its option rank and has no budget; found {asked.budget!r}")
    try:
        peft = importlib.import_module("peft")
    except ImportError as missing:
        raise ImportError("method lora needs the package peft: pip install peft") from missing
    model = peft.get_peft_model(asked.model, peft.LoraConfig(**_of_lora(asked.options)))
    adam = {name: value for name, value in asked.options.items() if name in _ADAMW}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return model, AdamW(_groups(trained, asked.weight_decay), asked.lr, **adam)


def _of_lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of peft, checked."""
    check_rates(options)
    rank, dropout = options.get("rank", 8), options.get("dropout", 0.0)
    if not (is_whole(rank) and rank >= 1):
        raise ValueError(f"rank must be a whole number, at least 1; found {rank!r}")
    alpha, targets = options.get("alpha", 2 * rank), options.get("targets", "all-linear")
    if not (is_number(alpha) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number; found {alpha!r}")
    if not (is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be a number, at least 0 and below 1; found {dropout!r}")
    if not (isinstance(targets, Collection) and targets and all(isinstance(each, str) for each in targets)):
        raise ValueError(f"targets must be names of linear layers; found {targets!r}")
    return {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}


def _badam(asked: Asked) -> tuple[nn.Module, Optimizer]:
    layers, outside = _layers(asked.model)
    turn = 100 if asked.steps is None else min(100, max(1, asked.steps // len(layers)))
    budget = max(layers) if asked.budget is None else asked.budget
    return _layerwise(asked, budget, rule="cyclic", never=outside, switch_every=turn)


def _lisa(asked: Asked) -> tuple[nn.Module, Optimizer]:
    layers, outside = _layers(asked.model)
    always = sum(p.numel() for name, p in asked.model.named_parameters() if name in outside)
    budget = always + sum(sorted(layers)[-2:]) if asked.budget is None else asked.budget
    return _layerwise(asked, budget, rule="random", always=outside, switch_every=20)


def _layerwise(asked: Asked, budget: Any, **defaults: Any) -> tuple[nn.Module, Optimizer]:
    return _blockllm(asked._replace(budget=budget), granularity="layer", mask=False, ramp=0, **defaults)


def _hft(asked: Asked) -> tuple[nn.Module, Optimizer]:
    return _blockllm(asked, rule="half", granularity="tensor", mask=False, ramp=0, switch_every=None)


def _misa(asked: Asked) -> tuple[nn.Module, Optimizer]:
    return _blockllm(asked, rule="importance", granularity="tensor", embeddings="auto", ramp=0, switch_every=50)


def _layers(model: nn.Module) -> tuple[list[int], list[str]]:
    """Entries of every numbered layer, and the names of the parameters that lie in none.

    Raises
    ------
    ValueError
        If no layer has a number in its name.
    """
    named = dict(model.named_parameters())
    outside = [name for name in named if not any(part.isdigit() for part in name.split(".")[:-1])]
    inside = [name for name in named if name not in outside]
    if not inside:
        raise ValueError("this method trains layer by layer, and no parameter of the model lies in a numbered layer")
    blocks = Blocks.of(inside, [named[name].shape for name in inside], "layer")
    return blocks.cost.tolist(), outside


_FLAGS = {  # of bcd-llm finetune, for the arguments of make
    "name": "--method",
    "model": "--model",
    "lr": "--lr",
    "weight_decay": "--weight-decay",
    "budget": "--budget",
    "steps": "--steps",
}
_ADAMW = frozenset({"betas", "eps"})
_BLOCK = frozenset(inspect.signature(BlockLLM).parameters) - {"params", "lr", "weight_decay", "model", "budget"}
METHODS = {
    "blockllm": Method(_greedy, 5e-4, _BLOCK),
    "adamw": Method(_adamw, 5e-5, _ADAMW),
    "lora": Method(_lora, 1e-3, _ADAMW | {"rank", "alpha", "dropout", "targets"}),
    "badam": Method(_badam, 1e-4, _BLOCK),
    "lisa": Method(_lisa, 1e-4, _BLOCK),
    "hft": Method(_hft, 5e-5, _BLOCK),
    "misa": Method(_misa, 1e-4, _BLOCK),
}
