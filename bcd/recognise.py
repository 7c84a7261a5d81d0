# SPDX-License-Identifier: BSD-3-Clause
"""Sums and bounds in a general quadratic program, and the way back to its variables and multipliers.

    minimise 1/2 x'Px + q'x   subject to   A x = b,  G x <= h,  lb <= x <= ub          what modelling tools write
    minimise 1/2 w'Hw + c'w   subject to   lo_k <= a_k'w <= hi_k,  lower <= w <= upper    what bcd.solve_qp takes

with a_k of disjoint supports. Rows with one variable are bounds. A row of A that defines a free variable,
e y + F'w = b, is used up by substituting y; what y'My was becomes H = F M F' + ..., as factors where M is diagonal or
small. A row x_j = c x_k + s makes one variable of two. What is left of A and G must be sums over disjoint variables,
multiples of each other, or sums of other rows.

The way back. With x = T w + s after a substitution, the reduced gradient is T' times the gradient of the Lagrangian,
in which the multipliers of the rows used up do not show; so these follow, last substitution first, from the
gradient's entries at the variables that were substituted. A multiplier of w's bounds or sums belongs to the row that
set the bound: each keeps its source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator

from bcd._check import as_matrix, as_vector, check_numeric
from bcd.constraints import InfeasibleError
from bcd.objectives import LowRank

__all__ = ["NotSumBoxError", "Recovered", "SumBoxForm", "recognise"]

Array = np.ndarray

LOWER, UPPER = 0, 1
A_ROW, G_ROW, BOX, NOTHING = 0, 1, 2, 3  # where a bound comes from
PARALLEL = 1e-12  # relative difference of coefficients up to which rows are multiples of each other
AGREE = 1e-9  # difference of right-hand sides, relative to their size, up to which constraints that say the same agree
ROUNDING = 1e-15
RESIDUE = 1e-6  # a side counts as no smaller than this share of its terms: AGREE * RESIDUE of them is rounding
DENSE_UP_TO = 8192  # variables for which H is formed (512 MB) where it is not low rank plus diagonal
DENSE_FROM = 0.1  # share of non-zeros from which a matrix is stored densely


class NotSumBoxError(ValueError):
    """The program has a constraint that is no bound, no sum over variables of its own, and defines no variable.

    Attributes
    ----------
    matrix : str
        ``"A"`` or ``"G"``.
    row : int
        The row of that matrix.
    """

    def __init__(self, message: str, kind: int, row: int):
        super().__init__(message)
        self.matrix, self.row = "AG"[kind], int(row)


class Recovered(NamedTuple):
    """A point and multipliers of the program as given: ``P x + q + A'y + G'z + z_box = 0`` at a solution.

    ``z >= 0``; ``z_box`` is positive at upper bounds, negative at lower ones.
    """

    x: Array
    y: Array
    z: Array
    z_box: Array


def recognise(
    P: Any, q: Any, A: Any = None, b: Any = None, G: Any = None, h: Any = None, lb: Any = None, ub: Any = None
) -> SumBoxForm:
    """Find the sum + box problem in ``min 1/2 x'Px + q'x, A x = b, G x <= h, lb <= x <= ub``.

    Parameters
    ----------
    P : array of float or scipy sparse, shape (n, n)
        Symmetric.
    q : array of float, shape (n,)
    A, G : array of float or scipy sparse, shapes (m, n) and (p, n), optional
    b, h : array of float, shapes (m,) and (p,)
        Infinite entries of h are no constraint.
    lb, ub : array of float, shape (n,), optional

    Returns
    -------
    SumBoxForm

    Raises
    ------
    NotSumBoxError
        Some row is outside of this form; the message names it and says why.
    InfeasibleError
        Rows and bounds contradict each other (as far as it shows here; totals out of reach are found by the solver).
    ValueError
        Wrong shapes, NaN.

    Examples
    --------
    Two assets and a factor y = w_0 + 2 w_1, as a modelling tool writes it:

    >>> P = np.diag([0.0, 0.0, 1.0])
    >>> A = np.array([[1.0, 2.0, -1.0], [3.0, 3.0, 0.0]])
    >>> form = recognise(P, np.zeros(3), A, b=[0.0, 3.0], G=[[-1.0, 0.0, 0.0], [0.0, -2.0, 0.0]], h=[0.0, 0.0])
    >>> form.total, form.lower, form.P.factors.ravel()
    (1.0, array([0., 0.]), array([1., 2.]))
    """
    given = _check(P, q, A, b, G, h, lb, ub)
    left = _Reduction(given)
    left.run()
    sums = _Sums(left.bounds, left.columns)
    for rows in (left.equalities, left.inequalities):
        sums.add_rows(rows)
    sums.check()
    P_left, q_left = left.objective()
    (lower, upper), (total, weights, groups) = left.bounds.value, sums.arguments()
    return SumBoxForm(P_left, q_left, lower, upper, total, weights, groups, _Way(given, left, sums))


@dataclass(frozen=True)
class SumBoxForm:
    """Arguments for :func:`bcd.solve_qp`, and the way back.

    Attributes
    ----------
    P, q, lower, upper, total, weights, groups
        As :func:`bcd.solve_qp` takes them, of the variables that are left.
    """

    P: Any
    q: Array
    lower: Array
    upper: Array
    total: Any
    weights: Array | None
    groups: Array | None
    way: _Way = field(repr=False)

    def start(self, x: Any) -> Array:
        """The entries of a point of the given program that are left here."""
        return as_vector("x0", x, len(self.way.given.q))[self.way.left.columns]

    def restore(self, w: Array, total_multipliers: Array, bound_multipliers: Array) -> Recovered:
        """Point and multipliers of the given program from those of this one.

        Parameters
        ----------
        w, bound_multipliers : ndarray, shape (len(q),)
        total_multipliers : ndarray, shape (number of sums,)
            Signs as in :class:`bcd.Result`.
        """
        return self.way.back(w, total_multipliers, bound_multipliers)


# -- the program as given -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Program:
    P: Any
    q: Array
    A: sp.csr_array
    b: Array
    G: sp.csr_array
    h: Array
    lb: Array
    ub: Array

    def gradient(self, at: Recovered) -> Array:
        """The gradient of the Lagrangian."""
        return self.P @ at.x + self.q + self.A.T @ at.y + self.G.T @ at.z + at.z_box


def _check(P: Any, q: Any, A: Any, b: Any, G: Any, h: Any, lb: Any, ub: Any) -> _Program:
    matrix = as_matrix("P", P, "a matrix of shape (n, n)")
    n = matrix.shape[1]
    if matrix.shape[0] != n:
        raise ValueError(f"P must be square; found shape {matrix.shape}")
    rows = _check_rows("A", A, "b", b, n), _check_rows("G", G, "h", h, n)
    if not np.isfinite(rows[0][1]).all():
        raise ValueError(f"b must be finite; found {rows[0][1]}")
    box = _check_limits("lb", lb, n, -np.inf), _check_limits("ub", ub, n, np.inf)
    return _Program(matrix, as_vector("q", q, n), *rows[0], *rows[1], *box)


def _check_rows(name: str, matrix: Any, side_name: str, side: Any, n: int) -> tuple[sp.csr_array, Array]:
    if (matrix is None) != (side is None):
        raise ValueError(f"{name} and {side_name} must be given together; one of them is None")
    if matrix is None or np.shape(matrix)[0] == 0:
        return sp.csr_array((0, n)), np.empty(0)
    matrix = sp.csr_array(as_matrix(name, matrix, f"a matrix with {n} columns"))
    if matrix.shape[1] != n:
        raise ValueError(f"{name} must have {n} columns, one a variable; found shape {matrix.shape}")
    return _tidy(matrix), _check_limits(side_name, side, matrix.shape[0], np.inf)


def _check_limits(name: str, value: Any, n: int, absent: float) -> Array:
    if value is None:
        return np.full(n, absent)
    check_numeric(name, value)
    limits = np.asarray(value, dtype=np.float64)
    if limits.shape != (n,) or np.isnan(limits).any():
        raise ValueError(f"{name} must have shape ({n},) without NaN; found shape {limits.shape}")
    return limits


def _tidy(matrix: sp.csr_array) -> sp.csr_array:
    """In place: no stored zeros, columns ascending in every row."""
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _source(kind: int, row: int) -> str:
    if kind in (A_ROW, G_ROW):
        return f"row {row} of {'AG'[kind]}"
    return f"lb or ub of variable {row}" if kind == BOX else "no bound"


def _agree(a: float, b: float, size: float) -> bool:
    return abs(a - b) <= AGREE * max(size, abs(a), abs(b))


# -- what is left of it while rows are used up ------------------------------------------------------


@dataclass
class _Rows:
    """Rows of A or G: ``number`` are their places in the given matrix, ``size`` what ``side`` has been made of."""

    kind: int
    matrix: sp.csr_array
    side: Array
    number: Array
    size: Array

    @classmethod
    def of(cls, kind: int, matrix: sp.csr_array, side: Array, reach: Array) -> _Rows:
        """``reach``: how large the variables are."""
        return cls(kind, matrix, side, np.arange(len(side)), np.maximum(np.abs(side), RESIDUE * (abs(matrix) @ reach)))

    @property
    def lengths(self) -> Array:
        return np.diff(self.matrix.indptr)

    def keep(self, which: Array) -> None:
        if not which.all():
            self.matrix, self.side = self.matrix[which], self.side[which]
            self.number, self.size = self.number[which], self.size[which]

    def substitute(self, change: _Change) -> None:
        """A coefficient that only rounding has left is none."""
        if not np.isin(self.matrix.indices, change.gone).any():
            self.matrix = self.matrix[:, change.kept]
            return
        size, most = change.absolute().of(abs(self.matrix))
        self.matrix, shift = change.of(self.matrix)
        self.side, self.size = self.side - shift, np.maximum(self.size, most)
        self.matrix = self.matrix.multiply(abs(self.matrix) > PARALLEL * size).tocsr()
        _tidy(self.matrix)


@dataclass(frozen=True)
class _Change:
    """Variables ``gone`` become ``slope @ x[kept] + shift``."""

    gone: Array
    kept: Array
    slope: sp.csr_array
    shift: Array

    def of(self, matrix: sp.csr_array) -> tuple[sp.csr_array, Array]:
        """``matrix @ x`` as (new matrix, constant)."""
        tail = matrix[:, self.gone]
        if tail.nnz == 0:
            return matrix[:, self.kept], np.zeros(matrix.shape[0])
        return sp.csr_array(matrix[:, self.kept] + tail @ self.slope), tail @ self.shift

    def complete(self, x: Array) -> None:
        """Fill in the variables that are gone."""
        x[self.gone] = self.slope @ x[self.kept] + self.shift

    def pull(self, gradient: Array) -> None:
        """Gradient with respect to what is kept, zero elsewhere."""
        gradient[self.kept] += self.slope.T @ gradient[self.gone]
        gradient[self.gone] = 0.0

    def absolute(self) -> _Change:
        return _Change(self.gone, self.kept, abs(self.slope), np.abs(self.shift))

    def renamed(self, columns: Array) -> _Change:
        return _Change(columns[self.gone], columns[self.kept], self.slope, self.shift)


@dataclass(frozen=True)
class _Step:
    """A change in the numbering of the given program, the rows of A that it has used up, and their coefficients."""

    change: _Change
    rows: Array
    pivot: Array


class _Bounds:
    """Lower and upper bounds (2, n), and of each where it comes from.

    ``scale`` is the coefficient of the variable in the source: a multiplier mu of the bound is mu / scale there.
    ``size`` is what the value has been made of, 0 where there is none.
    """

    PARTS = ("value", "kind", "row", "scale", "size")

    def __init__(self, lb: Array, ub: Array):
        self.value = np.array([lb, ub])
        self.kind = np.where([lb > -np.inf, ub < np.inf], BOX, NOTHING)
        self.row = np.tile(np.arange(len(lb)), (2, 1))
        self.scale = np.ones((2, len(lb)))
        self.size = np.where(np.isinf(self.value), 0.0, np.abs(self.value))

    @property
    def free(self) -> Array:
        return np.isinf(self.value).all(axis=0)

    def tighten(self, side: int, index: Array, *parts: Array) -> None:
        """Add bounds (PARTS), several on a variable perhaps; the tightest holds."""
        value = parts[0]
        sign = 1 if side == UPPER else -1
        order = np.lexsort((sign * value, index))
        best = order[np.unique(index[order], return_index=True)[1]]
        best = best[sign * value[best] < sign * self.value[side, index[best]]]
        for name, part in zip(self.PARTS, parts, strict=True):
            getattr(self, name)[side, index[best]] = part[best]

    def check(self, columns: Array) -> None:
        """Make bounds equal that rounding keeps apart; raise InfeasibleError where they cross by more."""
        (lower, upper), size = self.value, self.size.max(axis=0)
        near = lower + ROUNDING * size >= upper
        for k in np.flatnonzero(near & (lower != upper) | (lower == np.inf) | (upper == -np.inf)):
            if not np.isfinite(self.value[:, k]).all() or not _agree(lower[k], upper[k], size[k]):
                low, high = (_source(self.kind[s, k], self.row[s, k]) for s in (LOWER, UPPER))
                raise InfeasibleError(
                    f"variable {columns[k]} must be at least {lower[k]} ({low}) and at most {upper[k]} ({high})"
                )
            self.value[:, k] = lower[k]

    def substitute(self, change: _Change) -> None:
        """Pass bounds of variables that are gone (x_j = c x_k + s) on to those that stay."""
        bounded = np.flatnonzero(~self.free[change.gone])
        value, kind, row, scale, size = (getattr(self, name)[:, change.gone[bounded]] for name in self.PARTS)
        for name in self.PARTS:
            setattr(self, name, getattr(self, name)[:, change.kept])
        if len(bounded) == 0:
            return
        slope = change.slope[bounded]
        c, k = slope.data, slope.indices
        shift = change.shift[bounded]
        value, scale, size = (value - shift) / c, scale * c, np.maximum(size, np.abs(shift)) / np.abs(c)
        for side in (LOWER, UPPER):
            for new, turned in ((side, c > 0), (1 - side, c < 0)):
                m = turned & (kind[side] != NOTHING)
                self.tighten(new, k[m], *(part[side, m] for part in (value, kind, row, scale, size)))


class _Reduction:
    """The program while rows and variables go; ``columns`` are the places of the variables that are left."""

    def __init__(self, given: _Program):
        n = len(given.q)
        self.P, self.q = given.P, given.q
        reach = np.maximum(np.abs(given.lb), np.abs(given.ub))
        reach[np.isinf(reach)] = 1.0  # nothing says how large
        self.equalities = _Rows.of(A_ROW, given.A, given.b, reach)
        self.inequalities = _Rows.of(G_ROW, given.G, given.h, reach)
        self.bounds = _Bounds(given.lb, given.ub)
        self.columns = np.arange(n)
        self.squares, self.square_shift = sp.csr_array((0, n)), np.empty(0)  # 1/2 |squares @ x + square_shift|^2
        self.steps: list[_Step] = []

    def run(self) -> None:
        """Use up all rows that are bounds or define variables."""
        self.inequalities.keep(self.inequalities.side < np.inf)
        self._absorb()
        while self._eliminate(*self._definitions()) or self._eliminate(*self._pairs()):
            self._absorb()

    def _absorb(self) -> None:
        for rows in (self.equalities, self.inequalities):
            _check_empty(rows)
            single = rows.lengths == 1
            at = rows.matrix.indptr[:-1][single]
            index, scale = rows.matrix.indices[at], rows.matrix.data[at]
            value, number = rows.side[single] / scale + 0.0, rows.number[single]  # no -0.0
            kind, size = np.full(len(at), rows.kind), rows.size[single] / np.abs(scale)
            for side in (LOWER, UPPER):
                m = np.full(len(at), True) if rows.kind == A_ROW else (scale > 0) == (side == UPPER)
                self.bounds.tighten(side, index[m], *(part[m] for part in (value, kind, number, scale, size)))
            rows.keep(rows.lengths > 1)
        self.bounds.check(self.columns)

    def _definitions(self) -> tuple[Array, Array]:
        """Rows of A with a free variable that is in no other row, and these variables.

        P may couple such variables with each other only. Where a row has several of them and shares no variable
        with other rows it may as well be a sum, and stays.
        """
        matrix, used = self.equalities.matrix, self._appearances()
        once = self.bounds.free & (used == 1)
        if not once[matrix.indices].any():
            return np.empty(0, np.int64), np.empty(0, np.int64)
        row = np.full(len(used), -1)
        entry_row = np.repeat(np.arange(matrix.shape[0]), self.equalities.lengths)
        row[matrix.indices] = entry_row
        row[~once] = -1
        several = np.bincount(row[row >= 0], minlength=matrix.shape[0]) > 1
        keep = several & ~self._shared(self.equalities, used) & (self.equalities.lengths > 2)
        row[(row >= 0) & keep[row]] = -1
        return self._uncoupled(row, entry_row)

    def _uncoupled(self, row: Array, entry_row: Array) -> tuple[Array, Array]:
        """Choose one variable for every row (largest coefficient) so that P couples the chosen with no others."""
        matrix = self.equalities.matrix
        row[self.P.diagonal() < 0] = -1
        if not (row >= 0).any():
            return np.empty(0, np.int64), np.empty(0, np.int64)
        P = sp.coo_array(self.P)
        off = (P.row != P.col) & (P.data != 0)
        i, j = P.row[off], P.col[off]
        while True:
            bad = (row[i] >= 0) & ((row[j] < 0) | (row[i] == row[j]))
            if not bad.any():
                break
            row[i[bad]] = -1
        while True:
            here = np.flatnonzero(row[matrix.indices] >= 0)
            order = here[np.lexsort((-np.abs(matrix.data[here]), entry_row[here]))]
            gone = matrix.indices[order[np.unique(entry_row[order], return_index=True)[1]]]
            chosen = np.isin(np.arange(len(row)), gone)
            bad = chosen[i] & ~chosen[j]
            if not bad.any():
                return row[gone], gone
            row[i[bad]] = -1

    def _pairs(self) -> tuple[Array, Array]:
        """Rows of two variables that share one with rows that are not parallel; of each the variable in fewer rows."""
        matrix, used = self.equalities.matrix, self._appearances()
        two = np.flatnonzero(self.equalities.lengths == 2)
        gone, kept, found = np.zeros(len(used), bool), np.zeros(len(used), bool), []
        for i, parallel in zip(two, self._parallel(two), strict=True):
            ends = matrix.indices[matrix.indptr[i] : matrix.indptr[i + 1]]
            if used[ends].max() == parallel:
                continue
            for j, k in sorted((ends, ends[::-1]), key=lambda pair: used[pair[0]]):
                if not (gone[j] or gone[k] or kept[j]):
                    gone[j] = kept[k] = True
                    found.append((i, j))
                    break
        return tuple(np.array(found, np.int64).reshape(-1, 2).T)  # type: ignore[return-value]

    def _parallel(self, two: Array) -> Array:
        """How many rows of A and G are multiples of these rows of A with two variables, themselves included."""
        keys = []
        for rows, which in ((self.equalities, two), (self.inequalities, self.inequalities.lengths == 2)):
            pairs = rows.matrix[which]
            ratio = (pairs.data[1::2] / pairs.data[::2]).astype(np.float32)  # equal but for rounding
            keys.append(np.column_stack([pairs.indices[::2], pairs.indices[1::2], ratio]))
        _, place, count = np.unique(np.vstack(keys), axis=0, return_inverse=True, return_counts=True)
        return count[place[: len(two)]]

    def _appearances(self) -> Array:
        """In how many rows every variable is."""
        index = np.concatenate([self.equalities.matrix.indices, self.inequalities.matrix.indices])
        return np.bincount(index, minlength=len(self.q))

    def _shared(self, rows: _Rows, used: Array) -> Array:
        """Whether a row has a variable that is in another row as well."""
        if len(rows.side) == 0:
            return np.zeros(0, bool)
        return np.maximum.reduceat(used[rows.matrix.indices], rows.matrix.indptr[:-1]) > 1

    def _eliminate(self, rows: Array, gone: Array) -> bool:
        """Solve these rows for these variables, one each, and substitute."""
        if len(rows) == 0:
            return False
        block = self.equalities.matrix[rows]
        pivot = block[:, gone].diagonal()
        kept = np.setdiff1d(np.arange(len(self.q)), gone)
        slope = sp.csr_array(sp.diags_array(-1 / pivot) @ block[:, kept])
        change = _Change(gone, kept, slope, self.equalities.side[rows] / pivot)
        self.steps.append(_Step(change.renamed(self.columns), self.equalities.number[rows], pivot))
        self._substitute(change)
        self.bounds.substitute(change)
        self.equalities.keep(~np.isin(np.arange(len(self.equalities.side)), rows))
        for left in (self.equalities, self.inequalities):
            left.substitute(change)
        self.columns = self.columns[kept]
        return True

    def _substitute(self, change: _Change) -> None:
        """In the objective: as squares where the products would fill H, else in P."""
        P, gone, kept = sp.csr_array(self.P), change.gone, change.kept
        square = _worth_squares(P[gone][:, gone], change.slope)
        plain = gone[~square]
        slope, shift = change.slope[~square], change.shift[~square]
        inner, outer = P[plain][:, plain], P[plain][:, kept]
        cross = slope.T @ outer
        self.q = self.q[kept] + change.slope.T @ self.q[gone] + slope.T @ (inner @ shift) + outer.T @ shift
        self.P = sp.csr_array(P[kept][:, kept] + slope.T @ inner @ slope + cross + cross.T)
        self.squares, more = change.of(self.squares)
        root = _root(P[gone[square]][:, gone[square]])
        self.squares = sp.csr_array(sp.vstack([self.squares, root.T @ change.slope[square]]))
        self.square_shift = np.concatenate([self.square_shift + more, root.T @ change.shift[square]])

    def objective(self) -> tuple[Any, Array]:
        """H and c of what is left."""
        squares = _tidy(self.squares)
        q = self.q + squares.T @ self.square_shift
        length = np.diff(squares.indptr)
        lone = squares[length == 1]
        diagonal = np.zeros(len(q))
        np.add.at(diagonal, lone.indices, lone.data**2)
        return _hessian(self.P, diagonal, squares[length > 1].T), q


def _check_empty(rows: _Rows) -> None:
    off = rows.side if rows.kind == G_ROW else -np.abs(rows.side)
    for i in np.flatnonzero((rows.lengths == 0) & (off < -AGREE * rows.size) | (rows.side == -np.inf)):
        relation = "0 = " if rows.kind == A_ROW else "0 <= " if rows.side[i] > -np.inf else "a sum <= "
        raise InfeasibleError(f"{_source(rows.kind, rows.number[i])} asks for {relation}{rows.side[i]:.6g}")


def _worth_squares(block: sp.csr_array, slope: sp.csr_array) -> Array:
    """Whether a variable is better kept as squares: it, or one that P couples it with, is a sum of many."""
    _, label = connected_components(block, directed=False)
    long = np.zeros(label.max(initial=-1) + 1, bool)
    long[label[np.diff(slope.indptr) > 1]] = True
    return long[label]


def _root(block: sp.csr_array) -> sp.csr_array:
    """L with L L' = block, by connected components."""
    count, label = connected_components(block, directed=False)
    if count == block.shape[0]:
        return sp.csr_array(sp.diags_array(np.sqrt(block.diagonal())))
    order = np.argsort(label, kind="stable")
    ends = np.cumsum(np.bincount(label))
    parts = [block[m][:, m].toarray() for m in np.split(order, ends[:-1])]
    root = sp.block_diag([_dense_root(part) for part in parts], format="csr")
    return sp.csr_array(root[np.argsort(order)])


