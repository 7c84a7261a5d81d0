# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a language model from the logits of the tokens that are learnt, and no others.

Logits are the largest activation of a small model: tokens x vocabulary. Where prompts and padding are not learnt,
theirs are not made: the head reads the last hidden states of the learnt tokens alone. And the usual cross-entropy
holds four arrays of the size of the logits (these, their log-softmax, and two gradients); here the gradient
``softmax - one-hot`` is written over the logits, some rows at a time.

Of a head that is not trained only the gradient of its input is wanted, a row for every token that needs nothing of the
other tokens. Then logits are made for some tokens at a time, turned into a loss and that gradient, and overwritten by
those of the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from llm.data import IGNORED
from llm.row_gradients import RowForward

__all__ = ["losses_of"]

TOGETHER = {"cpu": 2**21}  # entries of logits that are gone through at a time: what a cache holds
ELSEWHERE = 2**25  # on other devices: few kernels
APART = {"cpu": 2**23}  # the same where they are made at a time: the weight of the head is read for every piece

BOOST = 2**10  # of gradients in float16, whose small numbers are few

_returned: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # heads: whether their model returns what they give


def losses_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The losses of the examples of a batch: sums over their learnt tokens, in nats.

    Parameters
    ----------
    model : Module
        Returns an object with ``logits``: (examples, tokens, vocabulary), each token predicted from those before it,
        or (examples, classes). If its ``get_output_embeddings()`` is a module that reads (examples, tokens, width),
        as in the causal language models of transformers, this module is given the learnt tokens only, as
        (1, learnt tokens, width). Its last operation must not need its own output for its gradient (a softmax does).
        A plain linear layer that is not trained, or one without gradients, is given one token, where the model returns
        what it gives as it is: to find that out the model is called once with the first example, in evaluation mode.
    batch : mapping
        Arguments of the model, and ``labels``, int64: (examples, tokens), -100 where a token is not learnt; or
        (examples,) or (examples, 1) for classes.

    Returns
    -------
    Tensor
        Shape (examples,), float32 (float64 for a model of that type). Can be differentiated once; a second backward
        pass is possible only where the head is not trained.
        What some models add to their own loss, such as the balance of experts, is not in it.

    Raises
    ------
    ValueError
        If there are not as many logits as labels.
    RuntimeError
        In the backward pass: if it is the second one and the head is trained, or was asked for a graph of its own.

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
    with _only(learnt, labels.shape, model, inputs) as read:
        logits = model(**inputs).logits
    if read.apart and not read.gave(logits):  # what the model does with its logits has to be differentiated
        _returned[read.head] = False
        del logits, read
        with _only(learnt, labels.shape, model, inputs) as read:
            logits = model(**inputs).logits
    if logits.dim() == 2:
        return _plain(logits, labels.flatten())
    expected = (1, learnt.numel()) if learnt is not None and read.hidden is not None else labels.shape
    if logits.shape[:-1] != (expected if not read.apart else (1, min(1, expected[1]))):
        raise ValueError(
            f"the model must return logits for {tuple(expected)} tokens; found logits of shape {tuple(logits.shape)}"
        )
    if learnt is None:
        return _plain(logits, targets).sum(1)
    place = learnt.to(logits.device)
    wanted = targets.flatten()[learnt].to(logits.device)
    if read.apart and read.hidden is not None:
        every = _HeadLoss.apply(read.hidden.to(logits.dtype), read.weight, read.bias, wanted)
    else:
        logits = logits.flatten(0, 1)
        logits = logits if read.hidden is not None else logits.index_select(0, place)
        every = _CrossEntropy.apply(logits, wanted)
    return every.new_zeros(labels.numel()).index_put((place,), every).view(labels.shape).sum(1)


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every target, 0 where it is ignored."""
    flat = logits.flatten(0, -2).to(_wide(logits.dtype)), targets.flatten()
    return nn.functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view(targets.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass
class _Read:
    """What the head of a model was given instead of all tokens.

    Attributes
    ----------
    head : Module or None
    apart : bool
        Whether it saw the first learnt token only, and the logits of all are to be made from ``hidden``.
    hidden : Tensor or None
        Of the learnt tokens; None if the head was given what it is given otherwise.
    weight, bias, made : Tensor or None
        With what, and what it made.
    """

    head: Any = None
    apart: bool = False
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    made: Tensor | None = None
    version: int = 0

    def see(self, head: Any, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the head."""
        self.made, self.version, self.weight, self.bias = output, output._version, head.weight, head.bias

    def gave(self, logits: Tensor) -> bool:
        """Whether these are what the head has made, as it was made, with what it still holds."""
        same = self.head.weight is self.weight and self.head.bias is self.bias
        fits = self.weight is not None and self.weight.shape[:1] == logits.shape[-1:]
        return same and fits and logits is self.made and logits._version == self.version


