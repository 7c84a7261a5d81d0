# SPDX-License-Identifier: BSD-3-Clause
"""Compiled loops over tiles of a kernel matrix: entries into a small buffer, and their use while it is in cache.

A tile holds k(x_i, z_j) for a run of rows i and a chunk of columns j, row-major, in float32 or float64.
Everything releases the GIL: one thread works on one run of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bcd._jit import njit

PANEL = 64  # columns whose sums a sparse row keeps in registers at once
_BYTES = 64  # one AVX-512 register; LLVM splits it on other CPUs
_I64 = ir.IntType(64)


@intrinsic
def _sparse_row(typingctx: Any, data: Any, indices: Any, start: Any, stop: Any, panel: Any, out: Any) -> Any:
    """Make ``out[:PANEL] = sum over p in start..stop of data[p] * panel[indices[p]]``; panel has shape (d, PANEL)."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        """The instructions, for the array pointers of the call."""
        data_p, indices_p, first, last, panel_p, out_p = (
            context.make_array(t)(context, b, a).data if isinstance(t, types.Array) else a
            for t, a in zip(sig.args, args, strict=True)
        )
        element = data_p.type.pointee
        lanes = 8 * _BYTES // sig.args[0].dtype.bitwidth
        vector = ir.VectorType(element, lanes)
        name = f"llvm.fma.v{lanes}f{sig.args[0].dtype.bitwidth}"
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector] * 3), name)
        sums = [cgutils.alloca_once_value(b, ir.Constant(vector, [0.0] * lanes)) for _ in range(PANEL // lanes)]
        for s in sums:  # the registers of an earlier call
            b.store(ir.Constant(vector, [0.0] * lanes), s)
        with cgutils.for_range_slice(b, first, last, _I64(1), _I64) as (p, _):
            value = b.load(b.gep(data_p, [p]))
            one = b.insert_element(ir.Constant(vector, ir.Undefined), value, _I64(0))
            spread = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
            column = b.load(b.gep(indices_p, [p]))
            column = column if column.type == _I64 else b.sext(column, _I64)
            row = b.gep(panel_p, [b.mul(column, _I64(PANEL))])
            for k, s in enumerate(sums):
                w = b.load(b.bitcast(b.gep(row, [_I64(k * lanes)]), vector.as_pointer()), align=4)
                b.store(b.call(fma, [spread, w, b.load(s)]), s)
        for k, s in enumerate(sums):
            b.store(b.load(s), b.bitcast(b.gep(out_p, [_I64(k * lanes)]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(data, indices, types.int64, types.int64, panel, out), codegen


@njit(cache=True, nogil=True)
def sparse_dots(data, indices, indptr, lo, panels, tile):
    """``tile[i, j] = <row lo + i of the CSR matrix, z_j>``; panels has shape (chunks, d, PANEL) and holds the z_j."""
    for k in range(panels.shape[0]):
        for i in range(tile.shape[0]):
            _sparse_row(data, indices, indptr[lo + i], indptr[lo + i + 1], panels[k], tile[i, k * PANEL :])


@njit(cache=True, nogil=True)
def fill_panels(data, indices, indptr, scale, panels):
    """Write row j of a CSR matrix, scaled, into ``panels[j // PANEL, :, j % PANEL]``; panels are zero before."""
    for j in range(indptr.shape[0] - 1):
        panel, lane = panels[j // PANEL], j % PANEL
        for p in range(indptr[j], indptr[j + 1]):
            panel[indices[p], lane] += scale * data[p]


@njit(cache=True, nogil=True)
def manhattan(X, Z, tile):
    """``tile[i, j] = -|x_i - z_j|_1``; Z has shape (d, columns)."""
    for i in range(tile.shape[0]):
        row = tile[i]
        row[:] = 0
        for k in range(X.shape[1]):
            x, z = X[i, k], Z[k]
            for j in range(row.shape[0]):
                row[j] -= abs(x - z[j])


_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2; k _LN2_HIGH is exact
# exp(r) = 1 + r + r^2 p(r) on |r| <= ln 2 / 2: minimax coefficients of the Cephes library (expf.c)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_LEAST = np.float32(-87.0)  # exp of less is below the smallest normal number


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def exp_shifted(tile, row_shift, column_shift, powers):
    """``tile[i, j] = exp(tile[i, j] + row_shift[i] + column_shift[j])`` in float32, to 2 units in the last place.

    Exponents are taken as at most 0 and at least -87. ``powers`` is an int32 work array of the tile's shape.
    """
    for i in range(tile.shape[0]):
        row, power, shift = tile[i], powers[i], row_shift[i]
        for j in range(row.shape[0]):
            x = min(max(row[j] + (shift + column_shift[j]), _LEAST), np.float32(0.0))
            k = np.floor(x * _LOG2E + np.float32(0.5))
            r = (x - k * _LN2_HIGH) - k * _LN2_LOW
            p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
            row[j] = p * (r * r) + r + np.float32(1.0)
            power[j] = np.int32(k) << np.int32(23)
        bits = row.view(np.int32)
        for j in range(bits.shape[0]):
            bits[j] += power[j]


_LOG2E64 = 1.4426950408889634
_LN2_HIGH64, _LN2_LOW64 = 6.93145751953125e-1, 1.42860682030941723212e-6
# exp(r) = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)): coefficients of the Cephes library (exp.c)
_N0, _N1, _N2 = 1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1
_D0, _D1, _D2, _D3 = 3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1, 2.0
_LEAST64 = -708.0


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def exp_shifted64(tile, row_shift, column_shift, powers):
    """As :func:`exp_shifted`, in float64 with exponents down to -708; ``powers`` is int64."""
    for i in range(tile.shape[0]):
        row, power, shift = tile[i], powers[i], row_shift[i]
        for j in range(row.shape[0]):
            x = min(max(row[j] + (shift + column_shift[j]), _LEAST64), 0.0)
            k = np.floor(x * _LOG2E64 + 0.5)
            r = (x - k * _LN2_HIGH64) - k * _LN2_LOW64
            s = r * r
            p = r * ((_N0 * s + _N1) * s + _N2)
            row[j] = 1.0 + 2.0 * (p / ((((_D0 * s + _D1) * s + _D2) * s + _D3) - p))
            power[j] = np.int64(k) << np.int64(52)
        bits = row.view(np.int64)
        for j in range(bits.shape[0]):
            bits[j] += power[j]


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def add_dots(out, tile, step):
    """``out[i] += sum_j tile[i, j] step[j]``, in float64."""
    for i in range(tile.shape[0]):
        row, total = tile[i], 0.0
        for j in range(row.shape[0]):
            total += np.float64(row[j]) * step[j]
        out[i] += total


_SIDE = 16  # a cache line of float32: squares of this side are transposed at a time


@njit(cache=True, nogil=True, error_model="numpy")
def keep_columns(arena, slots, columns, lo, tile):
    """Copy columns of a tile into the cache: ``arena[slots[k], lo + i] = tile[i, columns[k]]``."""
    rows = tile.shape[0]
    whole = rows - rows % _SIDE
    for a in range(0, slots.shape[0], _SIDE):
        b = min(a + _SIDE, slots.shape[0])
        for c in range(0, whole, _SIDE):
            for k in range(a, b):
                kept, part = arena[slots[k], lo + c : lo + c + _SIDE], tile[c : c + _SIDE, columns[k]]
                for i in range(_SIDE):
                    kept[i] = part[i]
        for k in range(a, b):
            kept, part = arena[slots[k], lo + whole : lo + rows], tile[whole:, columns[k]]
            for i in range(kept.shape[0]):
                kept[i] = part[i]


_SPAN = 2048  # entries of the result that stay in the first-level cache while columns pass by


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def add_columns(out, arena, slots, step, lo, hi):
    """``out[lo:hi] += sum_k arena[slots[k], lo:hi] step[k]``, four columns at a time."""
    for a in range(lo, hi, _SPAN):
        b = min(hi, a + _SPAN)
        part = out[a:b]
        whole = slots.shape[0] - slots.shape[0] % 4
        for k in range(0, whole, 4):
            s0, s1, s2, s3 = step[k], step[k + 1], step[k + 2], step[k + 3]
            c0, c1 = arena[slots[k], a:b], arena[slots[k + 1], a:b]
            c2, c3 = arena[slots[k + 2], a:b], arena[slots[k + 3], a:b]
            for i in range(part.shape[0]):
                part[i] += (s0 * c0[i] + s1 * c1[i]) + (s2 * c2[i] + s3 * c3[i])
        for k in range(whole, slots.shape[0]):
            s0, c0 = step[k], arena[slots[k], a:b]
            for i in range(part.shape[0]):
                part[i] += s0 * c0[i]


@njit(cache=True, nogil=True)
def gather(arena, slots, index, out):
    """``out[k, m] = arena[slots[k], index[m]]`` for the slots >= 0."""
    for k in range(slots.shape[0]):
        if slots[k] >= 0:
            row, kept = out[k], arena[slots[k]]
            for m in range(index.shape[0]):
                row[m] = kept[index[m]]
