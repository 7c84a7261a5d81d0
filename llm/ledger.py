# SPDX-License-Identifier: BSD-3-Clause
"""Every byte that training holds: storages are counted as operations make them, and again as they are freed.

On real tensors this is a measurement. On fake ones, which have shapes and types but no data, it is a simulation of
models that no memory here could hold. Then fake tensors stand for the device and real ones for the host: all that
comes from a fake weight is fake. A real tensor counts if the model made it (a mask, say), or if it is state.

Seen are the results of operations. Not seen are what a kernel needs inside an operation, what an allocator wastes,
and the context of a device.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llm.compact import CompactGrad

__all__ = ["PARTS", "Ledger", "Peak", "watch"]

PARTS = ("weights", "gradients", "state", "activations", "temporary")
aten = torch.ops.aten


@dataclass(frozen=True)
class Peak:
    """The moment of a phase of training at which most bytes were alive.

    Attributes
    ----------
    parts : dict of str to int
        Bytes of the weights (buffers included), gradients of weights, state of the optimizer, activations
        (recomputed ones included), and of all else: gradients of activations and what updates and scores take.
    step : int
        From 1.
    phase : {"forward", "backward", "step"}
    census : bool
        Whether :class:`llm.BlockLLM` took a census in that step.
    """

    parts: dict[str, int]
    step: int
    phase: str
    census: bool

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Size and moment, for people."""
        return f"{self.total / 1e9:.2f} GB in the {self.phase} of step {self.step}{', a census' * self.census}"


@dataclass(eq=False, slots=True)
class _Storage:
    """Bytes that were allocated together, and the part that they turned out to be."""

    size: int
    part: str
    watched: Any  # the weak reference that tells when it is freed


class Ledger(TorchDispatchMode):
    """Bytes alive while this mode is on.

    Parameters
    ----------
    simulating : bool
        Tensors are fake. Questions that have no answer without data (is this norm finite?) are answered with 1.

    Attributes
    ----------
    now, most : int
        Bytes alive, and the most since the last :meth:`close`.
    forward : bool
        Whether a model runs forward: all that is made then are activations.
    """

    def __init__(self, simulating: bool) -> None:
        super().__init__()
        self.simulating = simulating
        self.now = self.most = 0
        self.forward = False
        self._alive: dict[int, _Storage] = {}  # by address
        self._at_most: list[_Storage] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count what it made."""
        if CompactGrad in kinds:
            return NotImplemented  # it takes itself apart, and its operations come here one by one
        out = _answer(func, args, kwargs or {}) if self.simulating else func(*args, **(kwargs or {}))
        in_model = self.forward or torch.is_grad_enabled()  # recomputation; neither gradients nor optimizers
        for tensor in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(tensor, Tensor) and (in_model or isinstance(tensor, FakeTensor) or not self.simulating):
                self.add(tensor, "activations" if in_model else "temporary")
        if self.now > self.most:
            self.most, self._at_most = self.now, list(self._alive.values())
        return out

    def add(self, tensor: Tensor, part: str) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = _storage(tensor)
        if storage is not None and storage._cdata not in self._alive:
            address = storage._cdata
            tell = weakref.ref(storage, functools.partial(self._freed, address))
            self._alive[address] = _Storage(storage.nbytes(), part, tell)
            self.now += storage.nbytes()

    def _freed(self, address: int, _: Any) -> None:
        self.now -= self._alive.pop(address).size

    def mark(self, tensor: Tensor | None, part: str) -> None:
        """Say what a storage turned out to be; weights stay weights, and gradients gradients."""
        storage = None if tensor is None else _storage(tensor)
        known = None if storage is None else self._alive.get(storage._cdata)
        if known is not None and known.part not in ("weights", "gradients"):
            known.part = part

    def mark_state(self, optimizer: Any) -> None:
        """All that an optimizer holds is state; what its ``state`` holds counts on whichever device it is."""
        for tensor in _reached(optimizer.state, set()):
            self.add(tensor, "state")
        for tensor in _reached(vars(optimizer), set()):
            self.mark(tensor, "state")

    def close(self, step: int, phase: str, census: bool) -> Peak:
        """The peak since the last call, or since the start."""
        parts = dict.fromkeys(PARTS, 0)
        for storage in self._at_most:
            parts[storage.part] += storage.size
        self.most, self._at_most = self.now, list(self._alive.values())
        return Peak(parts, step, phase, census)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    tensor = tensor.active if isinstance(tensor, CompactGrad) else tensor
    return tensor.untyped_storage() if tensor.layout == torch.strided else None


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation; of those that would have to look at fake data, a possible one."""
    fake = args[0] if args and isinstance(args[0], FakeTensor) else None
    if fake is not None and func is aten.index.Tensor:
        args = (fake, [_places(index) for index in args[1]])
    if fake is not None and func is aten._local_scalar_dense.default:
        return torch.ones((), dtype=fake.dtype).item()
    if fake is not None and func is aten.bincount.default:
        return fake.new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0), dtype=torch.int64)
    return func(*args, **kwargs)


