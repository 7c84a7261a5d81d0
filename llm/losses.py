# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a language model from the logits of the tokens that are learnt, and no others.

Logits are the largest activation of a small model: tokens x vocabulary. Where prompts and padding are not learnt,
theirs are not made: the head reads the last hidden states of the learnt tokens alone. And the usual cross-entropy
holds four arrays of the size of the logits (these, their log-softmax, and two gradients); here the gradient
``softmax - one-hot`` is written over the logits, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from llm.data import IGNORED

__all__ = ["losses_of"]

TOGETHER = {"cpu": 2**21}  # entries of logits that are gone through at a time: what a cache holds
ELSEWHERE = 2**25  # on other devices: few kernels


def losses_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The losses of the examples of a batch: sums over their learnt tokens, in nats.

    Parameters
    ----------
    model : Module
        Returns an object with ``logits``: (examples, tokens, vocabulary), each token predicted from those before it,
        or (examples, classes). If its ``get_output_embeddings()`` is a module that reads (examples, tokens, width),
        as in the causal language models of transformers, this module is given the learnt tokens only, as
        (1, learnt tokens, width). Its last operation must not need its own output for its gradient (a softmax does).
    batch : mapping
        Arguments of the model, and ``labels``, int64: (examples, tokens), -100 where a token is not learnt; or
        (examples,) or (examples, 1) for classes.

    Returns
    -------
    Tensor
        Shape (examples,), float32 (float64 for a model of that type). Can be differentiated once, and once only.
        What some models add to their own loss, such as the balance of experts, is not in it.

    Raises
    ------
    ValueError
        If there are not as many logits as labels.
    RuntimeError
        In the backward pass: if it is the second one, or was asked for a graph of its own.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[-100, -100, 3, 4]])}
    >>> losses = losses_of(model, batch)
    >>> bool(torch.isclose(losses[0] / 2, model(**batch).loss))  # a mean over two tokens
    True
    """
    inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    unknown = isinstance(labels, FakeTensor) or labels.is_meta or labels.dim() == 1
    learnt = None if unknown else (targets.flatten() != IGNORED).nonzero()[:, 0]
    with _only(learnt, labels.shape, model) as shortened:
        logits = model(**inputs).logits
    if logits.dim() == 2:
        return _plain(logits, labels.flatten())
    expected = (1, learnt.numel()) if learnt is not None and shortened else labels.shape
    if logits.shape[:-1] != expected:
        raise ValueError(
            f"the model must return logits for {tuple(expected)} tokens; found logits of shape {tuple(logits.shape)}"
        )
    if learnt is None:
        return _plain(logits, targets).sum(1)
    logits, place = logits.flatten(0, 1), learnt.to(logits.device)
    logits = logits if shortened else logits.index_select(0, place)
    every = _CrossEntropy.apply(logits, targets.flatten()[learnt].to(logits.device))
    return every.new_zeros(labels.numel()).index_put((place,), every).view(labels.shape).sum(1)


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every target, 0 where it is ignored."""
    flat = logits.flatten(0, -2).to(_wide(logits.dtype)), targets.flatten()
    return nn.functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view(targets.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def _only(learnt: Tensor | None, shape: Sequence[int], model: Any) -> Iterator[list[bool]]:
    """In this block a model's head reads the learnt tokens only, if it reads every token by itself.

    The list that is given to the block is not empty once it has done so.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shortened: list[bool] = []
    if learnt is None or not isinstance(head, nn.Module):
        yield shortened
        return

    def shorten(_: nn.Module, args: tuple[Any, ...]) -> Any:
        """The input of the head, cut down."""
        whole = len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[:-1] == shape
        if not whole or torch.compiler.is_compiling():
            return None
        shortened.append(True)
        return (args[0].flatten(0, 1).index_select(0, learnt.to(args[0].device))[None],)

    hook = head.register_forward_pre_hook(shorten)
    try:
        yield shortened
    finally:
        hook.remove()


class _CrossEntropy(torch.autograd.Function):
    """``-log softmax(logits)[target]`` of every row; its backward pass writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses."""
        wide = _wide(logits.dtype)
        sums = logits.new_empty(len(logits), dtype=wide)
        for rows in _pieces(logits):
            torch.logsumexp(logits[rows].to(wide), 1, out=sums[rows])
        ctx.save_for_backward(logits, targets, sums)
        ctx.over = False
        return sums - logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the logits, in their memory."""
        if ctx.over or torch.is_grad_enabled():  # enabled: with create_graph=True
            raise RuntimeError("losses_of can be differentiated once: its gradient is written over the logits")
        logits, targets, sums = ctx.saved_tensors
        logits, ctx.over = logits.detach(), True
        for rows in _pieces(logits):
            share = logits[rows].to(sums.dtype)  # the logits themselves in float32
            share.sub_(sums[rows, None]).exp_()
            share[torch.arange(len(share), device=share.device), targets[rows]] -= 1
            logits[rows] = share.mul_(grad[rows, None])
        return logits, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, TOGETHER.get(logits.device.type, ELSEWHERE) // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, len(logits), step))
