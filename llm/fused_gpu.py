# SPDX-License-Identifier: BSD-3-Clause
"""The same AdamW step as :func:`llm.adam.adamw_` on active entries of a GPU's tensor, in one kernel.

Every entry is read, updated and written once, where it is, with its moments in bfloat16 or float32. In PyTorch's
operations it takes a gathered copy of everything, some forty launches for every million entries, and memory for these.
The kernel is Triton's, which comes with PyTorch for CUDA. It is tried once for every kind, against PyTorch's
operations; where it cannot be compiled, or differs, a warning says so and those do the step, as without Triton.

What is stored in bfloat16 is rounded stochastically, as :func:`llm.adam.stochastic_round` does, with noise from a hash
of an entry's place and two seeds.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
from torch import Tensor

from llm.adam import Hyper, adamw_

try:
    import triton
    from triton import language as tl
except ImportError:  # PyTorch for CPUs comes without
    triton = None

__all__ = ["adamw_entries_", "fits"]

BLOCK = 1024  # entries of a program
TYPES = (torch.float32, torch.bfloat16)


def fits(weight: Tensor, moment: Tensor, rows: bool, cautious: bool) -> bool:
    """Whether :func:`adamw_entries_` knows these types, and works on this device."""
    known = type(weight) is Tensor and weight.dtype in TYPES and moment.dtype in TYPES
    return known and weight.is_cuda and _works(weight.device, weight.dtype, moment.dtype, rows, cautious)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, moment: torch.dtype, rows: bool, cautious: bool) -> bool:
    """Try a step, and look whether it is that of :func:`llm.adam.adamw_`."""
    if triton is None:
        return False
    hyper, index = Hyper(0.01, 0.9, 0.999, 1e-8, 0.1, cautious), torch.arange(2, dtype=torch.int32, device=device)
    numbers = torch.linspace(-1.0, 1.0, 8 * BLOCK + 8, dtype=torch.float32, device=device).view(4, 2, -1)
    weight, grad, mean = numbers[0].to(dtype), numbers[1].to(dtype), (numbers[2] - 0.25).to(moment)
    found = weight, mean, numbers[3].to(moment)
    expected = tuple(x.float().clone() for x in found)
    try:
        flat = weight if rows else weight.view(-1)
        adamw_entries_(flat, index if rows else 0, grad, mean, found[2], 2, hyper, 1.0, 0)
        adamw_(expected[0], grad.float(), expected[1], expected[2], 2, hyper)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.float(), y, rtol=1e-5 if x.dtype == torch.float32 else 2**-7, atol=1e-6)
    except Exception as error:  # of whatever kind a compiler, a driver or a linker raises
        text = f"Triton cannot update {dtype} with moments in {moment} on {device}, so that it takes longer: {error}"
        warnings.warn(text, stacklevel=2)
        return False
    return True


def adamw_entries_(
    weight: Tensor,
    where: Tensor | int,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    hyper: Hyper,
    scale: float,
    seed: int,
) -> None:
    """Step number ``step`` of AdamW on some rows, or on consecutive entries; changes these and both moments.

    Parameters
    ----------
    weight : Tensor of float32 or bfloat16, shape (m, n) or (m,)
        A matrix in any layout (of the transpose of a matrix, rows are its columns), or a vector.
    where : Tensor of int32 or int64, shape (k,), or int
        Distinct rows of a matrix, which is not looked at; or of a vector the first entry.
    grad : Tensor, shape (k, n), or of as many entries as are updated
    exp_avg, exp_avg_sq : Tensor of float32 or bfloat16, contiguous, of that size
    step : int
        From 1.
    hyper : Hyper
    scale : float
        Multiplies the gradient.
    seed : int
        Of the roundings, which are the same for the same seed.

    Raises
    ------
    ValueError
        If gradient, moments and rows are not equally many.
    """
    rows = isinstance(where, Tensor)
    total = where.numel() * weight.shape[1] if rows else exp_avg.numel()  # type: ignore[union-attr]
    if not (grad.numel() == exp_avg.numel() == exp_avg_sq.numel() == total):
        found = total, grad.numel(), exp_avg.numel(), exp_avg_sq.numel()
        raise ValueError(f"active entries, gradient and moments must be equally many; found {found}")
    if not total:
        return
    places = (where.contiguous(), 0, weight.shape[1]) if rows else (weight, where, 1)  # type: ignore[union-attr]
    strides = weight.stride() if rows else (0, weight.stride(0))
    flags = {"ROWS": rows, "CAUTIOUS": hyper.cautious, "BLOCK": BLOCK}
    grid = (-(-total // BLOCK),)
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        tensors = weight, grad.contiguous(), exp_avg, exp_avg_sq
        _kernel[grid](*tensors, *places, *strides, total, *hyper.terms(step, scale), *_seeds(seed), **flags)


def _seeds(seed: int) -> tuple[int, int]:
    """Two numbers below 2^31 that look independent for all seeds (splitmix64)."""
    x = (seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor & (2**64 - 1)
    x ^= x >> 31
    return x & (2**31 - 1), x >> 33


if triton is not None:

    @triton.jit
    def _stored(value, noise, pointer):  # type: ignore[no-untyped-def]
        """A float32 as the pointer's type; bfloat16 is its upper half, up or down by 16 bits of noise."""
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:  # Triton reads what comes after an if as well, and the types differ
            return value

    @triton.jit(do_not_specialize=["start", "total", "seed", "other"])
    def _kernel(  # type: ignore[no-untyped-def]
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        where,
        start,
        unit,
        across,
        along,
        total,
        scale,
        keep,
        new1,
        beta2,
        new2,
        root,
        eps,
        rate,
        seed,
        other,
        ROWS: tl.constexpr,
        CAUTIOUS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """A block of entries."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < total
        if ROWS:
            row = tl.load(where + place // unit, mask=inside, other=0).to(tl.int64)
            at = row * across + (place % unit) * along
        else:
            at = (place + start) * along
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * scale
        m = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.where(new1 < 0.5, m + new1 * (g - m), g - (g - m) * (1.0 - new1))  # as torch.lerp
        v = v * beta2 + new2 * g * g
        move = m
        if CAUTIOUS:
            move = tl.where(((m > 0) & (g > 0)) | ((m < 0) & (g < 0)), m, 0.0)
        w = w * keep + rate * (move / (tl.sqrt_rn(v) / root + eps))
        noise = place.to(tl.uint32) + seed.to(tl.uint32)  # a hash with good avalanche: two products, three shifts
        noise = (noise ^ (noise >> 16)) * 0x7FEB352D
        noise = noise ^ other.to(tl.uint32)
        noise = (noise ^ (noise >> 15)) * 0x846CA68B
        noise = noise ^ (noise >> 16)
        third = noise * 0x9E3779B1
        tl.store(exp_avg + place, _stored(m, noise, exp_avg), mask=inside)
        tl.store(exp_avg_sq + place, _stored(v, noise >> 16, exp_avg_sq), mask=inside)
        tl.store(weight + at, _stored(w, third >> 16, weight), mask=inside)
