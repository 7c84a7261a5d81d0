# SPDX-License-Identifier: BSD-3-Clause
"""How good a model is: loss and perplexity of what is learnt, and the accuracy of a classification.

With tokens x_1, ..., x_n of an example, of which those in L are learnt, its loss is ``-sum over t in L of
log p(x_t | x_1, ..., x_t-1)``; the loss of a set is the sum over its examples by the number of all learnt tokens, in
nats, and its perplexity ``exp(loss)``. A classifier is scored likewise by its class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.data import IGNORED, Example, collate, load_choices, load_labelled
from llm.losses import losses_of

__all__ = [
    "Accuracy",
    "Score",
    "accuracy",
    "classes_of",
    "classifies",
    "evaluate",
    "fitting_length",
    "learnt",
]

Compute = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # a result for every example of a batch
DEFAULT_LENGTH = 512  # tokens


@dataclass(frozen=True)
class Score:
    """Loss of a set of examples: mean over ``tokens`` learnt ones (or classes), in nats."""

    loss: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Accuracy:
    """Rows told rightly, of all rows; ``majority``: how many bear the most frequent label."""

    correct: int
    rows: int
    majority: int

    @property
    def accuracy(self) -> float:
        """Share of rows told rightly."""
        return self.correct / self.rows

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as that of a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.rows)


def classifies(model: nn.Module) -> bool:
    """Whether a model has a head for classes of sequences."""
    config = getattr(model, "config", None)
    names = [type(model).__name__, *(getattr(config, "architectures", None) or ())]
    return any(name.endswith("ForSequenceClassification") for name in names)


def classes_of(model: Any) -> dict[int, str]:
    """Names of the classes of a classifier of transformers, by number."""
    return {int(k): name for k, name in model.config.id2label.items()}


def learnt(examples: Iterable[Example]) -> int:
    """How many tokens are learnt (of a classifier: classes); the first token of an example never is."""
    return sum(len(e.labels) == 1 or sum(label != IGNORED for label in e.labels[1:]) for e in examples)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def evaluate(model: nn.Module, examples: Sequence[Example], *, batch_size: int = 4, pad: int = 0) -> Score:
    """Loss of a set of examples; changes nothing.

    Parameters
    ----------
    model : Module
    examples : sequence of Example
        Not empty; in any order.
    batch_size : int
        Examples at a time; the loss does not depend on it but for rounding.
    pad : int
        Token to pad with.
    """
    losses = _sequences(model, examples, batch_size, pad, losses_of)
    tokens = learnt(examples)
    return Score(sum(float(loss) for loss in losses) / tokens, tokens, len(examples))


def accuracy(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    template: str | None = None,
    rename: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Accuracy:
    """Let a model tell the labels of a file.

    A sequence classifier answers by its head. A language model is asked as it would be trained on the same file, and
    answers with the label of the smallest loss.

    Parameters
    ----------
    model : Module
    tokenizer : object
    path : str or Path
        Rows with a label, and sentence, text, or sentence1 and sentence2.
    max_length, template, rename
        As of :func:`llm.data.load_examples`.
    batch_size : int
        Sequences at a time; a language model reads one for every row and label.
    limit : int, optional
        Read the first so many rows only.

    Raises
    ------
    ValueError
        With file and line, if something cannot be read.
    """
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    if classifies(model):
        named = classes_of(model)
        examples = load_labelled(path, tokenizer, max_length=max_length, classes=named, rename=rename)[:limit]
        right = [example.labels[0] for example in examples]
        logits = _sequences(model, examples, batch_size, pad, _logits)
        told = [int(row.argmax()) for row in logits]
    else:
        choices, labels = load_choices(path, tokenizer, max_length=max_length, template=template, rename=rename)
        choices = choices[:limit]
        right = [choice.right for choice in choices]
        losses = _sequences(model, [e for c in choices for e in c.options], batch_size, pad, losses_of)
        told = torch.stack(losses).view(len(choices), len(labels)).argmin(1).tolist()
    correct = sum(a == b for a, b in zip(told, right, strict=True))
    return Accuracy(correct, len(right), max(Counter(right).values()))


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _sequences(model: nn.Module, examples: Sequence[Example], size: int, pad: int, compute: Compute) -> list[Tensor]:
    """One result an example, in their order, computed by length."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda k: len(examples[k].ids))
    results: dict[int, Tensor] = {}
    with _evaluating(model):
        for a in range(0, len(order), size):
            mine = order[a : a + size]
            batch = collate([examples[k] for k in mine], pad, device)
            results.update(zip(mine, compute(model, batch).cpu(), strict=True))
    return [results[k] for k in range(len(examples))]


def fitting_length(model: Any, asked: int | None) -> int:
    """Tokens of a sequence at most: as asked, or 512 where nothing is asked and the model can read that many.

    The model may be its configuration.

    Raises
    ------
    ValueError
        If the model cannot read as many as asked.
    """
    most = getattr(getattr(model, "config", model), "max_position_embeddings", None) or asked or DEFAULT_LENGTH
    if asked is not None and asked > most:
        raise ValueError(f"max_length must be at most {most}, which is what the model can read; found {asked}")
    return asked or min(DEFAULT_LENGTH, most)
