# SPDX-License-Identifier: BSD-3-Clause
"""Moments of the active part of a parameter, the update that uses them, and what stays of them at a switch.

Slices that became active together form a cohort: a dict of plain values and tensors with their common step count,
so that each cohort is bias-corrected as if it were a parameter of its own::

    count        slices, in the order of the part's index
    step         updates so far
    ramp         steps over which the rate rises to lr after a switch; 0: none
    exp_avg, exp_avg_sq             shape (count, unit), from the first update on; 8-bit codes have
    exp_avg_scale, exp_avg_sq_scale    scales beside them
    master       float32 weights, with precision "fp32-active"

State of a parameter is ``{"index", "unit", "cohorts"}``; released cohorts that are kept have an index and a unit of
their own and lie on its ``"shelf"``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm import fused_gpu
from llm.adam import GROUP, Hyper, adam_direction, adamw_, compand, decode, expand, stochastic_round
from llm.compact import CompactGrad, Part, flat
from llm.fused import LEAST, adamw_rows_, fits

__all__ = ["STATES", "Gradient", "Update", "active_directions", "bytes_per_entry", "regroup", "round_to", "update_"]

STATES = ("fp32", "bf16", "8bit")
CHUNK = 1 << 20  # entries that are updated at a time, which bounds the temporary memory
CACHED = 1 << 16  # so many of small pieces on a CPU, whose caches hold them
SMALL = 1 << 14  # entries of a tensor that is active as a whole and still updated with others
SEEDS = 1 << 20  # of kernels for one of a generator
_MOMENTS = ("exp_avg", "exp_avg_sq")
Cohort = dict[str, Any]
Gradient = Tensor | Callable[[Tensor], Tensor]


def bytes_per_entry(states: str) -> float:
    """Bytes of both moments of an active entry."""
    return {"fp32": 8.0, "bf16": 4.0, "8bit": 2.0 + 8.0 / GROUP}[states]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a parameter of this type is updated: float32, or float64 where it is that."""
    return torch.promote_types(dtype, torch.float32)


def round_to(value: Tensor, dtype: torch.dtype, stochastic: bool, generator: torch.Generator) -> Tensor:
    """``value`` as ``dtype``: to the nearest, or stochastically where that is asked for and dtype is bfloat16."""
    return stochastic_round(value.float(), generator) if stochastic and dtype == torch.bfloat16 else value.to(dtype)


