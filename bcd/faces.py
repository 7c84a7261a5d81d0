# SPDX-License-Identifier: BSD-3-Clause
"""Solves with the Hessian of the free coordinates: P_FF Y = H, in the way that the form of P allows.

    [ P_FF + diag(damping)  E' ] [ d ]   [ h   ]
    [ E                     0  ] [ y ] = [ off ]      E: 1 where a coordinate belongs to a sum

    dense     Cholesky; after few changes of F the old factor, bordered (Schur complement)
    low rank  Woodbury: a k x k Cholesky factor of I + F'D^-1 F; dense where F has fewer rows than factors
    sparse    SuperLU (scipy)
    operator  conjugate gradients on the directions that keep the sums; dense where they fail and that is affordable

A ridge of rounding's size keeps what is singular solvable: its solutions are then long steps, which end at bounds or
belong to an unbounded problem. Negative curvature beyond rounding raises :class:`NonConvexError`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from scipy.linalg import blas, lapack
from scipy.sparse.linalg import splu

from bcd import _compiled
from bcd.gram import single_threaded_blas
from bcd.objectives import DenseHessian, LowRank, NonConvexError, OperatorHessian, SparseHessian

__all__ = ["Face", "make_face"]

Array = np.ndarray
EPS = float(np.finfo(np.float64).eps)
MOST_ENTRIES = 30_000_000  # of the matrix of free coordinates by sums: beyond, conjugate gradients need less memory
CG_ACCURACY = 1e-11  # of a residual, relative to the first one
BORDER = 6  # a factor serves while the changes are fewer than its size over this
CONCAVE = 1e-10  # negative curvature, relative to the size of the matrix, that passes for rounding
FLAT_D = 1e-10  # entries of D below this share of the diagonal are as good as 0
CANCELS = 1e-4  # D below this share of the diagonal costs Woodbury's formula more than four digits
COARSE = 1e-4  # damping, relative to the diagonal, from which float32 serves
PARALLEL = 1e10  # operations of BLAS below which one thread is quicker: panels of a factor wait for each other
MOST_FORMED = 2000  # coordinates of an operator whose matrix is formed where conjugate gradients do not converge
MOST_DENSE = 6000  # coordinates of a face that a low-rank matrix with zeros in D is formed for


def one_thread_below(flops: float) -> Any:
    """A context in which BLAS has one thread, where waking a second one does not pay."""
    return single_threaded_blas if flops < PARALLEL else nullcontext()


class Face(Protocol):
    """Solves for the free coordinates.

    Attributes
    ----------
    halted : callable
        Asked between the iterations of conjugate gradients, which end with what they have when it returns a value.
    """

    hessian: Any
    halted: Callable[[], Any]

    def kkt(self, F: Array, h: Array, sums: Array, off: Array, damping: Array | None) -> tuple[Array, Array]:
        """(d, y) of the system above; h, sums and damping of shape (f,), off and y of shape (m,).

        sums: the sum 0 .. m - 1 that a free coordinate belongs to, -1: none. Sums without free coordinates have y = 0.
        """

    def flops(self, f: int) -> float:
        """Operations of BLAS in a solve with f free coordinates, roughly."""


class _Face:
    """What all faces have: P, and whom to ask whether to go on."""

    def __init__(self, hessian: Any):
        self.hessian = hessian
        self.halted: Callable[[], Any] = lambda: None


class _Definite(_Face):
    """Faces that solve with ``P_FF + weight EE'``, which is positive definite where the whole system is regular."""

    def __init__(self, hessian: Any):
        super().__init__(hessian)
        self.weight = _harmonic_mean(hessian.diagonal)

    def solve(self, F: Array, H: Array, sums: Array, damping: Array | None) -> Array | None:
        """Y with ``(P_FF + weight EE' + diag(damping)) Y = H``, shapes (f, r); None where that is not definite."""
        raise NotImplementedError

    def flops(self, f: int) -> float:
        """See :class:`Face`."""
        raise NotImplementedError

    def kkt(self, F: Array, h: Array, sums: Array, off: Array, damping: Array | None) -> tuple[Array, Array]:
        """See :class:`Face`."""
        y = np.zeros(len(off))
        taken = np.flatnonzero(np.bincount(sums + 1, minlength=len(off) + 1)[1:])
        if len(F) * len(taken) > MOST_ENTRIES:
            return _conjugate(self, F, h, sums, off, damping)[:2]
        E = (sums[:, None] == taken).astype(np.float64)
        with one_thread_below(self.flops(len(F))):
            Y = self.solve(F, np.column_stack([h, E]), sums, damping)
        if Y is None:
            d, y[taken] = _reduced(self.hessian.block(_examined(F)), self.hessian.n, F, h, E, off[taken], damping)
            return d, y
        d, turned = Y[:, 0], Y[:, 1:]
        if len(taken):
            y[taken] = _solve_small(E.T @ turned, E.T @ d - off[taken])
            d = d - turned @ y[taken]
            y[taken] += self.weight * off[taken]
        return d, y


