# SPDX-License-Identifier: BSD-3-Clause
"""The problems on which SVM solvers are compared, and the forms in which they get the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from experiments import data

SEED = 0
PRECISION = {"f64": np.float64, "f32": np.float32}


class Case(NamedTuple):
    """A data set with parameters.

    Attributes
    ----------
    data : str
        As :func:`experiments.data.load` knows it.
    task : {"classify", "regress", "one-class", "multi-class"}
        C-SVC, epsilon-SVR, one-class SVM, C-SVC one against one.
    gamma : float or None
        Of the RBF kernel; None: the linear kernel.
    C, epsilon, nu : float
        As far as the task has them.
    prepare : callable
        Turns the raw (X, y) into the problem's.
    rows : int or None
        Seeded random subset of the rows.
    """

    data: str
    task: str
    gamma: float | None
    C: float = 1.0
    epsilon: float = 0.0
    nu: float = 0.0
    prepare: Callable[[Any, np.ndarray], tuple[Any, np.ndarray]] | None = None
    rows: int | None = None

    @property
    def parameters(self) -> dict[str, float]:
        """What a result file says of the case."""
        named = {"gamma": self.gamma, "C": self.C if self.task != "one-class" else None}
        named |= {"epsilon": self.epsilon or None, "nu": self.nu or None}
        return {name: value for name, value in named.items() if value is not None}


def even(X: Any, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Even digits against odd ones."""
    return X, np.where(y % 2 == 0, 1.0, -1.0)


def majority(X: Any, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """The rows of the larger class alone."""
    kept = y == (1.0 if 2 * (y == 1.0).sum() > len(y) else -1.0)
    return X[kept], y[kept]


CASES = {
    "german C=1 g=1/24": Case("german_scale", "classify", 1 / 24, 1.0),
    "german C=1000 g=0.1": Case("german_scale", "classify", 0.1, 1000.0),
    "svmguide1 C=2 g=2": Case("svmguide1_scale", "classify", 2.0, 2.0),
    "svmguide1 C=1000 g=2": Case("svmguide1_scale", "classify", 2.0, 1000.0),
    "spambase C=10 g=1/57": Case("spambase_std", "classify", 1 / 57, 10.0),
    "spambase C=1000 g=1/57": Case("spambase_std", "classify", 1 / 57, 1000.0),
    "spambase linear C=1": Case("spambase_std", "classify", None, 1.0),
    "usps even/odd C=10 g=2^-7": Case("usps", "classify", 2.0**-7, 10.0, prepare=even),
    "reuters C=1 g=1": Case("reuters", "classify", 1.0, 1.0),
    "mushrooms C=10 g=1/8": Case("mushrooms", "classify", 0.125, 10.0),
    "a9a C=32 g=2^-7": Case("a9a", "classify", 2.0**-7, 32.0),
    "a9a C=1 g=1/123": Case("a9a", "classify", 1 / 123, 1.0),
    "ijcnn1 C=32 g=2": Case("ijcnn1", "classify", 2.0, 32.0),
    "w8a C=10 g=0.5": Case("w8a", "classify", 0.5, 10.0),
    "w8a C=10 g=0.05": Case("w8a", "classify", 0.05, 10.0),
    "SVR abalone C=10 e=0.1 g=1/8": Case("abalone_scale", "regress", 0.125, 10.0, 0.1),
    "SVR cpusmall C=100 e=1 g=1": Case("cpusmall_scale", "regress", 1.0, 100.0, 1.0),
    "SVR calhousing C=10 e=0.1 g=1/8": Case("calhousing_std", "regress", 0.125, 10.0, 0.1),
    "one-class a9a nu=0.1 g=2^-7": Case("a9a", "one-class", 2.0**-7, nu=0.1, prepare=majority),
    "usps, 10 classes C=10 g=2^-7": Case("usps", "multi-class", 2.0**-7, 10.0),
}


def load(case: Case) -> tuple[np.ndarray | sp.csr_matrix, np.ndarray]:
    """Features (float64; dense, or CSR where the data are sparse) and targets of a case."""
    X, y = data.load(case.data)
    if case.prepare is not None:
        X, y = case.prepare(X, y)
    if case.rows is not None:
        kept = np.random.default_rng(SEED).permutation(len(y))[: case.rows]
        X, y = X[kept], y[kept]
    return X, y


def forms(X: np.ndarray | sp.csr_matrix) -> list[str]:
    """The names of the forms that data may be given in: sparse data as CSR and as dense arrays."""
    return [f"{layout} {p}" for layout in (("CSR", "dense") if sp.issparse(X) else ("dense",)) for p in PRECISION]


def shaped(X: np.ndarray | sp.csr_matrix, form: str) -> np.ndarray | sp.csr_matrix:
    """The data in one of its forms."""
    layout, precision = form.split()
    kind = PRECISION[precision]
    if layout == "CSR":
        X = sp.csr_matrix(X, dtype=kind)
        X.sort_indices()
        return X
    return np.ascontiguousarray(X.toarray() if sp.issparse(X) else X, dtype=kind)


def rounded(X: np.ndarray | sp.csr_matrix) -> np.ndarray | sp.csr_matrix:
    """The numbers that a solver sees in float32 input, in float64."""
    return X.astype(np.float32).astype(np.float64)


def exact_in_float32(X: np.ndarray | sp.csr_matrix) -> bool:
    """Whether float32 holds every entry."""
    values = X.data if sp.issparse(X) else X
    return bool((values.astype(np.float32) == values).all())
