# SPDX-License-Identifier: BSD-3-Clause
"""Active parts of a parameter, and gradients that are stored for these parts only.

A parameter of n entries, seen as a table of n / unit slices of ``unit`` consecutive entries, is active in some of
its slices: one slice (the whole tensor), rows, experts, or with unit 1 single entries. A matrix can be active in some
of its columns, too, which are the slices of its transpose. Its gradient is zero elsewhere by definition (the rest is
frozen), so that norms, clipping and scaling of what is stored are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompactGrad", "Part", "add_rows", "flat", "pick_largest", "replace_rows", "restrict"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """The active slices of a parameter.

    Attributes
    ----------
    unit : int
        Entries of a slice.
    count : int
        Number of active slices.
    index : Tensor of int32 or int64, shape (count,), or None
        Which they are, distinct, on the device of the parameter. None: the ``count`` entries (unit 1) with the
        largest gradient, once there is one.
    columns : bool
        Whether a slice is a column of a matrix, not a run of consecutive entries.
    """

    unit: int
    count: int
    index: Tensor | None
    columns: bool = False

    @property
    def entries(self) -> int:
        """Number of active entries."""
        return self.unit * self.count

    @property
    def where(self) -> Tensor:
        """The index of a part that has one."""
        if self.index is None:
            raise AssertionError("the entries of this part are known once there is a gradient")
        return self.index

    def at(self, index: Tensor) -> Part:
        """The same number of slices elsewhere, on another device or in another order."""
        return replace(self, index=index)

    def table(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a table of slices, a view wherever its layout allows."""
        return tensor.t() if self.columns else tensor.reshape(-1, self.unit)

    def fits(self, other: Part) -> bool:
        """Whether the slices of both are cut in the same way."""
        return self.unit == other.unit and self.columns == other.columns

    @classmethod
    def whole(cls, size: int) -> Part:
        """All ``size`` entries as one slice."""
        return cls(size, 1, torch.zeros(1, dtype=index_dtype(size)))


def index_dtype(size: int) -> torch.dtype:
    """The smaller integer type that can count ``size`` entries."""
    return torch.int32 if size < 2**31 else torch.int64


def flat(tensor: Tensor) -> Tensor:
    """The entries as one vector that shares memory with ``tensor`` wherever its layout allows."""
    return tensor.detach().reshape(-1)


class CompactGrad(torch.Tensor):
    """A gradient of a parameter's shape that is zero outside some slices and stores these alone.

    It can stand in ``p.grad``: later backward passes add to it, ``clip_grad_norm_`` and ``GradScaler`` see the norm
    and the entries of the active slices, and nothing else is allowed, with an error that says what to use.

    Attributes
    ----------
    active : Tensor, shape (part.count, part.unit)
        The gradient of the active slices, in the order of ``part.index``.
    part : Part

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.zeros(2, 3))
    >>> p.grad = restrict(torch.arange(6.0).view(2, 3), Part(3, 1, torch.tensor([1])))
    >>> p.grad.active
    tensor([[3., 4., 5.]])
    >>> torch.nn.utils.clip_grad_norm_([p], 1.0).square()
    tensor(50.)
    """

    active: Tensor
    part: Part

    @staticmethod
    def __new__(cls, active: Tensor, part: Part, shape: Sequence[int]) -> CompactGrad:
        """An empty shell of the full shape around the active slices."""
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, shape, dtype=active.dtype, device=active.device)

    def __init__(self, active: Tensor, part: Part, shape: Sequence[int]) -> None:
        self.active, self.part = active, part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Say what is active."""
        return f"CompactGrad({self.part.count} slices of {self.part.unit} entries, shape={tuple(self.shape)})"

    def dense(self) -> Tensor:
        """The whole gradient with its zeros."""
        whole = self.active.new_zeros(self.shape)
        self.part.table(whole)[self.part.where] = self.active
        return whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The few operations that accumulate, measure or scale a gradient."""
        first = args[0]
        if func in (aten.mul_.Tensor, aten.div_.Tensor, aten.mul_.Scalar, aten.div_.Scalar, aten.zero_.default):
            func(first.active, *args[1:])
            return first
        if func is aten.linalg_vector_norm.default:
            return func(first.active, *args[1:], **(kwargs or {}))
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return func([g.active if isinstance(g, CompactGrad) else g for g in first], *args[1:])
        if func is aten.add_.Tensor and isinstance(first, CompactGrad) and not kwargs:
            first.active.add_(_gather(args[1], first.part))
            return first
        raise NotImplementedError(
            f"{func} is not defined for a gradient that is stored for the active slices only; use .grad.active "
            "(their gradient), .grad.dense() (with zeros elsewhere), or max_grad_norm= of the optimizer for clipping; "
            'in place of DistributedDataParallel, the bare model and process_group="world" of the optimizer'
        )


def _gather(grad: Tensor, part: Part) -> Tensor:
    """The slices of ``part`` as a new table of shape (count, unit); 0 where a compact gradient lacks them."""
    if not isinstance(grad, CompactGrad):
        return part.table(grad)[part.where]
    if not grad.part.fits(part):
        raise AssertionError("compact gradients are narrowed to slices of the same size only")
    ordered, order = grad.part.where.sort()
    place = torch.searchsorted(ordered, part.where).clamp_(max=len(ordered) - 1)
    held = (ordered[place] == part.where).unsqueeze(1)
    return grad.active[order[place]].mul_(held)


def restrict(grad: Tensor, part: Part) -> Tensor:
    """The gradient kept for ``part`` only: itself where that is the whole tensor, else a :class:`CompactGrad`.

    Parameters
    ----------
    grad : Tensor
        Dense or compact, of the parameter's shape.
    part : Part
        With an index; if ``grad`` is compact its slices have the same size.
    """
    if part.unit == grad.numel() and not isinstance(grad, CompactGrad):
        return grad
    return CompactGrad(_gather(grad, part), part, grad.shape)


def replace_rows(param: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The gradient that is held for a parameter (compact, or none), with these values in these rows."""
    old, rows = param.grad, rows.to(index_dtype(param.numel()))
    if isinstance(old, CompactGrad):
        others = ~torch.isin(old.part.where, rows)
        rows = torch.cat([old.part.where[others], rows])
        values = torch.cat([old.active[others], values])
    return CompactGrad(values, Part(values.shape[1], len(rows), rows), param.shape)


def add_rows(grad: CompactGrad, rows: Tensor, values: Tensor) -> None:
    """Add values to rows of a compact gradient; to those that it holds."""
    part = Part(grad.part.unit, len(rows), rows.to(grad.part.where.dtype))
    grad.active.add_(_gather(CompactGrad(values, part, grad.shape), grad.part))


def pick_largest(grad: Tensor, count: int) -> Part:
    """The ``count`` entries with the largest absolute gradient, ties by index.

    Parameters
    ----------
    grad : Tensor
        Dense, or compact with unit 1.
    count : int
        At most the number of entries held.

    Returns
    -------
    Part
        Unit 1, index ascending.
    """
    size = (grad.active if isinstance(grad, CompactGrad) else grad).reshape(-1).abs()
    if count >= size.numel():
        chosen = torch.arange(size.numel(), device=size.device)
    else:
        least = size.topk(count, sorted=False).values.min()
        above = (size > least).nonzero().squeeze(1)
        level = (size == least).nonzero().squeeze(1)[: count - above.numel()]
        chosen = torch.cat([above, level]).sort().values
    if isinstance(grad, CompactGrad):
        chosen = grad.part.where[chosen].sort().values
    return Part(1, chosen.numel(), chosen.to(index_dtype(grad.numel())))
