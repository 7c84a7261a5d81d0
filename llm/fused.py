# SPDX-License-Identifier: BSD-3-Clause
"""The same AdamW step as :func:`llm.adam.adamw_` on rows of a float32 matrix on a CPU, compiled.

One pass over the active rows, in one thread: each is read, updated and written while it lies in the cache nearest to
the core, with its moments in bfloat16 or float32. As thirty operations of PyTorch on gathered copies it took several
times as long (one or two threads).
Moments in bfloat16 are rounded stochastically, as :func:`llm.adam.stochastic_round` does, with noise from a hash of an
entry's place and two seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llm.adam import Hyper

__all__ = ["LEAST", "adamw_rows_", "fits"]

LEAST = 32  # entries of a row; shorter ones are gathered


def fits(weight: Tensor, moment: Tensor) -> bool:
    """Whether :func:`adamw_rows_` knows these types: float32 weights on a CPU, moments in that type or in bfloat16."""
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and moment.dtype in (torch.float32, torch.bfloat16)


def adamw_rows_(
    weight: Tensor,
    rows: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    hyper: Hyper,
    scale: float,
    generator: torch.Generator,
) -> None:
    """Step number ``step`` of AdamW on some rows; changes these rows and both moments.

    Parameters
    ----------
    weight : Tensor of float32, shape (m, n)
        In any layout: of the transpose of a matrix, rows are its columns.
    rows : Tensor of int32 or int64, shape (k,)
        Distinct, and rows of ``weight``: that is not looked at.
    grad : Tensor of float32, shape (k, n)
    exp_avg, exp_avg_sq : Tensor of float32 or bfloat16, shape (k, n)
    step : int
        From 1.
    hyper : Hyper
    scale : float
        Multiplies the gradient.
    generator : Generator
        On a CPU; of the seeds.

    Raises
    ------
    ValueError
        If the gradient or a moment does not have a row for each of ``rows``.

    Examples
    --------
    >>> w, m, v = torch.ones(2, 1), torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step = 1, Hyper(0.1, 0.9, 0.999, 1e-8, 0.0), 1.0, torch.Generator()
    >>> adamw_rows_(w, torch.tensor([1]), torch.tensor([[5.0]]), m, v, *step)
    >>> w
    tensor([[1.0000],
            [0.9000]])
    """
    if not (rows.numel() == len(grad) == len(exp_avg) == len(exp_avg_sq)):
        found = rows.numel(), len(grad), len(exp_avg), len(exp_avg_sq)
        raise ValueError(f"rows, gradient and moments must be equally many; found {found}")
    numbers = tuple(map(np.float32, hyper.terms(step, scale)))
    w, index, g = weight.numpy(), rows.numpy(), grad.numpy()
    if exp_avg.dtype == torch.bfloat16:
        m, v = (x.view(torch.int16).numpy().view(np.uint16) for x in (exp_avg, exp_avg_sq))
        seeds = torch.randint(1 << 32, (2,), generator=generator).numpy().astype(np.uint32)
        _low_rows(w, index, g, m, v, numbers, hyper.cautious, seeds[0], seeds[1])
    else:
        _rows(w, index, g, exp_avg.numpy(), exp_avg_sq.numpy(), numbers, hyper.cautious)


@njit(inline="always")
def _row(w: Any, g: Any, m: Any, v: Any, numbers: Any, cautious: bool) -> None:
    """One row, with PyTorch's operations (the order of a product and a quotient is another)."""
    scale, keep, new1, beta2, new2, root, eps, rate = numbers
    near = new1 < np.float32(0.5)  # torch.lerp starts from the nearer end
    for j in range(len(w)):
        grad = g[j] * scale
        gap = grad - m[j]
        mean = m[j] + new1 * gap if near else grad - gap * (np.float32(1) - new1)
        square = v[j] * beta2 + new2 * grad * grad
        agree = (mean > 0 and grad > 0) or (mean < 0 and grad < 0)
        move = mean if agree or not cautious else np.float32(0)
        w[j] = w[j] * keep + rate * (move / (np.sqrt(square) / root + eps))
        m[j], v[j] = mean, square


@njit(cache=True, nogil=True, error_model="numpy")
def _rows(weight: Any, rows: Any, grad: Any, mean: Any, square: Any, numbers: Any, cautious: bool) -> None:
    """Moments in float32."""
    for k in range(len(rows)):
        _row(weight[rows[k]], grad[k], mean[k], square[k], numbers, cautious)


@njit(cache=True, nogil=True, error_model="numpy")
def _low_rows(
    weight: Any, rows: Any, grad: Any, mean: Any, square: Any, numbers: Any, cautious: bool, seed: Any, other: Any
) -> None:
    """Moments in bfloat16, which is the upper half of a float32."""
    n = weight.shape[1]
    bits1, bits2 = np.empty(n, np.uint32), np.empty(n, np.uint32)
    wide1, wide2 = bits1.view(np.float32), bits2.view(np.float32)
    for k in range(len(rows)):
        for j in range(n):
            bits1[j] = np.uint32(mean[k, j]) << np.uint32(16)
            bits2[j] = np.uint32(square[k, j]) << np.uint32(16)
        _row(weight[rows[k]], grad[k], wide1, wide2, numbers, cautious)
        for j in range(n):
            noise = np.uint32(seed + np.uint32(k * n + j))  # a hash with good avalanche: two products, three shifts
            noise = np.uint32((noise ^ (noise >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ other
            noise = np.uint32((noise ^ (noise >> np.uint32(15))) * np.uint32(0x846CA68B))
            noise = noise ^ (noise >> np.uint32(16))
            mean[k, j] = np.uint32(bits1[j] + (noise & np.uint32(0xFFFF))) >> np.uint32(16)
            square[k, j] = np.uint32(bits2[j] + (noise >> np.uint32(16))) >> np.uint32(16)
