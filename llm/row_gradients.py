# SPDX-License-Identifier: BSD-3-Clause
"""Weight gradients of the active rows alone, where the modules allow it.

A linear layer y = x W' has the weight gradient dW = dy' x, and its rows R alone are ``dy[:, R]' x``: what they cost
in time and memory goes with the number of active rows, not with the size of W. Of a token table the gradient of row t
is the sum of dy over the places of token t.

Modules that hold such a parameter keep computing the same output. Only its backward pass differs: it hands the rows'
gradient to a leaf without memory of its own, the slot, whose hook tells the optimizer. The parameter still requires
grad, so that what a model does with it outside of these modules reaches it as before.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RowGradients", "RowWatcher", "cover"]


class RowWatcher(Protocol):
    """What the slots tell: the optimizer, which they do not keep alive."""

    def arrived_rows(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter's active rows, in the order in which :meth:`RowForward.use` got them."""


class _Linear(torch.autograd.Function):
    """``functional.linear``, with the gradient of some rows of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, rows: Tensor) -> Tensor:
        """What the layer computes."""
        ctx.save_for_backward(x, weight, rows)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the input, the bias and the active rows."""
        x, weight, rows = ctx.saved_tensors
        wants_x, _, wants_bias, wants_rows, _ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = functional.linear(grad, weight.t()) if wants_x else None
        grad_bias = flat.sum(0) if wants_bias else None
        grad_rows = flat.index_select(1, rows).t() @ x.reshape(-1, x.shape[-1]) if wants_rows else None
        return grad_x, None, grad_bias, grad_rows, None


class _Table(torch.autograd.Function):
    """``functional.embedding``, with the gradient of some rows of the table."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, slot: Tensor, rows: Tensor, padding: int | None) -> Tensor:
        """The rows of the tokens."""
        ctx.save_for_backward(tokens, rows)
        ctx.padding = padding
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the active rows."""
        tokens, rows = ctx.saved_tensors
        tokens = tokens.reshape(-1)
        ordered, order = rows.sort()
        place = torch.searchsorted(ordered, tokens.to(ordered.dtype)).clamp_(max=len(ordered) - 1)
        held = ordered[place] == tokens
        if ctx.padding is not None:
            held &= tokens != ctx.padding
        flat = grad.reshape(-1, grad.shape[-1])
        total = flat.new_zeros(len(rows), flat.shape[1])
        total.index_add_(0, order[place[held]], flat[held])
        return None, None, total, None, None


class RowForward:
    """The forward of a linear layer or token table whose weight has few active rows.

    Parameters
    ----------
    module : Linear or Embedding
        Gets this as its ``forward`` until :meth:`remove`; a copy of the module gets the plain one.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.weight = module, module.weight
        self.slot: Tensor | None = None
        self.rows: Tensor | None = None
        module.forward = self

    def __reduce__(self) -> Any:
        """Saved and copied as the plain forward: the slot belongs to one optimizer and one module."""
        return getattr, (self.module, "forward")  # of its class: nothing is in the new module yet

    def __call__(self, input: Tensor) -> Tensor:
        """What the module computes; compiled and replaced weights take the plain way, with their whole gradient."""
        module, slot, x = self.module, self.slot, input
        plain = slot is None or not torch.is_grad_enabled() or module.weight is not self.weight
        if plain or torch.compiler.is_compiling():
            return type(module).forward(module, x)
        weight = self.weight.detach()
        if isinstance(module, nn.Embedding):
            return _Table.apply(x, weight, slot, self.rows, module.padding_idx)
        bias = module.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        return _Linear.apply(x, weight, bias, slot, self.rows)

    def use(self, slot: Tensor | None, rows: Tensor | None) -> None:
        """Take gradients of these rows alone from the next forward on; None: of the whole weight, as ever."""
        self.slot, self.rows = slot, rows

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward


class RowGradients:
    """The slots of all parameters of a model that can have them.

    Parameters
    ----------
    watcher : RowWatcher
        Kept weakly.
    model : Module
    params : sequence of Tensor
        By position.
    """

    def __init__(self, watcher: RowWatcher, model: nn.Module, params: Sequence[Tensor]) -> None:
        self._watcher = weakref.ref(watcher)
        self._forwards = {k: [RowForward(m) for m in modules] for k, modules in cover(model, params).items()}
        self._rows: dict[int, Tensor] = {}

    def use(self, wanted: dict[int, Tensor]) -> None:
        """Positions and their active rows whose gradients alone are wanted; all others get whole gradients."""
        for position, forwards in self._forwards.items():
            rows = wanted.get(position)
            if rows is self._rows.get(position):
                continue
            slot = None if rows is None else self._slot(position, forwards[0].weight, len(rows))
            for forward in forwards:
                forward.use(slot, rows)
        self._rows = {position: rows for position, rows in wanted.items() if position in self._forwards}

    def _slot(self, position: int, weight: Tensor, count: int) -> Tensor:
        """A leaf with the shape of the active rows, of one entry in memory."""
        slot = weight.detach().new_zeros(()).expand(count, weight.shape[1]).requires_grad_()
        slot.register_post_accumulate_grad_hook(functools.partial(_tell, self._watcher, position))
        return slot

    def remove(self) -> None:
        """Give all modules their own forwards back."""
        for forwards in self._forwards.values():
            for forward in forwards:
                forward.remove()
        self._forwards, self._rows = {}, {}


def _tell(watcher: weakref.ref[RowWatcher], position: int, slot: Tensor) -> None:
    grad, slot.grad = slot.grad, None
    alive = watcher()
    if alive is not None and grad is not None:
        alive.arrived_rows(position, grad)


def cover(model: nn.Module, params: Sequence[Tensor]) -> dict[int, list[nn.Module]]:
    """Positions of the matrices that only plain linear layers and token tables hold, with those modules.

    Examples
    --------
    >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    >>> list(cover(model, list(model.parameters())))
    [0, 1]
    """
    places = {id(p): k for k, p in enumerate(params)}
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in places:
                holders.setdefault(places[id(parameter)], []).append(module)
    return {k: modules for k, modules in holders.items() if all(_plain(m, params[k]) for m in modules)}


def _plain(module: nn.Module, weight: Tensor) -> bool:
    """Whether a module's output is what the functions above compute, from this weight."""
    if "forward" in module.__dict__ or module._parameters.get("weight") is not weight or weight.dim() != 2:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    table = type(module).forward is nn.Embedding.forward
    return table and module.max_norm is None and not (module.sparse or module.scale_grad_by_freq)