def _places(index: Tensor | None) -> Tensor | None:
    """A mask that is known, as numbers: how many they are could not be seen otherwise."""
    known = index is not None and index.dtype == torch.bool and index.dim() == 1 and not isinstance(index, FakeTensor)
    return index.nonzero().squeeze(1) if known else index  # type: ignore[union-attr]


def _reached(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors inside nested containers and objects, models left out."""
    if id(thing) in seen or isinstance(thing, nn.Module | types.ModuleType | type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for inner in list(thing.values()):
            yield from _reached(inner, seen)
    elif isinstance(thing, list | tuple | set):
        for inner in thing:
            yield from _reached(inner, seen)
    elif hasattr(thing, "__dict__"):
        yield from _reached(vars(thing), seen)


def watch(
    model: nn.Module,
    make: Callable[[nn.Module], Any],
    loss: Callable[[], Tensor],
    steps: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> list[Peak]:
    """Train a model and say how much memory that takes.

    Parameters
    ----------
    model : Module
        With real or fake parameters. Real ones are changed.
    make : callable
        The optimizer of a model: has ``state``, ``step()`` and ``zero_grad()``, and is closed in the end if it has
        ``close()``.
    loss : callable
        Runs the model and returns the loss.
    steps : int
    backward : callable
        What is done with the loss.

    Returns
    -------
    list of Peak
        One for each phase of each step, in order.

    Examples
    --------
    >>> model = nn.Linear(100, 10, bias=False)
    >>> peaks = watch(model, lambda m: torch.optim.Adam(m.parameters()), lambda: model(torch.ones(1, 100)).sum(), 2)
    >>> peaks[-1].parts["weights"], peaks[-1].parts["gradients"]
    (4000, 4000)
    """
    ledger, params = Ledger(any(isinstance(p, FakeTensor) for p in model.parameters())), list(model.parameters())
    for tensor in (*params, *model.buffers()):
        ledger.add(tensor, "weights")
    handles, peaks, optimizer = _tell_gradients(params, ledger), [], None

    def _done(step: int, phase: str, census: bool) -> None:
        for p in params:
            ledger.mark(p.grad, "gradients")
        ledger.mark_state(optimizer)
        peaks.append(ledger.close(step, phase, census))

    try:
        with ledger:
            with torch.no_grad():  # what it makes belongs to no pass through the model
                optimizer = make(model)
            handles += _tell_gradients(params, ledger)  # once more, behind the hooks of the optimizer
            for step in range(1, steps + 1):
                census = bool(getattr(optimizer, "census_on", False))
                ledger.forward = True
                value = loss()
                ledger.forward = False
                _done(step, "forward", census)
                backward(value)
                del value
                _done(step, "backward", census)
                optimizer.step()
                _done(step, "step", census)
                optimizer.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
        getattr(optimizer, "close", lambda: None)()
    return peaks


def _tell_gradients(params: Sequence[Tensor], ledger: Ledger) -> list[Any]:
    """Hooks that mark gradients as they come."""
    handles = []
    for p in params:
        required = p.requires_grad
        if p.is_floating_point():
            p.requires_grad_(True)  # hooks can be had only so
            handles.append(p.register_post_accumulate_grad_hook(lambda p: ledger.mark(p.grad, "gradients")))
            p.requires_grad_(required)
    return handles
