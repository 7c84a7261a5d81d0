# SPDX-License-Identifier: BSD-3-Clause
"""LIBSVM's model files and svmlight data, read and written.

A model file is a header of ``name value`` lines and one line a support vector::

    svm_type c_svc          c_svc, nu_svc, one_class, epsilon_svr or nu_svr
    kernel_type rbf         linear, polynomial, rbf, sigmoid or precomputed
    gamma 0.5               polynomial, rbf and sigmoid; coef0 for polynomial and sigmoid; degree for polynomial
    nr_class 2              2 for regression and one-class
    total_sv 3
    rho 0.1                 k (k - 1) / 2 values for k classes, pairs (0, 1), (0, 2), ..., (1, 2), ...
    label 1 -1              classification only, and so is nr_sv
    nr_sv 2 1               support vectors of each class, in the order of label
    SV
    0.5 1:0.25 3:1          k - 1 coefficients, then index:value, indices from 1; precomputed: 0:row of the training set

The decision value of a pair (i, j), i before j in ``label``, is ``sum of coefficient * kernel - rho``; it is a vote for
i where it is positive and for j where it is not, and of equal votes the class that comes first in ``label`` wins.

scikit-learn's conventions, which :mod:`bcd.svm` follows, differ in two points, and :func:`save_model` and
:func:`load_model` translate:

* of two classes the second one of the sorted ``classes_`` is the positive one, so the file names it first;
* three or more classes are sorted. A file that is loaded keeps **its** order in ``classes_``, for equal votes to fall
  where LIBSVM lets them fall.
"""

from __future__ import annotations

import bz2
import gzip
import os
import re
import warnings
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import scipy.sparse as sp

__all__ = ["Model", "load_model", "read_data", "read_model", "save_model", "write_data", "write_model"]

Array = np.ndarray
TYPES = {"c_svc": "SVC", "nu_svc": "NuSVC", "one_class": "OneClassSVM", "epsilon_svr": "SVR", "nu_svr": "NuSVR"}
KERNELS = {"linear": "linear", "polynomial": "poly", "rbf": "rbf", "sigmoid": "sigmoid", "precomputed": "precomputed"}
NEEDS = {"polynomial": ("degree", "gamma", "coef0"), "rbf": ("gamma",), "sigmoid": ("gamma", "coef0")}
CLASSIFIERS = ("c_svc", "nu_svc")
IGNORED = ("probA", "probB", "prob_density_marks")
LARGEST = 2**31 - 1  # LIBSVM's int; also what 32-bit CSR indices hold
SHOWN = 40  # characters of a bad token in a message


@dataclass(frozen=True)
class Model:
    """What a model file says, in the file's own order and signs.

    Attributes
    ----------
    svm_type, kernel : str
        LIBSVM's names, "c_svc" and "polynomial" for example.
    coef : ndarray of float64, shape (k - 1, l)
        k classes (2 for regression and one-class), l support vectors.
    vectors : csr_array of float64, shape (l, d)
        Support vectors; of a precomputed kernel shape (l, 0).
    rho : ndarray of float64, shape (k (k - 1) / 2,)
    labels, n_sv : ndarray of int64, shape (k,) or (0,)
        Empty for regression and one-class.
    rows : ndarray of int64, shape (l,) or (0,)
        Precomputed kernels: the rows of the training set that are support vectors, from 0.
    degree, gamma, coef0 : int, float, float
        Of the kernels that have them.
    ignored : tuple of str
        Probability fields that the file has and that are not used.
    """

    svm_type: str
    kernel: str
    coef: Array
    vectors: sp.csr_array
    rho: Array
    labels: Array = field(default_factory=lambda: np.empty(0, np.int64))
    n_sv: Array = field(default_factory=lambda: np.empty(0, np.int64))
    rows: Array = field(default_factory=lambda: np.empty(0, np.int64))
    degree: int = 3
    gamma: float = 0.0
    coef0: float = 0.0
    ignored: tuple[str, ...] = ()


# Reading a model --------------------------------------------------------------------------------------------------


