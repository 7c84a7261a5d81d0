# SPDX-License-Identifier: BSD-3-Clause
"""Kernel matrices whose entries are computed by PyTorch, on a GPU or any other device: bcd.gram with ``device=...``.

Rows live on the device in float32 (float64 after `raise_precision`), dense or as CSR where the host would choose
sparse rows. A product goes through tiles of bounded size; their sums over the columns are float64 and stay on
the device until the product is complete, so that per product only an index, a step and n sums travel.

Nothing is kept between products: on a GPU an entry costs less to compute than memory for it is worth, so
``cache_size`` and ``keep`` do nothing here.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from bcd.gram import _SLAB, _WIDE, Gram, Kernel, _DotRows, _sparse_is_cheaper

try:
    import torch
except ImportError:  # said when a device is asked for
    torch = None  # type: ignore[assignment]

__all__ = ["TorchGram", "torch_product"]

Array = np.ndarray
_MEMORY = (
    1 << 28
)  # bytes on the device beside the data: half for a tile and its float64 copy, half for columns and rows
_TILE = _MEMORY // 32  # entries of a tile: 4 bytes each, or 8, and 8 for the copy
_COLUMNS = 4096  # of a tile, where their rows are short


def _device(name: Any) -> Any:
    """The torch device of that name; ValueError where it cannot be used."""
    if torch is None:
        raise ValueError(
            f"device={str(name)!r} needs PyTorch, which is not installed: pip install torch (see pytorch.org for GPU "
            "builds), or leave device=None"
        )
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be a device of PyTorch such as "cpu" or "cuda"; found {name!r}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise ValueError(
            f"device={str(name)!r}, but PyTorch {torch.__version__} ({build}) sees no CUDA device here; "
            'use device="cpu" or device=None'
        )
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu().numpy()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device={str(name)!r} cannot be used for float64 sums here: {error}") from error
    _silence_beta_notice()
    return device


@functools.cache
def _silence_beta_notice() -> None:
    """Make a CSR tensor: torch says once a process that they are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.ones(1, dtype=torch.int64)
        torch.sparse_csr_tensor(one.cumsum(0).new_tensor([0, 1]), one - 1, one.double(), (1, 1), check_invariants=False)


class _FullPrecision:
    """While anybody is inside, matrix products of float32 are float32 (not TF32 or bfloat16, a setting of torch)."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: list[Any] = []

    @staticmethod
    def _settings() -> list[tuple[Any, str, Any]]:
        backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        if all(hasattr(backend, "fp32_precision") for backend in backends):
            return [(backend, "fp32_precision", "ieee") for backend in backends]
        return [(backends[0], "allow_tf32", False)]  # torch before 2.9

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = [getattr(backend, name) for backend, name, _ in self._settings()]
                for backend, name, value in self._settings():
                    setattr(backend, name, value)

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for (backend, name, _), value in zip(self._settings(), self.before, strict=True):
                    setattr(backend, name, value)


_full_precision = _FullPrecision()


def _tensor(array: Array, device: Any) -> Any:
    """The array on the device; one on the host is shared where torch can, which it cannot with read-only memory."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _runs(n: int, length: int) -> Iterator[tuple[int, int]]:
    for lo in range(0, n, length):
        yield lo, min(n, lo + length)


