# SPDX-License-Identifier: BSD-3-Clause
"""Data sets by name.

``load`` looks, in this order, in scikit-learn itself (digits, breast_cancer), in the folder that the
environment variable BCD_DATA names (its svm/NAME.bz2 is svmlight text), in the cache folder
(``$XDG_CACHE_HOME`` or ~/.cache, then blockdescent/NAME.bz2), and on the LIBSVM data page, from which
it fills the cache. Binary labels are +1 and -1. Sets without a public address in the form used here have to be put
in one of the folders; :data:`ORIGINS` says what they are.
"""

from __future__ import annotations

import bz2
import io
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.datasets import dump_svmlight_file, load_breast_cancer, load_digits, load_svmlight_file
from sklearn.preprocessing import minmax_scale

PAGE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"
BUNDLED = {"digits": load_digits, "breast_cancer": load_breast_cancer}


class Source(NamedTuple):
    """A file of the LIBSVM data page.

    Attributes
    ----------
    path : str
        Below :data:`PAGE`.
    positive : float or None
        The label that becomes +1 (all others -1); None leaves the labels as they are.
    scaled : bool
        Whether the features are already scaled; if not, each goes to [-1, 1].
    """

    path: str
    positive: float | None = 1.0
    scaled: bool = True


SOURCES = {
    "heart_scale": Source("binary/heart_scale"),
    "german_scale": Source("binary/german.numer_scale"),
    "svmguide1_scale": Source("binary/svmguide1", scaled=False),
    "mushrooms": Source("binary/mushrooms"),
    "a9a": Source("binary/a9a"),
    "a9a.t": Source("binary/a9a.t"),
    "ijcnn1": Source("binary/ijcnn1.bz2"),
    "w8a": Source("binary/w8a"),
    "abalone_scale": Source("regression/abalone_scale", positive=None),
    "svmguide3": Source("binary/svmguide3"),
    "cpusmall_scale": Source("regression/cpusmall_scale", positive=None),
}
ORIGINS = {
    "usps": "the 7291 training rows of zipcode (Elements of Statistical Learning), labels 0 to 9",
    "reuters": "binary/reuters/reuters.trn.bz2 of github.com/X-DataInitiative/tick-datasets",
    "spambase_std": "UCI spambase, every column standardised",
    "svmguide1_scale.t": "svmguide1.t of the LIBSVM data page, scaled with the ranges of svmguide1",
    "calhousing_std": "California housing, features and target standardised",
}


def load(name: str) -> tuple[np.ndarray | sp.csr_matrix, np.ndarray]:
    """Features and labels of a data set.

    Parameters
    ----------
    name : str
        "digits", "breast_cancer", or the name of a file without its ending.

    Returns
    -------
    X : ndarray or csr_matrix, shape (n, d)
        Dense where at least half of the entries differ from 0; otherwise with 32-bit indices (scikit-learn's SVC
        takes no others).
    y : ndarray of float, shape (n,)

    Raises
    ------
    FileNotFoundError
        If the file is nowhere and cannot be fetched; the message says what to do.
    """
    if name in BUNDLED:
        bunch = BUNDLED[name]()
        return bunch.data, bunch.target.astype(float)
    path = next((p for p in candidates(name) if p.exists()), None) or fetch(name)
    X, y = load_svmlight_file(str(path))
    if 2 * X.nnz >= X.shape[0] * X.shape[1]:
        return X.toarray(), y
    return sp.csr_matrix((X.data, X.indices.astype(np.int32), X.indptr.astype(np.int32)), X.shape), y


def candidates(name: str) -> list[Path]:
    """Where the file may lie on this machine."""
    folder = os.environ.get("BCD_DATA")
    return ([Path(folder) / "svm" / f"{name}.bz2"] if folder else []) + [cache() / f"{name}.bz2"]


def cache() -> Path:
    """The folder for what was downloaded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdescent"


def fetch(name: str) -> Path:
    """Download a data set into the cache and return its path there."""
    if name not in SOURCES:
        what = f" ({ORIGINS[name]})" if name in ORIGINS else ""
        raise FileNotFoundError(_advice(name, f"it has no public address in experiments/data.py{what}"))
    source = SOURCES[name]
    try:
        with urllib.request.urlopen(f"{PAGE}/{source.path}", timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise FileNotFoundError(_advice(name, f"{PAGE}/{source.path} could not be read ({error})")) from error
    X, y = load_svmlight_file(io.BytesIO(bz2.decompress(content) if source.path.endswith(".bz2") else content))
    return _keep(name, *_prepare(X, y, source))


def _advice(name: str, why: str) -> str:
    return (
        f"data set {name!r} is not on this machine: {why}. Put the svmlight file at {cache().name}/{name}.bz2 in the "
        f"cache folder (XDG_CACHE_HOME, default ~/.cache), or set BCD_DATA to a folder with svm/{name}.bz2"
    )


def _prepare(X: sp.csr_matrix, y: np.ndarray, source: Source) -> tuple[sp.csr_matrix, np.ndarray]:
    if source.positive is not None:
        y = np.where(y == source.positive, 1.0, -1.0)
    return (X if source.scaled else sp.csr_matrix(minmax_scale(X.toarray(), (-1, 1)))), y


def _keep(name: str, X: sp.csr_matrix, y: np.ndarray) -> Path:
    text = io.BytesIO()
    dump_svmlight_file(X, y, text, zero_based=False)
    path = cache() / f"{name}.bz2"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")  # a torn download must never look like a data set
    partial.write_bytes(bz2.compress(text.getvalue()))
    partial.replace(path)
    return path