def _harmonic_mean(diagonal: Array) -> float:
    """Of the positive entries: in units of the diagonal's square roots EE' is then as large as P; it drowns nothing."""
    positive = diagonal[diagonal > 0]
    return float(len(positive) / (1.0 / positive).sum()) if len(positive) else 1.0


def _solve_small(S: Array, r: Array) -> Array:
    return r / S[0] if len(r) == 1 else np.linalg.lstsq(S, r, rcond=None)[0]


def _examined(F: Array) -> Array:
    """F, if it is not too large for eigenvalues."""
    if len(F) > MOST_DENSE:
        raise ValueError(f"P is not positive definite on {len(F)} free coordinates; up to {MOST_DENSE} can be examined")
    return F


def _reduced(P: Array, n: int, F: Array, h: Array, E: Array, off: Array, damping: Array | None) -> tuple[Array, Array]:
    """The same from P_FF where only the directions that keep the sums have positive curvature: one coordinate follows.

    Raises NonConvexError where one of those directions has negative curvature.
    """
    K = P if damping is None else P + np.diag(damping)
    anchors = E.argmax(axis=0)
    rest = np.setdiff1d(np.arange(len(F)), anchors)
    Z = np.zeros((len(F), len(rest)))
    Z[rest, np.arange(len(rest))] = 1.0
    Z[anchors] = -E[rest].T
    values, vectors = np.linalg.eigh(Z.T @ K @ Z)
    scale = float(np.abs(K).sum(axis=1).max(initial=0.0))
    if len(rest) and values[0] < -CONCAVE * scale:
        d = Z @ vectors[:, 0]
        d /= np.linalg.norm(d)
        direction = np.zeros(n)
        direction[F] = d
        raise NonConvexError(direction, float(d @ P @ d))
    d = np.zeros(len(F))
    d[anchors] = off
    pull = vectors.T @ (Z.T @ (h - K @ d))
    d += Z @ (vectors @ (pull / np.maximum(values, 4 * EPS * max(scale, EPS))))
    return d, (h - K @ d)[anchors]


def examine_block(P: Array, n: int, F: Array, sums: Array) -> None:
    """NonConvexError where P_FF has negative curvature along a direction that keeps the sums of the n coordinates."""
    if _cholesky(P + _harmonic_mean(P.diagonal()) * _same(sums, sums), None) is None:
        E = (sums[:, None] == np.unique(sums[sums >= 0])).astype(np.float64)
        _reduced(P, n, F, np.zeros(len(F)), E, np.zeros(E.shape[1]), None)