@contextmanager
def _only(learnt: Tensor | None, shape: Sequence[int], model: Any, inputs: Mapping[str, Any]) -> Iterator[_Read]:
    """In this block a model's head reads the learnt tokens only, if it reads every token by itself."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if learnt is None or not isinstance(head, nn.Module):
        yield _Read()
        return
    read = _Read(head, _frozen(head) and _returns(model, head, inputs, shape))

    def shorten(_: nn.Module, args: tuple[Any, ...]) -> Any:
        """The input of the head, cut down."""
        whole = len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[:-1] == shape
        if not whole or torch.compiler.is_compiling():
            read.apart = read.apart and read.hidden is not None  # if it has been cut before, that cannot be taken back
            return None
        read.hidden = args[0].flatten(0, 1).index_select(0, learnt.to(args[0].device))
        return (read.hidden[None, :1] if read.apart else read.hidden[None],)

    hooks = [head.register_forward_pre_hook(shorten)]
    if read.apart:
        hooks.append(head.register_forward_hook(read.see))
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def _returns(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether a model returns what its head gives; found out once, on one token of the first example."""
    if head in _returned:
        return _returned[head]
    first = {k: v[:1] if isinstance(v, Tensor) and v.shape[:1] == shape[:1] else v for k, v in inputs.items()}
    read, modes = _Read(head), {module: module.training for module in model.modules()}

    def shorten(_: nn.Module, args: tuple[Any, ...]) -> Any:
        """The first token."""
        return (args[0][:, :1], *args[1:])

    hooks = head.register_forward_pre_hook(shorten), head.register_forward_hook(read.see)
    model.eval()  # nothing is drawn, and nothing that is told of training steps counts this
    try:
        with torch.no_grad():
            _returned[head] = read.gave(model(**first).logits)
    except (RuntimeError, ValueError, IndexError):  # it wants logits of all tokens
        _returned[head] = False
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return _returned[head]


def _frozen(head: nn.Module) -> bool:
    """Whether it is a plain linear layer that gets no gradient, and nothing else looks at what it does."""
    plain = type(head).forward is nn.Linear.forward and not head._forward_hooks and not head._forward_pre_hooks
    own = head.__dict__.get("forward")  # that of an optimizer is the plain one where the weight is not trained
    looked_at = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    if not plain or looked_at or not (own is None or isinstance(own, RowForward)) or torch.is_inference_mode_enabled():
        return False
    held = [p for p in (head.weight, head.bias) if p is not None]
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in held)
    return not trained and all(type(p) in (Tensor, nn.Parameter) for p in held)


class _HeadLoss(torch.autograd.Function):
    """``-log softmax(W h + b)[target]`` of every row h, whose gradient is made in the forward pass; not that of W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """The losses."""
        low, wide = hidden.dtype, _wide(hidden.dtype)
        weight, bias = weight.to(low), None if bias is None else bias.to(low)
        every = hidden.new_empty(len(hidden), dtype=wide)
        made = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        room: Any = None
        for rows in _pieces(hidden, len(weight), APART):
            x, target = hidden[rows], targets[rows, None]
            room = hidden.new_empty(len(x), len(weight)) if room is None else room[: len(x)]
            args = (x, weight.t()) if bias is None else (bias, x, weight.t())
            logits = torch.mm(*args, out=room) if bias is None else torch.addmm(*args, out=room)
            share = logits.to(wide)
            picked, top = share.gather(1, target), share.amax(1, keepdim=True)
            total = share.sub_(top).exp_().sum(1, keepdim=True)
            every[rows] = (total.log() + top - picked)[:, 0]
            if made is not None:
                share.div_(total).scatter_add_(1, target, share.new_full(target.shape, -1))
                share = share.mul_(BOOST) if low == torch.float16 else share
                torch.mm(share.to(low), weight, out=made[rows])
        ctx.save_for_backward(made)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the rows."""
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("losses_of cannot be differentiated twice")
        (made,) = ctx.saved_tensors
        grad = grad / BOOST if made.dtype == torch.float16 else grad
        return (made * grad[:, None]).to(made.dtype), None, None, None


class _CrossEntropy(torch.autograd.Function):
    """``-log softmax(logits)[target]`` of every row; its backward pass writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses."""
        wide = _wide(logits.dtype)
        sums = logits.new_empty(len(logits), dtype=wide)
        room: Any = None
        for rows in _pieces(logits, logits.shape[1], TOGETHER):
            piece = logits[rows]
            room = torch.empty_like(piece, dtype=wide) if room is None else room[: len(piece)]
            top = piece.amax(1, keepdim=True).to(wide)
            total = torch.sub(piece, top, out=room).exp_().sum(1, keepdim=True)
            sums[rows] = total.log_().add_(top)[:, 0]
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
        for rows in _pieces(logits, logits.shape[1], TOGETHER):
            share = logits[rows].to(sums.dtype)  # the logits themselves in float32
            share.sub_(sums[rows, None]).exp_()
            share[torch.arange(len(share), device=share.device), targets[rows]] -= 1
            logits[rows] = share.mul_(grad[rows, None])
        return logits, None


def _pieces(rows: Tensor, words: int, together: Mapping[str, int]) -> Iterator[slice]:
    step = max(1, together.get(rows.device.type, ELSEWHERE) // max(1, words))
    return (slice(start, start + step) for start in range(0, len(rows), step))
