# SPDX-License-Identifier: BSD-3-Clause
"""Solutions of quadratic programs as torch functions: a layer that can be trained through.

    x(q, s, l, u, P) = argmin 1/2 x'Px + q'x   subject to   sum of x over every group = s,   l <= x <= u

Where no multiplier of a bound that holds is 0, the bounds that hold stay the same for small changes, and on the free
set F, with E the sums over F, B the coordinates at a bound and x_B that bound,

    [ P_FF  E' ] [ x_F ]   [ -q_F - P_FB x_B ]
    [ E     0  ] [ y   ] = [ s - sums of x_B ]                                                           (1)

says all about the derivatives (Amos and Kolter 2017). The point comes from :class:`bcd.QP`; here (1) is one function
that torch can differentiate, whose derivative is the same function again, so that derivatives of every order, and those
in P, follow from one factorisation. Elsewhere (a bound holds with multiplier 0) the solution has one-sided derivatives
only, and what is returned is that of the pieces next to the point on which the bound stays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bcd._check import group_labels
from bcd.faces import make_face
from bcd.objectives import Hessian, LowRank
from bcd.qp import QP
from bcd.result import Result, Status

__all__ = ["solve"]

Array = np.ndarray
LOOSE = 100  # times the tolerance, or TIGHTEST: up to there a point that rounding stopped serves
TIGHTEST = 1e-12
ACCURATE = 1e-8  # relative residual of (1) up to which a factorisation serves; those of singular matrices miss it


def solve(
    P: Any,
    q: Any,
    *,
    total: Any = None,
    lower: Any = None,
    upper: Any = None,
    groups: Any = None,
    tol: float = 1e-10,
) -> Tensor:
    """Minimise ``1/2 x'Px + q'x`` under sums and bounds; differentiable in every tensor given.

    Parameters
    ----------
    P : Tensor, ndarray, scipy sparse array or LowRank; shape (n, n)
        Positive semidefinite on the feasible directions, the same for the whole batch. Of a tensor or ndarray
        ``(P + P') / 2`` is used; gradients reach it if it is a tensor that requires them.
    q : Tensor, shape (..., n)
        Linear terms; leading dimensions are a batch. Its dtype and device are those of the result.
    total : float or Tensor, optional
        Sums; one that broadcasts to the batch, or with ``groups`` to the batch and (m,). Default: no sum.
    lower, upper : float or Tensor, optional
        Bounds that broadcast to q. Default: none.
    groups : array of int, shape (n,), optional
        The sum each coordinate is in; negative: in none.
    tol : float
        As for :func:`bcd.solve_qp`. Where rounding stops the solver before it, a violation of 100 times as much is
        accepted, and one of 1e-10 in any case.

    Returns
    -------
    Tensor, shape (..., n)
        The solutions.

    Raises
    ------
    ValueError
        As for :func:`bcd.solve_qp`, if a problem has no solution because it falls without end, and if rounding stops
        the solver far from the tolerance.

    Notes
    -----
    Everything is computed on the CPU in float64; tensors of other devices and types are moved there and back.

    Where P_FF is singular and the solution not unique, derivatives are those of least norm (the pseudo-inverse of the
    matrix in (1)). Where all coordinates of a sum are at bounds, the derivative in its total is 0. A coordinate
    counts as free when it is strictly between its bounds.

    Examples
    --------
    >>> q = torch.tensor([0.0, -1.0, 5.0], dtype=torch.float64, requires_grad=True)
    >>> x = solve(np.eye(3), q, total=1.0, lower=0.0)
    >>> x.tolist()
    [0.0, 1.0, 0.0]
    >>> q = torch.tensor([0.0, -0.5, 5.0], dtype=torch.float64, requires_grad=True)
    >>> x = solve(np.eye(3), q, total=1.0, lower=0.0)
    >>> x[1].backward()
    >>> x.tolist()
    [0.25, 0.75, 0.0]
    >>> torch.allclose(q.grad, torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64))
    True
    """
    if not isinstance(q, Tensor) or q.ndim == 0 or not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor of shape (..., n); found {_found(q)}")
    n, batch = q.shape[-1], q.shape[:-1]
    matrix, qp = _prepared(P, groups, n)
    labels, sums = group_labels(groups, n)
    labels = labels if len(labels) else np.full(n, -1 if total is None else 0)
    sums = 0 if total is None else sums
    linear = _host(q).reshape(batch.numel(), n)
    totals = _spread("total", 0.0 if total is None else total, batch, () if groups is None else (sums,))[:, :sums]
    low = _spread("lower", -np.inf if lower is None else lower, batch, (n,))
    high = _spread("upper", np.inf if upper is None else upper, batch, (n,))

    x, y, side = _points(qp, linear, totals, low, high, groups, tol)
    held = torch.where(side < 0, low, torch.where(side > 0, high, torch.zeros_like(low)))
    pull = held @ matrix if matrix is not None else _Product.apply(held, qp.quadratic.hessian)
    free = side == 0
    inside = torch.from_numpy(np.flatnonzero(labels >= 0))
    group = torch.from_numpy(labels[labels >= 0].astype(np.int64))
    left = totals - torch.zeros_like(totals).index_add(1, group, held[:, inside])
    system = _System(qp.quadratic.hessian, free.numpy(), labels)
    moved, _ = _Solve.apply(matrix, -(linear + pull), left, system, (torch.where(free, x, torch.zeros_like(x)), y))
    return (held + moved).reshape(q.shape).to(q.device, q.dtype)


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return type(value).__name__


def _host(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64)


def _spread(name: str, value: Any, batch: torch.Size, tail: tuple[int, ...]) -> Tensor:
    """A number, array or tensor as a float64 tensor with one row a problem."""
    given = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float64))
    shape = (*batch, *tail)
    try:
        return _host(given).expand(shape).reshape(batch.numel(), math.prod(tail))
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to shape {shape}; found {tuple(given.shape)}") from None


def _prepared(P: Any, groups: Any, n: int) -> tuple[Tensor | None, QP]:
    """The matrix as a tensor, if gradients must reach it, and the solver."""
    matrix = None
    if isinstance(P, Tensor | np.ndarray):
        given = _host(P) if isinstance(P, Tensor) else torch.as_tensor(P, dtype=torch.float64)
        if given.shape != (n, n):
            raise ValueError(f"P must have shape ({n}, {n}) to go with q; found {tuple(given.shape)}")
        symmetric = 0.5 * (given + given.mT)
        matrix = symmetric if symmetric.requires_grad else None
        P = symmetric.detach().contiguous().numpy()
    elif not isinstance(P, LowRank) and not sp.issparse(P):
        raise ValueError(f"P must be a tensor, an array, a scipy sparse array or bcd.LowRank; found {_found(P)}")
    qp = QP(P, groups=groups)
    if qp.n != n:
        raise ValueError(f"P must have shape ({n}, {n}) to go with q; found ({qp.n}, {qp.n})")
    return matrix, qp


@torch.no_grad()
def _points(
    qp: QP, linear: Tensor, totals: Tensor, low: Tensor, high: Tensor, groups: Any, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions, multipliers of the sums, and the side of every coordinate: -1 lower bound, 1 upper, 0 free."""
    rows = [part.detach().numpy() for part in (linear, totals, low, high)]
    x, y = np.empty(linear.shape), np.empty(totals.shape)
    side = np.zeros(linear.shape, np.int64)
    for k, (q, s, a, b) in enumerate(zip(*rows, strict=True)):
        total = None if len(s) == 0 else float(s[0]) if groups is None else s.tolist()
        result = qp.solve(q, total=total, lower=a, upper=b, tol=tol)
        if result.status is Status.INTERRUPTED:
            raise KeyboardInterrupt
        if result.status not in (Status.CONVERGED, Status.STAGNATED):
            raise ValueError(f"problem {k} of the batch has no solution: {result.status.value}")
        if not result.status.ok:
            _check_accuracy(k, result, qp.quadratic.hessian.product(result.x) + q, tol)
        x[k], y[k] = result.x, result.total_multipliers
        at_upper = (result.x == b) & ((a < b) | (result.bound_multipliers > 0))  # of equal bounds the one that holds
        side[k] = np.where(at_upper, 1, np.where(result.x == a, -1, 0))
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(side)