def _spans(part: Part, size: int, lo: int, hi: int, chunk: int = CHUNK) -> Iterator[tuple[int, int, slice | Tensor]]:
    """Pieces of the slices lo, ..., hi - 1 of a part: where they are in the part, and in the parameter.

    Large slices are cut and named by a slice of entries, small ones are taken together and named by their index.
    """
    unit = part.unit
    if not part.columns and (unit == size or (unit >= chunk and unit % GROUP == 0)):
        places = [0] if unit == size else part.where[lo:hi].tolist()
        for k, place in enumerate(places, lo):
            for a in range(0, unit, chunk):
                b = min(unit, a + chunk)
                yield k * unit + a, k * unit + b, slice(place * unit + a, place * unit + b)
        return
    aligned = GROUP // math.gcd(unit, GROUP)  # slices between two places where a scale of 8-bit states begins
    together = max(1, chunk // unit // aligned) * aligned
    for k in range(lo, hi, together):
        stop = min(hi, k + together)
        yield k * unit, stop * unit, part.where[k:stop]


def _begin(cohort: Cohort, unit: int, states: str, dtype: torch.dtype, like: Tensor) -> None:
    """Zero moments, where ``like`` is."""
    shape = (cohort["count"], unit)
    low = {"bf16": (torch.bfloat16, torch.bfloat16), "8bit": (torch.int8, torch.uint8)}
    for name, kind in zip(_MOMENTS, low.get(states, (dtype, dtype)), strict=True):
        cohort[name] = like.new_zeros(shape, dtype=kind)
        if states == "8bit":
            scales = -(-cohort["count"] * unit // GROUP)
            cohort[name + "_scale"] = like.new_zeros(scales, dtype=torch.float32)


def _read(cohort: Cohort, name: str, a: int, b: int, dtype: torch.dtype) -> Tensor:
    """Entries a, ..., b - 1 of a moment in the working type; a view if they are stored so."""
    stored = cohort[name].view(-1)[a:b]
    if name + "_scale" in cohort:
        return expand(stored, cohort[name + "_scale"][a // GROUP : -(-b // GROUP)]).to(dtype)
    return stored.to(dtype)


# -- the update ------------------------------------------------------------------------------------


class Update(NamedTuple):
    """One AdamW step on the active entries of a parameter.

    Attributes
    ----------
    param : Tensor
        Changed in its active entries, and there alone.
    grad : Tensor or callable
        A :class:`CompactGrad` of this part, or dense, of which only the part is looked at; or what makes the gradient
        of an index of slices, which then have fewer than ``CHUNK`` entries each.
    part : Part
    cohorts : list of dict
        Changed: steps count up, moments move (and are made at the first step).
    hyper : Hyper
    precision : {"stochastic", "fp32-active"}
        For parameters below float32: round the new weight stochastically, or keep float32 copies of active entries.
    """

    param: Tensor
    grad: Gradient
    part: Part
    cohorts: list[Cohort]
    hyper: Hyper
    precision: str


class _Span(NamedTuple):
    """Entries a, ..., b - 1 of a cohort, where they are among the entries of their parameter, and which step comes."""

    entries: Tensor  # a vector, or for columns the matrix
    part: Part
    where: slice | Tensor
    grad: Callable[[], Tensor]
    cohort: Cohort
    a: int
    b: int
    step: int
    hyper: Hyper

    @property
    def kind(self) -> tuple[Any, ...]:
        """Small spans of one kind are updated together."""
        cohort = self.cohort
        return self.entries.dtype, cohort["exp_avg"].dtype, "master" in cohort, self.step, self.hyper

    @property
    def size(self) -> int:
        """How many entries."""
        return self.b - self.a

    @property
    def compiled(self) -> bool:
        """Whether there is one pass for its types."""
        return "master" not in self.cohort and fits(self.entries, self.cohort["exp_avg"])

    @property
    def on_gpu(self) -> bool:
        """Whether one kernel updates it; small tensors that are active as a whole are quicker together."""
        rows = isinstance(self.where, Tensor)
        return not self.waits and _kernel_fits(self.entries, self.cohort, rows, self.hyper.cautious)

    @property
    def waits(self) -> bool:
        """Whether it is a small piece of consecutive entries."""
        return isinstance(self.where, slice) and self.size <= SMALL

    @property
    def in_rows(self) -> bool:
        """Whether it is rows (or columns) that can be updated in one pass."""
        return isinstance(self.where, Tensor) and self.part.unit >= LEAST and self.compiled

    def of(self, name: str) -> Tensor:
        """A moment or the float32 weights there, as they are stored."""
        return self.cohort[name].view(-1)[self.a : self.b]

    def scales_of(self, name: str) -> Tensor:
        """Of an 8-bit moment."""
        return self.cohort[name + "_scale"][self.a // GROUP : -(-self.b // GROUP)]


def update_(
    updates: Iterable[Update],
    *,
    states: str = "fp32",
    scale: float = 1.0,
    generator: torch.Generator,
) -> None:
    """Step; what is small is gathered from several parameters and updated at once.

    Parameters
    ----------
    updates : iterable of Update
        Of parameters on one device.
    states : {"fp32", "bf16", "8bit"}
        How moments that are made here are stored; low-precision ones are rounded stochastically.
    scale : float
        Multiplies the gradient (clipping).
    generator : Generator
        Of the roundings; on the device of the parameters.
    """
    launched = 0  # kernels on a GPU
    waiting: dict[Any, list[_Span]] = {}  # small ones, by kind
    held: dict[Any, int] = {}  # entries of these

    def use(kinds: Iterable[Any]) -> None:
        """Update all that waits of some kinds."""
        for kind in kinds:
            _step(waiting.pop(kind), scale, generator)
            del held[kind]

    for update in updates:
        entries = update.param.detach() if update.part.columns else flat(update.param)
        most = CACHED if entries.is_cpu else CHUNK
        try:
            for span in _spans_of(update, entries, states):
                if span.in_rows:
                    _step_rows(span, scale, generator)
                    continue
                if span.on_gpu:
                    _step_on_gpu(span, scale, generator.initial_seed() * SEEDS + launched)
                    launched += 1
                    continue
                kind, size = span.kind, span.size
                if not span.waits and (isinstance(span.where, slice) or size > most):
                    _step([span], scale, generator)
                    continue
                if kind in waiting and held[kind] + size > most:
                    use([kind])
                waiting.setdefault(kind, []).append(span)
                held[kind] = held.get(kind, 0) + size
            if not (update.param.is_contiguous() or update.part.columns):
                use(list(waiting))
        finally:
            if not (update.param.is_contiguous() or update.part.columns):  # its layout is not that of a vector
                update.param.detach().copy_(entries.view(update.param.shape))
    use(list(waiting))


def _spans_of(update: Update, entries: Tensor, states: str) -> Iterator[_Span]:
    """The spans of a parameter, with moments made that are not there yet."""
    part, dtype = update.part, working_dtype(entries.dtype)
    gradient = _pieces_of(update.grad, part)
    lo = 0
    for cohort in update.cohorts:
        if "exp_avg" not in cohort:
            _begin(cohort, part.unit, states, dtype, entries)
            if update.precision == "fp32-active" and dtype != entries.dtype:
                cohort["master"] = _taken(entries, part, lo, cohort["count"]).to(dtype)
        rows = part.columns or part.unit != entries.numel()
        kernel = not _makes_copies(update.grad, part) and _kernel_fits(entries, cohort, rows, update.hyper.cautious)
        chunk = max(1, entries.numel()) if kernel else CHUNK
        step = cohort["step"] + 1
        rate = update.hyper.lr * min(1.0, step / (cohort["ramp"] or 1))
        hyper, start = update.hyper._replace(lr=rate), lo * part.unit
        for a, b, where in _spans(part, entries.numel(), lo, lo + cohort["count"], chunk):
            piece = functools.partial(gradient, a, b, where)
            yield _Span(entries, part, where, piece, cohort, a - start, b - start, step, hyper)
        lo += cohort["count"]


def _pieces_of(grad: Gradient, part: Part) -> Callable[[int, int, slice | Tensor], Tensor]:
    """The gradient of what :func:`_spans` names."""
    if not isinstance(grad, Tensor):
        return lambda a, b, where: grad(where).reshape(-1)  # type: ignore[arg-type]
    if isinstance(grad, CompactGrad):
        active = grad.active.reshape(-1)
        return lambda a, b, where: active[a:b]
    entries = grad if part.columns else grad.reshape(-1)
    return lambda a, b, where: _at(entries, where, part)


def _makes_copies(grad: Gradient, part: Part) -> bool:
    """Whether each of these pieces is new memory."""
    return not isinstance(grad, CompactGrad) and not (isinstance(grad, Tensor) and part.unit == grad.numel())


def _kernel_fits(entries: Tensor, cohort: Cohort, rows: bool, cautious: bool) -> bool:
    """Whether there is a kernel for a cohort on a GPU."""
    return "master" not in cohort and fused_gpu.fits(entries, cohort["exp_avg"], rows, cautious)


def _at(entries: Tensor, where: slice | Tensor, part: Part) -> Tensor:
    """A piece of a tensor as :func:`_spans` names it; a view if that is a slice."""
    return entries[where] if isinstance(where, slice) else part.table(entries)[where].reshape(-1)


def _taken(entries: Tensor, part: Part, lo: int, count: int) -> Tensor:
    if part.unit == entries.numel():
        return entries.clone().view(1, -1)
    return part.table(entries)[part.where[lo : lo + count]]


def _step_rows(span: _Span, scale: float, generator: torch.Generator) -> None:
    """AdamW on rows or columns where they are."""
    grad = span.grad().to(span.entries.dtype).contiguous()
    grad, mean, square = (x.view(-1, span.part.unit) for x in (grad, *(span.of(name) for name in _MOMENTS)))
    weight = span.part.table(span.entries)
    adamw_rows_(weight, span.where, grad, mean, square, span.step, span.hyper, scale, generator)  # type: ignore[arg-type]
    span.cohort["step"] = span.step


def _step_on_gpu(span: _Span, scale: float, seed: int) -> None:
    """AdamW in one kernel."""
    rows = isinstance(span.where, Tensor)
    weight = span.part.table(span.entries) if rows else span.entries
    mean, square = (span.of(name) for name in _MOMENTS)
    where: Any = span.where if rows else span.where.start  # type: ignore[union-attr]
    fused_gpu.adamw_entries_(weight, where, span.grad(), mean, square, span.step, span.hyper, scale, seed)
    span.cohort["step"] = span.step


def _step(spans: list[_Span], scale: float, generator: torch.Generator) -> None:
    """AdamW on spans of one kind: joined, or one of them in place."""
    first, stored = spans[0], None
    dtype = working_dtype(first.entries.dtype)
    join = _Join([span.size for span in spans], GROUP if "exp_avg_scale" in first.cohort else 1)
    grad = join([span.grad() for span in spans]).to(dtype)
    grad = grad * scale if scale != 1.0 else grad
    masters = "master" in first.cohort
    if masters:
        weight = join([span.of("master") for span in spans])
    else:
        stored = join([_at(span.entries, span.where, span.part) for span in spans])
        weight = stored.to(dtype)
    mean, square = (_joined(spans, name, join, dtype) for name in _MOMENTS)
    adamw_(weight, grad, mean, square, first.step, first.hyper)
    for span in spans:
        span.cohort["step"] = span.step
    _put_back(spans, "exp_avg", mean, join, generator)
    _put_back(spans, "exp_avg_sq", square, join, generator)
    if masters:
        _put_back(spans, "master", weight, join, generator)
    elif join.single and isinstance(first.where, slice) and weight is stored:
        return
    new = round_to(weight, first.entries.dtype, not masters, generator)
    for span, piece in zip(spans, join.parts(new), strict=True):
        if isinstance(span.where, slice):
            span.entries[span.where] = piece
        else:
            span.part.table(span.entries)[span.where] = piece.view(-1, span.part.unit)


class _Join:
    """Several vectors as one, each beginning at a multiple of ``align``; a single one stays what it is."""

    def __init__(self, sizes: Sequence[int], align: int) -> None:
        self.align = align
        self.cuts = [n for size in sizes for n in (size, -size % align)]  # each vector and the zeros behind it
        self.single = len(sizes) == 1

    def __call__(self, vectors: Sequence[Tensor]) -> Tensor:
        """One vector."""
        if self.single:
            return vectors[0]
        if self.align == 1:
            return torch.cat(list(vectors))
        zeros = vectors[0].new_zeros(self.align)
        return torch.cat([piece for v in vectors for piece in (v, zeros[: -len(v) % self.align])])

    def parts(self, value: Tensor) -> Sequence[Tensor]:
        """The vectors that were joined."""
        return (value,) if self.single else value.split(self.cuts)[::2]


def _joined(spans: list[_Span], name: str, join: _Join, dtype: torch.dtype) -> Tensor:
    """A moment in the working type; what is stored if that is one vector of this type."""
    stored = join([span.of(name) for span in spans])
    if name + "_scale" in spans[0].cohort:
        return expand(stored, torch.cat([span.scales_of(name) for span in spans])).to(dtype)
    return stored.to(dtype)


def _put_back(spans: list[_Span], name: str, value: Tensor, join: _Join, generator: torch.Generator) -> None:
    """Store what :func:`_joined` gave and the update changed."""
    stored = [span.of(name) for span in spans]
    if name + "_scale" in spans[0].cohort:
        value, found = compand(value.float(), name == "exp_avg", generator)
        scales = [span.scales_of(name) for span in spans]
        torch._foreach_copy_(scales, list(found.split([len(scale) for scale in scales])))
    elif join.single and stored[0].dtype == value.dtype:
        return
    else:
        value = round_to(value, stored[0].dtype, True, generator)
    torch._foreach_copy_(stored, list(join.parts(value)))


def active_directions(
    grad: Tensor, part: Part, cohorts: list[Cohort], hyper: Hyper
) -> Iterator[tuple[int, int, Tensor, slice | Tensor, Tensor]]:
    """Adam's direction of the active entries that have moments, piece by piece.

    Yields
    ------
    start, stop : int
        Which entries of the part.
    direction : Tensor, shape (stop - start,)
    where : slice of entries, or Tensor
        The same in the parameter, as entries or as an index of slices.
    grad : Tensor, shape (stop - start,)
        The gradient there.
    """
    entries, lo = grad if part.columns else grad.reshape(-1), 0
    for cohort in cohorts:
        start = lo * part.unit
        if "exp_avg" in cohort:
            for a, b, where in _spans(part, grad.numel(), lo, lo + cohort["count"]):
                piece = _at(entries, where, part)
                piece = piece.to(working_dtype(piece.dtype))
                mean, square = (_read(cohort, name, a - start, b - start, piece.dtype) for name in _MOMENTS)
                yield a, b, adam_direction(piece, mean, square, cohort["step"] + 1, hyper), where, piece
        lo += cohort["count"]


# -- what stays at a switch ------------------------------------------------------------------------


def regroup(
    state: dict[str, Any], part: Part, ramp: int, moments: str, generator: torch.Generator
) -> tuple[dict[str, Any], Part]:
    """State of a parameter for a new active part: slices that had moments keep them, the others start anew.

    Parameters
    ----------
    state : dict
        Of the part before; may be empty. Not changed.
    part : Part
        With an index.
    ramp : int
        Of the slices that start anew.
    moments : {"reset", "offload", "keep"}
        Whether moments of released slices are dropped, moved to the CPU, or left where they are.
    generator : Generator
        For 8-bit moments, which are stored anew.

    Returns
    -------
    state : dict
    part : Part
        The same slices in the order of the cohorts.
    """
    sources = _records(state) + state.get("shelf", [])
    if not sources:
        new = {"count": part.count, "step": 0, "ramp": ramp}
        return {"index": part.where, "unit": part.unit, "cohorts": [new]}, part
    owner = torch.full_like(part.where, len(sources))  # number of the record that holds a slice; the last: none does
    slot, offset = (torch.zeros_like(part.where, dtype=torch.int64) for _ in range(2))
    for number, record in enumerate(sources):
        own_slot, own_offset, held = _places(record, part)
        owner.masked_fill_(held, number)
        slot, offset = torch.where(held, own_slot, slot), torch.where(held, own_offset, offset)
    found = [(owner == number).sum() for number in range(len(sources) + 1)]
    counts = torch.stack(found).tolist()  # one copy to the host
    order = owner.argsort(stable=True)
    cohorts, released = [], []
    for record, mine in zip(sources, order.split(counts)[:-1], strict=True):
        if len(mine):
            cohorts.append(_moved(record, slot[mine], offset[mine], part.unit, generator))
        if moments != "reset" and record["unit"] == part.unit:
            released += _released(record, slot[mine], moments, generator)
    if counts[-1]:
        cohorts.append({"count": counts[-1], "step": 0, "ramp": ramp})
    index = part.where[order]
    after: dict[str, Any] = {"index": index, "unit": part.unit, "cohorts": cohorts}
    return (after | {"shelf": released} if released else after), part.at(index)


def shelve(state: dict[str, Any], moments: str, generator: torch.Generator) -> dict[str, Any]:
    """State of a parameter none of which is active any more."""
    if moments == "reset":
        return {}
    none = torch.zeros(0, dtype=torch.int64)
    shelf = [kept for record in _records(state) for kept in _released(record, none, moments, generator)]
    shelf += state.get("shelf", [])
    return {"shelf": shelf} if shelf else {}


def _records(state: dict[str, Any]) -> list[Cohort]:
    """Cohorts with moments, each with its own index and unit."""
    records, lo = [], 0
    for cohort in state.get("cohorts", []):
        own = {"index": state["index"][lo : lo + cohort["count"]], "unit": state["unit"]}
        records += [cohort | own] if "exp_avg" in cohort else []
        lo += cohort["count"]
    return records


def _places(record: Cohort, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """For every slice of the part: the slot of a record that holds it, the offset in that slot, and if there is one."""
    wanted, index = part.where, record["index"].to(part.where.device)
    ratio = record["unit"] // part.unit
    cut = part.columns and record["unit"] != part.unit  # a whole tensor's moments, which lie row after row
    if cut or record["unit"] % part.unit:  # coarser than the record: its entries may have different step counts
        none = torch.zeros_like(wanted, dtype=torch.int64)
        return none, none, none.bool()
    parent = wanted // ratio
    ordered, order = index.sort()
    place = torch.searchsorted(ordered, parent).clamp_(max=len(ordered) - 1)
    return order[place], (wanted % ratio).long(), ordered[place] == parent


def _moved(record: Cohort, slot: Tensor, offset: Tensor, unit: int, generator: torch.Generator) -> Cohort:
    """A cohort of some slices of a record (cut to ``unit`` where that is finer), on the device of ``slot``."""
    cohort = {key: record[key] for key in ("step", "ramp")} | {"count": len(slot)}
    count = record["count"]
    same = unit == record["unit"] and len(slot) == count and torch.equal(slot, torch.arange(count).to(slot))
    for name in (*_MOMENTS, "master"):
        scaled = name + "_scale" in record
        if name in record and same:
            cohort |= {key: record[key].to(slot.device) for key in (name, name + "_scale")[: 1 + scaled]}
        elif scaled:
            cohort[name], cohort[name + "_scale"] = _moved_codes(record, name, slot, offset, unit, generator)
        elif name in record:
            table = record[name].view(count, -1, unit)
            cohort[name] = table[slot.to(table.device), offset.to(table.device)].to(slot.device)
    return cohort


def _moved_codes(
    record: Cohort, name: str, slot: Tensor, offset: Tensor, unit: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes and scales of some slices of an 8-bit moment; groups fall elsewhere, so that they are made anew."""
    stored, scales = record[name].view(-1), record[name + "_scale"]
    total = len(slot) * unit
    codes = stored.new_empty(total, device=slot.device)
    new = scales.new_empty(-(-total // GROUP), device=slot.device)
    start = (slot * record["unit"] + offset * unit).to(stored.device)
    for a in range(0, total, CHUNK):
        b = min(total, a + CHUNK)
        place = torch.arange(a, b, device=stored.device)
        place = start[place // unit] + place % unit
        value = decode(stored[place], scales[place // GROUP]).to(slot.device)
        codes[a:b], new[a // GROUP : -(-b // GROUP)] = compand(value, name == "exp_avg", generator)
    return codes.view(len(slot), unit), new


def _released(record: Cohort, taken: Tensor, moments: str, generator: torch.Generator) -> list[Cohort]:
    """The slices of a record that nobody took, as a record for the shelf."""
    free = torch.ones(record["count"], dtype=torch.bool, device=taken.device)
    free[taken] = False
    slot = free.nonzero().squeeze(1)
    if not len(slot):
        return []
    where = torch.device("cpu") if moments == "offload" else record["exp_avg"].device
    kept = _moved(record, slot.to(record["exp_avg"].device), torch.zeros_like(slot), record["unit"], generator)
    kept = {key: value.to(where) if isinstance(value, Tensor) else value for key, value in kept.items()}
    return [kept | {"index": record["index"][slot.to(record["index"].device)].to(where), "unit": record["unit"]}]