def _dense_root(block: Array) -> Array:
    if len(block) == 1:
        return np.sqrt(block)
    values, vectors = np.linalg.eigh(block)
    if values[0] < -1e-10 * values[-1]:
        raise ValueError(
            f"P must be positive semidefinite; on a block of {len(block)} variables that equality rows define "
            f"it has the eigenvalue {values[0]:.3g}"
        )
    keep = values > 1e-15 * len(block) * values[-1]
    return vectors[:, keep] * np.sqrt(values[keep])


def _hessian(P: Any, diagonal: Array, factors: sp.csr_array) -> Any:
    """``P + diag(diagonal) + factors factors'`` in the form that suits the solver."""
    n, rank = factors.shape
    if rank == 0 and not diagonal.any():
        return _compact(P)
    on = P.diagonal() + diagonal
    off_diagonal = sp.csr_array(P).count_nonzero() > np.count_nonzero(P.diagonal())
    if rank and not off_diagonal and (on >= 0).all() and (2 * rank <= n or n > DENSE_UP_TO):
        return LowRank(_compact(factors), on)
    whole = sp.csr_array(P) + sp.diags_array(diagonal)
    if n <= DENSE_UP_TO and rank:
        F = _compact(factors)
        product = F @ F.T
        return (product.toarray() if sp.issparse(product) else product) + whole.toarray()
    if rank == 0:
        return _compact(whole)
    return LinearOperator((n, n), matvec=lambda x: whole @ x + factors @ (factors.T @ x), dtype=np.float64)


