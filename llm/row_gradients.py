# SPDX-License-Identifier: BSD-3-Clause
"""Weight gradients of the active rows alone, where the modules allow it.

A linear layer y = x W' has the weight gradient dW = dy' x, and its rows R alone are ``dy[:, R]' x``: what they cost
in time and memory goes with the number of active rows, not with the size of W. Its columns C alone are ``dy' x[:, C]``,
for which those columns of the input suffice. Of a token table the gradient of row t is the sum of dy over the places of
token t. What follows says rows, and means columns of a weight whose slices are columns.

Modules that hold such a parameter keep computing the same output. Only its backward pass differs: it hands the rows'
gradient to a leaf without memory of its own, the slot, whose hook tells the optimizer. The parameter still requires
grad, so that what a model does with it outside of these modules reaches it as before.

A census wants the norms of all rows. The modules then make the gradient of a few rows at a time, tell it and free it.
Where the weight of a head is also the token table, the gradients of both add up, in the rows of the batch's tokens:
of these the head's gradient is kept until the table's comes. A weight that is used in any other way several times
gets its whole gradient.

A linear layer needs its input for that. Where the input is a product (``silu(gate) * up``, a scaled norm) autograd
holds the factors in any case, and the gradient is made from these instead of holding their product as well. So is
that of the weight of a norm.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

__all__ = ["RowGradients", "RowWatcher", "cover"]

Rows = slice | Tensor


class RowWatcher(Protocol):
    """What is told of rows: the optimizer, which is not kept alive."""

    def arrived_rows(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter's active rows, in the order in which :meth:`RowGradients.use` got them."""

    def use_rows(self, position: int, gradient: Callable[[Rows], Tensor]) -> bool:
        """A function that makes the gradient of active rows; False: :meth:`arrived_rows` is wanted."""

    def by_rows(self, position: int) -> bool:
        """In a census: whether the gradient shall come by rows, not whole."""

    def survey(self, position: int, gradient: Callable[[Rows], Tensor], more: bool) -> None:
        """In a census: a function that makes the gradient of rows; ``more``: there will be :meth:`survey_rows`."""

    def survey_rows(self, position: int, rows: Tensor, grad: Tensor, others: Tensor | None) -> None:
        """In a census: the gradient of some rows, to which that of ``others`` adds, which was surveyed before.

        Without others it is zero in all other rows.
        """


# -- inputs that are products ----------------------------------------------------------------------

TOGETHER = 2**20  # entries of a product that are made at a time on a CPU: little memory, and few regions of threads
ELSEWHERE = 2**25  # entries of a gradient that are copied at a time on other devices: few kernels
_scratch = threading.local()  # .tensor: where they are made, since fresh memory takes longer than a multiplication


