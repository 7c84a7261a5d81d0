# SPDX-License-Identifier: BSD-3-Clause
"""argmin and argmax that vectorise, for the two passes of a WSS2 step.

LLVM vectorises ``min`` but not ``argmin`` of doubles, and at n = 1000 a separate search for the position
costs a fifth of a step. ``_first_best`` therefore writes that one loop in vector IR, eight entries at a
time, each lane keeping its own best value and where it saw it. Eight lanes are one AVX-512 register; on
other CPUs LLVM splits them.

Every operation is rounded once, as in the scalar code (nothing is reassociated), so the steps do not
depend on the CPU or on where an entry falls in the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TINY = float(np.finfo(np.float64).tiny)  # stands in for a curvature of 0 in a quotient
LANES = 8
_F64, _I64 = ir.DoubleType(), ir.IntType(64)


def _fill(element: Any, value: Any) -> Any:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _splat(b: Any, x: Any) -> Any:
    first = b.insert_element(ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined), x, _I64(0))
    return b.shuffle_vector(first, first, _fill(ir.IntType(32), 0))


def _max(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _reduce(b: Any, op: str, v: Any, flags: tuple[str, ...] = ()) -> Any:
    name = f"llvm.vector.reduce.{op}"  # e.g. fmin.v8f64
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(v.type.element, [v.type]), name)
    return b.call(fn, [v], fastmath=flags)


def _first_best(better: str, start: float, value: Any) -> Any:
    """Make the intrinsic scan(arrays, scalars, count) -> (best, index).

    best is the extreme of `start` and of value(b, load, store, *scalars) over the first
    `count` entries (a multiple of LANES), better ("<" or ">") saying which end; index is
    the smallest one attaining it.  `arrays` are contiguous, float64 or (if only read) float32; in
    `value`, load(a) and store(a, v) access the eight entries at hand of the a-th one as float64.
    """

    @intrinsic
    def scan(typingctx: Any, arrays: Any, scalars: Any, count: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            """The instructions, for the array pointers of the call."""
            data = [
                context.make_array(t)(context, b, a).data
                for t, a in zip(sig.args[0], cgutils.unpack_tuple(b, args[0]), strict=True)
            ]
            spread = [_splat(b, s) for s in cgutils.unpack_tuple(b, args[1])]
            best = cgutils.alloca_once_value(b, _fill(_F64, start))
            where = cgutils.alloca_once_value(b, _fill(_I64, 0))
            with cgutils.for_range_slice(b, _I64(0), args[2], _I64(LANES), _I64) as (k, _):

                def at(a: int) -> Any:
                    vector = ir.VectorType(data[a].type.pointee, LANES)
                    return b.bitcast(b.gep(data[a], [k]), vector.as_pointer())

                def load(a: int) -> Any:
                    v = b.load(at(a), align=4)
                    return v if v.type.element == _F64 else b.fpext(v, ir.VectorType(_F64, LANES))

                v = value(b, load, lambda a, v: b.store(v, at(a), align=8), *spread)
                wins = b.fcmp_ordered(better, v, b.load(best))  # strict: a lane keeps its first
                b.store(b.select(wins, v, b.load(best)), best)
                b.store(b.select(wins, _splat(b, k), b.load(where)), where)
            # Across lanes: the extreme, then the smallest index among the lanes that reach it.
            v = b.load(best)
            extreme = _reduce(b, "fmin.v8f64" if better == "<" else "fmax.v8f64", v, ("nnan", "nsz"))
            index = b.add(b.load(where), ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES))))
            ties = b.fcmp_ordered("==", v, _splat(b, extreme))
            index = _reduce(b, "umin.v8i64", b.select(ties, index, _fill(_I64, -1)))
            return context.make_tuple(b, sig.return_type, [extreme, index])

        return types.Tuple((types.float64, types.intp))(arrays, scalars, types.intp), codegen

    return scan


def _moved(b: Any, load: Any, store: Any, delta: Any) -> Any:
    g, qi, qj, up = range(4)
    v = b.fadd(load(g), b.fmul(delta, b.fsub(load(qi), load(qj))))
    store(g, v)
    return b.fadd(v, load(up))


def _gain(b: Any, load: Any, store: Any, gi: Any, di: Any) -> Any:
    g, low, qi, diag = range(4)
    gap = _max(b, b.fsub(b.fadd(load(g), load(low)), gi), _fill(_F64, 0.0))
    # The adder is busy here, hence the fused multiply-add where there is one ("contract");
    # doubling is exact, so fused or not the result is the same.
    twice = b.fmul(load(qi), _fill(_F64, -2.0), flags=("contract",))
    curvature = b.fadd(b.fadd(di, load(diag)), twice, flags=("contract",))
    return b.fdiv(b.fmul(gap, gap), _max(b, curvature, _fill(_F64, TINY)))


scan_moved = _first_best("<", np.inf, _moved)
scan_gain = _first_best(">", 0.0, _gain)