def _check_accuracy(k: int, result: Result, gradient: Array, tol: float) -> None:
    reached = result.violation / max(1.0, float(np.abs(gradient).max()))
    if reached > LOOSE * max(tol, TIGHTEST):
        raise ValueError(
            f"problem {k} of the batch: rounding stopped the solver at a violation of {reached:.3g} relative to the "
            f"gradient, where tol asks for {tol:g}; use a larger tol or scale the problem"
        )


class _System:
    """Equation (1) for every row of a batch; rows with the same free set are solved one after the other."""

    def __init__(self, hessian: Hessian, free: Array, labels: Array):
        self.hessian, self.labels = hessian, labels
        self.face = make_face(hessian)
        sets = free.tobytes(), free.shape[1]
        which: dict[bytes, list[int]] = {}
        for k in range(len(free)):
            which.setdefault(sets[0][k * sets[1] : (k + 1) * sets[1]], []).append(k)
        self.parts = [(np.flatnonzero(free[rows[0]]), np.array(rows)) for rows in which.values()]

    def solve(self, r: Array, s: Array) -> tuple[Array, Array]:
        """The answer (u, w) to the right-hand sides r, of which the free entries count, and s; u is 0 elsewhere."""
        u, w = np.zeros(r.shape), np.zeros(s.shape)
        for F, rows in self.parts:
            if len(F) == 0:
                continue
            for k in rows:
                found = self._solve(F, r[k, F], s[k])
                if found is None:
                    u[np.ix_(rows, F)], w[rows] = self._least_norm(F, r[np.ix_(rows, F)], s[rows])
                    break
                u[k, F], w[k] = found
        return u, w

    def _solve(self, F: Array, r: Array, s: Array) -> tuple[Array, Array] | None:
        """By a factor of P_FF, refined; None where that leaves more than rounding: the matrix is singular."""
        sums = self.labels[F]
        held = np.isin(np.arange(len(s)), sums)
        unit = float(np.abs(self.hessian.diagonal[F]).max())
        size = np.abs(r).max() + unit * np.abs(s[held]).max(initial=0.0)
        u, w, miss = np.zeros(len(F)), np.zeros(len(s)), np.inf
        rest, off = r, np.where(held, s, 0.0)
        for _ in range(2):  # the second time for what rounding and the ridge of a face have left
            du, dw = self.face.kkt(F, rest, sums, off, None)
            u, w = u + du, w + dw
            full = np.zeros(self.hessian.n)
            full[F] = u
            rest = r - self.hessian.product(full)[F] - np.append(w, 0.0)[sums]  # the last serves -1
            off = np.where(held, s - np.bincount(sums + 1, u, minlength=len(s) + 1)[1:], 0.0)
            miss = max(np.abs(rest).max(), unit * np.abs(off).max(initial=0.0))
        return (u, w) if miss <= ACCURATE * size else None

    def _least_norm(self, F: Array, r: Array, s: Array) -> tuple[Array, Array]:
        """By the pseudo-inverse, for several right-hand sides (rows)."""
        P = self.hessian.block(F)
        unit = float(P.diagonal().max()) or 1.0  # the sums in the size of P, so that one cut-off serves both
        E = unit * (self.labels[F][:, None] == np.arange(s.shape[1]))
        K = np.block([[P, E], [E.T, np.zeros((s.shape[1], s.shape[1]))]])
        inverse = np.linalg.pinv(K, rcond=len(K) * float(np.finfo(np.float64).eps), hermitian=True)
        solution = np.hstack([r, unit * s]) @ inverse
        return solution[:, : len(F)], unit * solution[:, len(F) :]


