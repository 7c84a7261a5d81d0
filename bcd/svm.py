# SPDX-License-Identifier: BSD-3-Clause
"""Support vector machines with the interface of scikit-learn and LIBSVM's answers, each with its proof.

In ``b_i = y_i alpha_i`` the labels vanish from the Hessian, and every machine is one and the same problem
(docs/theory.md; K is the kernel matrix, C_i = C times the weights of row i, w_i these weights alone):

===========  ===================================================  ===================  ============================
estimator    minimise                                             bounds               sums
===========  ===================================================  ===================  ============================
SVC          1/2 b'Kb - y'b                                       [0, C_i], y = +1     sum b = 0
                                                                  [-C_i, 0], y = -1
NuSVC        1/2 b'Kb                                             [0, w_i], [-w_i, 0]  +- nu sum(w)/2 in each class
SVR          1/2 b'Kb - y'b + epsilon (sum p - sum m), b = p + m  p in [0, C_i]        sum b = 0
                                                                  m in [-C_i, 0]
NuSVR        1/2 b'Kb - y'b, b = p + m                            as SVR               sum p = -sum m = nu sum(C)/2
OneClassSVM  1/2 b'Kb                                             [0, w_i]             sum b = nu sum(w)
SVDD         1/2 b'Kb - 1/2 diag(K)'b                             [0, C_i]             sum b = 1
===========  ===================================================  ===================  ============================

Attributes that every fitted machine has (one number; for three and more classes one a pair of classes):
``dual_objective_`` the minimised value above, LIBSVM's sign; ``primal_objective_ = duality_gap_ - dual_objective_``,
the primal at the same w and the best intercept; ``duality_gap_ >= 0``, the Frank-Wolfe gap, which bounds what is
lost in both; ``violation_``, LIBSVM's stopping quantity, recomputed; ``n_columns_`` of K that were computed; and
``status_``, a :class:`bcd.Status`.

Sources: Chang and Lin, LIBSVM: a library for support vector machines, ACM TIST 2 (2011), for the problems, the
layout of the coefficients and one-vs-one; Tax and Duin, Support vector data description, Machine Learning 54
(2004).
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import scipy.sparse as sp
from joblib import Parallel, delayed, effective_n_jobs
from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin, RegressorMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_consistent_length, column_or_1d, compute_class_weight
from sklearn.utils._param_validation import Hidden, Interval, StrOptions
from sklearn.utils.multiclass import _ovr_decision_function, check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from bcd._check import as_vector
from bcd.dual import (
    Dual,
    DualProgress,
    DualResult,
    nu_svc_dual,
    nu_svr_dual,
    one_class_dual,
    solve_dual,
    svc_dual,
    svdd_dual,
    svr_dual,
)
from bcd.gram import KERNELS, Expansion, Gram, Kernel, kernel_diagonal, kernel_product, usable_cores
from bcd.result import Status

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn before 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Nothing to support."""


__all__ = [
    "SVC",
    "SVDD",
    "SVR",
    "NuSVC",
    "NuSVR",
    "OneClassSVM",
]

Array = np.ndarray
LOOK_SECONDS = 1.0  # between two lines of verbose
SIDE_BY_SIDE = 256  # pairs of classes, about twice what one product of a prediction has


# One problem --------------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    """Checked training data; rows without weight are gone, and ``kept`` says which ones are left (None: all)."""

    X: Any
    y: Any
    weight: Array
    kept: Array | None

    def original(self, rows: Array) -> Array:
        """Numbers of these rows in what the user passed."""
        return rows if self.kept is None else self.kept[rows]


class _Point(NamedTuple):
    """A dual point with what a model is made of (the fields are named as those of DualResult)."""

    coefficients: Array
    product: Array
    offset: Array
    largest: float  # of the diagonal of K
    solved: bool


def _point_of(result: DualResult, largest: float) -> _Point:
    if result.status is Status.NOT_FINITE:
        raise ValueError("The kernel matrix is not finite; found values in X that are too large: scale the features")
    return _Point(result.coefficients, result.product, result.offset, largest, result.status.ok)


class _Halt:
    """A callback that stops every solve that asks it, once ``now`` is set."""

    now = False

    def __call__(self, progress: DualProgress) -> bool:
        return self.now


def _rows(X: Any, rows: Array | None, kernel: Kernel) -> Any:
    if rows is None:
        return X
    return X[np.ix_(rows, rows)] if kernel.name == "precomputed" else X[rows]


def _solve_pair(
    X: Any,
    rows: Array,
    kernel: Kernel,
    dual: Dual,
    x0: Array | None,
    gram: dict,
    solver: dict,
    share: tuple[float, int],
) -> tuple[DualResult, float]:
    """Solve for some rows of X; share: the time by which everything must end, and the rounds still to come."""
    started = time.perf_counter()
    columns = Gram(_rows(X, rows, kernel), kernel, **gram)
    limit = None if share[0] == np.inf else max(0.0, share[0] - started) / share[1]
    return solve_dual(columns, dual, x0, time_limit=limit, **solver), float(columns.diagonal.max())


def _rescaled(x: Array, last: Dual, dual: Dual) -> Array:
    """A point of an earlier box in the box of now: each coordinate keeps its place between its bounds."""
    width, new = last.upper - last.lower, dual.upper - dual.lower
    out = x * np.divide(new, width, out=np.ones(len(x)), where=width > 0)
    out[x == last.lower], out[x == last.upper] = dual.lower[x == last.lower], dual.upper[x == last.upper]
    return np.clip(np.where(x == 0, 0.0, out), dual.lower, dual.upper)


def _offsets(dual: Dual, x: Array, product: Array) -> Array:
    """Minus the gradient at the free coordinates of every sum (DualResult.offset)."""
    grad = dual.linear + (product if len(product) == len(x) else np.tile(product, 2))
    labels = dual.labels if len(dual.labels) else np.zeros(len(x), np.int64)
    offset = np.zeros(len(dual.totals))
    for s in range(len(offset)):
        mine = labels == s
        rise, fall = mine & (x < dual.upper), mine & (x > dual.lower)
        if (rise & fall).any():
            offset[s] = -grad[rise & fall].mean()
        else:
            ends = ([grad[rise].min()] if rise.any() else []) + ([grad[fall].max()] if fall.any() else [])
            offset[s] = -np.mean(ends) if ends else 0.0
    return offset