class DenseFace(_Definite):
    """P explicit: Cholesky factor of a base set of coordinates, bordered while the free ones stay near to it."""

    def __init__(self, hessian: DenseHessian):
        super().__init__(hessian)
        self.P = hessian.matrix
        self.base = self.held = np.empty(0, np.int64)  # the coordinates and their sums
        self.lower: Any = None  # L with P = LL' on the base
        self.place = np.full(hessian.n, -1)  # of a coordinate in the base

    def solve(self, F: Array, H: Array, sums: Array, damping: Array | None) -> Array | None:
        """See :class:`_Definite`."""
        if damping is not None:  # such steps only lead the way, and float32 is enough for well conditioned ones
            coarse = bool((damping >= COARSE * self.hessian.diagonal[F]).all())
            return _solve_dense(self._upper(F, sums, np.float32 if coarse else np.float64), H, damping)
        known = self.place[F]
        stays = np.zeros(len(self.base), bool)
        stays[known[known >= 0]] = True
        border = np.count_nonzero(known < 0) + np.count_nonzero(~stays)
        moved = (self.held[known[known >= 0]] != sums[known >= 0]).any()
        if self.lower is None or BORDER * border > len(self.base) or moved:
            self._factor(F, sums)
            return None if self.lower is None else lapack.dpotrs(self.lower, H, lower=1)[0]
        if border == 0:
            return lapack.dpotrs(self.lower, H[np.argsort(known)], lower=1)[0][known]
        return self._bordered(F, H, sums, known, np.flatnonzero(~stays))

    def flops(self, f: int) -> float:
        """Of the Cholesky factor."""
        return f**3 / 3

    def _upper(self, F: Array, sums: Array, dtype: Any = np.float64) -> Array:
        """P_FF + weight EE' in its upper triangle."""
        K = np.empty((len(F), len(F)), dtype)
        _compiled.gather_upper(self.P, F, sums, self.weight, K)
        return K

    def _factor(self, F: Array, sums: Array) -> None:
        """Make F the base; ``lower`` is None where the matrix is not positive definite."""
        self.place[self.base] = -1
        self.base, self.held, self.lower = F, sums, _cholesky(self._upper(F, sums), None)
        self.place[F] = np.arange(len(F))

    def _cross(self, F: Array, sums: Array, G: Array, other: Array) -> Array:
        """Rows F and columns G of P + weight EE'."""
        return self.P[np.ix_(F, G)] + self.weight * _same(sums, other)

    def _bordered(self, F: Array, H: Array, sums: Array, known: Array, gone: Array) -> Array | None:
        """The base with rows added for what is new in F, and a multiplier for every one that is gone."""
        new, r = known < 0, H.shape[1]
        added = int(new.sum())
        right = np.zeros((len(self.base), r + added + len(gone)), order="F")
        right[known[~new], :r] = H[~new]
        right[:, r : r + added] = self._cross(F[new], sums[new], self.base, self.held).T
        right[gone, r + added + np.arange(len(gone))] = 1.0
        half = blas.dtrsm(1.0, self.lower, right, lower=1, overwrite_b=1)
        V, W = half[:, :r], half[:, r:]
        corner = np.zeros((W.shape[1], W.shape[1]))
        corner[:added, :added] = self._cross(F[new], sums[new], F[new], sums[new])
        bottom = np.zeros((W.shape[1], r))
        bottom[:added] = H[new]
        factor, pivots, z, fault = lapack.dsysv(corner - W.T @ W, bottom - W.T @ V)
        if fault or _positive(factor, pivots) != added:  # else the matrix would not be definite
            self.lower = None
            return self.solve(F, H, sums, None)
        back = blas.dtrsm(1.0, self.lower, np.asfortranarray(V - W @ z), lower=1, trans_a=1, overwrite_b=1)
        Y = np.empty((len(F), r))
        Y[~new], Y[new] = back[known[~new]], z[:added]
        return Y


def _same(sums: Array, other: Array) -> Array:
    """Whether two coordinates share a sum, shape (f, g)."""
    return (sums[:, None] == other) & (sums >= 0)[:, None]


def _ridge(diagonal: Array) -> Array:
    """What rounding may have taken from a positive semidefinite matrix, coordinate by coordinate."""
    return 4 * EPS * np.where(diagonal > 0, len(diagonal) * diagonal, float(diagonal.max(initial=0.0)) or 1.0)


def _cholesky(K: Array, damping: Array | None) -> Any:
    """L with ``LL' = K + diag(damping) + ridge``, K given by its upper triangle and overwritten; None: not definite."""
    K.flat[:: len(K) + 1] += _ridge(K.diagonal()) + (0.0 if damping is None else damping)
    factor = lapack.spotrf if K.dtype == np.float32 else lapack.dpotrf
    lower, fault = factor(K.T, lower=1, clean=0, overwrite_a=1)
    return None if fault else lower


def _solve_dense(K: Array, H: Array, damping: Array | None) -> Array | None:
    """``(K + diag(damping)) Y = H`` in the precision of K, by its upper triangle, which is overwritten."""
    lower = _cholesky(K, damping)
    if lower is None:
        return None
    solve = lapack.spotrs if K.dtype == np.float32 else lapack.dpotrs
    return solve(lower, H, lower=1)[0].astype(np.float64, copy=False)


