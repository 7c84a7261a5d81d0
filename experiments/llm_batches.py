# SPDX-License-Identifier: BSD-3-Clause
"""What a training run is given besides its method: a model, batches, held-out examples, and a schedule of rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from llm.losses import losses_of

FIXED = 20260101  # seed of everything that is the same for all seeds: which examples are held out
IGNORED = -100  # a label that has no part in the loss
WARM_UP = 5  # steps of "constant"

Results = dict[str, Any]


class Batch(NamedTuple):
    """Keyword arguments of a model, and how many tokens they have without padding."""

    inputs: dict[str, Tensor]
    tokens: int


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns."""
    return model(**batch.inputs).loss


class Task(NamedTuple):
    """A run without its method.

    Attributes
    ----------
    model : Module
    head : tuple of str
        Modules that are new.
    batches : list of Batch
        One a step.
    held_out : list of Batch
    score : callable
        From the model and a held-out batch to lists with a value for every example: ``losses``, for classifiers also
        ``predicted``.
    truth : dict
        ``weights``: label tokens of every held-out example, whose losses are sums over them; or ``labels``.
    rate : callable
        From a step (the first is 1) to the share of the learning rate.
    loss : callable
        From the model and a batch to the loss that is trained.
    """

    model: nn.Module
    head: tuple[str, ...]
    batches: list[Batch]
    held_out: list[Batch]
    score: Callable[[nn.Module, Batch], dict[str, list[Any]]]
    truth: Results
    rate: Callable[[int], float]
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss


# -- rates --------------------------------------------------------------------------------------


def constant(step: int, warm_up: int = WARM_UP) -> float:
    """Linear warm-up, then 1."""
    return min(1.0, step / warm_up)


def cosine(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the run, then half a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step <= warm_up:
        return step / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def linear(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the run, then linear down to nothing."""
    warm_up = max(1, steps // 20)
    return step / warm_up if step <= warm_up else (steps - step + 1) / (steps - warm_up + 1)


# -- losses -------------------------------------------------------------------------------------


def learnt_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same but for rounding, from the logits of label tokens alone: that of ``bcd-llm finetune``."""
    return losses_of(model, batch.inputs).sum() / (batch.inputs["labels"][:, 1:] != IGNORED).sum()


def token_losses(model: nn.Module, batch: Batch) -> dict[str, list[float]]:
    """The loss of every row, summed over its label tokens."""
    return {"losses": losses_of(model, batch.inputs).tolist()}


def predictions(model: nn.Module, batch: Batch) -> dict[str, list[Any]]:
    """The loss of every row and the class that it is given."""
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    losses = functional.cross_entropy(logits, batch.inputs["labels"], reduction="none")
    return {"losses": losses.tolist(), "predicted": logits.argmax(1).tolist()}