class _Reader:
    """The lines of a file with their numbers, and errors that name them."""

    def __init__(self, path: str | os.PathLike[str], lines: Iterator[bytes]):
        self.path, self.lines, self.number = os.fspath(path), lines, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            self.number += 1
            yield line

    def fail(self, found: str, needs: str, number: int | None = None) -> NoReturn:
        raise ValueError(f"{self.path}, line {number or self.number}: found {found}; needs {needs}")

    def integer(self, token: bytes, name: str, low: int, high: int = LARGEST) -> int:
        value = int(token) if re.fullmatch(rb"[+-]?[0-9]{1,18}", token) else None
        if value is None or not low <= value <= high:
            self.fail(f"{name} {_shown(token)}", f"an integer from {low} to {high}")
        return value

    def number_from(self, token: bytes, name: str) -> float:
        try:
            value = float(token) if b"_" not in token else np.nan
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            self.fail(f"{name} {_shown(token)}", "a finite number")
        return value


def _shown(token: bytes) -> str:
    """A token as a message can hold it."""
    text = token.decode("ascii", "backslashreplace")
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def read_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file as it stands.

    Memory is bounded by the size of the file: no number in the header is trusted to allocate.

    Parameters
    ----------
    path : path

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        With the line, what was found there and what is needed.
    OSError
        If the file cannot be read.
    """
    with open(path, "rb") as handle:
        reader = _Reader(path, handle)
        header, at = _read_header(reader)
        k, total = _check_header(reader, header, at)
        coef, rows, vectors = _read_vectors(reader, k, total, header["kernel_type"] == "precomputed")
    return Model(
        svm_type=header["svm_type"],
        kernel=header["kernel_type"],
        coef=coef,
        vectors=vectors,
        rho=np.array(header["rho"], np.float64),
        labels=np.array(header.get("label", ()), np.int64),
        n_sv=np.array(header.get("nr_sv", ()), np.int64),
        rows=rows,
        **{name: header[name] for name in NEEDS.get(header["kernel_type"], ())},
        ignored=tuple(name for name in IGNORED if name in header),
    )


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, int]]:
    """The fields and the lines they stand on, up to and with SV."""
    header: dict[str, Any] = {}
    at: dict[str, int] = {}
    for line in reader:
        tokens = line.split()
        if not tokens:
            continue
        name = tokens[0].decode("ascii", "backslashreplace")
        if name in at:
            reader.fail(f"{name} a second time (first on line {at[name]})", "each field once")
        at[name] = reader.number
        if name == "SV":
            return header, at
        header[name] = _header_value(reader, tokens[0], name, tokens[1:])
    reader.number += 1
    reader.fail("the end of the file", "a line SV, and the support vectors after it")


def _header_value(reader: _Reader, raw: bytes, name: str, values: list[bytes]) -> Any:
    many = {
        "rho": lambda token: reader.number_from(token, name),
        "label": lambda token: reader.integer(token, name, -LARGEST - 1),
        "nr_sv": lambda token: reader.integer(token, name, 0),
    }
    one = {
        "svm_type": lambda token: _choice(reader, token, name, TYPES),
        "kernel_type": lambda token: _choice(reader, token, name, KERNELS),
        "degree": lambda token: reader.integer(token, name, 0),
        "gamma": lambda token: reader.number_from(token, name),
        "coef0": lambda token: reader.number_from(token, name),
        "nr_class": lambda token: reader.integer(token, name, 2),
        "total_sv": lambda token: reader.integer(token, name, 0),
    }
    if name in IGNORED:
        return None
    if name in many:
        return [many[name](token) for token in values]
    if name not in one:
        known = ", ".join([*one, *many, *IGNORED, "SV"])
        reader.fail(_shown(raw), f"a field of LIBSVM's model files ({known})")
    if len(values) != 1:
        reader.fail(f"{name} with {len(values)} values", "one value")
    return one[name](values[0])


def _choice(reader: _Reader, token: bytes, name: str, among: dict[str, str]) -> str:
    text = token.decode("ascii", "backslashreplace")
    if text not in among:
        reader.fail(f"{name} {_shown(token)}", f"one of {', '.join(among)}")
    return text


def _check_header(reader: _Reader, header: dict[str, Any], at: dict[str, int]) -> tuple[int, int]:
    """Number of classes and of support vectors, once every count agrees."""
    classifier = header.get("svm_type") in CLASSIFIERS
    needed = ["svm_type", "kernel_type", *NEEDS.get(header.get("kernel_type", ""), ()), "nr_class", "total_sv", "rho"]
    needed += ["label", "nr_sv"] if classifier else []
    for name in needed:
        if name not in header:
            reader.fail("SV", f"a line {name} before it")
    k, total = header["nr_class"], header["total_sv"]
    if not classifier:
        if k != 2:
            reader.fail(f"nr_class {k}", f"nr_class 2 with {header['svm_type']}", at["nr_class"])
        for name in ("label", "nr_sv"):
            if name in header:
                reader.fail(name, f"no {name} with {header['svm_type']}", at[name])
    for name, size in {"rho": k * (k - 1) // 2, "label": k, "nr_sv": k}.items():
        if name in header and len(header[name]) != size:
            reader.fail(f"{len(header[name])} values of {name}", f"{size} for nr_class {k}", at[name])
    if classifier and len(set(header["label"])) != k:
        reader.fail("the same label twice", "labels that differ", at["label"])
    if classifier and sum(header["nr_sv"]) != total:
        reader.fail(f"nr_sv that sum to {sum(header['nr_sv'])}", f"the total_sv of line {at['total_sv']}", at["nr_sv"])
    if header.get("gamma", 0.0) < 0:
        reader.fail(f"gamma {header['gamma']}", "gamma >= 0", at["gamma"])
    return k, total


def _read_vectors(reader: _Reader, k: int, total: int, precomputed: bool) -> tuple[Array, Array, sp.csr_array]:
    coefs, indices, values, ends = array("d"), array("q"), array("d"), array("q", [0])
    for line in reader:
        tokens = line.split()
        if not tokens:
            continue
        if len(ends) > total:
            reader.fail("one more support vector", f"the end of the file after total_sv = {total} of them")
        if len(tokens) < k - 1:
            reader.fail(f"{len(tokens)} numbers", f"{k - 1} coefficients (nr_class - 1), then index:value pairs")
        coefs.extend(reader.number_from(token, "coefficient") for token in tokens[: k - 1])
        _read_pairs(reader, tokens[k - 1 :], precomputed, indices, values)
        ends.append(len(indices))
    if len(ends) <= total:
        reader.number += 1
        reader.fail(f"the end of the file after {len(ends) - 1} support vectors", f"total_sv = {total} of them")
    coef = np.frombuffer(coefs, np.float64).reshape(total, k - 1).T.copy()
    data = np.frombuffer(values, np.float64)
    if precomputed:
        return coef, data.astype(np.int64) - 1, sp.csr_array((total, 0), dtype=np.float64)
    columns = np.frombuffer(indices, np.int64) - 1
    width = int(columns.max(initial=-1)) + 1
    small = np.int32 if len(data) <= LARGEST else np.int64
    parts = data.copy(), columns.astype(small), np.frombuffer(ends, np.int64).astype(small)
    return coef, np.empty(0, np.int64), sp.csr_array(parts, shape=(total, width))


def _read_pairs(reader: _Reader, tokens: list[bytes], precomputed: bool, indices: array, values: array) -> None:
    """Append the index:value pairs of one line."""
    if precomputed:
        if len(tokens) != 1 or not tokens[0].startswith(b"0:"):
            reader.fail(_shown(b" ".join(tokens[:3])), "0:row, the row of the training set, with a precomputed kernel")
        indices.append(0)
        values.append(reader.integer(tokens[0][2:], "row", 1))
        return
    before = 0
    for token in tokens:
        left, colon, right = token.partition(b":")
        if not colon:
            reader.fail(_shown(token), "index:value")
        index = reader.integer(left, "index", 1)
        if index <= before:
            reader.fail(f"index {index} after {before}", "indices that rise along the line")
        before = index
        indices.append(index)
        values.append(reader.number_from(right, "value"))


# Writing a model --------------------------------------------------------------------------------------------------


def write_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model file; every number is written so that it reads back to the same float64.

    The file appears whole or not at all; a link stays one, and what it leads to is written. A device, a pipe
    (/dev/null, /dev/stdout), and a file in a folder that takes no new one are written in place.

    Parameters
    ----------
    model : Model
    path : path
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):
        with open(target, "w", encoding="ascii") as handle:
            handle.writelines(_lines(model))
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(partial, "w", encoding="ascii") as handle:
            handle.writelines(_lines(model))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _lines(model: Model) -> Iterator[str]:
    yield f"svm_type {model.svm_type}\nkernel_type {model.kernel}\n"
    for name in NEEDS.get(model.kernel, ()):
        yield f"{name} {_number(getattr(model, name))}\n"
    yield f"nr_class {len(model.coef) + 1}\ntotal_sv {model.coef.shape[1]}\n"
    yield f"rho {' '.join(map(_number, model.rho.tolist()))}\n"
    if len(model.labels):
        yield f"label {' '.join(map(str, model.labels.tolist()))}\n"
        yield f"nr_sv {' '.join(map(str, model.n_sv.tolist()))}\n"
    yield "SV\n"
    vectors = model.vectors
    for i, coef in enumerate(model.coef.T.tolist()):
        if model.kernel == "precomputed":
            pairs = [f"0:{model.rows[i] + 1}"]
        else:
            part = slice(vectors.indptr[i], vectors.indptr[i + 1])
            both = zip(vectors.indices[part].tolist(), vectors.data[part].tolist(), strict=True)
            pairs = [f"{column + 1}:{_number(value)}" for column, value in both]
        yield " ".join([*map(_number, coef), *pairs]) + " \n"


def _number(value: float) -> str:
    """The shortest text that reads back to the same float64 (17 digits at most)."""
    return repr(value).removesuffix(".0")


# Estimators -------------------------------------------------------------------------------------------------------


def save_model(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator as a LIBSVM model file.

    Parameters
    ----------
    estimator : SVC, NuSVC, SVR, NuSVR or OneClassSVM, fitted
        Of :mod:`bcd.svm` or :mod:`sklearn.svm`. Classes must be integers. An SVDD is written as the one-class machine
        that decides alike where k(x, x) is constant (an RBF kernel); its decision values come out halved.
    path : path

    Raises
    ------
    ValueError
        If LIBSVM's format cannot hold the model: another kernel, a degree or classes that are not integers, an SVDD
        whose k(x, x) varies.
    sklearn.exceptions.NotFittedError
        If it is not fitted.
    """
    write_model(_as_model(estimator), path)


