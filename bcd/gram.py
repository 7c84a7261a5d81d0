# SPDX-License-Identifier: BSD-3-Clause
"""Kernel matrices K_ij = k(x_i, x_j) of n rows, read by columns and stored whole only where that is little.

What a solver asks of one is three functions: the diagonal, a square block, and the product with a sparse
vector, ``out += K[:, index] step``. The product goes over the rows in tiles: inner products (one BLAS call or
one pass over sparse rows), the kernel's elementwise part and the multiplication with the step all happen
while a tile is in the second-level cache, one thread a tile; an entry reaches main memory only where its
column is kept for later, in an arena of fixed size whose least recently used columns give way.

Entries are float32 by default, sums of them float64; `exact_product` and a raised precision compute them in
float64.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from bcd import _tiles

__all__ = ["KERNELS", "Expansion", "Gram", "Kernel", "kernel_diagonal", "kernel_product"]

Array = np.ndarray
KERNELS = ("linear", "rbf", "poly", "sigmoid", "laplacian", "cosine", "precomputed")
_CHUNK = 512  # columns of a tile
_WEIGHTS = 1 << 24  # features up to which a linear kernel goes through a dense vector of weights
_CHUNK_BYTES = 1 << 21  # of the columns of a tile, made ready: they are read once for every run of rows
_READY_BYTES = 1 << 26  # of columns that an expansion keeps ready
_TILE_BYTES = 1 << 19  # half of a usual second-level cache
_SQUARE = 64  # rows at a time for the diagonal of a callable kernel
# a matrix of at most so many rows is computed at once if it costs one core at most so much, in float64 if less
_SMALL, _SMALL_NS, _TINY_NS = 2048, 1.5e7, 2e6
_SLAB, _SLAB_BYTES = 1 << 14, 1 << 26  # rows converted at a time, and what they may take
_WIDE = 1 << 16  # features beyond which only those that a chunk of columns has are looked at
_INLINE = 1 << 15  # entries for which waking a second thread does not pay
# nanoseconds of one core: a term of a dense inner product, of a sparse one, an entry that is dear
_DENSE_NS, _SPARSE_NS, _DEAR_NS = 0.022, 0.036, 3.0


@dataclass(frozen=True)
class Kernel:
    """A kernel function k(x, z).

    Parameters
    ----------
    name : str
        linear ``x'z``; rbf ``exp(-gamma |x - z|^2)``; poly ``(gamma x'z + coef0)^degree``; sigmoid
        ``tanh(gamma x'z + coef0)``; laplacian ``exp(-gamma |x - z|_1)``; cosine ``x'z / (|x| |z|)``;
        precomputed: the data are the kernel matrix.
    gamma, degree, coef0 : float
    function : callable, optional
        ``function(X, Z)`` returns the matrix of k(x_i, z_j); overrides the name.

    Examples
    --------
    >>> Kernel("rbf", gamma=0.5)(np.zeros((1, 2)), np.ones((2, 2))).round(4)
    array([[0.3679, 0.3679]])
    """

    name: str = "rbf"
    gamma: float = 1.0
    degree: float = 3
    coef0: float = 0.0
    function: Callable[[Any, Any], Array] | None = None

    def __post_init__(self) -> None:
        if self.name not in KERNELS and self.function is None:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)} or a callable; found {self.name!r}")

    def __call__(self, X: Any, Z: Any) -> Array:
        """The matrix k(x_i, z_j), shape (len(X), len(Z)), float64."""
        return kernel_product(X, Z, self, np.eye(Z.shape[0]))


# -- rows of data ---------------------------------------------------------------------------------


class _Rows:
    """Rows x_i in one precision, and tiles of their entries with columns made of other rows.

    A copy of the data is made where precision or layout differ from what was given.
    """

    cost = 1e3  # nanoseconds an entry takes one core, roughly

    def __init__(self, X: Any, kernel: Kernel, dtype: Any):
        self.given, self.kernel, self.dtype = X, kernel, np.dtype(dtype)
        self.picked: Any = None  # rows of what was given; None: all
        self.n, self.d = X.shape[0], (X.shape[1] if X.ndim > 1 else 1)

    @property
    def source(self) -> Any:
        """These rows in the data as given."""
        return self.given if self.picked is None else self.given[self.picked]

    def take(self, index: Any, dtype: Any = None) -> _Rows:
        """Some of the rows (an index array or a slice), perhaps in another precision."""
        return type(self)(self.source[index], self.kernel, dtype or self.dtype)

    def columns(self, other: _Rows) -> _Columns:
        """The rows of ``other`` made ready to be columns of tiles."""
        return _Columns(other.source, other.n)

    def tile(self, lo: int, hi: int, columns: _Columns) -> Array:
        """Entries of rows lo .. hi; valid until the thread's next tile. Columns beyond ``count`` are padding."""
        made: Any = self.kernel.function(self.source[lo:hi], columns.data)  # type: ignore[misc]
        K = np.asarray(made.toarray() if sp.issparse(made) else made)
        if K.shape != (hi - lo, columns.count):
            raise ValueError(
                f"a callable kernel must return the matrix of shape (len(X), len(Z)) = ({hi - lo}, {columns.count}); "
                f"found shape {K.shape}"
            )
        return np.ascontiguousarray(K, dtype=self.dtype)

    def like(self, X: Any) -> _Rows:
        """Other data in the same form and precision."""
        return type(self)(X, self.kernel, self.dtype)

    def sizes(self) -> Array:
        """What the rounding of a row's entries grows with."""
        return np.abs(self.diagonal())

    def diagonal(self) -> Array:
        """k(x_i, x_i) in float64."""
        out = np.empty(self.n)
        for a in range(0, self.n, _SQUARE):  # the diagonals of squares along the diagonal
            part = self.take(slice(a, a + _SQUARE))
            out[a : a + _SQUARE] = part.tile(0, part.n, self.columns(part)).diagonal()
        return out


@dataclass
class _Columns:
    """Columns made ready for tiles, their number, padded width and shift; rows to go with them if others are needed."""

    data: Any
    count: int
    width: int = 0
    shift: Array | None = None
    rows: Any = None


class _DotRows(_Rows):
    """Kernels of inner products, dense rows or sparse ones, whichever make an entry cheaper.

    rbf: the exponent is ``2 gamma x'z - gamma |x|^2 - gamma |z|^2``. Dense rows are shifted by ``centre``, which
    leaves distances as they are and shrinks the norms, and with them the rounding.
    """

    def __init__(self, X: Any, kernel: Kernel, dtype: Any, centre: Array | None = None, sparse: bool | None = None):
        super().__init__(X, kernel, dtype)
        self.sparse = bool(sp.issparse(X) and (_sparse_is_cheaper(X) if sparse is None else sparse))
        self.centre = centre if not self.sparse else None
        if centre is None and not self.sparse and kernel.name == "rbf":
            self.centre = np.asarray(X.mean(axis=0, dtype=np.float64)).ravel()
        self.rows: Any = self._sparse_rows(X) if self.sparse else self._dense_rows(X)
        norms = _square_norms(self.rows) if kernel.name == "rbf" else np.zeros(self.n)
        self.shift = (-kernel.gamma * norms).astype(self.dtype)
        terms = X.nnz / max(1, self.n) * _SPARSE_NS if self.sparse else self.d * _DENSE_NS
        self.cost = terms * (self.dtype.itemsize / 4) + 0.4

    def _sparse_rows(self, X: Any) -> Any:
        data = X.data / np.repeat(_lengths(X), np.diff(X.indptr)) if self.kernel.name == "cosine" else X.data
        index = np.int32 if self.d < 2**31 else np.int64
        parts = (data.astype(self.dtype, copy=False), X.indices.astype(index, copy=False))
        return sp.csr_array((*parts, X.indptr.astype(np.int64, copy=False)), shape=X.shape)

    def _dense_rows(self, X: Any) -> Array:
        X = X.toarray() if sp.issparse(X) else X
        if self.kernel.name == "cosine":
            X = X / _lengths(X)[:, None]
        if self.centre is not None:
            return np.subtract(X, self.centre, out=np.empty(X.shape, self.dtype), dtype=np.float64, casting="same_kind")
        return np.ascontiguousarray(X, dtype=self.dtype)

    def take(self, index: Any, dtype: Any = None) -> _DotRows:
        """Some of the rows (an index array or a slice), perhaps in another precision."""
        if dtype is not None and dtype != self.dtype:
            return _DotRows(self.source[index], self.kernel, dtype, self.centre, self.sparse)
        part: _DotRows = object.__new__(_DotRows)
        part.__dict__.update(self.__dict__)
        part.rows, part.shift = self.rows[index], self.shift[index]
        part.n, part.picked = part.rows.shape[0], (np.arange(self.n) if self.picked is None else self.picked)[index]
        return part

    def like(self, X: Any) -> _DotRows:
        """Other data in the same form and precision, with the same shift."""
        X = sp.csr_array(X) if self.sparse else X
        return _DotRows(X, self.kernel, self.dtype, np.zeros(1) if self.centre is None else self.centre, self.sparse)

    def columns(self, other: _DotRows) -> _Columns:  # type: ignore[override]
        """Columns scaled by 2 gamma (rbf); panels for sparse rows, turned for dense ones."""
        scale = self.dtype.type(2 * self.kernel.gamma if self.kernel.name == "rbf" else 1)
        X, Z = None, other.rows
        if self.sparse and self.d > _WIDE:
            X, Z = _common_features(self.rows, Z)
        if not self.sparse:
            Z = (Z.toarray() if sp.issparse(Z) else Z).T * scale
            return _Columns(np.ascontiguousarray(Z), other.n, other.n, other.shift)
        Z = Z if sp.issparse(Z) else sp.csr_array(Z)
        panels = np.zeros((-(-other.n // _tiles.PANEL), Z.shape[1], _tiles.PANEL), self.dtype)
        _tiles.fill_panels(Z.data, Z.indices, Z.indptr, scale, panels)
        shift = np.zeros(len(panels) * _tiles.PANEL, self.dtype)
        shift[: other.n] = other.shift
        return _Columns(panels, other.n, len(shift), shift, X)

    def tile(self, lo: int, hi: int, columns: _Columns) -> Array:
        """Inner products, then the kernel's elementwise part."""
        out, powers = _scratch.get(hi - lo, columns.width, self.dtype)
        if self.sparse:
            X = self.rows if columns.rows is None else columns.rows
            _tiles.sparse_dots(X.data, X.indices, X.indptr, lo, columns.data, out)
        else:
            np.matmul(self.rows[lo:hi], columns.data, out=out)
        self._finish(out, self.shift[lo:hi], columns.shift, powers)
        return out

    def _finish(self, tile: Array, row_shift: Array, column_shift: Any, powers: Array) -> None:
        """Turn inner products into entries, in place."""
        kernel, real = self.kernel, tile.dtype.type
        if kernel.name == "rbf":
            exp = _tiles.exp_shifted if tile.dtype == np.float32 else _tiles.exp_shifted64
            exp(tile, row_shift, column_shift, powers)
        elif kernel.name in ("poly", "sigmoid"):
            tile *= real(kernel.gamma)
            tile += real(kernel.coef0)
            if kernel.name == "sigmoid":
                np.tanh(tile, out=tile)
            else:
                np.power(tile, real(kernel.degree), out=tile)

    def sizes(self) -> Array:
        """Squared norms of the rows, as they are stored."""
        return _square_norms(self.rows)

    def diagonal(self) -> Array:
        """k(x_i, x_i) in float64."""
        if self.kernel.name == "rbf":
            return np.ones(self.n)
        norms = _square_norms(
            self.source
        )  # of the rows as given: rounded ones would leave their mark in float64 blocks
        values = (norms > 0).astype(np.float64)[:, None] if self.kernel.name == "cosine" else norms[:, None]
        self._finish(values, values[:, 0], values[:, 0], values.view(np.int64))
        return values[:, 0].copy()


class _LaplacianRows(_Rows):
    """exp(-gamma |x - z|_1); a tile's rows are made dense."""

    def __init__(self, X: Any, kernel: Kernel, dtype: Any):
        super().__init__(X, kernel, dtype)
        self.cost = 0.15 * self.d

    def _dense(self, X: Any) -> Array:
        return np.ascontiguousarray(X.toarray() if sp.issparse(X) else X, dtype=self.dtype)

    def columns(self, other: _Rows) -> _Columns:
        """Dense columns, turned."""
        return _Columns(np.ascontiguousarray(self._dense(other.source).T), other.n, other.n)

    def tile(self, lo: int, hi: int, columns: _Columns) -> Array:
        """Distances, scaled and exponentiated."""
        out, _ = _scratch.get(hi - lo, columns.width, self.dtype)
        _tiles.manhattan(self._dense(self.source[lo:hi]), columns.data, out)
        out *= self.dtype.type(self.kernel.gamma)
        return np.exp(out, out=out)

    def diagonal(self) -> Array:
        """Ones."""
        return np.ones(self.n)

    def sizes(self) -> Array:
        """Sums of absolute values."""
        return np.asarray(abs(self.source).sum(axis=1), np.float64).ravel()


def _copied_bytes(rows: Any, X: Any) -> int:
    """Memory of rows that is not memory of X."""
    mine, given = (A.data if sp.issparse(A) else A for A in (rows, X))
    return 0 if np.may_share_memory(mine, given) else mine.nbytes


def _slab(d: int) -> int:
    """Rows to be converted at a time."""
    return int(min(_SLAB, max(64, _SLAB_BYTES // (8 * max(1, d)))))


def _make_rows(X: Any, kernel: Kernel, dtype: Any) -> _Rows:
    if kernel.function is not None:
        return _Rows(X, kernel, np.float64)
    if kernel.name == "laplacian":
        return _LaplacianRows(X, kernel, dtype)
    return _DotRows(X, kernel, dtype)


def _sparse_is_cheaper(X: Any) -> bool:
    """Whether products of sparse rows cost less than dense ones, or dense rows would not fit beside them."""
    entries, stored = X.shape[0] * X.shape[1], max(1, X.nnz)
    return entries > 8 * stored + (1 << 24) or stored * _SPARSE_NS < entries * _DENSE_NS


def _common_features(X: Any, Z: Any) -> tuple[Any, Any]:
    """Sparse rows over the features that Z has, so that rows of Z can be made dense; those of X alone become 0."""
    Z = sp.csr_array(Z)
    features, place = np.unique(Z.indices, return_inverse=True)
    if len(features) == 0:
        features = np.zeros(1, X.indices.dtype)
    Z = sp.csr_array((Z.data, place.ravel(), Z.indptr), shape=(Z.shape[0], len(features)))
    place = np.minimum(np.searchsorted(features, X.indices), len(features) - 1)
    data = np.where(features[place] == X.indices, X.data, X.data.dtype.type(0))
    rows = sp.csr_array((data, place.astype(X.indices.dtype), X.indptr), shape=(X.shape[0], len(features)))
    return rows, Z


def _square_norms(X: Any) -> Array:
    if sp.issparse(X):
        squares = sp.csr_array((X.data.astype(np.float64) ** 2, X.indices, X.indptr), shape=X.shape)
        return np.asarray(squares.sum(axis=1)).ravel()
    return np.einsum("ij,ij->i", X, X, dtype=np.float64)


def _lengths(X: Any) -> Array:
    """Euclidean norms; 1 for a row of zeros."""
    norm = np.sqrt(_square_norms(X))
    return np.where(norm > 0, norm, 1.0)


class _Scratch(threading.local):
    """Buffers of a thread, reused from tile to tile and from fit to fit."""

    def __init__(self) -> None:
        self.memory = np.empty((2, 0), np.uint8)

    def get(self, rows: int, columns: int, dtype: np.dtype) -> tuple[Array, Array]:
        """A tile, and integer work space of its shape and item size."""
        size = rows * columns * dtype.itemsize
        if self.memory.shape[1] < size:
            self.memory = np.empty((2, size), np.uint8)
        tile, powers = self.memory[0, :size], self.memory[1, :size]
        integer = np.int32 if dtype.itemsize == 4 else np.int64
        return tile.view(dtype).reshape(rows, columns), powers.view(integer).reshape(rows, columns)


_scratch = _Scratch()


# -- threads --------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may use: its affinity, or less if NUMBA_NUM_THREADS or OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("NUMBA_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return max(1, min(cores, int(told))) if told.isdigit() else cores


class _BlasLimit:
    """While anybody is inside, every BLAS call of the process runs in the thread that makes it.

    Threads enter and leave in any order; the first sets the limit and the last takes it back.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.controller: Any = None
        self.limiter: Any = None

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                from threadpoolctl import ThreadpoolController

                if self.controller is None:
                    self.controller = ThreadpoolController().select(user_api="blas")
                self.limiter = self.controller.limit(limits=1)

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.limiter is not None:
                self._let_any_thread_set_limits()  # the last to leave need not be the first who came
                self.limiter.restore_original_limits()
                self._let_any_thread_set_limits()

    def _let_any_thread_set_limits(self) -> None:
        """Threadpoolctl since 3.7 heeds only the first thread that sets a limit, until told otherwise."""
        for library in self.controller.lib_controllers:
            if hasattr(library, "clear_controlling_thread"):
                library.clear_controlling_thread(force=True)


single_threaded_blas = _BlasLimit()


class Team:
    """Threads that share the runs of rows of one product; the caller is one of them."""

    def __init__(self, threads: int | None = None):
        self.threads = threads or usable_cores()
        self.pool: ThreadPoolExecutor | None = None

    def run(self, job: Callable[[int, int], None], n: int, length: int, entries: int) -> None:
        """Call ``job(lo, hi)`` for runs of ``length`` rows that together cover n."""
        helpers = min(self.threads, -(-n // length), 1 + entries // _INLINE) - 1
        turn = itertools.count()

        def work() -> None:
            while (lo := next(turn) * length) < n:
                job(lo, min(n, lo + length))

        if helpers > 0 and self.pool is None:
            self.pool = ThreadPoolExecutor(self.threads - 1)
        futures = [self.pool.submit(work) for _ in range(helpers)] if self.pool and helpers > 0 else []
        work()
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


# -- columns kept for later -----------------------------------------------------------------------


class _Cache:
    """Columns in an arena of fixed size.

    Dear ones are kept at once, and the least recently used give way. Cheap ones, which cost about as much to
    keep as to compute, are kept when they are wanted again and only while there is room.
    """

    def __init__(self, n: int, dtype: np.dtype, memory: Array, dear: bool):
        self.dear, self.seen = dear, np.zeros(n, bool)
        self.slots = int(min(n, len(memory) // (n * dtype.itemsize)))
        self.arena = memory[: self.slots * n * dtype.itemsize].view(dtype).reshape(self.slots, n)
        self.slot = np.full(n, -1)  # of a column
        self.owner = np.full(self.slots, -1)  # of a slot
        self.used = np.zeros(self.slots, np.int64)  # when a slot was last read
        self.clock = self.filled = 0

    def find(self, index: Array) -> Array:
        """Slots of some columns, -1 where a column is not kept."""
        slot = self.slot[index]
        self.clock += 1
        self.used[slot[slot >= 0]] = self.clock
        return slot

    def worthy(self, index: Array) -> Array:
        """Which of some new columns should be kept."""
        before = self.seen[index]
        self.seen[index] = True
        return before | self.dear

    def make_room(self, index: Array) -> Array:
        """Slots for new columns, as many as can be had: never one that the present product reads."""
        fresh = np.arange(self.filled, min(self.slots, self.filled + len(index)))
        self.filled += len(fresh)
        wanted = len(index) - len(fresh) if self.dear else 0
        old = np.flatnonzero(self.used[: self.filled - len(fresh)] < self.clock)
        if 0 < wanted < len(old):
            old = old[np.argpartition(self.used[old], wanted)]
        slots = np.concatenate([fresh, old[: max(0, wanted)]])
        gone = self.owner[slots]
        self.slot[gone[gone >= 0]] = -1
        taken = index[: len(slots)]
        self.owner[slots], self.slot[taken], self.used[slots] = taken, slots, self.clock
        return slots


class _Whole:
    """A precomputed matrix, as a cache that keeps every column."""

    slots = 0

    def __init__(self, matrix: Array):
        self.arena = matrix

    def find(self, index: Array) -> Array:
        """Every column is its own slot."""
        return index


# -- the matrix -----------------------------------------------------------------------------------

Use = Callable[[int, int, int, Array], None]  # (lo, hi, first column of the chunk, tile)
Chunk = tuple[int, _Columns]  # number of its first column, and the columns made ready


def _chunks(rows: _Rows, columns: _Rows, index: Array | None = None) -> Iterator[Chunk]:
    """Columns (all of them, or those of ``index``) made ready for tiles with ``rows``, a chunk at a time."""
    fits = _CHUNK_BYTES // (min(max(1, rows.d), _WIDE) * rows.dtype.itemsize) // _tiles.PANEL * _tiles.PANEL
    size = min(_CHUNK, max(_tiles.PANEL, fits))
    for a in range(0, columns.n if index is None else len(index), size):
        chosen = slice(a, a + size) if index is None else index[a : a + size]
        yield a, rows.columns(columns.take(chosen, rows.dtype))


def _sweep(team: Team, rows: _Rows, chunks: Iterable[Chunk], use: Use) -> None:
    """Compute the tiles of all rows with every chunk of columns, and hand each to ``use``."""
    for a, ready in chunks:
        length = max(64, _TILE_BYTES // (max(1, ready.count) * rows.dtype.itemsize) // 16 * 16)

        def job(lo: int, hi: int, a: int = a, ready: _Columns = ready) -> None:
            use(lo, hi, a, rows.tile(lo, hi, ready)[:, : ready.count])

        team.run(job, rows.n, min(length, 2048), rows.n * ready.count)


class Gram:
    """The kernel matrix of n rows.

    Parameters
    ----------
    X : array of float32 or float64, shape (n, d), or scipy CSR
        Rows; for ``precomputed`` the symmetric matrix itself, shape (n, n), used in place.
    kernel : Kernel
    dtype : {"auto", "float64"}
        Of the entries. "auto" starts with float32 and lets the solver raise it. A precomputed matrix keeps its
        own; callables are float64.
    cache_size : float
        Megabytes (2^20 bytes) for columns that are kept.
    device : str, optional
        A torch device ("cpu", "cuda", ...) that computes the entries; default: compiled loops and NumPy.
    threads : int, optional
        Default: the cores that this process may use. Callables are called from one thread.

    Attributes
    ----------
    n : int
    diagonal : ndarray of float64, shape (n,)
    dtype : numpy.dtype
        Of the entries now.
    stored : bool
        Whether the whole matrix is in memory: it was given, or is small.
    exact : bool
        Whether entries are as exact as they get: float64, or precomputed.
    divisible : bool
        Whether the matrix of some of the rows is worth solving for by itself. Not where columns cost nothing
        (stored), nor where a product goes through the weights (linear and cosine: always float64).

    Examples
    --------
    >>> gram = Gram(np.eye(3), Kernel("linear"))
    >>> out = np.zeros(3)
    >>> gram.add_product(out, np.array([0, 2]), np.array([1.0, -2.0]))
    >>> out
    array([ 1.,  0., -2.])
    """

    def __new__(cls, *args: Any, device: str | None = None, **options: Any) -> Gram:
        """With a device, the class that computes there."""
        if device is not None and cls is Gram:
            from bcd.gram_torch import TorchGram

            return object.__new__(TorchGram)
        return object.__new__(cls)

    def __init__(
        self,
        X: Any,
        kernel: Kernel,
        *,
        dtype: str = "auto",
        cache_size: float = 200.0,
        device: str | None = None,
        threads: int | None = None,
    ):
        if dtype not in ("auto", "float64"):
            raise ValueError(f'dtype must be "auto" or "float64"; found {dtype!r}')
        self.kernel, self.n, self.cache_size = kernel, X.shape[0], cache_size
        self.counter = np.zeros(1, np.int64)  # of entries, one for a matrix and its parts
        self.precomputed = self.stored = kernel.function is None and kernel.name == "precomputed"
        self.team = Team(1 if kernel.function is not None else threads)
        self.through_weights = (
            kernel.function is None and kernel.name in ("linear", "cosine") and X.shape[1] <= _WEIGHTS
        )
        self.exact = dtype == "float64" or self.precomputed or self.through_weights or kernel.function is not None
        self.divisible = not (self.precomputed or self.through_weights or kernel.function is not None)
        self._start(X, np.float64 if self.exact else np.float32, device)

    def _start(self, X: Any, dtype: Any, device: str | None) -> None:
        if self.precomputed:
            self.cache: Any = _Whole(X)
            self.diagonal, self.dtype = X.diagonal().astype(np.float64), X.dtype
            return
        self.rows = _make_rows(sp.csr_array(X) if self._mostly_zeros(X) else X, self.kernel, dtype)
        self.dtype, self.diagonal = self.rows.dtype, self.rows.diagonal()
        # one arena for all columns, the last eighth for those of parts; its pages are touched only as columns arrive
        # a float32 copy of the data counts as cache, so that a fit adds no more than cache_size to the data
        copied = _copied_bytes(getattr(self.rows, "rows", X), X)
        budget = max(self.cache_size * 2**20 - copied, self.cache_size * 2**20 / 8)
        memory = np.empty(int(min(budget, self.n * (self.n + 1) * self.dtype.itemsize * 8 / 7)), np.uint8)
        cut = len(memory) - len(memory) // 8
        self.memory, self.reserve = memory[: cut // 64 * 64], memory[cut // 64 * 64 :]
        self.cache = _Cache(self.n, self.dtype, self.memory, self.dear)
        work = self.n * self.n * self.rows.cost
        entry = np.dtype(np.float64 if work <= _TINY_NS else dtype)
        fits = self.n * self.n * entry.itemsize <= self.cache_size * 2**20
        if self.divisible and work <= _SMALL_NS and self.n <= _SMALL and fits:
            self._store(entry)

    def _mostly_zeros(self, X: Any) -> bool:
        """Whether dense data would cost less than half as sparse rows: one-hot features, say."""
        if sp.issparse(X) or self.kernel.function is not None or self.kernel.name == "laplacian" or X.size < _INLINE:
            return False
        return 2 * np.count_nonzero(X) * _SPARSE_NS < X.size * _DENSE_NS

    def _store(self, dtype: Any) -> None:
        """Compute a small matrix once and for all."""
        with single_threaded_blas:
            K = self._square(np.arange(self.n), np.dtype(dtype))
        np.fill_diagonal(K, self.diagonal)
        self.cache, self.dtype, self.stored, self.divisible = _Whole(K), K.dtype, True, False
        self.exact = self.exact or K.dtype == np.float64

    @property
    def dear(self) -> bool:
        """Whether an entry costs much more to compute than to copy."""
        return self.divisible and self.rows.cost > _DEAR_NS

    @property
    def entries(self) -> int:
        """Entries computed so far, those of parts included."""
        return int(self.counter[0])

    def restrict(self, index: Array) -> Gram:
        """The matrix of some of the rows; shares the threads and a part of the memory for columns."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.n = len(index)
        part.rows, part.diagonal = self.rows.take(index), self.diagonal[index]
        part.cache = _Cache(part.n, part.dtype, self.reserve, self.dear)
        return part

    def raise_precision(self) -> None:
        """Compute float64 entries from now on; what was kept is dropped."""
        if self.stored:
            self._store(np.float64)
            return
        self.rows = self.rows.take(slice(None), np.float64)
        self.dtype, self.exact = self.rows.dtype, True
        self.cache = _Cache(self.n, self.dtype, self.memory, self.dear)

    def block(self, index: Array, dtype: Any = None) -> Array:
        """Rows and columns ``index``, shape (q, q); the diagonal is exact. ``dtype`` default: that of the entries.

        Not to be written to: of a stored matrix it may be the matrix itself.
        """
        dtype = np.dtype(dtype or self.dtype)
        stored = self.stored and (self.exact or dtype == self.dtype)
        if stored and dtype == self.dtype and len(index) == self.n and (index[1:] > index[:-1]).all():
            return self.cache.arena
        if not stored and not (self.dear and dtype == self.dtype):
            K = self._square(index, dtype)
        else:
            K, slots = np.empty((len(index), len(index)), dtype), self.cache.find(index)
            _tiles.gather(self.cache.arena, slots, index, K)
            missing, kept = np.flatnonzero(slots < 0), np.flatnonzero(slots >= 0)
            if len(missing):
                K[np.ix_(missing, missing)] = self._square(index[missing], dtype)
                K[np.ix_(missing, kept)] = K[np.ix_(kept, missing)].T
        np.fill_diagonal(K, self.diagonal[index])
        return K

    def _square(self, index: Array, dtype: np.dtype) -> Array:
        """Rows and columns ``index``, computed."""
        K, rows = np.empty((len(index), len(index)), dtype), self.rows.take(index, dtype)

        def use(lo: int, hi: int, a: int, tile: Array) -> None:
            """Put a tile in its place."""
            K[lo:hi, a : a + tile.shape[1]] = tile

        _sweep(self.team, rows, _chunks(rows, rows), use)
        self.counter += K.size
        return K

    def add_product(self, out: Array, index: Array, step: Array, keep: Array | None = None) -> None:
        """``out += K[:, index] step``.

        Parameters
        ----------
        out : ndarray of float64, shape (n,)
            Changed in place.
        index : ndarray of int, shape (k,)
            Distinct columns.
        step : ndarray of float64, shape (k,)
        keep : ndarray of bool, shape (k,), optional
            Columns worth keeping for later; default: none.
        """
        if self.through_weights:
            self._add_through_weights(out, index, step)
            return
        slots = self.cache.find(index)
        have = slots >= 0
        if have.any():
            arena, mine, by = self.cache.arena, slots[have], step[have]
            self.team.run(
                lambda lo, hi: _tiles.add_columns(out, arena, mine, by, lo, hi), self.n, 8192, self.n * len(mine)
            )
        if have.all():
            return
        index, step, keep = index[~have], step[~have], None if keep is None else keep[~have]
        slots = np.full(len(index), -1)
        worthy = self.cache.worthy(index)
        if keep is not None and (worthy & keep).any():
            wanted = np.flatnonzero(worthy & keep)
            given = self.cache.make_room(index[wanted])
            slots[wanted[: len(given)]] = given
        self._compute(out, index, step, slots)

    def _add_through_weights(self, out: Array, index: Array, step: Array) -> None:
        """The same by way of ``w = X[index]' step``, which costs less than a column and rounds less."""
        X, size = self.rows.rows, _slab(self.rows.d)  # type: ignore[attr-defined]
        w = np.zeros(self.rows.d)
        for a in range(0, len(index), size):
            w += X[index[a : a + size]].T @ step[a : a + size]

        def job(lo: int, hi: int) -> None:
            out[lo:hi] += X[lo:hi] @ w

        self.team.run(job, self.n, 8192, self.n)
        self.counter += self.n

    def _compute(self, out: Array, index: Array, step: Array, slots: Array) -> None:
        """Add the product with columns that are not kept yet; keep those with a slot."""

        def use(lo: int, hi: int, a: int, tile: Array) -> None:
            """Add a tile's part of the product, and keep the columns that have a slot."""
            chunk = slice(a, a + tile.shape[1])
            _tiles.add_dots(out[lo:hi], tile, step[chunk])
            kept = np.flatnonzero(slots[chunk] >= 0)
            if len(kept):
                _tiles.keep_columns(self.cache.arena, slots[chunk][kept], kept, lo, tile)

        _sweep(self.team, self.rows, _chunks(self.rows, self.rows, index), use)
        self.counter += self.n * len(index)

    def sizes(self) -> Array:
        """What the rounding of a row's entries grows with: the norm of its features (precomputed: its diagonal)."""
        return np.abs(self.diagonal) if self.precomputed else self.rows.sizes()

    def exact_product(self, index: Array, step: Array, rows: Array | slice = slice(None)) -> Array:
        """``K[rows, index] step`` with float64 entries, computed anew; shape (len(rows),)."""
        if self.through_weights or (self.stored and self.exact):
            out = np.zeros(self.n)
            self.add_product(out, index, step)
            return out[rows]
        number = np.arange(self.n)[rows]
        out = np.zeros(len(number))
        size = _slab(self.rows.d)
        for a in range(0, len(number), size):  # so that float64 copies of the rows stay small
            part = self.rows.take(number[a : a + size], np.float64)
            target = out[a : a + size]

            def use(lo: int, hi: int, b: int, tile: Array, target: Array = target) -> None:
                _tiles.add_dots(target[lo:hi], tile, step[b : b + tile.shape[1]])

            _sweep(self.team, part, _chunks(part, self.rows, index), use)
        self.counter += len(number) * len(index)
        return out


class Expansion:
    """``f(x) = sum_j coef_j k(x, z_j)`` for many x: the sums of a decision function, without K in memory.

    Parameters
    ----------
    Z : array of float32 or float64, shape (k, d), or scipy CSR
        For ``precomputed`` it is ignored.
    kernel : Kernel
    coef : ndarray of float64, shape (k, r)
    dtype : dtype
        Of the entries, float32 or float64; they are summed in float64.
    device : str, optional
        A torch device.

    Notes
    -----
    The z_j are made ready once, so that a single x costs little more than its k entries.
    """

    def __init__(self, Z: Any, kernel: Kernel, coef: Array, *, dtype: Any = np.float64, device: str | None = None):
        self.Z, self.kernel, self.coef, self.dtype, self.device = Z, kernel, coef, dtype, device
        self.single = np.ascontiguousarray(coef[:, 0]) if coef.shape[1] == 1 else None
        self.plain = len(coef) > 0 and device is None and not (kernel.function is None and kernel.name == "precomputed")
        self.weights = None
        if self.plain and kernel.function is None and kernel.name == "linear" and Z.shape[1] <= _WEIGHTS:
            self.weights = np.asarray(Z.T @ coef)
        elif self.plain:
            self.rows = _make_rows(Z, kernel, dtype)
            size = self.rows.n * self.rows.d * self.rows.dtype.itemsize  # dense, as columns are made ready
            wide = isinstance(self.rows, _DotRows) and self.rows.sparse and self.rows.d > _WIDE
            self.ready = None if wide or size > _READY_BYTES else list(_chunks(self.rows, self.rows))

    def __call__(self, X: Any, threads: int | None = None) -> Array:
        """The sums at every row of X, shape (m, r), float64; for ``precomputed`` X is K(X, Z), shape (m, k)."""
        if not self.plain:
            if self.device is None or len(self.coef) == 0 or self.kernel.name == "precomputed":
                return np.asarray(X @ self.coef) if len(self.coef) else np.zeros((X.shape[0], self.coef.shape[1]))
            from bcd.gram_torch import torch_product

            return torch_product(X, self.Z, self.kernel, self.coef, self.device, self.dtype)
        if self.weights is not None:
            return np.asarray(X @ self.weights)
        out = np.zeros((X.shape[0], self.coef.shape[1]))
        if 0 in out.shape:
            return out
        small = X.shape[0] * len(self.coef) < _INLINE  # then one thread is enough, for BLAS as well
        team = Team(1 if small or self.kernel.function is not None else threads)
        try:
            with nullcontext() if small else single_threaded_blas:
                size = _slab(self.rows.d)
                for a in range(0, X.shape[0], size):  # so that converted rows stay small
                    self._add(out[a : a + size], X[a : a + size], team)
        finally:
            team.close()
        return out

    def _add(self, out: Array, X: Any, team: Team) -> None:
        rows = self.rows.like(X)

        def use(lo: int, hi: int, a: int, tile: Array) -> None:
            """Add a tile's part of the product, and keep the columns that have a slot."""
            chunk = slice(a, a + tile.shape[1])
            if self.single is not None:
                _tiles.add_dots(out[lo:hi, 0], tile, self.single[chunk])
            else:
                out[lo:hi] += tile.astype(np.float64, copy=False) @ self.coef[chunk]

        _sweep(team, rows, _chunks(rows, self.rows) if self.ready is None else self.ready, use)


def kernel_diagonal(X: Any, kernel: Kernel) -> Array:
    """``k(x_i, x_i)``, shape (n,), float64; not for ``precomputed``."""
    size = _slab(X.shape[1] if X.ndim > 1 else 1)
    parts = [_make_rows(X[a : a + size], kernel, np.float64).diagonal() for a in range(0, X.shape[0], size)]
    return np.concatenate([np.empty(0), *parts])


def kernel_product(
    X: Any, Z: Any, kernel: Kernel, coef: Array, *, device: str | None = None, threads: int | None = None
) -> Array:
    """``K(X, Z) coef`` once: :class:`Expansion` for one X, with entries in the precision of X."""
    dtype = np.float32 if X.dtype == np.float32 else np.float64
    return Expansion(Z, kernel, coef, dtype=dtype, device=device)(X, threads)