def _positive(factor: Array, pivots: Array) -> int:
    """Number of positive eigenvalues, from a Bunch-Kaufman factor: a block of two has one of each sign."""
    return int(((pivots > 0) & (factor.diagonal() > 0)).sum() + (pivots < 0).sum() // 2)


class LowRankFace(_Definite):
    """``F F' + diag(D)``: Woodbury, or dense where that is smaller or D has zeros."""

    def solve(self, F: Array, H: Array, sums: Array, damping: Array | None) -> Array | None:
        """See :class:`_Definite`."""
        D = self.hessian.shift[F] if damping is None else self.hessian.shift[F] + damping
        diagonal = self.hessian.diagonal[F]
        share = float((D / np.where(diagonal > 0, diagonal, 1.0)).min())
        if len(F) <= self.hessian.factors.shape[1] or (len(F) <= MOST_DENSE and share <= FLAT_D):
            return _solve_dense(self.hessian.block(F) + self.weight * _same(sums, sums), H, damping)
        D = np.maximum(D, np.where(diagonal > 0, FLAT_D * diagonal, FLAT_D * self.weight))
        Y, again = self._woodbury(F, D, H)
        if share < CANCELS:  # the formula loses digits: refined once
            rows = self.hessian._rows(F)
            joint = H[:, 1:] @ (H[:, 1:].T @ Y)
            Y += again(H - D[:, None] * Y - rows @ (rows.T @ Y) - self.weight * joint)
        return Y

    def flops(self, f: int) -> float:
        """Of the core matrix."""
        return float(f * self.hessian.factors.shape[1] ** 2)

    def _woodbury(self, F: Array, D: Array, H: Array) -> tuple[Array, Callable[[Array], Array]]:
        """``(F F' + weight EE' + diag(D))^-1 H``, E = H[:, 1:], and the function that solves for other H."""
        root = np.sqrt(D)[:, None]
        B = self.hessian._rows(F)
        B /= root
        E = np.sqrt(self.weight) * H[:, 1:] / root
        k, m = B.shape[1], E.shape[1]
        core = np.zeros((k + m, k + m), order="F")
        core[:k, :k] = blas.dsyrk(1.0, B.T)  # upper triangle
        core[:k, k:], core[k:, k:] = B.T @ E, E.T @ E
        core.flat[:: k + m + 1] += 1.0
        factor = lapack.dpotrf(core, lower=0, clean=0, overwrite_a=1)[0]

        def inverse(R: Array) -> Array:
            """The formula for one R."""
            R = R / root
            z = lapack.dpotrs(factor, np.concatenate([B.T @ R, E.T @ R]), lower=0)[0]
            R -= B @ z[:k]
            R -= E @ z[k:]
            R /= root
            return R

        return inverse(H), inverse


class SparseFace(_Face):
    """A scipy sparse matrix: SuperLU of the whole system."""

    def __init__(self, hessian: SparseHessian):
        super().__init__(hessian)
        self.P = sp.csc_array(hessian.matrix)
        self.examined = np.zeros(hessian.n, bool)  # coordinates on which P is known to be positive definite

    def kkt(self, F: Array, h: Array, sums: Array, off: Array, damping: Array | None) -> tuple[Array, Array]:
        """See :class:`Face`."""
        f, y = len(F), np.zeros(len(off))
        taken = np.flatnonzero(np.bincount(sums + 1, minlength=len(off) + 1)[1:])
        held = np.flatnonzero(sums >= 0)
        E = sp.csc_array((np.ones(len(held)), (held, np.searchsorted(taken, sums[held]))), shape=(f, len(taken)))
        K = self.P[:, F][F]
        K = K + sp.diags_array(_ridge(K.diagonal()) + (0.0 if damping is None else damping))
        if damping is None and not self._definite(F, K):
            if f > MOST_DENSE:
                return _conjugate(self, F, h, sums, off, damping)[:2]
            d, y[taken] = _reduced(self.hessian.block(F), self.hessian.n, F, h, E.toarray(), off[taken], damping)
            return d, y
        factor = _superlu(sp.block_array([[K, E], [E.T, None]]) if len(taken) else K)
        if factor is None:  # singular
            return _conjugate(self, F, h, sums, off, damping)[:2]
        solution = factor.solve(np.concatenate([h, off[taken]]))
        d, y[taken] = solution[:f], solution[f:]
        return d, y

    def flops(self, f: int) -> float:
        """SuperLU has its own loops."""
        return 0.0

    def _definite(self, F: Array, K: Any) -> bool:
        """Whether K has positive pivots; principal submatrices of what had them need no look."""
        if self.examined[F].all():
            return True
        factor = _superlu(K, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        found = factor is not None and (factor.perm_r == factor.perm_c).all() and (factor.U.diagonal() > 0).all()
        if found:
            self.examined[:] = False
            self.examined[F] = True
        return bool(found)


def _superlu(matrix: Any, **options: Any) -> Any:
    """SuperLU of a sparse matrix; None if it is singular."""
    matrix = sp.csc_matrix(matrix)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    try:
        return splu(matrix, **options)
    except RuntimeError:
        return None


class OperatorFace(_Face):
    """Products only; where conjugate gradients need more of them than there are columns, the matrix that these make."""

    def __init__(self, hessian: OperatorHessian):
        super().__init__(hessian)
        self.dense: DenseFace | None = None

    def flops(self, f: int) -> float:
        """Threads are the operator's own affair."""
        return np.inf

    def kkt(self, F: Array, h: Array, sums: Array, off: Array, damping: Array | None) -> tuple[Array, Array]:
        """See :class:`Face`."""
        if self.dense is None:
            d, y, enough = _conjugate(self, F, h, sums, off, damping)
            if enough or self.hessian.n > MOST_FORMED:
                return d, y
            columns = self.hessian.operator.matmat(np.eye(self.hessian.n))
            self.dense = DenseFace(DenseHessian(0.5 * (columns + columns.T)))
        return self.dense.kkt(F, h, sums, off, damping)


def _conjugate(
    face: Face, F: Array, h: Array, sums: Array, off: Array, damping: Array | None
) -> tuple[Array, Array, bool]:
    """Conjugate gradients on the directions that keep the sums; whether they were enough, or halted, comes last."""
    hessian: Any = face.hessian
    count = np.maximum(np.bincount(sums + 1, minlength=len(off) + 1)[1:], 1)
    size = getattr(hessian, "size", float(np.abs(hessian.diagonal).max(initial=0.0)))
    ridge = float(_ridge(hessian.diagonal[F]).max())
    shift = ridge + (0.0 if damping is None else damping)

    def product(v: Array) -> Array:
        whole = np.zeros(hessian.n)
        whole[F] = v
        return hessian.product(whole)[F] + shift * v

    def mean(r: Array) -> Array:
        return np.bincount(sums + 1, r, minlength=len(off) + 1)[1:] / count

    def spread(y: Array) -> Array:
        return np.append(y, 0.0)[sums]  # the last serves -1

    d = spread(off / count)
    r = h - product(d)
    r -= spread(mean(r))
    p, square = r, float(r @ r)
    enough = max(CG_ACCURACY**2 * square, len(F) * (4 * EPS * float(np.abs(h).max(initial=0.0))) ** 2)
    for _ in range((1 if hessian.n <= MOST_FORMED else 4) * len(F) + 50):
        if square <= enough or face.halted() is not None:
            break
        Kp = product(p)
        curvature = float(p @ Kp)
        if curvature < -CONCAVE * size * float(p @ p):
            _refuse_concave(hessian, F, p - spread(mean(p)), CONCAVE * size)
        step = square / max(curvature, ridge * float(p @ p))
        d = d + step * p
        r = r - step * Kp
        r -= spread(mean(r))  # each time: what rounding adds to the sums would stay while r gets small
        square, before = float(r @ r), square
        p = r + (square / before) * p
    return d, mean(h - product(d)), square <= enough or face.halted() is not None


def _refuse_concave(hessian: Any, F: Array, p: Array, allowed: float) -> None:
    """NonConvexError if the curvature of P along p, computed anew, is below what rounding explains."""
    direction = np.zeros(hessian.n)
    direction[F] = p / np.linalg.norm(p)
    curvature = float(direction @ hessian.product(direction))
    if curvature < -allowed:
        raise NonConvexError(direction, curvature)


def make_face(hessian: Any) -> Face:
    """The solver that suits the form of the matrix."""
    if isinstance(hessian, LowRank):
        return LowRankFace(hessian)
    if isinstance(hessian, OperatorHessian):
        return OperatorFace(hessian)
    return SparseFace(hessian) if isinstance(hessian, SparseHessian) else DenseFace(hessian)