def _variance(X: Any, weight: Array | None) -> float:
    """Variance of all entries, each row counted weight times, in float64 and without a copy of X."""
    d = X.shape[1]
    total = d * (X.shape[0] if weight is None else weight.sum())
    if sp.issparse(X):
        share = np.ones(1) if weight is None else np.repeat(weight, np.diff(X.indptr))
        share = np.broadcast_to(share, X.data.shape)
        first, second = (np.einsum(s, share, *[X.data] * k, dtype=np.float64) for k, s in ((1, "i,i"), (2, "i,i,i")))
        return float(second / total - (first / total) ** 2)
    mean = X.mean(dtype=np.float64) if weight is None else weight @ X.sum(axis=1, dtype=np.float64) / total
    step = max(1, 2**18 // d)
    second = 0.0
    for i in range(0, X.shape[0], step):
        part = X[i : i + step] - mean
        square = np.einsum("ij,ij->i", part, part)
        second += square.sum() if weight is None else weight[i : i + step] @ square
    return float(second / total)


_FEW = 1 << 14  # values that are checked without scikit-learn's validation

# for each machine what its predictions have made ready; not in the machine, which predictions leave as it is
_READY: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()

# What all of them share ---------------------------------------------------------------------------------------

KERNEL_RULES: dict[str, list] = {
    "kernel": [StrOptions(set(KERNELS)), callable],
    "degree": [Interval(Integral, 0, None, closed="left")],
    "gamma": [StrOptions({"scale", "auto"}), Interval(Real, 0.0, None, closed="left")],
    "coef0": [Interval(Real, None, None, closed="neither")],
    "shrinking": ["boolean"],
    "tol": [Interval(Real, 0.0, None, closed="neither")],
    "cache_size": [Interval(Real, 0, None, closed="neither")],
    "verbose": ["verbose"],
    "max_iter": [Interval(Integral, -1, None, closed="left")],
    "time_limit": [Interval(Real, 0, None, closed="left"), None],
    "warm_start": ["boolean"],
    "dtype": [StrOptions({"auto", "float64"})],
    "device": [str, None],
}
C_RULE = {"C": [Interval(Real, 0.0, None, closed="neither")]}
NU_RULE = {"nu": [Interval(Real, 0.0, 1.0, closed="right")]}
EPSILON_RULE = {"epsilon": [Interval(Real, 0.0, None, closed="left")]}
CLASSIFIER_RULES: dict[str, list] = KERNEL_RULES | {
    "probability": ["boolean", Hidden(StrOptions({"deprecated"}))],
    "class_weight": [StrOptions({"balanced"}), dict, None],
    "decision_function_shape": [StrOptions({"ovr", "ovo"})],
    "break_ties": ["boolean"],
    "random_state": ["random_state"],
    "n_jobs": [Integral, None],
}


class _SVM(CallbackSupportMixin, BaseEstimator, ABC):
    """Checks, the dual's solution, the fitted attributes, and K(X, support vectors) times the coefficients.

    Prediction reads the parameters of the kernel, ``_gamma`` and the fitted attributes of scikit-learn alone.
    """

    n_iter_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        tags.input_tags.sparse = self.kernel != "precomputed"
        return tags

    # checks

    @abstractmethod
    def _model(self, data: _Data, point: _Point) -> dict[str, Any]:
        """The fitted attributes of a dual point."""

    def _check(self, X: Any, y: Any = "no_validation", sample_weight: Any = None, *, numeric: bool = False) -> _Data:
        X, y = self._check_arrays(X, y, numeric)
        n = X.shape[0]
        if self.kernel == "precomputed" and X.shape[1] != n:
            raise ValueError(f"Precomputed matrix must be a square matrix; found X of shape {X.shape}")
        weight, kept = self._check_weight(sample_weight, n)
        if kept is not None:
            X = X[np.ix_(kept, kept)] if self.kernel == "precomputed" else X[kept]
            y = None if y is None else y[kept]
        self.shape_fit_ = (n, *X.shape[1:]) if self.kernel != "precomputed" else (n, n)
        self._gamma = self._resolved_gamma(X, None if sample_weight is None else weight)
        return _Data(X, y, weight, kept)

    def _check_arrays(self, X: Any, y: Any, numeric: bool) -> tuple[Any, Any]:
        with_y = not isinstance(y, str)
        if with_y and y is None:
            raise ValueError(f"requires y to be passed, but the target y is None; {type(self).__name__} needs it")
        if callable(self.kernel):
            X = self._check_objects(X, reset=True)
            if with_y:
                check_consistent_length(X, y)
                y = column_or_1d(y, warn=True)
        elif with_y:
            X, y = validate_data(self, X, y, y_numeric=numeric, **self._accepted())
            X = _canonical(X)
        else:
            X = _canonical(validate_data(self, X, **self._accepted()))
        if not with_y:
            return X, None
        return X, np.asarray(y, np.float64) if numeric else y

    def _accepted(self) -> dict[str, Any]:
        sparse = False if self.kernel == "precomputed" else "csr"
        return {"dtype": [np.float64, np.float32], "order": "C", "accept_sparse": sparse}

    def _check_objects(self, X: Any, *, reset: bool) -> Any:
        """What a callable kernel gets: an array of anything, as it is."""
        X = check_array(X, dtype=None, accept_sparse="csr", ensure_2d=False, allow_nd=True)
        if reset and X.ndim == 2:
            self.n_features_in_ = X.shape[1]
        return X

    def _check_weight(self, sample_weight: Any, n: int) -> tuple[Array, Array | None]:
        """The positive weights and their rows (None: all rows)."""
        if sample_weight is None:
            return np.ones(n), None
        weight = as_vector("sample_weight", sample_weight, n)
        if weight.min() > 0:
            return weight, None
        kept = np.flatnonzero(weight > 0)
        if not len(kept):
            raise ValueError("sample_weight must have a positive entry; found that all are zero or negative")
        return weight[kept], kept

    def _resolved_gamma(self, X: Any, weight: Array | None) -> float:
        if not isinstance(self.gamma, str):
            return float(self.gamma)
        if self.kernel == "precomputed" or callable(self.kernel):
            return 0.0
        if self.gamma == "auto":
            return 1.0 / X.shape[1]
        variance = _variance(X, weight)
        return 1.0 / (X.shape[1] * variance) if variance != 0 else 1.0

    # the problem

    def _make_kernel(self) -> Kernel:
        if callable(self.kernel):
            return Kernel("callable", function=self.kernel)
        return Kernel(self.kernel, self._gamma, self.degree, self.coef0)

    def _gram_settings(self, workers: int = 1) -> dict[str, Any]:
        threads = None if workers == 1 else max(1, usable_cores() // workers)
        return {
            "dtype": self.dtype,
            "cache_size": self.cache_size / workers,
            "device": self.device,
            "threads": threads,
        }

    def _solver_settings(self) -> dict[str, Any]:
        limit = None if self.max_iter == -1 else self.max_iter
        return {"tol": self.tol, "max_iter": limit, "shrinking": self.shrinking}

    def _start(self, k: int, dual: Dual) -> Array | None:
        """Where problem k starts: at its last solution with warm_start=True, if the rows are as many."""
        last = getattr(self, "_last_duals", None) if self.warm_start else None
        if last is None or len(last) <= k or len(last[k][0]) != len(dual.linear):
            return None
        x, before = last[k]
        return _rescaled(x, before, dual)

    def _solve(self, data: _Data, gram: Gram, dual: Dual, sample_weight: Any) -> None:
        """Solve the only problem of this machine and set every fitted attribute."""
        largest = float(gram.diagonal.max())
        tasks = _Tasks(self, data, sample_weight, None)

        def look(progress: DualProgress) -> bool:
            return tasks.look(progress, lambda: self._model_at(data, dual, progress.x, largest))

        result = solve_dual(
            gram,
            dual,
            self._start(0, dual),
            time_limit=self.time_limit,
            callback=look if tasks.wanted or self.verbose else None,
            **self._solver_settings(),
        )
        self._set(
            self._model(data, _Point(result.coefficients, result.product, result.offset, largest, result.status.ok))
        )
        self._set(self._certificate(result))
        self._conclude([result], [dual])
        tasks.end()

    def _model_at(self, data: _Data, dual: Dual, x: Array, largest: float) -> dict[str, Any]:
        """The model of a dual point whose gradient is not known."""
        n = data.X.shape[0]
        b = x if len(x) == n else x[:n] + x[n:]
        support = np.flatnonzero(b)
        kernel = self._make_kernel()
        precomputed = kernel.name == "precomputed"
        X, Z = (data.X[:, support], None) if precomputed else (data.X, data.X[support])
        product = kernel_product(X, Z, kernel, b[support, None], device=self.device)[:, 0]
        return self._model(data, _Point(b, product, _offsets(dual, x, product), largest, False))

    def _set(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def _certificate(self, result: DualResult) -> dict[str, Any]:
        return {
            "duality_gap_": result.gap,
            "violation_": result.violation,
            "dual_objective_": result.objective,
            "primal_objective_": result.gap - result.objective,
            "n_columns_": result.columns,
            "status_": result.status,
            "n_iter_": result.iterations,
        }

    def _conclude(self, results: list[DualResult], duals: list[Dual]) -> None:
        """Remember the solutions if they are to be started from, and say what did not converge."""
        if self.warm_start:
            self._last_duals = [(r.x, d) for r, d in zip(results, duals, strict=True)]
        self.fit_status_ = int(not all(r.status.ok for r in results))
        poor = [r for r in results if r.status not in (Status.CONVERGED, Status.CALLBACK)]
        if not poor:
            return
        worst = max(poor, key=lambda r: r.violation)
        which = f"{len(poor)} of {len(results)} pairs of classes, the worst of them: " if len(results) > 1 else ""
        warnings.warn(
            f"{type(self).__name__}: {which}{worst.status.value.replace('x0=result.x', 'warm_start=True')} "
            f"The model is kept; its violation is {worst.violation:.3g} (tol is {self.tol:g}), and its duality gap "
            f"{worst.gap:.3g} bounds how far the objective {worst.objective:.6g} is from optimal.",
            ConvergenceWarning,
            stacklevel=5,
        )

    # the model

    def _vectors(self, data: _Data, support: Array, coefficients: Array) -> dict[str, Any]:
        """The attributes that describe the support vectors; coefficients: (m, n_sv)."""
        if not np.isfinite(coefficients).all():
            raise ValueError(
                "The dual coefficients are not finite; found values in X that are too large: scale the features"
            )
        sparse = sp.issparse(data.X) and not callable(self.kernel)
        container = sp.csr_matrix if sp.isspmatrix(data.X) else sp.csr_array
        return {
            "support_": data.original(support).astype(np.int32),
            "support_vectors_": np.empty((0, 0)) if self.kernel == "precomputed" else data.X[support],
            "dual_coef_": container(coefficients) if sparse else coefficients,
        }

    def _check_new(self, X: Any) -> Any:
        if "support_" not in self.__dict__:  # quicker than to ask about all attributes
            check_is_fitted(self)
        if callable(self.kernel):
            return self._check_objects(X, reset=False)
        if self._is_ready(X):
            return X
        return _canonical(validate_data(self, X, reset=False, **self._accepted()))

    def _is_ready(self, X: Any) -> bool:
        """Whether validation of so few values would find nothing to do or to say; it takes longer than a decision."""
        if type(X) is np.ndarray:
            values, well_formed = X, X.ndim == 2 and X.flags.c_contiguous
        elif type(X) in (sp.csr_matrix, sp.csr_array) and self.kernel != "precomputed":
            values, well_formed = X.data, X.ndim == 2 and X.has_canonical_format
        else:
            return False
        return (
            well_formed
            and values.dtype in (np.float64, np.float32)
            and 0 < values.size <= _FEW
            and X.shape[1] == self.__dict__.get("n_features_in_")  # models of LIBSVM's files may have none
            and "feature_names_in_" not in self.__dict__
            and bool(np.isfinite(values).all())
        )

    def _coefficients(self, block: slice = slice(None)) -> Array:
        """Some columns of dual_coef_, turned: (support vectors, rows of dual_coef_), dense."""
        coef = self.dual_coef_[:, block]
        return np.ascontiguousarray((coef.toarray() if sp.issparse(coef) else coef).T, np.float64)

    def _expand(self, X: Any, coef: Array, block: slice = slice(None)) -> Array:
        """K(X, some support vectors) times coefficients, (n, columns of coef)."""
        kernel = self._make_kernel()
        if kernel.name == "precomputed":
            return X[:, self.support_[block]] @ coef
        dtype = np.dtype(np.float32 if X.dtype == np.float32 else np.float64)
        key = (block.start, block.stop, dtype)
        ready = _READY.setdefault(self, {})
        vectors, known = ready.get(key, (None, None))
        if vectors is not self.support_vectors_ or known.kernel != kernel or not np.array_equal(known.coef, coef):
            known = Expansion(self.support_vectors_[block], kernel, coef, dtype=dtype, device=self.device)
            ready[key] = (self.support_vectors_, known)
        return known(X)

    def _decide(self, X: Any) -> Array:
        """K(X, support vectors) times the only row of coefficients, plus the intercept."""
        return self._expand(X, self._coefficients())[:, 0] + self.intercept_[0]

    @property
    def coef_(self) -> Any:
        """Weights of the features, kernel="linear" only: ``dual_coef_ @ support_vectors_``, read-only.

        Returns
        -------
        ndarray or CSR, shape (1, d); for k > 2 classes (k (k - 1) / 2, d)
        """
        if self.kernel != "linear":
            raise AttributeError(f"coef_ is only available with kernel='linear'; found kernel={self.kernel!r}")
        coef = self._weights()
        (coef.data if sp.issparse(coef) else coef).flags.writeable = False
        return coef

    def _weights(self) -> Any:
        return self.dual_coef_ @ self.support_vectors_


def _canonical(X: Any) -> Any:
    """Sorted indices, one entry each; the user's matrix is not touched."""
    if sp.issparse(X) and not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


class _Tasks:
    """The fit as a tree of tasks for sklearn.callback (nothing before scikit-learn 1.9), and the lines of verbose."""

    def __init__(self, machine: Any, data: _Data, sample_weight: Any, parts: int | None):
        self.machine = machine
        labels = getattr(machine, "classes_", None)  # y holds their codes
        self.what = {"estimator": machine, "X": data.X, "y": data.y if labels is None else lambda: labels[data.y]}
        if sample_weight is not None:
            self.what["metadata"] = {"sample_weight": data.weight}
        begin = getattr(machine, "_init_callback_context", None)
        self.context: Any = begin(max_subtasks=parts) if begin else None
        self.wanted = bool(getattr(machine, "_skl_callbacks", ()))
        self.printed = time.perf_counter()
        if self.wanted and self.context:
            self.context.call_on_fit_task_begin(**self.what)

    def look(self, progress: DualProgress, model: Callable[[], dict[str, Any]]) -> bool:
        """Report a look of the solver; True asks it to stop."""
        if self.machine.verbose and time.perf_counter() - self.printed >= LOOK_SECONDS:
            self.printed = time.perf_counter()
            print(
                f"{type(self.machine).__name__}: {progress.seconds:.1f} s, {progress.iteration} steps, "
                f"{progress.columns:.0f} columns, violation {progress.violation:.3g}, "
                f"objective {progress.objective:.8g}"
            )
        return self.part("solver look", model)

    def part(self, name: str, model: Callable[[], dict[str, Any]] | None = None) -> bool:
        """Report that a part of the fit is done; True asks to stop."""
        if not self.wanted:
            return False
        task = self.context.subcontext(task_name=name)
        task.call_on_fit_task_begin(**self.what)
        return bool(task.call_on_fit_task_end(reconstruction_attributes=model, **self.what))

    def end(self) -> None:
        """Report that the machine is fitted."""
        if self.wanted:
            self.context.call_on_fit_task_end(reconstruction_attributes={}, **self.what)


# Classification -----------------------------------------------------------------------------------------------


class _Classifier(ClassifierMixin, _SVM):
    """One problem for two classes, one a pair of classes for more (one-vs-one, LIBSVM's layout)."""

    @abstractmethod
    def _dual(self, y: Array, weight: Array) -> Dual:
        """The dual of rows with these targets (+1 and -1, or numbers) and weights."""

    def _boundary(self, point: _Point) -> tuple[Array, float]:
        """Coefficients and intercept; positive values mean y = +1."""
        return point.coefficients, float(point.offset[0])

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit to data.

        Parameters
        ----------
        X : {array-like, CSR} of float32 or float64, shape (n, d)
            Used as it is where it is C-contiguous (CSR: sorted); anything else is converted. (n, n) for
            kernel="precomputed"; anything indexable by rows for a callable kernel.
        y : array-like, shape (n,)
            Class labels.
        sample_weight : array-like of float, shape (n,), optional
            Factors of C (NuSVC: of the share of a row). Rows with weight 0 or less are left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If there are fewer than two classes, shapes differ, or an entry is not finite; NuSVC: if nu is
            infeasible.

        Warns
        -----
        ConvergenceWarning
            If the solver stopped before tol was reached; the model is the best so far.
        """
        self._refuse_probability()
        data = self._check(X, y, sample_weight)
        data, bound = self._check_classes(data)
        if len(self.classes_) > 2:
            self._fit_pairs(data, bound, sample_weight)
            return self
        dual = self._dual(np.where(data.y == 1, 1.0, -1.0), bound)
        self._solve(data, Gram(data.X, self._make_kernel(), **self._gram_settings()), dual, sample_weight)
        self.n_iter_ = np.array([self.n_iter_], np.int32)
        return self

    def _refuse_probability(self) -> None:
        if self.probability not in (False, "deprecated"):
            name = type(self).__name__
            raise ValueError(
                f"probability must be left at its default; found {self.probability!r}. For probabilities use\n"
                "    from sklearn.calibration import CalibratedClassifierCV\n"
                f"    CalibratedClassifierCV({name}(), ensemble=False).fit(X, y).predict_proba(X)"
            )

    def _check_classes(self, data: _Data) -> tuple[_Data, Array]:
        """The data with y as codes 0, 1, ..., and the weight of every row."""
        y = data.y
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            weighted = "" if data.kept is None else " among the rows with positive sample_weight"
            raise ValueError(
                f"y must hold at least two classes; the number of classes found{weighted} is 1 class "
                f"({self.classes_[0].item()!r})"
            )
        self.class_weight_ = self._weights_of_classes(y, codes, data.weight)
        if (self.class_weight_ < 0).any():
            raise ValueError(f"class_weight must not be negative; found {self.class_weight_.tolist()}")
        uniform = self.class_weight is None
        return data._replace(y=codes), data.weight if uniform else data.weight * self.class_weight_[codes]

    def _weights_of_classes(self, y: Array, codes: Array, weight: Array) -> Array:
        if self.class_weight == "balanced":  # with sample_weight: as many rows as their weights say
            counts = np.bincount(codes, weight)
            return counts.sum() / (len(counts) * counts)
        if self.class_weight is None:
            return np.ones(len(self.classes_))
        return compute_class_weight(self.class_weight, classes=self.classes_, y=y)

    def _model(self, data: _Data, point: _Point) -> dict[str, Any]:
        coefficients, intercept = self._boundary(point)
        support = np.flatnonzero(coefficients)
        support = support[np.argsort(data.y[support], kind="stable")]
        return {
            **self._vectors(data, support, coefficients[None, support]),
            "n_support_": np.bincount(data.y[support], minlength=2).astype(np.int32),
            "intercept_": np.array([intercept]),
        }

    # three and more classes

    def _fit_pairs(self, data: _Data, bound: Array, sample_weight: Any) -> None:
        members = np.split(np.argsort(data.y, kind="stable"), np.cumsum(np.bincount(data.y))[:-1])
        pairs = list(combinations(range(len(members)), 2))
        rows = [np.sort(np.concatenate([members[i], members[j]])) for i, j in pairs]
        duals = [self._dual_of(data, bound, r, i) for r, (i, _) in zip(rows, pairs, strict=True)]
        tasks = _Tasks(self, data, sample_weight, len(pairs))
        solved = self._solve_pairs(data, rows, duals, tasks)
        results = [result for result, _ in solved]
        n = data.X.shape[0]
        table, intercept = np.zeros((len(members) - 1, n)), np.empty(len(pairs))
        for k, (i, j) in enumerate(pairs):
            result, largest = solved[k]
            b, intercept[k] = self._boundary(
                _Point(result.coefficients, result.product, result.offset, largest, result.status.ok)
            )
            first = data.y[rows[k]] == i
            table[j - 1, rows[k][first]] = b[first]
            table[i, rows[k][~first]] = b[~first]
        support = np.concatenate([m[table[:, m].any(axis=0)] for m in members])
        self._set(self._vectors(data, support, np.ascontiguousarray(table[:, support])))
        self.n_support_ = np.bincount(data.y[support], minlength=len(members)).astype(np.int32)
        self.intercept_ = intercept
        proofs = [self._certificate(result) for result in results]
        self._set({name: np.array([p[name] for p in proofs]) for name in proofs[0] if name != "status_"})
        self.n_iter_ = self.n_iter_.astype(np.int32)
        self.status_ = [result.status for result in results]
        self._conclude(results, duals)
        tasks.end()

    def _dual_of(self, data: _Data, bound: Array, rows: Array, first: int) -> Dual:
        return self._dual(np.where(data.y[rows] == first, 1.0, -1.0), bound[rows])

    def _solve_pairs(
        self, data: _Data, rows: list[Array], duals: list[Dual], tasks: _Tasks
    ) -> list[tuple[DualResult, float]]:
        """All pairs in order; after Ctrl-C, or when a callback says stop, the rest stays where it starts."""
        total = len(duals)
        workers = min(effective_n_jobs(self.n_jobs), total)
        deadline = np.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        halt = _Halt()
        fixed = (self._make_kernel(), self._gram_settings(workers), self._solver_settings() | {"callback": halt})
        starts = [self._start(k, dual) for k, dual in enumerate(duals)]

        def job(k: int, **limits: Any) -> Any:
            kernel, gram, solver = fixed
            share = (deadline, -(-(total - k) // workers))
            return data.X, rows[k], kernel, duals[k], starts[k], gram, solver | limits, share

        done: list[tuple[DualResult, float]] = []
        stopped: Status | None = None
        work = Parallel(n_jobs=workers, prefer="threads", return_as="generator")
        answers = work(delayed(_solve_pair)(*job(k)) for k in range(total))
        try:
            for answer in answers:
                done.append(answer)
                if answer[0].status is Status.INTERRUPTED:
                    stopped = Status.INTERRUPTED
                elif tasks.part("pair of classes"):
                    stopped = Status.CALLBACK
                if stopped is not None:
                    break
        except KeyboardInterrupt:
            stopped = Status.INTERRUPTED
        with warnings.catch_warnings():  # joblib counts the tasks that it drops
            warnings.simplefilter("ignore", UserWarning)
            answers.close()
        if stopped is None:
            return done
        halt.now = True  # for pairs that other threads are at
        for k in range(len(done), total):
            result, largest = _solve_pair(*job(k, max_iter=0))
            done.append((replace(result, status=stopped), largest))
        return done

    def _weights(self) -> Any:
        if len(self.classes_) == 2:
            return super()._weights()
        blocks = [self.dual_coef_[:, b] @ self.support_vectors_[b] for b in self._blocks()]
        rows = [blocks[i][[j - 1]] + blocks[j][[i]] for i, j in combinations(range(len(blocks)), 2)]
        return sp.vstack(rows, format="csr") if sp.issparse(rows[0]) else np.vstack(rows)

    def _blocks(self) -> list[slice]:
        """Where the support vectors of each class lie."""
        ends = np.cumsum(self.n_support_).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.n_support_.tolist(), strict=True)]

    def _decide_pairs(self, X: Any) -> Array:
        """(n, pairs), positive for the first class of the pair; each kernel value is computed once."""
        k, slices = len(self.classes_), self._blocks()
        column = np.zeros((k, k), np.intp)
        column[np.triu_indices(k, 1)] = np.arange(len(self.intercept_))
        column += column.T
        values = np.tile(self.intercept_, (X.shape[0], 1))
        group = max(1, SIDE_BY_SIDE // k)  # its pairs are the columns of one product
        for first in range(0, k, group):
            members = range(first, min(first + group, k))
            block = slice(slices[members[0]].start, slices[members[-1]].stop)
            others = [np.delete(column[c], c) for c in members]
            pairs = np.unique(np.concatenate(others))
            coef = np.zeros((block.stop - block.start, len(pairs)))
            for c, own in zip(members, others, strict=True):
                rows = slice(slices[c].start - block.start, slices[c].stop - block.start)
                coef[rows, np.searchsorted(pairs, own)] = self._coefficients(slices[c])
            values[:, pairs] += self._expand(X, coef, block)
        return values

    def decision_function(self, X: Any) -> Array:
        """Values of the decision functions.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of float64
            Two classes: shape (m,), positive for ``classes_[1]``. More: shape (m, k) with
            decision_function_shape="ovr" (votes plus a term below 1/2 that breaks ties), else one column a pair
            (0, 1), (0, 2), ..., (1, 2), ..., positive for the first class of the pair.
        """
        X = self._check_new(X)
        if len(self.classes_) == 2:
            return self._decide(X)
        values = self._decide_pairs(X)
        if self.decision_function_shape == "ovr":
            return _ovr_decision_function(values < 0, -values, len(self.classes_))
        return values

    def predict(self, X: Any) -> Array:
        """Class labels.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray, shape (m,)
            Of three and more classes the one with most votes, of equals the first one, with break_ties=True the
            one with the largest decision function.

        Raises
        ------
        ValueError
            If break_ties=True with decision_function_shape="ovo".
        """
        X = self._check_new(X)
        if self.break_ties and self.decision_function_shape == "ovo":
            raise ValueError("break_ties must be False when decision_function_shape is 'ovo'")
        if len(self.classes_) == 2:
            return self.classes_[(self._decide(X) >= 0).astype(np.intp)]
        if self.break_ties:
            return self.classes_[np.argmax(self.decision_function(X), axis=1)]
        values = self._decide_pairs(X)
        votes = np.zeros((len(values), len(self.classes_)), np.int32)
        for p, (i, j) in enumerate(combinations(range(len(self.classes_)), 2)):
            wins = values[:, p] > 0
            votes[:, i] += wins
            votes[:, j] += ~wins
        return self.classes_[np.argmax(votes, axis=1)]


class SVC(_Classifier):
    """C-support vector classification.

    ``min over w, b: 1/2 |w|^2 + sum C_i max(0, 1 - y_i (<w, phi(x_i)> + b))``

    Parameters
    ----------
    C : float, default=1.0
        Price of a unit of loss, finite; a large one such as 1e6 comes close to a hard margin.
    kernel : str or callable, default="rbf"
        "linear" ``x'z``, "rbf" ``exp(-gamma |x - z|^2)``, "poly" ``(gamma x'z + coef0)^degree``, "sigmoid"
        ``tanh(gamma x'z + coef0)``, "laplacian" ``exp(-gamma |x - z|_1)``, "cosine" ``x'z / (|x| |z|)``,
        "precomputed" (X is the kernel matrix), or a function of two arrays that returns the matrix.
    degree : int, default=3
    gamma : {"scale", "auto"} or float, default="scale"
        "scale": 1 / (d times the variance of all entries of X), where rows count with their sample_weight;
        "auto": 1 / d.
    coef0 : float, default=0.0
    shrinking : bool, default=True
        Leave out coordinates that seem to stay at their bounds; all are looked at again before the end.
    probability : default="deprecated"
        Not offered, leave it alone: CalibratedClassifierCV(SVC(), ensemble=False) gives probabilities.
    tol : float, default=1e-3
        LIBSVM's: the largest difference of two gradient entries whose coordinates could still be traded.
    cache_size : float, default=200
        Kernel columns kept, in MB; with n_jobs all pairs together. Prediction keeps none.
    class_weight : dict or "balanced", optional
        Factors of C for each class; "balanced": sum of weights / (k times those of the class), where rows count
        with their sample_weight.
    verbose : bool, default=False
        Print a line a second.
    max_iter : int, default=-1
        Limit on the pair steps of a problem; -1 for none.
    decision_function_shape : {"ovr", "ovo"}, default="ovr"
    break_ties : bool, default=False
    random_state : default=None
        Not used: nothing is drawn. For compatibility.
    time_limit : float, optional
        Seconds; the best model so far is kept, with a ConvergenceWarning. With pairs of classes each gets its
        share of what is left.
    warm_start : bool, default=False
        Start from the last solution (as many rows, the same classes), rescaled to the bounds of now: for paths
        of C.
    dtype : {"auto", "float64"}, default="auto"
        Precision of kernel columns: "auto" is float32 and rises where that cannot reach tol.
    device : str, optional
        Where kernel columns are computed: None for this machine's own code, or a device of torch.
    n_jobs : int, optional
        Pairs of classes that are solved at a time (joblib); the model does not depend on it.

    Attributes
    ----------
    support_ : ndarray of int32, shape (n_sv,)
        Rows of the support vectors, ordered by class.
    support_vectors_ : {ndarray, CSR}, shape (n_sv, d)
        Of the dtype of X. (0, 0) for kernel="precomputed".
    n_support_ : ndarray of int32, shape (k,)
    dual_coef_ : {ndarray, CSR} of float64, shape (k - 1, n_sv)
        y_i alpha_i, with y = +1 for ``classes_[1]``. For k > 2 classes y = +1 for the first class of a pair, and
        row r of a column of class c belongs to the pair (r, c) if r < c, else (c, r + 1).
    coef_ : {ndarray, CSR}, shape (1, d) or (k (k - 1) / 2, d)
        kernel="linear" only.
    intercept_ : ndarray of float64, shape (k (k - 1) / 2,)
    classes_ : ndarray, shape (k,)
    class_weight_ : ndarray of float64, shape (k,)
    shape_fit_ : tuple
    fit_status_ : int
        0 if the tolerance was reached.
    n_iter_ : ndarray of int32, shape (k (k - 1) / 2,)
    duality_gap_, violation_, dual_objective_, primal_objective_ : float; k > 2: ndarray, shape (k (k - 1) / 2,)
        See :mod:`bcd.svm`.
    n_columns_ : float; k > 2: ndarray, shape (k (k - 1) / 2,)
        Kernel entries computed, in units of n.
    status_ : bcd.Status; k > 2: a list of them
    n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (d,)

    Notes
    -----
    With a linear kernel and many rows, LinearSVC (liblinear) is the better choice.

    Examples
    --------
    >>> from bcd.svm import SVC
    >>> X, y = np.array([[-2.0, 0], [-1, 0], [1, 0], [2, 0]]), np.array(["a", "a", "b", "b"])
    >>> machine = SVC(kernel="linear").fit(X, y)
    >>> machine.predict([[-0.1, 0], [3, 1]]).tolist(), machine.support_.tolist()
    (['a', 'b'], [1, 2])
    >>> bool(machine.duality_gap_ < 1e-3), machine.status_.name
    (True, 'CONVERGED')
    """

    _parameter_constraints: ClassVar[dict[str, list]] = CLASSIFIER_RULES | C_RULE

    def __init__(
        self,
        *,
        C: float = 1.0,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        shrinking: bool = True,
        probability: Any = "deprecated",
        tol: float = 1e-3,
        cache_size: float = 200,
        class_weight: dict | str | None = None,
        verbose: bool = False,
        max_iter: int = -1,
        decision_function_shape: str = "ovr",
        break_ties: bool = False,
        random_state: Any = None,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        n_jobs: int | None = None,
    ):
        self.C = C
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.shrinking = shrinking
        self.probability = probability
        self.tol = tol
        self.cache_size = cache_size
        self.class_weight = class_weight
        self.verbose = verbose
        self.max_iter = max_iter
        self.decision_function_shape = decision_function_shape
        self.break_ties = break_ties
        self.random_state = random_state
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device
        self.n_jobs = n_jobs

    def _dual(self, y: Array, weight: Array) -> Dual:
        return svc_dual(y, self.C * weight)


class NuSVC(_Classifier):
    """nu-support vector classification.

    ``min over w, b, rho: 1/2 |w|^2 - nu W rho + sum w_i max(0, rho - y_i (<w, phi(x_i)> + b))``, W = sum w_i, and
    then everything is divided by rho: nu bounds the share of margin errors from above, that of support vectors
    from below.

    Parameters
    ----------
    nu : float, default=0.5
        In (0, 1], at most twice the share of the smaller class (of every pair of classes).
    kernel, degree, gamma, coef0, shrinking, probability, tol, cache_size : see SVC
        tol is that of the problem before the division by rho.
    class_weight : dict or "balanced", optional
        Factors of w_i. scikit-learn ignores it here.
    verbose, max_iter, decision_function_shape, break_ties, random_state : see SVC
    time_limit, warm_start, dtype, device, n_jobs : see SVC

    Attributes
    ----------
    dual_coef_, intercept_ : ndarray
        After the division by rho.
    duality_gap_, violation_, dual_objective_, primal_objective_ : float or ndarray
        Before it.
    All others
        As those of SVC.

    Raises
    ------
    ValueError
        By fit, if nu is infeasible (the message names the largest feasible nu), or if the classes cannot be
        separated by any margin at this nu (rho = 0).

    Examples
    --------
    >>> from bcd.svm import NuSVC
    >>> X, y = np.array([[-2.0], [-1], [1], [2]]), [0, 0, 1, 1]
    >>> NuSVC(nu=0.5, kernel="linear").fit(X, y).predict([[-3], [0.5]])
    array([0, 1])
    """

    _parameter_constraints: ClassVar[dict[str, list]] = CLASSIFIER_RULES | NU_RULE

    def __init__(
        self,
        *,
        nu: float = 0.5,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        shrinking: bool = True,
        probability: Any = "deprecated",
        tol: float = 1e-3,
        cache_size: float = 200,
        class_weight: dict | str | None = None,
        verbose: bool = False,
        max_iter: int = -1,
        decision_function_shape: str = "ovr",
        break_ties: bool = False,
        random_state: Any = None,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        n_jobs: int | None = None,
    ):
        self.nu = nu
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.shrinking = shrinking
        self.probability = probability
        self.tol = tol
        self.cache_size = cache_size
        self.class_weight = class_weight
        self.verbose = verbose
        self.max_iter = max_iter
        self.decision_function_shape = decision_function_shape
        self.break_ties = break_ties
        self.random_state = random_state
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device
        self.n_jobs = n_jobs

    def _check_classes(self, data: _Data) -> tuple[_Data, Array]:
        data, weight = super()._check_classes(data)
        totals = np.bincount(data.y, weight)
        largest, pair = min(
            (2 * min(totals[i], totals[j]) / (totals[i] + totals[j]), (i, j))
            for i, j in combinations(range(len(totals)), 2)
        )
        if self.nu > largest * (1 + 1e-12):
            names = " and ".join(repr(self.classes_[c].item()) for c in pair)
            raise ValueError(
                f"specified nu is infeasible: nu = {self.nu:g}, and the largest feasible nu is {largest:.6g}, since "
                f"classes {names} have the weights {totals[pair[0]]:g} and {totals[pair[1]]:g}"
            )
        return data, weight

    def _dual(self, y: Array, weight: Array) -> Dual:
        return nu_svc_dual(y, weight, self.nu)

    def _boundary(self, point: _Point) -> tuple[Array, float]:
        above, below = point.offset
        rho = (below - above) / 2
        least = 4 * np.finfo(float).eps * point.largest * np.abs(point.coefficients).sum()
        if not rho > least and not point.solved:
            rho = max(least, np.finfo(float).tiny)  # far from optimal: nothing to normalise by yet
        elif not rho > least:
            raise ValueError(
                f"nu = {self.nu:g} leaves no margin (rho = {rho:.3g}): the reduced convex hulls of two classes meet; "
                "try a smaller nu, a smaller tol, another kernel, or SVC"
            )
        return point.coefficients / rho, float((above + below) / 2 / rho)


# Regression ---------------------------------------------------------------------------------------------------


class _Regressor(RegressorMixin, _SVM):
    """One problem with two coordinates a row."""

    @abstractmethod
    def _dual(self, y: Array, weight: Array) -> Dual:
        """The dual of rows with these targets (+1 and -1, or numbers) and weights."""

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit to data.

        Parameters
        ----------
        X : {array-like, CSR} of float32 or float64, shape (n, d)
            Used as it is where it is C-contiguous (CSR: sorted); anything else is converted. (n, n) for
            kernel="precomputed"; anything indexable by rows for a callable kernel.
        y : array-like of float, shape (n,)
            Targets.
        sample_weight : array-like of float, shape (n,), optional
            Factors of C. Rows with weight 0 or less are left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If shapes differ or an entry is not finite.

        Warns
        -----
        ConvergenceWarning
            If the solver stopped before tol was reached; the model is the best so far.
        """
        data = self._check(X, y, sample_weight, numeric=True)
        gram = Gram(data.X, self._make_kernel(), **self._gram_settings())
        self._solve(data, gram, self._dual(data.y, data.weight), sample_weight)
        return self

    def _model(self, data: _Data, point: _Point) -> dict[str, Any]:
        support = np.flatnonzero(point.coefficients)
        return {
            **self._vectors(data, support, point.coefficients[None, support]),
            "n_support_": np.array([len(support)], np.int32),
            "intercept_": np.array([point.offset.mean()]),
        }

    def predict(self, X: Any) -> Array:
        """Predicted targets.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of float64, shape (m,)
        """
        return self._decide(self._check_new(X))


class SVR(_Regressor):
    """epsilon-support vector regression.

    ``min over w, b: 1/2 |w|^2 + sum C_i max(0, |y_i - <w, phi(x_i)> - b| - epsilon)``

    Parameters
    ----------
    kernel, degree, gamma, coef0, tol : see SVC
    C : float, default=1.0
    epsilon : float, default=0.1
        Half the width of the tube in which errors cost nothing, in units of y.
    shrinking, cache_size, verbose, max_iter, time_limit, warm_start, dtype, device : see SVC

    Attributes
    ----------
    support_ : ndarray of int32, shape (n_sv,)
    support_vectors_ : {ndarray, CSR}, shape (n_sv, d)
    n_support_ : ndarray of int32, shape (1,)
    dual_coef_ : {ndarray, CSR} of float64, shape (1, n_sv)
        b = p + m, positive where the target lies above the tube.
    coef_ : {ndarray, CSR}, shape (1, d)
        kernel="linear" only.
    intercept_ : ndarray of float64, shape (1,)
    shape_fit_, fit_status_, n_iter_, n_columns_, status_ : see SVC; numbers
    duality_gap_, violation_, dual_objective_, primal_objective_ : float
        See :mod:`bcd.svm`.

    Examples
    --------
    >>> from bcd.svm import SVR
    >>> X = np.linspace(0, 3, 30)[:, None]
    >>> machine = SVR(C=100, epsilon=0.01).fit(X, np.sin(X[:, 0]))
    >>> bool(np.abs(machine.predict(X) - np.sin(X[:, 0])).max() < 0.02)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list]] = KERNEL_RULES | C_RULE | EPSILON_RULE

    def __init__(
        self,
        *,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        tol: float = 1e-3,
        C: float = 1.0,
        epsilon: float = 0.1,
        shrinking: bool = True,
        cache_size: float = 200,
        verbose: bool = False,
        max_iter: int = -1,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
    ):
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.tol = tol
        self.C = C
        self.epsilon = epsilon
        self.shrinking = shrinking
        self.cache_size = cache_size
        self.verbose = verbose
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device

    def _dual(self, y: Array, weight: Array) -> Dual:
        return svr_dual(y, self.C * weight, self.epsilon)


class NuSVR(_Regressor):
    """nu-support vector regression: SVR that finds its epsilon.

    ``min over w, b, epsilon: 1/2 |w|^2 + nu S epsilon + sum C_i max(0, |y_i - <w, phi(x_i)> - b| - epsilon)``,
    S = sum C_i

    Parameters
    ----------
    nu : float, default=0.5
        In (0, 1]: at most this share lies outside the tube, at least this share are support vectors.
    C : float, default=1.0
    kernel, degree, gamma, coef0, shrinking, tol, cache_size, verbose, max_iter : see SVC
    time_limit, warm_start, dtype, device : see SVC

    Attributes
    ----------
    All
        As those of SVR.

    Examples
    --------
    >>> from bcd.svm import NuSVR
    >>> X = np.linspace(0, 3, 30)[:, None]
    >>> bool(NuSVR(C=10).fit(X, X[:, 0]).score(X, X[:, 0]) > 0.99)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list]] = KERNEL_RULES | C_RULE | NU_RULE

    def __init__(
        self,
        *,
        nu: float = 0.5,
        C: float = 1.0,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        shrinking: bool = True,
        tol: float = 1e-3,
        cache_size: float = 200,
        verbose: bool = False,
        max_iter: int = -1,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
    ):
        self.nu = nu
        self.C = C
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.shrinking = shrinking
        self.tol = tol
        self.cache_size = cache_size
        self.verbose = verbose
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device

    def _dual(self, y: Array, weight: Array) -> Dual:
        return nu_svr_dual(y, self.C * weight, self.nu)


# Detection of outliers ----------------------------------------------------------------------------------------


class _Detector(OutlierMixin, _SVM):
    """One problem without targets."""

    @abstractmethod
    def _dual(self, gram: Gram, weight: Array) -> Dual:
        """The dual of rows with these weights."""

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Fit to data.

        Parameters
        ----------
        X : {array-like, CSR} of float32 or float64, shape (n, d)
            Used as it is where it is C-contiguous (CSR: sorted); anything else is converted. (n, n) for
            kernel="precomputed"; anything indexable by rows for a callable kernel.
        y : ignored
        sample_weight : array-like of float, shape (n,), optional
            How many rows a row stands for. Rows with weight 0 or less are left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If shapes differ or an entry is not finite.

        Warns
        -----
        ConvergenceWarning
            If the solver stopped before tol was reached; the model is the best so far.
        """
        data = self._check(X, sample_weight=sample_weight)
        gram = Gram(data.X, self._make_kernel(), **self._gram_settings())
        self._solve(data, gram, self._dual(gram, data.weight), sample_weight)
        return self

    def _model(self, data: _Data, point: _Point) -> dict[str, Any]:
        support = np.flatnonzero(point.coefficients)
        return {
            **self._vectors(data, support, point.coefficients[None, support]),
            "n_support_": np.array([len(support)], np.int32),
            "intercept_": point.offset.copy(),
            "offset_": -point.offset,
        }

    def decision_function(self, X: Any) -> Array:
        """Signed distance from the boundary, positive inside: ``score_samples(X) - offset_``.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of float64, shape (m,)
        """
        return self._decide(self._check_new(X))

    def score_samples(self, X: Any) -> Array:
        """Score that does not depend on where the boundary lies; the larger, the more usual.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of float64, shape (m,)
        """
        return self.decision_function(X) + self.offset_

    def predict(self, X: Any) -> Array:
        """+1 inside, -1 outside or on the boundary.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of intp, shape (m,)
        """
        return np.where(self.decision_function(X) > 0, 1, -1).astype(np.intp)


class OneClassSVM(_Detector):
    """One-class support vector machine: a boundary that leaves out a share nu of the data.

    ``min over w, rho: 1/2 |w|^2 - nu W rho + sum w_i max(0, rho - <w, phi(x_i)>)``, W = sum w_i

    Parameters
    ----------
    kernel, degree, gamma, coef0, tol : see SVC
    nu : float, default=0.5
        In (0, 1]: at most this share lies outside, at least this share are support vectors.
    shrinking, cache_size, verbose, max_iter, time_limit, warm_start, dtype, device : see SVC

    Attributes
    ----------
    dual_coef_ : {ndarray, CSR} of float64, shape (1, n_sv)
        In [0, w_i], with sum nu W.
    intercept_, offset_ : ndarray of float64, shape (1,)
        -rho and rho.
    All others
        As those of SVR.

    Examples
    --------
    >>> from bcd.svm import OneClassSVM
    >>> OneClassSVM(nu=0.5, gamma=0.5).fit([[0.0], [0.1], [0.2], [9.0]]).predict([[0.1], [5.0]])
    array([ 1, -1])
    """

    _parameter_constraints: ClassVar[dict[str, list]] = KERNEL_RULES | NU_RULE

    def __init__(
        self,
        *,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        tol: float = 1e-3,
        nu: float = 0.5,
        shrinking: bool = True,
        cache_size: float = 200,
        verbose: bool = False,
        max_iter: int = -1,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
    ):
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.tol = tol
        self.nu = nu
        self.shrinking = shrinking
        self.cache_size = cache_size
        self.verbose = verbose
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device

    def _dual(self, gram: Gram, weight: Array) -> Dual:
        return one_class_dual(weight, self.nu)


class SVDD(_Detector):
    """Support vector data description: the smallest ball in feature space, with a price on what lies outside.

    ``min over c, R: 1/2 R^2 + 1/2 sum C_i max(0, |phi(x_i) - c|^2 - R^2)``

    With C = 1 or more it encloses everything; with C = 1/(nu n) at most a share nu lies outside, and with an RBF
    kernel that is OneClassSVM(nu).

    Parameters
    ----------
    C : float, default=1.0
        Price of a unit outside; at least 1 / (sum of sample_weight).
    kernel, degree, gamma, coef0, tol : see SVC
        kernel="precomputed" needs a constant diagonal, since k(x, x) of new points must be known.
    shrinking, cache_size, verbose, max_iter, time_limit, warm_start, dtype, device : see SVC

    Attributes
    ----------
    dual_coef_ : {ndarray, CSR} of float64, shape (1, n_sv)
        The center as a mixture of the support vectors: in [0, C_i], with sum 1.
    radius_ : float
        R (0 if the ball is a point).
    offset_ : ndarray of float64, shape (1,)
        -R^2; score_samples is minus the squared distance from the center.
    intercept_ : ndarray of float64, shape (1,)
        decision_function is ``2 K(x, support vectors) dual_coef_' - k(x, x) + intercept_``.
    All others
        As those of SVR; the objectives are the halved ones.

    Examples
    --------
    >>> from bcd.svm import SVDD
    >>> machine = SVDD(kernel="linear").fit([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    >>> round(machine.radius_, 6), machine.predict([[0.0, 0.9], [0.0, 1.1]])
    (1.0, array([ 1, -1]))
    """

    _parameter_constraints: ClassVar[dict[str, list]] = KERNEL_RULES | C_RULE

    def __init__(
        self,
        *,
        C: float = 1.0,
        kernel: str | Callable = "rbf",
        degree: int = 3,
        gamma: str | float = "scale",
        coef0: float = 0.0,
        tol: float = 1e-3,
        shrinking: bool = True,
        cache_size: float = 200,
        verbose: bool = False,
        max_iter: int = -1,
        time_limit: float | None = None,
        warm_start: bool = False,
        dtype: str = "auto",
        device: str | None = None,
    ):
        self.C = C
        self.kernel = kernel
        self.degree = degree
        self.gamma = gamma
        self.coef0 = coef0
        self.tol = tol
        self.shrinking = shrinking
        self.cache_size = cache_size
        self.verbose = verbose
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.warm_start = warm_start
        self.dtype = dtype
        self.device = device

    def _dual(self, gram: Gram, weight: Array) -> Dual:
        total = float(weight.sum())
        if self.C * total < 1 - 1e-12:
            raise ValueError(
                f"C = {self.C:g} is infeasible: the smallest feasible C is {1 / total:.6g}, 1 / (sum of sample_weight)"
            )
        diagonal = np.asarray(gram.diagonal, np.float64)
        if self.kernel == "precomputed":
            if np.ptp(diagonal) > 1e-6 * np.abs(diagonal).max():
                raise ValueError(
                    "kernel='precomputed' must have a constant diagonal for SVDD, which needs k(x, x) of new points; "
                    f"found values from {diagonal.min():g} to {diagonal.max():g}: pass the kernel as a function"
                )
            self._self_similarity = float(diagonal[0])
        return svdd_dual(diagonal, self.C * weight)

    def _model(self, data: _Data, point: _Point) -> dict[str, Any]:
        square = max(0.0, 2 * float(point.offset[0]) + float(point.coefficients @ point.product))
        return super()._model(data, point) | {
            "intercept_": 2 * point.offset,
            "offset_": np.array([-square]),
            "radius_": float(np.sqrt(square)),
        }

    def decision_function(self, X: Any) -> Array:
        """R^2 minus the squared distance from the center, positive inside.

        Parameters
        ----------
        X : {array-like, CSR}, shape (m, d)
            (m, n) for kernel="precomputed".

        Returns
        -------
        ndarray of float64, shape (m,)
        """
        X = self._check_new(X)
        product = self._expand(X, self._coefficients())[:, 0]
        if self.kernel == "precomputed":
            return 2 * product - self._self_similarity + self.intercept_[0]
        diagonal = kernel_diagonal(X, self._make_kernel())
        return 2 * product - diagonal + self.intercept_[0]