def _as_model(estimator: Any) -> Model:
    from sklearn.utils.validation import check_is_fitted

    svm_type, kernel = _svm_type(estimator), _kernel_name(estimator)
    check_is_fitted(estimator, "dual_coef_")
    coef = estimator.dual_coef_
    coef = np.array(coef.toarray() if sp.issparse(coef) else coef, np.float64, ndmin=2)
    rho = _rho(estimator, kernel)
    labels, n_sv = np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.arange(coef.shape[1])
    if svm_type in CLASSIFIERS:
        labels, n_sv = _integer_classes(estimator.classes_), np.array(estimator.n_support_, np.int64)
        if len(labels) == 2:  # the positive class first
            labels, order = labels[::-1], np.roll(order, -n_sv[0])
            n_sv = n_sv[::-1]
    precomputed = kernel == "precomputed"
    return Model(
        svm_type=svm_type,
        kernel=kernel,
        coef=coef[:, order],
        vectors=sp.csr_array((len(order), 0)) if precomputed else _vectors(estimator)[order],
        rho=rho,
        labels=labels,
        n_sv=n_sv,
        rows=np.array(estimator.support_, np.int64)[order] if precomputed else np.empty(0, np.int64),
        degree=int(estimator.degree),
        gamma=float(estimator._gamma),
        coef0=float(estimator.coef0),
    )