def _slab(d: int) -> int:
    """Rows of d features that are made dense or float64 at a time."""
    return min(_SLAB, max(1, _MEMORY // (32 * max(1, d))))


# -- rows of data ---------------------------------------------------------------------------------


class _DeviceRows:
    """Rows x_i on the device, and tiles of their entries; what :class:`bcd.gram._Rows` is on the host.

    ``source`` are all rows as given, on the host, and ``number`` those that these are, for copies in another
    precision and, of sparse rows, for columns. ``X`` is a dense tensor, or the three arrays of a CSR matrix.
    """

    cost = 0.0  # nanoseconds an entry takes one core: none

    def __init__(
        self,
        source: Any,
        number: Array,
        kernel: Kernel,
        dtype: Any,
        device: Any,
        centre: Array | None = None,
        sparse: bool | None = None,
    ):
        self.source, self.number, self.kernel, self.device = source, number, kernel, device
        self.n, self.d, self.dtype = len(number), source.shape[1], np.dtype(dtype)
        self.sparse = sp.issparse(source) and (_sparse_is_cheaper(source) if sparse is None else sparse)
        self.centre = centre
        if centre is None and not self.sparse and kernel.name == "rbf":
            self.centre = np.asarray(source.mean(axis=0, dtype=np.float64)).ravel()
        self.shift = torch.zeros(self.n, dtype=self._real, device=device)  # rbf: -gamma |x|^2
        self.diagonal = np.ones(self.n)
        self.X: Any = self._upload_sparse() if self.sparse else self._upload_dense()

    @property
    def _real(self) -> Any:
        return torch.float32 if self.dtype == np.float32 else torch.float64

    def _host(self, lo: int, hi: int) -> _DotRows:
        """Some rows made ready on the host: centred, scaled to length 1 or as they are, with their norms."""
        kernel = Kernel("linear") if self.kernel.name == "laplacian" else self.kernel
        rows = _DotRows(self.source[self.number[lo:hi]], kernel, self.dtype, self.centre, self.sparse)
        if self.kernel.name != "laplacian":
            self.shift[lo:hi] = _tensor(rows.shift, self.device)
            self.diagonal[lo:hi] = rows.diagonal()
        return rows

    def _upload_dense(self) -> Any:
        X = torch.empty((self.n, self.d), dtype=self._real, device=self.device)
        for lo, hi in _runs(self.n, _slab(self.d)):
            X[lo:hi] = _tensor(self._host(lo, hi).rows, self.device)
        return X

    def _upload_sparse(self) -> tuple[Any, Any, Any]:
        X = self._host(0, self.n).rows
        index = np.int32 if max(X.nnz, self.d) < 2**31 else np.int64  # torch wants one type for both
        parts = X.indptr.astype(index), X.indices.astype(index, copy=False), X.data
        return tuple(_tensor(part, self.device) for part in parts)

    def take(self, index: Array, dtype: Any = None) -> _DeviceRows:
        """Some of the rows, perhaps in another precision."""
        if self.sparse or (dtype is not None and np.dtype(dtype) != self.dtype):
            fixed = (self.kernel, dtype or self.dtype, self.device, self.centre, self.sparse)
            return _DeviceRows(self.source, self.number[index], *fixed)
        part = object.__new__(_DeviceRows)
        part.__dict__.update(self.__dict__)
        where = _tensor(index, self.device)
        part.X, part.shift = self.X[where], self.shift[where]
        part.n, part.number, part.diagonal = len(index), self.number[index], self.diagonal[index]
        return part

    def like(self, X: Any) -> _DeviceRows:
        """Other data with the same shift and precision."""
        sparse = None if self.centre is None else False
        # sparse columns have no centre, and then dense rows must not get one of their own
        centre = np.zeros(self.d) if self.centre is None and self.kernel.name == "rbf" else self.centre
        if self.centre is None and sp.issparse(X):
            centre, sparse = None, True
        return _DeviceRows(X, np.arange(X.shape[0]), self.kernel, self.dtype, self.device, centre, sparse)

    def rows(self, lo: int, hi: int) -> Any:
        """Rows lo .. hi, dense or a CSR tensor."""
        if not self.sparse:
            return self.X[lo:hi]
        indptr, indices, data = self.X
        a, b = int(indptr[lo]), int(indptr[hi])
        parts = (indptr[lo : hi + 1] - a, indices[a:b], data[a:b])
        return torch.sparse_csr_tensor(*parts, size=(hi - lo, self.d), check_invariants=False)

    def dense(self, lo: int, hi: int) -> Any:
        """Rows lo .. hi, dense."""
        rows = self.rows(lo, hi)
        return rows.to_dense() if self.sparse else rows

    def tile(self, lo: int, hi: int, columns: _DeviceRows, Z: Any) -> Any:
        """Entries of rows lo .. hi with ``columns``, whose dense rows are Z; shape (hi - lo, columns.n)."""
        kernel = self.kernel
        if kernel.name == "laplacian":
            return torch.cdist(self.dense(lo, hi), Z, p=1).mul_(-kernel.gamma).exp_()
        K = self.rows(lo, hi) @ Z.T
        if kernel.name == "rbf":
            return K.mul_(2 * kernel.gamma).add_(self.shift[lo:hi, None]).add_(columns.shift).clamp_(max=0).exp_()
        if kernel.name in ("poly", "sigmoid"):
            K.mul_(kernel.gamma).add_(kernel.coef0)
            return K.tanh_() if kernel.name == "sigmoid" else K.pow_(kernel.degree)
        return K

    def _is_wide(self, columns: _DeviceRows) -> bool:
        return self.sparse and columns.sparse and self.d > _WIDE and self.kernel.name != "laplacian"

    def _chunk(self, columns: _DeviceRows) -> int:
        """Columns of a tile, such that they fit when they are dense."""
        room = _MEMORY // (4 * self.dtype.itemsize)
        if self._is_wide(columns):  # over the features of the chunk itself
            return min(_COLUMNS, max(1, math.isqrt(room // max(1, len(columns.X[1]) // max(1, columns.n)))))
        return min(_COLUMNS, max(1, room // max(1, self.d)))

    def _common_features(self, columns: _DeviceRows) -> tuple[_DeviceRows, _DeviceRows]:
        """Both over the features that the columns have; what only rows have adds nothing to an inner product."""
        indptr, indices, data = self.X
        features, place = torch.unique(columns.X[1], return_inverse=True)
        if len(features) == 0:
            features = torch.zeros(1, dtype=indices.dtype, device=self.device)
        where = torch.searchsorted(features, indices).clamp_(max=len(features) - 1)
        data = torch.where(features[where] == indices, data, 0.0)
        rows, ready = object.__new__(_DeviceRows), object.__new__(_DeviceRows)
        rows.__dict__.update(self.__dict__, X=(indptr, where.to(indices.dtype), data), d=len(features))
        parts = (columns.X[0], place.to(indices.dtype), columns.X[2])
        ready.__dict__.update(columns.__dict__, X=parts, d=len(features))
        return rows, ready

    def tiles(self, columns: _DeviceRows, index: Array) -> Iterator[tuple[int, int, int, Any]]:
        """All rows with the columns ``index``: (lo, hi, first column, tile)."""
        chunk = self._chunk(columns)
        for a in range(0, len(index), chunk):
            ready = columns.take(index[a : a + chunk], self.dtype)
            rows, ready = self._common_features(ready) if self._is_wide(columns) else (self, ready)
            Z = ready.dense(0, ready.n)
            length = max(1, _TILE // ready.n)
            if self.sparse and self.kernel.name == "laplacian":  # whose tiles make rows dense
                length = min(length, _slab(self.d))
            for lo, hi in _runs(self.n, length):
                yield lo, hi, a, rows.tile(lo, hi, ready, Z)

    def product(self, columns: _DeviceRows, index: Array, step: Array) -> Array:
        """``K[:, index] step`` for step of shape (k, r), summed in float64; shape (n, r)."""
        by = _tensor(np.asarray(step, np.float64), self.device)
        total = torch.zeros((self.n, by.shape[1]), dtype=torch.float64, device=self.device)
        with _full_precision:
            for lo, hi, a, tile in self.tiles(columns, index):
                total[lo:hi] += tile.double() @ by[a : a + tile.shape[1]]
        return total.cpu().numpy()

    def weights(self, step: Array) -> Any:
        """``X' step``, shape (d,), float64 as these rows must be."""
        by = _tensor(step, self.device)
        if not self.sparse:
            return by @ self.X
        indptr, indices, data = self.X
        spread = data * torch.repeat_interleave(by, indptr.diff())
        return torch.zeros(self.d, dtype=torch.float64, device=self.device).index_add_(0, indices, spread)


class _Matrix:
    """A precomputed symmetric matrix on the device."""

    cost = 0.0

    def __init__(self, X: Any, device: Any):
        self.device, self.n = device, X.shape[0]
        self.K = torch.empty(X.shape, dtype=torch.float32 if X.dtype == np.float32 else torch.float64, device=device)
        for lo, hi in _runs(self.n, _slab(self.n)):
            self.K[lo:hi] = _tensor(X[lo:hi], device)

    def product(self, index: Array, step: Array) -> Array:
        """``K[:, index] step``, summed in float64."""
        where, by = _tensor(index, self.device), _tensor(step, self.device)
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        for a, b in _runs(len(index), max(1, _TILE // self.n)):
            total += by[a:b] @ self.K[where[a:b]].double()
        return total.cpu().numpy()

    def block(self, index: Array) -> Array:
        """Rows and columns ``index``."""
        where = _tensor(index, self.device)
        return self.K[where[:, None], where].cpu().numpy()


# -- the matrix -----------------------------------------------------------------------------------


class TorchGram(Gram):
    """A :class:`bcd.gram.Gram` whose entries a device of PyTorch computes; made by ``Gram(..., device=...)``.

    Products go to the device and come back as NumPy. No columns are kept: ``cache_size`` and ``keep`` have no
    effect, and neither has ``threads`` (those of ``device="cpu"`` are torch's own). Callable kernels are refused.
    A precomputed matrix is copied to the device.

    Examples
    --------
    >>> gram = Gram(np.eye(3), Kernel("linear"), device="cpu")
    >>> out = np.zeros(3)
    >>> gram.add_product(out, np.array([0, 2]), np.array([1.0, -2.0]))
    >>> out
    array([ 1.,  0., -2.])
    """

    rows: Any

    def _start(self, X: Any, dtype: Any, device: Any) -> None:
        where = _device(device)
        if self.kernel.function is not None:
            raise ValueError(
                f"a callable kernel cannot be computed on a device; found device={str(device)!r}: leave device=None, "
                "or pass the matrix itself with kernel='precomputed'"
            )
        if self.precomputed:
            self.rows = _Matrix(X, where)
            self.dtype, self.diagonal = X.dtype, X.diagonal().astype(np.float64)
            return
        self.rows = _DeviceRows(X, np.arange(self.n), self.kernel, dtype, where)
        self.dtype, self.diagonal = self.rows.dtype, self.rows.diagonal

    def restrict(self, index: Array) -> TorchGram:
        """The matrix of some of the rows."""
        part = object.__new__(TorchGram)
        part.__dict__.update(self.__dict__)
        part.n = len(index)
        part.rows, part.diagonal = self.rows.take(index), self.diagonal[index]
        return part

    def raise_precision(self) -> None:
        """Compute float64 entries from now on."""
        self.rows = self.rows.take(np.arange(self.n), np.float64)
        self.dtype, self.exact = self.rows.dtype, True

    def block(self, index: Array, dtype: Any = None) -> Array:
        """Rows and columns ``index``, shape (q, q); the diagonal is exact."""
        dtype = np.dtype(dtype or self.dtype)
        if self.precomputed:
            K = self.rows.block(index).astype(dtype, copy=False)
        else:
            K = np.empty((len(index), len(index)), dtype)
            rows = self.rows.take(index, dtype)
            with _full_precision:
                for lo, hi, a, tile in rows.tiles(rows, np.arange(len(index))):
                    K[lo:hi, a : a + tile.shape[1]] = tile.cpu().numpy()
            self.counter += K.size
        np.fill_diagonal(K, self.diagonal[index])
        return K

    def add_product(self, out: Array, index: Array, step: Array, keep: Array | None = None) -> None:
        """``out += K[:, index] step``; ``keep`` is for the host's cache."""
        if len(index) == 0:
            return
        if self.precomputed:
            out += self.rows.product(index, step)
        elif self.through_weights:
            w = self.rows.take(index).weights(step)
            for lo, hi in _runs(self.n, _TILE):
                out[lo:hi] += (self.rows.rows(lo, hi) @ w[:, None])[:, 0].cpu().numpy()
            self.counter += self.n
        else:
            out += self.rows.product(self.rows, index, step[:, None])[:, 0]
            self.counter += self.n * len(index)

    def sizes(self) -> Array:
        """What the rounding of a row's entries grows with: gamma |x|^2 (rbf), else k(x, x)."""
        return -self.rows.shift.cpu().numpy() if self.kernel.name == "rbf" else np.abs(self.diagonal)

    def exact_product(self, index: Array, step: Array, rows: Array | slice = slice(None)) -> Array:
        """``K[rows, index] step`` with float64 entries, computed anew; shape (len(rows),)."""
        if self.precomputed or self.through_weights:
            return super().exact_product(index, step, rows)
        number = np.arange(self.n)[rows]
        out = np.zeros(len(number))
        for lo, hi in _runs(len(number), _slab(self.rows.d)):
            part = self.rows.take(number[lo:hi], np.float64)
            out[lo:hi] = part.product(self.rows, index, step[:, None])[:, 0]
        return out


def torch_product(X: Any, Z: Any, kernel: Kernel, coef: Array, device: Any, dtype: Any) -> Array:
    """``K(X, Z) coef`` with entries computed on a device of PyTorch; see :func:`bcd.gram.kernel_product`.

    Parameters
    ----------
    X, Z : array of float32 or float64, or scipy CSR, shapes (m, d) and (k, d)
    kernel : Kernel
        By name, not precomputed.
    coef : ndarray of float64, shape (k, r)
    device : str or torch.device
    dtype : dtype
        Of the entries, float32 or float64.

    Returns
    -------
    ndarray of float64, shape (m, r)

    Raises
    ------
    ValueError
        No PyTorch, no such device, or a callable kernel.
    """
    where = _device(device)
    if kernel.function is not None:
        raise ValueError(f"a callable kernel cannot be computed on a device; found device={str(device)!r}")
    out = np.zeros((X.shape[0], coef.shape[1]))
    if 0 in out.shape or 0 in coef.shape:
        return out
    columns = _DeviceRows(Z, np.arange(Z.shape[0]), kernel, dtype, where)
    for lo, hi in _runs(X.shape[0], _slab(X.shape[1])):
        out[lo:hi] = columns.like(X[lo:hi]).product(columns, columns.number, coef)
    return out
