# SPDX-License-Identifier: BSD-3-Clause
"""Objectives f(x) and what the solver needs of them.

    Quadratic(Q, c)       1/2 x'Qx + c'x, Q dense, scipy sparse, or LowRank(F, D) = F F' + diag(D)
    LeastSquares(A, b)    1/2 |Ax - b|^2 + l2/2 |x|^2
    Logistic(A, b)        sum_i log(1 + exp(-b_i a_i'x)) + l2/2 |x|^2
    Smooth(fun, grad, n)  any differentiable function

An objective is data. ``value(x)`` and ``gradient(x)`` compute from it alone; ``start(x)`` returns a
:class:`GradientState`, which follows a moving x cheaply. ``hessian`` is a constant matrix H with
``f(x+d) <= f(x) + <g, d> + 1/2 d'Hd`` (the Hessian itself for quadratics, ``exact``), or None.
Dense and sparse meet in the Hessian classes: ``column(i)``, ``block(W)``, ``add_columns``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from bcd import _compiled
from bcd._check import as_matrix, as_symmetric, as_vector, concave_message

__all__ = ["GradientState", "Hessian", "LeastSquares", "Logistic", "LowRank", "Objective", "Quadratic", "Smooth"]

Array = np.ndarray


class Hessian(Protocol):
    """A symmetric n x n matrix, read by columns."""

    n: int

    @property
    def diagonal(self) -> Array:
        """Shape (n,)."""

    def column(self, i: int) -> Array:
        """Column i, shape (n,)."""

    def block(self, index: Array) -> Array:
        """``H[index][:, index]``, shape (k, k), C-contiguous."""

    def product(self, x: Array) -> Array:
        """H x."""

    def add_columns(self, grad: Array, index: Array, step: Array) -> None:
        """``grad += H[:, index] step``, in place."""

    def lipschitz(self, labels: Array) -> float:
        """L1 (docs/theory.md), or an upper bound of it."""


class GradientState(Protocol):
    """The gradient at a point x that moves; x is a view that has moved already when ``move`` is called."""

    @property
    def grad(self) -> Array:
        """Gradient at x, shape (n,)."""

    @property
    def value(self) -> float:
        """f(x)."""

    def move(self, index: Array, step: Array) -> None:
        """X has moved by ``step`` at ``index``."""

    def rebuild(self) -> None:
        """Compute everything anew from x, without what rounding has added."""

    def along(self, index: Array, step: Array) -> Callable[[float], float]:
        """The function t -> d/dt f(x + t d) for the direction d with the non-zeros ``step`` at ``index``."""


class Objective(Protocol):
    """What :class:`bcd.Problem` asks of an objective."""

    n: int
    exact: bool

    @property
    def hessian(self) -> Hessian | None:
        """Upper bound on the second derivatives, None if there is none."""

    def value(self, x: Array) -> float:
        """f(x)."""

    def gradient(self, x: Array) -> Array:
        """Gradient at x, shape (n,)."""

    def start(self, x: Array) -> GradientState:
        """Follow x from here."""


# -- Hessians -----------------------------------------------------------------------------------


class NonConvexError(ValueError):
    """P has negative curvature along a feasible direction.

    Attributes
    ----------
    direction : ndarray, shape (n,)
        d of unit length with ``d'Pd < 0`` that keeps the sums.
    curvature : float
        ``d'Pd``.
    """

    def __init__(self, direction: Array, curvature: float):
        self.direction, self.curvature = direction, curvature
        k = np.flatnonzero(direction)
        where = {1: "e_{}", 2: "e_{} - e_{} (unit length)"}.get(len(k), "NonConvexError.direction").format(*k[:2])
        super().__init__(
            f"P must be positive semidefinite on the feasible directions; along {where} the curvature is "
            f"{curvature:.6g}. Such a problem may have many local minima, and none could be certified"
        )


class DenseHessian:
    """An explicit matrix, shape (n, n), C-contiguous float64; shared, not copied."""

    def __init__(self, matrix: Array):
        self.matrix = matrix
        self.n = matrix.shape[0]
        self.diagonal = matrix.diagonal().copy()

    def column(self, i: int) -> Array:
        """Row i, which by symmetry is column i."""
        return self.matrix[i]

    def block(self, index: Array) -> Array:
        """Rows and columns ``index``."""
        return self.matrix[np.ix_(index, index)]

    def product(self, x: Array) -> Array:
        """H x, from the columns of the entries that are not 0."""
        used = np.flatnonzero(x)
        if 2 * len(used) > self.n:
            return self.matrix @ x
        out = np.zeros(self.n)
        self.add_columns(out, used, x[used])
        return out

    def add_columns(self, grad: Array, index: Array, step: Array) -> None:
        """``grad += H[:, index] step``."""
        _compiled.move_dense(grad, self.matrix, index, step)

    def lipschitz(self, labels: Array) -> float:
        """L1 exactly; ValueError where the matrix is not convex on a pair."""
        high, low, i, j = _compiled.pair_extremes(self.matrix, labels)
        if low < -1e-10 * max(high, float(np.abs(self.diagonal).max())):
            raise ValueError(concave_message(i, j if i != j else -1, low if i == j else 4 * low))
        return high


class SparseHessian:
    """A scipy sparse matrix, shape (n, n)."""

    def __init__(self, matrix: sp.csc_array):
        self.matrix = matrix
        self.n = matrix.shape[0]
        self.diagonal = matrix.diagonal()

    def column(self, i: int) -> Array:
        """Column i, dense."""
        out = np.zeros(self.n)
        self.add_columns(out, np.array([i]), np.ones(1))
        return out

    def block(self, index: Array) -> Array:
        """Rows and columns ``index``, dense."""
        return np.ascontiguousarray(self.matrix[:, index][index].toarray())

    def product(self, x: Array) -> Array:
        """H x."""
        return self.matrix @ x

    def add_columns(self, grad: Array, index: Array, step: Array) -> None:
        """``grad += H[:, index] step``, touching the stored entries only."""
        m = self.matrix
        _compiled.move_sparse(grad, m.data, m.indices, m.indptr, index, step)

    def lipschitz(self, labels: Array) -> float:
        """An upper bound on L1: the two largest diagonal entries, and the pairs with a negative Q_ij."""
        entries = sp.coo_array(self.matrix)
        top = np.sort(self.diagonal)[-2:]
        pair = self.diagonal[entries.row] + self.diagonal[entries.col] - 2 * entries.data
        pair = pair[entries.row != entries.col]
        bound = 0.25 * max(float(top.sum()), float(pair.max(initial=0.0)))
        return max(bound, float(self.diagonal.max())) if (labels < 0).any() else bound


class LowRank:
    """``F F' + diag(D)``, never formed: the risk model of a portfolio, the Gram matrix of a least squares.

    Parameters
    ----------
    F : array of float or scipy sparse, shape (n, r)
        Factor loadings.
    D : float or array of float, shape (n,), optional
        Diagonal, non-negative. Default 0.
    """

    EXACT_UP_TO = 2048  # coordinates for which the matrix is formed once to get L1 exactly

    def __init__(self, F: Any, D: Any = 0.0):
        factors = as_matrix("F", F, "a matrix of shape (n, r)")
        self.factors = sp.csr_array(factors) if sp.issparse(factors) else factors
        self.n = self.factors.shape[0]
        self.shift = as_vector("D", D, self.n)
        if (self.shift < 0).any():
            raise ValueError(f"D must be non-negative; found {self.shift.min()} at {int(self.shift.argmin())}")
        self.diagonal = self._square_norms() + self.shift

    def _square_norms(self) -> Array:
        if sp.issparse(self.factors):
            return np.asarray((self.factors * self.factors).sum(axis=1)).ravel()
        return np.einsum("ij,ij->i", self.factors, self.factors)

    def _rows(self, index: Array) -> Array:
        """A dense copy of some rows of F."""
        rows = self.factors[index]
        return rows.toarray() if sp.issparse(rows) else rows

    def column(self, i: int) -> Array:
        """``F F[i] + D_i e_i``."""
        out = self.factors @ self._rows(np.array([i]))[0]
        out[i] += self.shift[i]
        return out

    def block(self, index: Array) -> Array:
        """Rows and columns ``index``."""
        rows = self._rows(index)
        return np.ascontiguousarray(rows @ rows.T + np.diag(self.shift[index]))

    def product(self, x: Array) -> Array:
        """``F (F'x) + D x``."""
        return self.factors @ (self.factors.T @ x) + self.shift * x

    def add_columns(self, grad: Array, index: Array, step: Array) -> None:
        """``grad += H[:, index] step``: one product with F whatever the number of columns."""
        if 4 * len(index) > self.n:  # a copy of the rows would cost more than the others do
            x = np.zeros(self.n)
            x[index] = step
            grad += self.factors @ (self.factors.T @ x)
        else:
            grad += self.factors @ (step @ self._rows(index))
        grad[index] += self.shift[index] * step

    def lipschitz(self, labels: Array) -> float:
        """L1 exactly up to 2048 coordinates; beyond, the bound of a ball around the mean row."""
        if self.n <= self.EXACT_UP_TO:
            return DenseHessian(self.block(np.arange(self.n))).lipschitz(labels)
        centre = np.asarray(self.factors.mean(axis=0)).ravel()
        offset = self.factors @ centre
        radius = np.sqrt(np.maximum(self._square_norms() - 2 * offset + centre @ centre, 0))
        near = np.sort(radius)[-2:].sum() ** 2 + np.sort(self.shift)[-2:].sum()
        bound = 0.25 * float(near)
        return max(bound, float(self.diagonal.max())) if (labels < 0).any() else bound


class OperatorHessian:
    """A symmetric matrix known by its products with vectors only; ``diagonal`` is their common estimate."""

    PROBES = 8

    def __init__(self, operator: LinearOperator):
        self.operator = operator
        self.n = operator.shape[0]
        draw = np.random.default_rng(0)
        signs = np.where(draw.random((self.PROBES, self.n)) < 0.5, -1.0, 1.0)
        products = np.array([self.product(v) for v in signs])
        if not np.isfinite(products).all():
            raise ValueError("P @ v must be finite for finite v; found NaN or an infinity")
        cross = signs @ products.T
        if np.abs(cross - cross.T).max() > 1e-8 * np.abs(cross).max():
            raise ValueError("the operator must be symmetric; found u'(P v) != v'(P u) for vectors of signs")
        self.diagonal = np.full(self.n, float(np.trace(cross)) / (self.PROBES * self.n))
        self.size = float(np.abs(products).max())  # rounding of a product is relative to this

    def product(self, x: Array) -> Array:
        """H x."""
        return np.asarray(self.operator.matvec(x), np.float64).ravel()

    def add_columns(self, grad: Array, index: Array, step: Array) -> None:
        """``grad += H[:, index] step``: one product."""
        x = np.zeros(self.n)
        x[index] = step
        grad += self.product(x)


def as_hessian(name: str, Q: Any) -> Any:
    """The matrix as a Hessian; what is one already stays as it is."""
    if isinstance(Q, LowRank | DenseHessian | SparseHessian | OperatorHessian):
        return Q
    if isinstance(Q, LinearOperator):
        if Q.shape[0] != Q.shape[1]:
            raise ValueError(f"{name} must be square; found shape {Q.shape}")
        return OperatorHessian(Q)
    matrix = as_symmetric(name, Q)
    return SparseHessian(matrix) if sp.issparse(matrix) else DenseHessian(matrix)


# -- quadratics ---------------------------------------------------------------------------------


class Quadratic:
    """``1/2 x'Qx + c'x`` with a symmetric Q, positive semidefinite on the feasible directions.

    Parameters
    ----------
    Q : array of float, scipy sparse array, or LowRank; shape (n, n)
        float64 C-contiguous arrays are used in place, not copied.
    c : float or array of float, shape (n,), optional
        Linear term; a scalar is broadcast. Default 0.

    Raises
    ------
    ValueError
        If Q is not square, symmetric and finite, or c does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> Quadratic(np.eye(2), [1.0, 0.0]).gradient(np.array([1.0, 1.0]))
    array([2., 1.])
    """

    exact = True

    def __init__(self, Q: Any, c: Any = 0.0):
        self.hessian: Any = as_hessian("Q", Q)
        self.n = self.hessian.n
        self.c = as_vector("c", c, self.n)

    def value(self, x: Array) -> float:
        """f(x)."""
        return float(0.5 * (x @ self.hessian.product(x)) + self.c @ x)

    def gradient(self, x: Array) -> Array:
        """Q x + c."""
        return self.hessian.product(x) + self.c

    def start(self, x: Array) -> GradientState:
        """Follow x; a move of k coordinates reads k columns of Q."""
        return _QuadraticState(self, x)


class _QuadraticState:
    def __init__(self, objective: Quadratic, x: Array):
        self.objective, self.x = objective, x
        self.rebuild()

    def rebuild(self) -> None:
        self.grad = self.objective.gradient(self.x)

    @property
    def value(self) -> float:
        return float(0.5 * (self.x @ (self.grad + self.objective.c)))

    def move(self, index: Array, step: Array) -> None:
        self.objective.hessian.add_columns(self.grad, index, step)

    def along(self, index: Array, step: Array) -> Callable[[float], float]:
        slope = float(self.grad[index] @ step)
        curvature = float(step @ self.objective.hessian.block(index) @ step)
        return lambda t: slope + t * curvature


# -- sums of losses of linear functions ---------------------------------------------------------


class _LinearModel(ABC):
    """``sum_i loss_i((A x)_i) + l2/2 |x|^2``; subclasses give the loss and its derivative."""

    bend: float  # upper bound on the second derivative of every loss

    def __init__(self, A: Any, l2: float):
        matrix = as_matrix("A", A, "a matrix of shape (m, n)")
        if not l2 >= 0 or not np.isfinite(l2):
            raise ValueError(f"l2 must be non-negative and finite; found {l2}")
        self.A = matrix if sp.issparse(matrix) else np.asfortranarray(matrix)  # moves read columns
        self.rows = sp.csr_array(matrix) if sp.issparse(matrix) else self.A
        self.m, self.n = self.A.shape
        self.l2 = float(l2)
        self._hessian: LowRank | None = None

    @property
    def hessian(self) -> LowRank:
        """``bend A'A + l2 I``, as its factors."""
        if self._hessian is None:
            self._hessian = LowRank(self.A.T * np.sqrt(self.bend), self.l2)
        return self._hessian

    @abstractmethod
    def loss(self, z: Array) -> Array:
        """Loss of each row at z = A x."""

    @abstractmethod
    def slope(self, z: Array) -> Array:
        """Derivative of each loss."""

    def value(self, x: Array) -> float:
        """f(x)."""
        return float(self.loss(self.rows @ x).sum() + 0.5 * self.l2 * (x @ x))

    def gradient(self, x: Array) -> Array:
        """``A' loss'(A x) + l2 x``."""
        return self.A.T @ self.slope(self.rows @ x) + self.l2 * x

    def start(self, x: Array) -> GradientState:
        """Follow x; a move of k coordinates reads k columns of A, a gradient is one product with A'."""
        return _LinearState(self, x)


class _LinearState:
    def __init__(self, objective: _LinearModel, x: Array):
        self.objective, self.x = objective, x
        self.rebuild()

    def rebuild(self) -> None:
        self.z = self.objective.rows @ self.x
        self._grad: Array | None = None

    @property
    def grad(self) -> Array:
        if self._grad is None:
            self._grad = self.objective.A.T @ self.objective.slope(self.z) + self.objective.l2 * self.x
        return self._grad

    @property
    def value(self) -> float:
        return float(self.objective.loss(self.z).sum() + 0.5 * self.objective.l2 * (self.x @ self.x))

    def move(self, index: Array, step: Array) -> None:
        self.z += self.objective.A[:, index] @ step
        self._grad = None

    def along(self, index: Array, step: Array) -> Callable[[float], float]:
        dz = self.objective.A[:, index] @ step
        ridge, bend = self.objective.l2 * float(self.x[index] @ step), self.objective.l2 * float(step @ step)
        return lambda t: float(dz @ self.objective.slope(self.z + t * dz)) + ridge + t * bend


class LeastSquares(_LinearModel):
    """``1/2 |Ax - b|^2 + l2/2 |x|^2``.

    Parameters
    ----------
    A : array of float or scipy sparse, shape (m, n)
    b : array of float, shape (m,)
    l2 : float, optional
        Ridge term, >= 0.
    """

    exact = True
    bend = 1.0

    def __init__(self, A: Any, b: Any, l2: float = 0.0):
        super().__init__(A, l2)
        self.b = as_vector("b", b, self.m)

    def loss(self, z: Array) -> Array:
        """Half the squared residuals."""
        return 0.5 * (z - self.b) ** 2

    def slope(self, z: Array) -> Array:
        """The residuals."""
        return z - self.b


class Logistic(_LinearModel):
    """``sum_i log(1 + exp(-b_i a_i'x)) + l2/2 |x|^2``.

    Parameters
    ----------
    A : array of float or scipy sparse, shape (m, n)
        One sample a row.
    b : array, shape (m,)
        Labels, -1 or +1.
    l2 : float, optional
        Ridge term, >= 0.
    """

    exact = False
    bend = 0.25

    def __init__(self, A: Any, b: Any, l2: float = 0.0):
        super().__init__(A, l2)
        self.b = as_vector("b", b, self.m)
        if not (np.abs(self.b) == 1).all():
            raise ValueError(f"b must hold labels -1 and +1; found {np.unique(self.b)[:5]}")

    def loss(self, z: Array) -> Array:
        """``log(1 + exp(-b z))``, without overflow."""
        return np.logaddexp(0.0, -self.b * z)

    def slope(self, z: Array) -> Array:
        """``-b / (1 + exp(b z))``."""
        return -self.b * np.exp(-np.logaddexp(0.0, self.b * z))


# -- anything else ------------------------------------------------------------------------------


class Smooth:
    """A differentiable function given by two callables.

    Parameters
    ----------
    fun : callable, (n,) -> float
    grad : callable, (n,) -> (n,)
    n : int
        Number of coordinates.
    lipschitz : float, optional
        L1, the Lipschitz constant of the gradient in the 1-norm on the feasible directions. Without it
        the solver estimates one by backtracking.

    Notes
    -----
    The callables receive a copy of x and may do with it what they like.
    """

    exact = False
    hessian = None

    def __init__(
        self, fun: Callable[[Array], float], grad: Callable[[Array], Array], n: int, lipschitz: float | None = None
    ):
        for name, f in (("fun", fun), ("grad", grad)):
            if not callable(f):
                raise ValueError(f"{name} must be callable; found {type(f).__name__}")
        if not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"n must be a positive integer; found {n!r}")
        if lipschitz is not None and not (lipschitz > 0 and np.isfinite(lipschitz)):
            raise ValueError(f"lipschitz must be positive and finite; found {lipschitz}")
        self.fun, self.grad, self.n, self.lipschitz = fun, grad, int(n), lipschitz

    def value(self, x: Array) -> float:
        """fun(x)."""
        return float(self.fun(x.copy()))

    def gradient(self, x: Array) -> Array:
        """grad(x), checked for its shape."""
        g = np.array(self.grad(x.copy()), dtype=np.float64)
        if g.shape != (self.n,):
            raise ValueError(f"grad must return an array of shape ({self.n},); found shape {g.shape}")
        return g

    def start(self, x: Array) -> GradientState:
        """Follow x; every move costs a gradient."""
        return _SmoothState(self, x)


class _SmoothState:
    def __init__(self, objective: Smooth, x: Array):
        self.objective, self.x = objective, x
        self.rebuild()

    def rebuild(self) -> None:
        self.grad = self.objective.gradient(self.x)
        self._value: float | None = None

    @property
    def value(self) -> float:
        if self._value is None:
            self._value = self.objective.value(self.x)
        return self._value

    def move(self, index: Array, step: Array) -> None:
        self.rebuild()

    def along(self, index: Array, step: Array) -> Callable[[float], float]:
        def slope(t: float) -> float:
            at = self.x.copy()
            at[index] += t * step
            return float(self.objective.gradient(at)[index] @ step)

        return slope