def _rho(estimator: Any, kernel: str) -> Array:
    """LIBSVM's rho; that of an SVDD half of what is left of its decision function beside 2 K a."""
    intercept = np.array(estimator.intercept_, np.float64, ndmin=1)
    if type(estimator).__name__ != "SVDD":
        return -intercept
    if kernel not in ("rbf", "precomputed"):
        raise ValueError(
            "kernel must be rbf for an SVDD in LIBSVM's format, which needs a constant k(x, x); "
            f"found {estimator.kernel!r} (joblib.dump keeps any model)"
        )
    return ((estimator._self_similarity if kernel == "precomputed" else 1.0) - intercept) / 2


def _svm_type(estimator: Any) -> str:
    names = {{"SVDD": "OneClassSVM"}.get(base.__name__, base.__name__) for base in type(estimator).__mro__}
    for svm_type, name in TYPES.items():
        if name in names:
            return svm_type
    raise ValueError(f"estimator must be one of {', '.join(TYPES.values())}; found {type(estimator).__name__}")


def _kernel_name(estimator: Any) -> str:
    for name, ours in KERNELS.items():
        if isinstance(estimator.kernel, str) and estimator.kernel == ours:
            if ours == "poly" and estimator.degree != int(estimator.degree):
                raise ValueError(f"degree must be an integer in LIBSVM's format; found {estimator.degree}")
            return name
    raise ValueError(
        f"kernel must be one of {', '.join(KERNELS.values())} in LIBSVM's format; found {estimator.kernel!r} "
        "(joblib.dump keeps any model)"
    )