def _compact(matrix: Any) -> Any:
    """Dense where that is no larger."""
    if not sp.issparse(matrix) or matrix.nnz < DENSE_FROM * matrix.shape[0] * matrix.shape[1]:
        return matrix
    return matrix.toarray()


# -- sums -------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """The row that set a side of a sum: row = scale * sum + the sums and fixed variables that were taken out."""

    kind: int
    row: int
    scale: float
    sums: list[tuple[int, float]]
    fixed: Array
    fixed_scale: Array


@dataclass
class _Sum:
    """``value[0] <= coefficients @ x[index] <= value[1]``; ``size`` is what these values have been made of."""

    index: Array
    coefficients: Array
    value: list[float]
    source: list[_Source | None]
    size: list[float]

    @property
    def equality(self) -> bool:
        source = self.source[LOWER]
        return source is not None and source.kind == A_ROW

    @property
    def name(self) -> str:
        source = self.source[LOWER] or self.source[UPPER]
        return _source(source.kind, source.row) if source else ""

    def ratio(self, coefficients: Array) -> float | None:
        """Times what these coefficients of all its variables are its own; None: they are no multiple."""
        c = float(coefficients[0] / self.coefficients[0])
        return c if np.allclose(coefficients, c * self.coefficients, rtol=PARALLEL, atol=0) else None

    def limit(self, side: int, value: float, source: _Source, size: float) -> None:
        """Tighten a side."""
        if value < self.value[side] if side == UPPER else value > self.value[side]:
            self.value[side], self.source[side], self.size[side] = value, source, size