def _factors(node: Any) -> list[Any] | None:
    """What autograd holds of the factors of a multiplication's output; None if that is not all of them.

    Tensors and numbers. A factor that it does not hold may be the output of another multiplication. What hooks have
    packed (those of a checkpoint that has ended) is not looked at: it can be unpacked once only.
    """
    node = node.product if isinstance(node, _Scale._backward_cls) else node  # whose output is that of the product
    if node is None or node.name() != "MulBackward0":
        return None
    raw = node._raw_saved_self, node._raw_saved_other
    if not all(isinstance(getattr(held, "data", None), Tensor | float | None) for held in raw):
        return None
    found: list[Any] = []
    for saved, (made_by, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
        factors = [saved] if saved is not None else _factors(made_by)
        if factors is None:
            return None
        found = found + factors if saved is not None else factors + found  # what was multiplied first comes first
    return found


def _is_product(node: Any) -> bool:
    """Whether all factors are held; also False where their graph has been freed or a factor has been changed."""
    try:
        return _factors(node) is not None
    except RuntimeError:
        return False


class _Matrix:
    """The product of some tensors as a matrix, a row for every token.

    In float32 a factor that is the same in a whole row or column (what a norm divides by, the weight of a norm) goes
    to the other side of a matrix product; on a CPU what remains is multiplied some rows at a time, unless it is asked
    for again. Low precision multiplies as the model did, and sums as a matrix product does.

    Parameters
    ----------
    factors : sequence of Tensor or float
        Each of ``shape`` or broadcast to it.
    shape : sequence of int
    dtype : torch.dtype
        Of the product.
    chosen : slice or Tensor
        Its columns; the others are not made.

    Attributes
    ----------
    columns : int
        How many.
    """

    def __init__(
        self, factors: Sequence[Any], shape: Sequence[int], dtype: torch.dtype, chosen: Rows = slice(None)
    ) -> None:
        columns, wide = shape[-1], dtype.itemsize >= 4
        base = max((factor for factor in factors if _has_entries(factor)), key=torch.numel)
        self.scale: Any = None  # of the rows, shape (rows, 1)
        self.weight: Any = None  # of the columns, shape (columns,)
        self._full: list[Any] = []
        self._rows, self._dtype = math.prod(shape[:-1]), dtype
        self.columns = len(chosen) if isinstance(chosen, Tensor) else len(range(columns)[chosen])
        self._in_pieces = wide and base.is_cpu and not isinstance(base, FakeTensor)
        self._reuses = self._in_pieces and all(_is_plain(factor, dtype) for factor in factors)
        for factor in factors:
            movable = wide and factor is not base and columns > 1
            if not _has_entries(factor):
                self._full.append(factor)
            elif movable and factor.shape[-1] == 1:
                factor = factor.expand(*shape[:-1], 1).reshape(-1, 1).to(dtype)
                self.scale = factor if self.scale is None else self.scale * factor
            elif movable and factor.numel() == columns:
                factor = factor.reshape(-1)[chosen].to(dtype)
                self.weight = factor if self.weight is None else self.weight * factor
            else:
                self._full.append(_columns_of(factor.expand(shape), chosen).reshape(-1, self.columns))

    @property
    def made_again(self) -> bool:
        """Whether it has to be multiplied, which is done at once and held if it is asked for twice."""
        return len(self._full) > 1

    def pieces(self) -> list[slice]:
        """Which rows to multiply at a time: all from the second time on, and where one factor is left."""
        if not self._in_pieces and len(self._full) > 1:
            self._full = [functools.reduce(operator.mul, self._full)]
        self._in_pieces = False
        step = max(1, TOGETHER // self.columns if len(self._full) > 1 else self._rows)
        return [slice(start, start + step) for start in range(0, max(1, self._rows), step)]

    def product(self, rows: slice) -> Tensor:
        """Some rows of what is multiplied; on a CPU up to the next call in this thread, if it is made in pieces."""
        factors = [factor[rows] if _has_entries(factor) else factor for factor in self._full]
        if not self._reuses or torch.is_grad_enabled() or len(factors) < 2:
            return functools.reduce(operator.mul, factors).to(self._dtype)
        factors.sort(key=_has_entries, reverse=True)
        first, second, *more = factors
        out = torch.mul(first, second, out=_reused(first.shape, self._dtype))
        return functools.reduce(Tensor.mul_, more, out)

    def times(self, left: Tensor) -> Tensor:
        """``left' @ self``, shape (columns of left, columns)."""
        left = left if self.scale is None else left * self.scale
        first, *more = self.pieces()
        out: Any
        if more:
            out = left.new_zeros(left.shape[1], self.columns)
            for rows in (first, *more):
                out.addmm_(left[rows].t(), self.product(rows))
        else:
            out = left.t() @ self.product(first)
        return out if self.weight is None else out.mul_(self.weight)

    def turned(self, right: Tensor) -> Tensor:
        """``self' @ right``, shape (columns, columns of right)."""
        right = right if self.scale is None else right * self.scale
        first, *more = self.pieces()
        out: Any = self.product(first).t() @ right[first]
        for rows in more:
            out.addmm_(self.product(rows).t(), right[rows])
        return out if self.weight is None else out.mul_(self.weight[:, None])

    def sums(self, left: Tensor) -> Tensor:
        """The sums of the columns of ``left * self``."""
        out: Any = 0
        for rows in self.pieces():
            product = left[rows] * self.product(rows)
            out = out + (product if self.scale is None else product.mul_(self.scale[rows])).sum(0)
        return out if self.weight is None else out.mul_(self.weight)


def _columns_of(tensor: Tensor, chosen: Rows) -> Tensor:
    """Some places of the last axis; a view if they are a slice."""
    return tensor.index_select(-1, chosen) if isinstance(chosen, Tensor) else tensor[..., chosen]


def _reused(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape in the memory that this thread keeps for it."""
    size, held = math.prod(shape), getattr(_scratch, "tensor", None)
    if held is None or held.dtype != dtype or held.numel() < size:
        held = _scratch.tensor = torch.empty(size, dtype=dtype)
    return held[:size].view(shape)


def _has_entries(factor: Any) -> bool:
    """Whether it is more than a number."""
    return isinstance(factor, Tensor) and factor.dim() > 0


def _is_plain(factor: Any, dtype: torch.dtype) -> bool:
    """Whether it is a number, or a tensor of this type and no subclass of one."""
    return not _has_entries(factor) or (factor.dtype == dtype and type(factor) in (Tensor, nn.Parameter))


def _may_look() -> bool:
    """Whether what autograd saves can be looked at: not where hooks take it away, as checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _factor(node: Any, weight: Tensor) -> Any:
    """The node that made the factor of ``weight`` in a multiplication, if that factor can be made again."""
    if node is None or node.name() != "MulBackward0":
        return None
    for saved, (made_by, _) in zip((node._saved_other, node._saved_self), node.next_functions, strict=True):
        whole = _has_entries(saved) and saved.shape == weight.shape
        same = whole and saved.untyped_storage()._cdata == weight.untyped_storage()._cdata
        if same and _is_product(made_by):
            return made_by
    return None


def _scales_once(output: Any, weight: Tensor, inputs: Any) -> bool:
    """Whether an output is a product with a weight that nothing else in its graph uses, down to the inputs."""
    waiting: list[Any] = [output.grad_fn] if isinstance(output, Tensor) else []
    known: set[Any] = {x.grad_fn for x in tree_leaves(inputs) if isinstance(x, Tensor)} | {None}
    users: list[Any] = []
    while waiting:
        node = waiting.pop()
        if node not in known:
            known.add(node)
            made_by = [before for before, _ in node.next_functions]
            users += [node for before in made_by if getattr(before, "variable", None) is weight]
            waiting += made_by
    return users == [output.grad_fn] if users else False


# -- functions -------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """``functional.linear``, with the gradient of some rows of the weight, and in a census of all by turns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor | None, rows: Tensor | None, shared: Any
    ) -> Tensor:
        """What the layer computes."""
        ctx.shared = shared
        ctx.made_by = x.grad_fn if _may_look() and _is_product(x.grad_fn) else None
        ctx.cut = shared.columns and rows is not None and not ctx.made_by and not weight.requires_grad
        held = x.index_select(-1, rows) if ctx.cut else x  # type: ignore[arg-type]
        ctx.save_for_backward(None if ctx.made_by else held, weight, rows)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the input, the bias and the active rows."""
        x: Any
        x, weight, rows = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_rows, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = functional.linear(grad, weight.t()) if wants_x else None
        grad_bias = flat.sum(0) if wants_bias else None
        if not (wants_weight or wants_rows):
            return grad_x, None, grad_bias, None, None, None
        factors: Any = [x] if x is not None else _factors(ctx.made_by)
        shape = *grad.shape[:-1], weight.shape[1]
        if ctx.shared.columns:
            gradient = _of_columns(factors, shape, flat, rows if ctx.cut else None)
        else:
            gradient = _of_outputs(_Matrix(factors, shape, grad.dtype), flat)
        if wants_weight and not ctx.shared.linear(gradient):
            whole = gradient(slice(None))
            return grad_x, whole.t() if ctx.shared.columns else whole, grad_bias, None, None, None
        if not wants_rows or ctx.shared.used(gradient):
            return grad_x, None, grad_bias, None, None, None
        return grad_x, None, grad_bias, gradient(rows), None, None


class _Table(torch.autograd.Function):
    """``functional.embedding``, with the gradient of some rows of the table, and in a census of the tokens' rows."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        slot: Tensor | None,
        rows: Tensor | None,
        padding: int | None,
        shared: Any,
    ) -> Tensor:
        """The rows of the tokens."""
        ctx.save_for_backward(tokens, rows)
        ctx.padding, ctx.shape, ctx.shared = padding, weight.shape, shared
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the active rows."""
        tokens, rows = ctx.saved_tensors
        _, wants_weight, wants_rows, *_ = ctx.needs_input_grad
        tokens, flat = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1])
        counts = torch.ones_like(tokens, dtype=torch.bool) if ctx.padding is None else tokens != ctx.padding
        if wants_weight and not ctx.shared.table(functools.partial(_of_tokens, tokens, flat, counts)):
            padding = -1 if ctx.padding is None else ctx.padding
            whole = torch.ops.aten.embedding_dense_backward(flat, tokens, ctx.shape[0], padding, False)
            return None, whole, None, None, None, None
        return None, None, _of_rows(tokens, flat, rows, counts) if wants_rows else None, None, None, None


class _Scale(torch.autograd.Function):
    """The output of a norm, ``weight * x``, and the gradient of that weight from an ``x`` that is made again."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, weight: Tensor, factor: Any) -> Tensor:
        """The product, unchanged."""
        ctx.product, ctx.factor = product.grad_fn, factor
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the product and the weight."""
        factors: Any = _factors(ctx.factor)
        return grad, _Matrix(factors, grad.shape, grad.dtype).sums(grad.reshape(-1, grad.shape[-1])), None


def _of_outputs(matrix: _Matrix, flat: Tensor) -> Callable[[Rows], Tensor]:
    """What makes the gradient of some rows of a layer's weight, from its input and the gradient of its output."""

    def gradient(rows: Rows) -> Tensor:
        """Shape (rows, columns of the weight)."""
        if isinstance(rows, slice):
            return matrix.times(flat[:, rows])
        most = TOGETHER if flat.is_cpu else ELSEWHERE
        if len(rows) * len(flat) <= most or matrix.made_again:
            return matrix.times(flat.index_select(1, rows))
        pieces = rows.split(max(1, most // len(flat)))  # a copy of the gradients of some outputs at a time
        out, start = flat.new_empty(len(rows), matrix.columns), 0
        for piece in pieces:
            out[start : start + len(piece)] = matrix.times(flat.index_select(1, piece))
            start += len(piece)
        return out

    return gradient


def _of_columns(
    factors: Sequence[Any], shape: Sequence[int], flat: Tensor, held: Tensor | None
) -> Callable[[Rows], Tensor]:
    """What makes the gradient of some columns of a layer's weight; ``held``: there are no others in its input."""

    def gradient(columns: Rows) -> Tensor:
        """Shape (columns, rows of the weight)."""
        if held is None:
            return _Matrix(factors, shape, flat.dtype, columns).turned(flat)
        inputs = factors[0].reshape(-1, len(held))
        if columns is held:
            return inputs.t() @ flat
        ordered, order = held.sort()
        return inputs[:, order[torch.searchsorted(ordered, columns)]].t() @ flat  # type: ignore[arg-type]

    return gradient


def _of_tokens(tokens: Tensor, flat: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a table that tokens use, and their gradient."""
    rows, place = tokens.unique(return_inverse=True)
    return rows, flat.new_zeros(len(rows), flat.shape[1]).index_add_(0, place[counts], flat[counts])


def _of_rows(tokens: Tensor, flat: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """The gradient of some rows of a table from that of its output."""
    ordered, order = rows.sort()
    place = torch.searchsorted(ordered, tokens.to(ordered.dtype)).clamp_(max=len(ordered) - 1)
    held = (ordered[place] == tokens) & counts
    total = flat.new_zeros(len(rows), flat.shape[1])
    return total.index_add_(0, order[place[held]], flat[held])


# -- modules ---------------------------------------------------------------------------------------


class _Shared:
    """A weight, and what its modules must know of each other.

    Attributes
    ----------
    weight : Tensor
    slot, rows : Tensor or None
        Where gradients of the active rows go, and which these are.
    census : bool
    columns : bool
        Whether its slices are columns.
    """

    def __init__(
        self, watcher: weakref.ref[RowWatcher], position: int, weight: Tensor, modules: int, columns: bool
    ) -> None:
        self._watcher, self._position, self.weight, self._modules = watcher, position, weight, modules
        self.columns = columns
        self.use(None, None, False)

    def use(self, slot: Tensor | None, rows: Tensor | None, census: bool) -> None:
        """Wanted from the next forward on: gradients of these rows; all rows for a census; both None and no census."""
        self.slot, self.rows, self.census = slot, rows, census
        self._linears = self._tables = 0  # forward passes whose backward is to come
        self._by_rows: bool | None = None  # decided by the first of them
        self._tokens: Tensor | None = None  # rows of the table that the next backward reaches
        self._kept: Tensor | None = None  # the head's gradient in these

    def called(self, tokens: Tensor | None) -> None:
        """A module runs forward, a table with tokens; not told when a checkpoint recomputes it."""
        self._by_rows = self._kept = None
        if tokens is None:
            self._linears += 1
        elif self.census and isinstance(tokens, FakeTensor):  # how many rows it uses is not known
            self._tables += 2
        elif self.census:
            self._tables, self._tokens = self._tables + 1, tokens.unique()

    def linear(self, gradient: Callable[[Rows], Tensor]) -> bool:
        """Backward of a linear layer; False: its whole gradient is needed."""
        watcher = self._watcher()
        if watcher is None or not self._decide(watcher, self._linears <= 1 and self._tables <= 1):
            self._linears -= self._linears > 0
            return False
        self._linears = 0
        watcher.survey(self._position, gradient, self._tables > 0)
        if self._tables and self._tokens is not None:
            self._kept = gradient(self._tokens)
        return True

    def used(self, gradient: Callable[[Rows], Tensor]) -> bool:
        """Backward of a linear layer; False: the slot is to have the gradient of the active rows."""
        watcher = self._watcher()
        alone = self._modules == 1 and self._linears <= 1
        self._linears -= self._linears > 0
        return watcher is not None and alone and watcher.use_rows(self._position, gradient)

    def table(self, gradient: Callable[[], tuple[Tensor, Tensor]]) -> bool:
        """Backward of a token table; False: its whole gradient is needed."""
        watcher = self._watcher()
        alone = self._tables <= 1 and not self._linears  # a linear layer that comes later would have to know this
        if watcher is None or not self._decide(watcher, alone):
            self._tables -= self._tables > 0
            return False
        self._tables, kept, self._kept, self._tokens = 0, self._kept, None, None
        watcher.survey_rows(self._position, *gradient(), kept)
        return True

    def _decide(self, watcher: RowWatcher, alone: bool) -> bool:
        if self._by_rows is None:
            self._by_rows = alone and watcher.by_rows(self._position)
        return self._by_rows


class _Forward:
    """Stands for the ``forward`` of a module until :meth:`remove`; a copy of the module gets the plain one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        module.forward = self

    def __reduce__(self) -> Any:
        """Saved and copied as the plain forward: what is here belongs to one optimizer and one module."""
        return getattr, (self.module, "forward")  # of its class: nothing is in the new module yet

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward


class ScaleForward(_Forward):
    """The forward of a module whose only parameter may scale its output: a norm. The first call finds out."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.found = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        module, weight = self.module, self.module.weight
        plain = functools.partial(type(module).forward, module, *args, **kwargs)
        if torch.compiler.is_compiling() or not (weight.requires_grad and torch.is_grad_enabled()):
            return plain()
        if weight._backward_hooks or not _may_look():
            return plain()
        if not self.found:
            output = plain()
            self.found = _scales_once(output, weight, (args, kwargs))
            if not self.found:
                self.remove()
                return output
            del output
        weight.requires_grad_(False)  # so that autograd does not hold the other factor
        try:
            output = plain()
        finally:
            weight.requires_grad_(True)
        if not isinstance(output, Tensor):
            factor = None
        elif not output.requires_grad:  # nothing before it is trained
            return plain()
        else:
            factor = _factor(output.grad_fn, weight)
        if factor is None:
            self.remove()
            return plain()
        return _Scale.apply(output, weight, factor)


class RowForward(_Forward):
    """The forward of a linear layer or token table whose weight has few active rows, or is looked at by a census.

    Parameters
    ----------
    module : Linear or Embedding
    shared : _Shared
        Of its weight.
    """

    def __init__(self, module: Any, shared: _Shared) -> None:
        super().__init__(module)
        self.shared = shared

    def __call__(self, input: Tensor) -> Tensor:
        """What the module computes; compiled, replaced and hooked weights have whole gradients, in the plain way."""
        module, shared, x = self.module, self.shared, input
        table = isinstance(module, nn.Embedding)
        plain = torch.compiler.is_compiling() or (shared.slot is None and not shared.census)
        if plain or module.weight is not shared.weight or shared.weight._backward_hooks:
            return type(module).forward(module, x)
        recomputed = torch._C._current_graph_task_id() != -1
        if (module.training or torch.is_grad_enabled()) and not recomputed:
            shared.called(x if table else None)
        if not torch.is_grad_enabled():
            return type(module).forward(module, x)
        weight = shared.weight if shared.census else shared.weight.detach()
        if table:
            return _Table.apply(x, weight, shared.slot, shared.rows, module.padding_idx, shared)
        bias = module.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        return _Linear.apply(x, weight, bias, shared.slot, shared.rows, shared)


class RowGradients:
    """The slots of all parameters of a model that can have them.

    Parameters
    ----------
    watcher : RowWatcher
        Kept weakly.
    model : Module
    params : sequence of Tensor
        By position.
    norms : bool
        Whether norms, too, make a factor again instead of holding it; their weight must not change in the backward.
    columns : set of int
        Positions of which columns are active, not rows; a token table among them has whole gradients.
    """

    def __init__(
        self,
        watcher: RowWatcher,
        model: nn.Module,
        params: Sequence[Tensor],
        norms: bool = True,
        columns: AbstractSet[int] = frozenset(),
    ) -> None:
        self._watcher = weakref.ref(watcher)
        covered = {
            k: modules
            for k, modules in cover(model, params).items()
            if k not in columns or not any(isinstance(module, nn.Embedding) for module in modules)
        }
        self._shared = {
            k: _Shared(self._watcher, k, params[k], len(modules), k in columns) for k, modules in covered.items()
        }
        self._forwards = {k: [RowForward(m, self._shared[k]) for m in modules] for k, modules in covered.items()}
        self._scales = [ScaleForward(module) for module in scales(model, params)] if norms else []

    def use(self, wanted: dict[int, Tensor], census: set[int]) -> None:
        """Positions whose gradients are wanted in some rows alone, with these, and those a census looks at."""
        for position, shared in self._shared.items():
            rows = wanted.get(position)
            if rows is not shared.rows or shared.census or position in census:
                slot = shared.slot if rows is shared.rows else self._slot(position, shared.weight, rows)
                shared.use(slot, rows, position in census)

    def _slot(self, position: int, weight: Tensor, rows: Tensor | None) -> Tensor | None:
        """A leaf with the shape of the active rows, of one entry in memory."""
        if rows is None:
            return None
        unit = weight.shape[0 if self._shared[position].columns else 1]
        slot = weight.detach().new_zeros(()).expand(len(rows), unit).requires_grad_()
        slot.register_post_accumulate_grad_hook(functools.partial(_tell, self._watcher, position))
        return slot

    def leave(self, position: int) -> None:
        """Let a parameter have whole gradients from now on."""
        self._shared.pop(position, None)
        for forward in self._forwards.pop(position, []):
            forward.remove()

    def remove(self) -> None:
        """Give all modules their own forwards back."""
        for position in list(self._forwards):
            self.leave(position)
        while self._scales:
            self._scales.pop().remove()


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


def scales(model: nn.Module, params: Sequence[Tensor]) -> list[nn.Module]:
    """Modules that hold nothing but a vector of these, called weight: most are norms."""
    known = {id(p) for p in params}
    return [
        m
        for m in model.modules()
        if list(m._parameters) == ["weight"]
        and m._parameters["weight"] is not None
        and m._parameters["weight"].dim() == 1
        and id(m._parameters["weight"]) in known
        and not m._modules
        and "forward" not in m.__dict__
    ]


def _plain(module: nn.Module, weight: Tensor) -> bool:
    """Whether a module's output is what the functions above compute, from this weight."""
    if "forward" in module.__dict__ or module._parameters.get("weight") is not weight or weight.dim() != 2:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    table = type(module).forward is nn.Embedding.forward
    return table and module.max_norm is None and not (module.sparse or module.scale_grad_by_freq)