def _integer_classes(classes: Array) -> Array:
    """The labels as LIBSVM's ints."""
    if classes.dtype.kind in "iufb" and np.all(classes == np.round(classes)) and np.abs(classes).max() <= LARGEST:
        return classes.astype(np.int64)
    raise ValueError(
        f"classes must be integers in LIBSVM's format; found {classes[:3].tolist()} (fit to integer labels, "
        "for example those of sklearn.preprocessing.LabelEncoder)"
    )


def _vectors(estimator: Any) -> sp.csr_array:
    """The support vectors; an explicit zero names the last column where no other value does."""
    vectors = sp.csr_array(estimator.support_vectors_, dtype=np.float64)
    vectors.sum_duplicates()
    n, d = vectors.shape
    if not n or not d or (len(vectors.indices) and vectors.indices.max() == d - 1):
        return vectors
    at = vectors.indptr[1]
    indptr = vectors.indptr.copy()
    indptr[1:] += 1
    parts = np.insert(vectors.data, at, 0.0), np.insert(vectors.indices, at, d - 1), indptr
    return sp.csr_array(parts, shape=(n, d))


def load_model(path: str | os.PathLike[str], *, n_features: int | None = None) -> Any:
    """Read a LIBSVM model file as a fitted estimator of :mod:`bcd.svm`.

    It predicts what LIBSVM predicts, but for two-class points whose decision value is exactly 0: there LIBSVM says the
    second label of the file and scikit-learn ``classes_[1]``. What the file does not hold is not there (``support_``,
    the certificate) or has its default (C, nu, epsilon). Probability fields are ignored with a warning: LIBSVM uses
    them for ``-b 1`` only.

    Parameters
    ----------
    path : path
    n_features : int, optional
        Columns of the data to predict; default: the largest index in the file, which a model that was saved by
        :func:`save_model` always names. A file of LIBSVM's may lack the last columns. Not used with a precomputed
        kernel, whose matrix may have any width that holds the support vectors.

    Returns
    -------
    SVC, NuSVC, SVR, NuSVR or OneClassSVM
        Of three or more classes, ``classes_`` is in the order of the file.

    Raises
    ------
    ValueError
        With the line, what was found there and what is needed; or if ``n_features`` is too small for the file.
    OSError
        If the file cannot be read.
    """
    return _loaded(read_model(path), path, n_features)


def _loaded(model: Model, path: str | os.PathLike[str], n_features: int | None) -> Any:
    width = model.vectors.shape[1]
    if n_features is not None and n_features < width:
        raise ValueError(
            f"n_features must be at least {width}, the largest index in {os.fspath(path)}; got {n_features}"
        )
    if model.ignored:
        ignored = ", ".join(model.ignored)
        warnings.warn(f"{os.fspath(path)}: {ignored} ignored; predictions do not use them", stacklevel=3)
    return _as_estimator(model, max(n_features or 0, width))


def _as_estimator(model: Model, width: int) -> Any:
    from bcd import svm

    coef, intercept, classes, n_sv = model.coef, -model.rho, model.labels, model.n_sv
    order = np.arange(coef.shape[1])
    if len(classes) == 2 and classes[0] < classes[1]:  # the file's positive class is the first one, ours the second
        coef, intercept = -coef, -intercept
    elif len(classes) == 2:
        order = np.roll(order, -n_sv[0])
        classes, n_sv = classes[::-1].copy(), n_sv[::-1].copy()
    has_gamma = "gamma" in NEEDS.get(model.kernel, ())
    machine = getattr(svm, TYPES[model.svm_type])(
        kernel=KERNELS[model.kernel],
        degree=model.degree,
        gamma=model.gamma if has_gamma else "scale",
        coef0=model.coef0,
    )
    machine._gamma = model.gamma
    machine.intercept_ = intercept
    if model.svm_type in CLASSIFIERS:
        machine.classes_, machine.n_support_ = classes, n_sv.astype(np.int32)
    else:
        machine.n_support_ = np.array([len(order)], np.int32)
    if model.svm_type == "one_class":
        machine.offset_ = -intercept
    _set_vectors(machine, model, coef[:, order], order, width)
    return machine


def _set_vectors(machine: Any, model: Model, coef: Array, order: Array, width: int) -> None:
    """Support vectors and coefficients, sparse where less than half of the values are there."""
    machine.dual_coef_ = np.ascontiguousarray(coef)
    if model.kernel == "precomputed":
        machine.support_, machine.support_vectors_ = model.rows[order].astype(np.int32), np.empty((0, 0))
        return
    vectors = model.vectors[order]
    vectors.resize(len(order), width)
    if width:  # a file without support vectors does not say
        machine.n_features_in_ = width
    if 2 * vectors.nnz >= len(order) * width:
        machine.support_vectors_ = vectors.toarray()
    else:
        machine.support_vectors_, machine.dual_coef_ = vectors, sp.csr_array(coef)