class _Sums:
    """Sums over disjoint variables, from rows; equalities first, short rows first."""

    def __init__(self, bounds: _Bounds, columns: Array):
        self.bounds, self.columns = bounds, columns
        self.owner = np.full(len(columns), -1)
        self.found: list[_Sum] = []

    def add_rows(self, rows: _Rows) -> None:
        start = rows.matrix.indptr
        for i in np.argsort(rows.lengths, kind="stable"):
            part = slice(start[i], start[i + 1])
            entries = rows.matrix.indices[part], rows.matrix.data[part]
            self.add(rows.kind, int(rows.number[i]), *entries, rows.side[i], rows.size[i])

    def add(self, kind: int, row: int, index: Array, coefficients: Array, side: float, size: float) -> None:
        """Take fixed variables and known sums out of a row; what is left is a new sum, or a multiple of one."""
        lower, upper = self.bounds.value[:, index]
        fixed = lower == upper
        taken: list[tuple[int, float]] = []
        source = _Source(kind, row, 1.0, taken, index[fixed], coefficients[fixed])
        size += np.abs(coefficients[fixed] * lower[fixed]).sum()
        side = float(side - coefficients[fixed] @ lower[fixed])
        index, coefficients = index[~fixed], coefficients[~fixed]
        for k in np.unique(self.owner[index]):
            part = self.owner[index] == k
            if k < 0:
                continue
            known = self.found[k]
            c = self._multiple(source, known, index[part], coefficients[part], bool(part.all()))
            if not known.equality:
                return self._limit(known, side, c, source, size)
            taken.append((int(k), c))
            side -= c * known.value[LOWER]
            size += abs(c) * known.size[LOWER]
            index, coefficients = index[~part], coefficients[~part]
        if len(index):
            return self._new(index, coefficients, side, source, size)
        if side < -AGREE * size or (kind == A_ROW and side > AGREE * size):
            raise InfeasibleError(f"{_source(kind, row)} contradicts rows and bounds before it by {abs(side):.6g}")

    def _new(self, index: Array, coefficients: Array, side: float, source: _Source, size: float) -> None:
        scale = float(coefficients[np.argmax(np.abs(coefficients))])
        self.owner[index] = len(self.found)
        self.found.append(_Sum(index, coefficients / scale, [-np.inf, np.inf], [None, None], [0.0, 0.0]))
        self._limit(self.found[-1], side, scale, source, size)

    def _limit(self, known: _Sum, side: float, scale: float, source: _Source, size: float) -> None:
        source.scale = scale
        if source.kind == A_ROW or scale > 0:
            known.limit(UPPER, side / scale, source, size / abs(scale))
        if source.kind == A_ROW or scale < 0:
            known.limit(LOWER, side / scale, source, size / abs(scale))

    def _multiple(self, source: _Source, known: _Sum, index: Array, coefficients: Array, alone: bool) -> float:
        """How often a row has a sum in it; NotSumBoxError if it does not have it as a whole."""
        c = known.ratio(coefficients) if len(index) == len(known.index) else None
        if c is not None and (known.equality or alone):
            return c
        reason = "and others besides" if c is not None else "in other proportions"
        if len(index) < len(known.index):
            reason = "but not all of its variables"
        raise NotSumBoxError(
            f"{_source(source.kind, source.row)} has variable {self.columns[index[0]]} in common with {known.name}, "
            f"{reason}: the solver takes bounds, sums over disjoint sets of variables, and equality rows that define "
            "a variable without bounds and other constraints",
            source.kind,
            source.row,
        )

    def check(self) -> None:
        """Make sides equal that cross by rounding; raise InfeasibleError where they cross by more."""
        for known in self.found:
            low, high = known.value
            if low > high:
                names = [_source(s.kind, s.row) for s in known.source if s]
                if not _agree(low, high, max(known.size)):
                    raise InfeasibleError(f"a sum must be at least {low} ({names[0]}) and at most {high} ({names[1]})")
                known.value[UPPER] = low

    def arguments(self) -> tuple[Any, Array | None, Array | None]:
        """Total, weights and groups for :func:`bcd.solve_qp`."""
        if not self.found:
            return None, None, None
        weights = np.ones(len(self.owner))
        for known in self.found:
            weights[known.index] = known.coefficients
        totals = [low if low == high else (low, high) for low, high in (known.value for known in self.found)]
        some = None if (weights == 1).all() else weights
        whole = len(totals) == 1 and (self.owner == 0).all()
        return (totals[0], some, None) if whole else (totals, some, self.owner)


