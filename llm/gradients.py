# SPDX-License-Identifier: BSD-3-Clause
"""What is done with one tensor's gradient: watch it come, cut it down, check it, use it without state."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm.adam import spectral_direction, state_free_
from llm.compact import CompactGrad, Part, flat, pick_largest, restrict
from llm.moments import CHUNK, round_to, working_dtype
from llm.patience import LossWatch

__all__ = ["Watcher", "hear_losses", "narrow", "norm_of", "not_finite_message", "stored", "update_inactive", "watch"]


class Watcher(Protocol):
    """What the hooks tell: the optimizer, which they do not keep alive."""

    losses: LossWatch

    def arrived(self, position: int, param: Tensor) -> None:
        """The gradient of a parameter has been added to ``param.grad``."""


def watch(watcher: Watcher, params: Sequence[Tensor]) -> list[Any]:
    """Hooks on all parameters that can have a gradient; leaves them requiring grad. Returns the handles."""
    handles = []
    for position, param in enumerate(params):
        if param.is_floating_point():
            param.requires_grad_(True)
            tell = functools.partial(_arrived, weakref.ref(watcher), position)
            handles.append(param.register_post_accumulate_grad_hook(tell))
    return handles


def _arrived(watcher: weakref.ref[Watcher], position: int, param: Tensor) -> None:
    alive = watcher()
    if alive is not None:
        alive.arrived(position, param)


def hear_losses(watcher: Watcher, model: nn.Module) -> Any:
    """A hook that reads the loss in what the model returns while training. Returns its handle."""
    return model.register_forward_hook(functools.partial(_returned, weakref.ref(watcher)), with_kwargs=True)


def _returned(watcher: weakref.ref[Watcher], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    alive = watcher()
    if alive is not None and module.training and torch.is_grad_enabled():
        # a model of transformers that is told how many tokens the whole window has divides by that number
        alive.losses.hear(output, share=kwargs.get("num_items_in_batch") is not None)


def stored(grad: Tensor) -> Tensor:
    """The entries of a gradient that are held in memory."""
    return grad.active if isinstance(grad, CompactGrad) else grad


def narrow(param: Tensor, part: Part | None) -> None:
    """Cut the gradient that is held for a parameter down to a part; dropped where it lacks slices of that kind."""
    grad = param.grad
    if part is None or grad is None or (isinstance(grad, CompactGrad) and not grad.part.fits(part)):
        param.grad = None
    elif part.index is None:
        param.grad = restrict(grad, pick_largest(grad, part.count))
    else:
        part = part.at(part.index.to(param.device))
        whole = part.unit < part.entries == grad.numel() and not isinstance(grad, CompactGrad)
        if whole and not part.columns:  # all slices, in ascending order as they were chosen: no copy
            param.grad = CompactGrad(grad.reshape(-1, part.unit), part, grad.shape)
        elif not (isinstance(grad, CompactGrad) and torch.equal(grad.part.where, part.where)):
            param.grad = restrict(grad, part)


def norm_of(names: Sequence[str], grads: Sequence[Tensor]) -> float:
    """The 2-norm over all these gradients.

    Raises
    ------
    ValueError
        If it is not finite, with the names of those to blame.
    """
    if not grads:
        return 0.0
    norms = _norms([stored(g) for g in grads])
    total = float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
    if not total < float("inf"):
        bad = [name for name, norm in zip(names, norms, strict=True) if not norm.isfinite()]
        raise ValueError(not_finite_message(bad or ["all active parameters together"]))
    return total


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """At once where no type has to be widened."""
    alike = all(entries.dtype == working_dtype(entries.dtype) for entries in tensors)
    return torch._foreach_norm(tensors) if alike else [_norm(entries) for entries in tensors]


def _norm(entries: Tensor) -> Tensor:
    """Piece by piece in the wider working type: a kernel may copy what it converts."""
    dtype = working_dtype(entries.dtype)
    pieces = [torch.linalg.vector_norm(piece, dtype=dtype) for piece in entries.reshape(-1).split(CHUNK)]
    return torch.linalg.vector_norm(torch.stack(pieces))


def not_finite_message(names: Sequence[str]) -> str:
    """Say whose gradient is NaN or infinite, and what helps."""
    return (
        f"gradient must be finite; that of {', '.join(names[:3])} is not. Weights that it would have changed are as "
        "they were. Look at the batch, lower lr, or train in bfloat16 rather than float16"
    )


def update_inactive(
    param: Tensor, grad: Tensor, part: Part | None, kind: str, lr: float, generator: torch.Generator
) -> None:
    """The state-free update of all entries outside ``part``; uses up ``grad``."""
    if kind == "spectral":
        kind, grad = ("sgd", spectral_direction(grad)) if grad.dim() > 1 else ("sign", grad)
    grad = grad.contiguous()
    if part is not None and part.index is not None:
        part.table(grad)[part.index] = 0
    entries, dtype = flat(param), working_dtype(param.dtype)
    for a in range(0, entries.numel(), CHUNK):
        old = entries[a : a + CHUNK]
        weight = old.to(dtype)
        state_free_(weight, grad.view(-1)[a : a + CHUNK].to(dtype), kind, lr)
        if weight is not old:
            old.copy_(round_to(weight, old.dtype, True, generator))
    if not param.is_contiguous():  # its layout is not that of a vector
        param.copy_(entries.view(param.shape))