# Data -------------------------------------------------------------------------------------------------------------


def read_data(
    path: str | os.PathLike[str], *, n_features: int | None = None, precomputed: bool = False, dtype: Any = np.float64
) -> tuple[Any, Array]:
    """Read svmlight data (``label index:value ...``, indices from 1), also compressed as .gz or .bz2.

    scikit-learn's reader does the work; this adds errors that name the line.

    Parameters
    ----------
    path : path
    n_features : int, optional
        Columns of the result at least; default: the largest index in the file.
    precomputed : bool
        The lines are ``label 0:row 1:K(x, x_1) 2:K(x, x_2) ...``.
    dtype : dtype
        Of the features, float64 or float32.

    Returns
    -------
    X : csr_matrix with 32-bit indices, shape (n, d)
        With ``precomputed``, a dense ndarray instead: the row numbers, then the kernel values.
    y : ndarray of float64, shape (n,)

    Raises
    ------
    ValueError
        With the line, what was found there and what is needed.
    OSError
        If the file cannot be read.
    """
    from sklearn.datasets import load_svmlight_file

    if not Path(path).is_file():
        found = "is a folder; needs a file" if Path(path).is_dir() else "no such file"
        raise ValueError(f"{os.fspath(path)}: {found}")
    try:
        X, y = load_svmlight_file(os.fspath(path), dtype=dtype, zero_based=precomputed)
    except (ValueError, OverflowError) as error:
        _explain(path, precomputed)
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    except (EOFError, OSError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's own errors name the file
        raise ValueError(f"{os.fspath(path)}: the compressed file is broken ({error})") from error
    if not len(y):
        raise ValueError(f"{os.fspath(path)}: found no data; needs lines like '1 1:0.5 3:2'")
    if not (np.isfinite(y).all() and np.isfinite(X.data).all()):
        _explain(path, precomputed)
        raise ValueError(f"{os.fspath(path)}: values must be finite in {np.dtype(dtype)}")
    if precomputed:
        return _kernel_values(path, X), y
    X.resize(X.shape[0], max(n_features or 1, X.shape[1]))
    small = np.int32 if X.nnz <= LARGEST else np.int64
    return sp.csr_matrix((X.data, X.indices.astype(small), X.indptr.astype(small)), shape=X.shape), y


def _kernel_values(path: str | os.PathLike[str], X: sp.csr_matrix) -> Array:
    n, d = X.shape
    if d < 2 or d - 1 > max(10 * n, 10**5):
        needs = "label 0:row 1:K(x, x_1) 2:K(x, x_2) ..., one value for every row of the training set"
        raise ValueError(f"{os.fspath(path)}: found indices up to {d - 1} on {n} lines; needs {needs}")
    return X.toarray()


def write_data(X: Any, y: Any, path: str | os.PathLike[str]) -> None:
    """Write svmlight data with indices from 1, as LIBSVM and :func:`read_data` read it (16 digits).

    Parameters
    ----------
    X : array or sparse matrix, shape (n, d)
    y : array, shape (n,)
    path : path
    """
    from sklearn.datasets import dump_svmlight_file

    dump_svmlight_file(X, y, os.fspath(path), zero_based=False)


def _explain(path: str | os.PathLike[str], precomputed: bool) -> None:
    """Raise ValueError naming the first line that svmlight data cannot hold; return if there is none."""
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open}.get(Path(path).suffix, open)
    with opened(path, "rb") as handle:
        reader = _Reader(path, handle)
        for line in reader:
            tokens = line.partition(b"#")[0].split()
            if not tokens:
                continue
            reader.number_from(tokens[0], "label")
            before = -1 if precomputed else 0
            for token in tokens[1:]:
                left, colon, right = token.partition(b":")
                if left == b"qid":
                    continue
                if not colon:
                    reader.fail(_shown(token), "index:value")
                if left == b"0" and not precomputed:
                    reader.fail("index 0", "indices from 1 (dump_svmlight_file writes them with zero_based=False)")
                index = reader.integer(left, "index", before + 1 if before < 1 else 1)
                if index <= before:
                    reader.fail(f"index {index} after {before}", "indices that rise along the line")
                before = index
                reader.number_from(right, "value")