# -- the way back -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """From the solution of what is left to that of the given program."""

    given: _Program
    left: _Reduction
    sums: _Sums

    def back(self, w: Array, total_multipliers: Array, bound_multipliers: Array) -> Recovered:
        """See :meth:`SumBoxForm.restore`."""
        given = self.given
        at = Recovered(np.zeros(len(given.q)), np.zeros(len(given.b)), np.zeros(len(given.h)), np.zeros(len(given.q)))
        at.x[self.left.columns] = w
        for step in reversed(self.left.steps):
            step.change.complete(at.x)
        mu = np.array(bound_multipliers, dtype=np.float64)
        self._sums_back(np.array(total_multipliers, dtype=np.float64), mu, at)
        self._bounds_back(mu, at)
        self._definitions_back(at)
        return at

    def _sums_back(self, mu: Array, bound: Array, at: Recovered) -> None:
        """Later sums first: what is due to the sums and bounds that were taken out of a row goes to these."""
        for k in reversed(range(len(mu))):
            source = self.sums.found[k].source[UPPER if mu[k] > 0 else LOWER]
            if mu[k] == 0 or source is None:
                continue
            share = mu[k] / source.scale
            (at.y, at.z)[source.kind][source.row] += share
            for j, c in source.sums:
                mu[j] -= c * share
            bound[source.fixed] -= source.fixed_scale * share

    def _bounds_back(self, mu: Array, at: Recovered) -> None:
        bounds, side, every = self.left.bounds, np.where(mu > 0, UPPER, LOWER), np.arange(len(mu))
        share = mu / bounds.scale[side, every]
        kind, row = bounds.kind[side, every], bounds.row[side, every]
        for which, target in ((A_ROW, at.y), (G_ROW, at.z), (BOX, at.z_box)):
            np.add.at(target, row[kind == which], share[kind == which])

    def _definitions_back(self, at: Recovered) -> None:
        """The gradient of the Lagrangian is zero at the variables that were substituted."""
        for k in reversed(range(len(self.left.steps))):
            step = self.left.steps[k]
            gradient = self.given.gradient(at)
            for earlier in self.left.steps[:k]:
                earlier.change.pull(gradient)
            at.y[step.rows] = -gradient[step.change.gone] / step.pivot