class _Solve(torch.autograd.Function):
    """(P, r, s) -> (u, w) by :class:`_System`; its derivative is itself in r and s, ``-(dr u' + u dr') / 2`` in P."""

    @staticmethod
    def forward(ctx: Any, P: Tensor | None, r: Tensor, s: Tensor, system: _System, known: Any) -> tuple[Tensor, Tensor]:
        """``known`` is the answer where the solver has given it."""
        u, w = known or (torch.from_numpy(part) for part in system.solve(r.detach().numpy(), s.detach().numpy()))
        ctx.system = system
        ctx.save_for_backward(P, u)
        return u, w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Solve the same (symmetric) system with the gradients on the right."""
        P, u = ctx.saved_tensors
        du, dw = grads
        r, s = _Solve.apply(P, du, dw, ctx.system, None)
        outer = r.mT @ u if ctx.needs_input_grad[0] else None
        return None if outer is None else -0.5 * (outer + outer.mT), r, s, None, None


class _Product(torch.autograd.Function):
    """Rows times a constant symmetric matrix."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, hessian: Hessian) -> Tensor:
        """Row by row."""
        ctx.hessian = hessian
        out = [torch.from_numpy(hessian.product(row)) for row in rows.detach().numpy()]
        return torch.stack(out) if out else rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The matrix is symmetric."""
        return _Product.apply(grads[0], ctx.hessian), None
