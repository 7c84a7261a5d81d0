# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what users pass in; every message names the argument, what was found and what is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from bcd import _compiled


def check_numeric(name: str, value: Any) -> None:
    """Raise ValueError unless value (an array, a sparse array, nested lists, a number) holds real numbers."""
    dtype = value.dtype if sp.issparse(value) else np.asarray(value).dtype
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers; found dtype {dtype}")


def as_matrix(name: str, value: Any, needs: str) -> np.ndarray | sp.csc_array:
    """A finite float64 matrix: dense C-contiguous, or CSC."""
    check_numeric(name, value)
    if sp.issparse(value):
        matrix = sp.csc_array(value, dtype=np.float64)
        matrix.sum_duplicates()
        entries = matrix.data
    else:
        matrix = entries = np.ascontiguousarray(value, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be {needs}; found shape {matrix.shape}")
    if not np.isfinite(entries).all():
        raise ValueError(
            f"{name} must be finite; found {np.count_nonzero(~np.isfinite(entries))} NaN or infinite entries"
        )
    return matrix


def as_vector(name: str, value: Any, n: int) -> np.ndarray:
    """A finite float64 vector of length n; a scalar fills it."""
    check_numeric(name, value)
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape not in ((), (n,)):
        raise ValueError(f"{name} must have shape ({n},); found shape {vector.shape}")
    vector = np.array(np.broadcast_to(vector, (n,)))
    if not np.isfinite(vector).all():
        k = int(np.argmin(np.isfinite(vector)))
        raise ValueError(f"{name} must be finite; {name}[{k}] is {vector[k]}")
    return vector


def as_symmetric(name: str, value: Any) -> np.ndarray | sp.csc_array:
    """A finite symmetric float64 matrix: dense C-contiguous (not copied if it is that), or CSC."""
    check_numeric(name, value)
    if sp.issparse(value):
        matrix = as_matrix(name, value, "a matrix of shape (n, n)")
        _check_square(name, matrix)
        _check_symmetric(name, matrix)
        return matrix
    matrix = np.ascontiguousarray(value, dtype=np.float64)
    _check_square(name, matrix)
    diagonal = matrix.diagonal()
    worst, i, j, largest = _compiled.examine(matrix)
    if np.isnan(worst) or not np.isfinite(diagonal).all():
        as_matrix(name, matrix, "a matrix of shape (n, n)")  # which says what is not finite
    if worst > 1e-10 * max(largest, float(np.abs(diagonal).max())):
        raise ValueError(_asymmetric(name, matrix, i, j))
    return matrix


def _check_square(name: str, matrix: Any) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a matrix of shape (n, n); found shape {matrix.shape}")
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square; found shape {matrix.shape}")


def _check_symmetric(name: str, matrix: sp.csc_array) -> None:
    off = abs(matrix - matrix.T)
    if off.max() > 1e-10 * abs(matrix).max():
        i, j = np.unravel_index(int(off.argmax()), matrix.shape)
        raise ValueError(_asymmetric(name, matrix, i, j))


def _asymmetric(name: str, matrix: Any, i: Any, j: Any) -> str:
    return (
        f"{name} must be symmetric; {name}[{i}, {j}] = {matrix[i, j]} but {name}[{j}, {i}] = {matrix[j, i]}; "
        f"({name} + {name}.T) / 2 gives the same function"
    )


def not_finite(grad: np.ndarray, what: str = "grad") -> str:
    """Name the first entry of ``grad`` that is NaN or infinite."""
    k = int(np.argmin(np.isfinite(grad)))
    return f"{what} must be finite; {what}[{k}] is {grad[k]}"


def group_labels(groups: Any, n: int) -> tuple[np.ndarray, int]:
    """Labels as int64 (length 0: one sum over everything) and the number of sums."""
    if groups is None:
        return np.empty(0, np.int64), 1
    labels = np.asarray(groups)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(groups_message(n, labels))
    labels = labels.astype(np.int64, copy=False)
    return labels, int(labels.max(initial=-1)) + 1


def groups_message(n: int, labels: Any) -> str:
    """Say what is wrong with labels (an array of any library)."""
    return (
        f"groups must be an integer array of shape ({n},), one label a coordinate; "
        f"found dtype {labels.dtype} and shape {tuple(labels.shape)}"
    )


def concave_message(i: int, j: int, curvature: float) -> str:
    """Say that a quadratic is not convex along e_i - e_j (or e_i alone where the other is negative)."""
    along = f"e_{i} - e_{j}" if min(i, j) >= 0 else f"e_{max(i, j)}"
    return f"Q must be positive semidefinite on the feasible directions; along {along} the curvature is {curvature:.3g}"
