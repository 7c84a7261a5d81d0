"""bcd.gram against scikit-learn's kernels: products, blocks, kept columns, precision, threads."""

import threading
import tracemalloc
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp
from duals import BY_NAME, float64, kernel_matrix
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from bcd import gram as module
from bcd.gram import Expansion, Gram, Kernel, _Cache, kernel_product, single_threaded_blas

FORMS = ("dense", "sparse", "full")
N = 150


def data(form, dtype=np.float64, n=N, seed=0):
    """Rows far from the origin, one of zeros and two alike; sparse ones with empty rows; CSR that is better dense."""
    rng = np.random.default_rng(seed)
    if form == "sparse":
        X = sp.random_array((n, 40), density=0.1, format="lil", rng=rng)
        X[[0, n // 2, n - 1]] = 0
        X = sp.csr_array(X).astype(dtype)
        assert module._sparse_is_cheaper(X)
        return X
    X = (rng.normal(size=(n, 7)) + 2.0).astype(dtype)
    X[n // 3], X[n // 2] = 0, X[n // 2 - 1]
    if form == "full":
        X = sp.csr_array(X)
        assert not module._sparse_is_cheaper(X)
    return X


def rounding(kernel, X, Z, dtype):
    """How far an entry may be off: some units of the largest number that occurs on the way to it."""
    square = max(float((float64(A) ** 2).sum(axis=1).max(initial=0.0)) for A in (X, Z))
    largest = {
        "linear": square,
        "rbf": 1.0 + kernel.gamma * square,
        "poly": (abs(kernel.gamma) * square + abs(kernel.coef0)) ** kernel.degree,
        "sigmoid": 1.0 + abs(kernel.gamma) * square,
        "laplacian": 1.0 + kernel.gamma * square,
        "cosine": 1.0,
    }[kernel.name]
    return 16 * np.finfo(dtype).eps * max(1.0, largest)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Small data are treated like large ones, but in the tests of small ones."""
    monkeypatch.setattr(module, "_SMALL_NS", -1.0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and several chunks of columns on small data, shared by the threads."""
    monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(module, "_TILE_BYTES", 1)
    monkeypatch.setattr(module, "_INLINE", 1)


def drawn(n=N, size=90, seed=1):
    """Distinct columns in no order, and a step."""
    rng = np.random.default_rng(seed)
    return rng.permutation(n)[:size], rng.normal(size=size)


def check(gram, K, atol, index, step, keep=None):
    out = np.linspace(-1, 1, gram.n)
    true = out + K[:, index] @ step
    gram.add_product(out, index, step, keep)
    np.testing.assert_allclose(out, true, rtol=0, atol=atol * np.abs(step).sum())


EVERY = [
    pytest.param(name, form, dtype, precision, id=f"{name}-{form}-{np.dtype(dtype).name}-{precision}")
    for name in BY_NAME
    for form in FORMS
    for dtype in (np.float32, np.float64)
    for precision in ("auto", "float64")
]


# -- every kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form", "dtype", "precision"), EVERY)
def test_every_kernel(name, form, dtype, precision, small_tiles):
    """Diagonal, blocks, products with and without columns kept, exact products on all rows and on some."""
    X, kernel = data(form, dtype), BY_NAME[name]
    K = kernel_matrix(kernel, X)
    gram = Gram(X, kernel, dtype=precision)
    assert gram.dtype == (np.float64 if gram.exact else np.float32)
    assert gram.exact == (precision == "float64" or name in ("linear", "cosine"))
    tight = rounding(kernel, X, X, np.float64)
    loose = rounding(kernel, X, X, gram.dtype)
    np.testing.assert_allclose(gram.diagonal, K.diagonal(), rtol=0, atol=loose)
    index, step = drawn()
    for asked, atol in ((None, loose), (np.float64, tight), (np.float32, rounding(kernel, X, X, np.float32))):
        block = gram.block(index, asked)
        assert block.dtype == (asked or gram.dtype)
        np.testing.assert_allclose(block, K[np.ix_(index, index)], rtol=0, atol=atol)
        assert (block.diagonal() == gram.diagonal[index].astype(block.dtype)).all()
    check(gram, K, loose, index, step)
    check(gram, K, loose, index, step, np.arange(90) % 2 == 0)
    check(gram, K, loose, index, step, np.ones(90, bool))  # half of the columns are there
    check(gram, K, loose, index[::-1], step, np.ones(90, bool))  # all of them
    np.testing.assert_allclose(gram.block(index[20:70]), K[np.ix_(index[20:70], index[20:70])], rtol=0, atol=loose)
    total = np.abs(step).sum()
    for rows in (slice(None), slice(3, 80, 2), np.array([149, 0, 77]), np.arange(N) > 100, np.empty(0, np.int64)):
        exact = gram.exact_product(index, step, rows)
        np.testing.assert_allclose(exact, (K[:, index] @ step)[rows], rtol=0, atol=tight * total)


@pytest.mark.parametrize(("name", "form", "dtype", "precision"), EVERY)
def test_restriction_and_raised_precision(name, form, dtype, precision, small_tiles):
    X, kernel = data(form, dtype), BY_NAME[name]
    K = kernel_matrix(kernel, X)
    gram = Gram(X, kernel, dtype=precision)
    tight, loose = (rounding(kernel, X, X, d) for d in (np.float64, gram.dtype))
    rows = np.random.default_rng(3).permutation(N)[:100]
    index, step = drawn(100, 70)
    whole, keep = drawn(), np.ones(90, bool)
    check(gram, K, loose, *whole, keep)
    part = gram.restrict(rows)
    inner = K[np.ix_(rows, rows)]
    assert (part.n, part.dtype) == (100, gram.dtype)
    assert part.entries == gram.entries  # one count for both
    assert (part.diagonal == gram.diagonal[rows]).all()
    for _ in range(2):  # columns kept for the part and for the whole do not touch one another
        check(part, inner, loose, index, step, np.ones(70, bool))
        check(gram, K, loose, *whole, keep)
    np.testing.assert_allclose(part.block(index), inner[np.ix_(index, index)], rtol=0, atol=loose)
    np.testing.assert_allclose(part.block(index, np.float64), inner[np.ix_(index, index)], rtol=0, atol=tight)
    gram.raise_precision()
    assert gram.exact
    assert gram.dtype == np.float64
    for _ in range(2):
        check(gram, K, tight, *whole, keep)
    np.testing.assert_allclose(gram.block(index), K[np.ix_(index, index)], rtol=0, atol=tight)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", [None, np.float64])
@pytest.mark.parametrize("dear", [0.0, 1e9])
def test_a_block_from_kept_columns(name, form, asked, dear, small_tiles, monkeypatch):
    """All, some and none of it kept; rows twice, as SVR asks for."""
    monkeypatch.setattr(module, "_DEAR_NS", dear)
    X, kernel, rng = data(form), BY_NAME[name], np.random.default_rng(0)
    K, gram = kernel_matrix(kernel, X), Gram(X, kernel)
    atol = rounding(kernel, X, X, asked or gram.dtype)
    for _ in range(12):
        gram.add_product(np.zeros(N), *drawn(size=8), np.ones(8, bool))
        index = rng.integers(0, N, rng.integers(1, 70))
        np.testing.assert_allclose(gram.block(index, asked), K[np.ix_(index, index)], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_precomputed_matrix_is_used_in_place(dtype):
    K = kernel_matrix(BY_NAME["rbf"], data("dense")).astype(dtype)
    K.flags.writeable = False
    gram = Gram(K, Kernel("precomputed"), cache_size=0)
    assert np.shares_memory(gram.cache.arena, K)
    assert gram.exact
    assert not gram.divisible
    index, step = drawn()
    check(gram, K.astype(np.float64), 1e-13, index, step)
    check(gram, K.astype(np.float64), 1e-13, index, step, np.ones(90, bool))
    assert (gram.block(index) == K[np.ix_(index, index)]).all()
    assert gram.block(index, np.float64).dtype == np.float64
    np.testing.assert_allclose(gram.exact_product(index, step, [5, 2]), (K.astype(np.float64)[:, index] @ step)[[5, 2]])
    assert gram.entries == 0


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 3])
def test_kernel_product(name, form, other, dtype, columns, small_tiles):
    """Dense and sparse rows on either side; entries have the precision of X."""
    kernel, width = BY_NAME[name], 40

    def wide(form, n, seed):
        X = data(form, dtype, n, seed)
        if form == "sparse":
            return X
        X = np.pad(X.toarray() if form == "full" else X, ((0, 0), (0, width - 7)))
        return sp.csr_array(X) if form == "full" else X

    X, Z = wide(form, 130, 5), wide(other, 80, 6)
    coef = np.random.default_rng(7).normal(size=(80, columns))
    found = kernel_product(X, Z, kernel, coef)
    assert found.dtype == np.float64
    atol = rounding(kernel, X, Z, dtype) * np.abs(coef).sum(axis=0).max()
    np.testing.assert_allclose(found, kernel_matrix(kernel, X, Z) @ coef, rtol=0, atol=atol)


def test_kernel_product_of_nothing():
    X, kernel = np.ones((3, 2)), BY_NAME["rbf"]
    assert kernel_product(X, X[:0], kernel, np.ones((0, 2))).tolist() == [[0, 0]] * 3
    assert kernel_product(X[:0], X, kernel, np.ones((3, 2))).shape == (0, 2)
    assert kernel_product(X, X, kernel, np.ones((3, 0))).shape == (3, 0)


def test_kernel_product_of_a_precomputed_matrix():
    K, coef = np.random.default_rng(0).normal(size=(4, 6)), np.ones((6, 2))
    for given_K in (K, sp.csr_array(K)):
        np.testing.assert_allclose(kernel_product(given_K, None, Kernel("precomputed"), coef), K @ coef)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_expansion_is_used_again(name, form, dtype):
    """One row, many, none, in any order; the entries have the precision asked for."""
    kernel, rng = BY_NAME[name], np.random.default_rng(0)
    X, Z, coef = data(form, dtype, 130, 5), data(form, dtype, 80, 6), rng.normal(size=(80, 2))
    for coefficients in (coef, coef[:, :1]):
        known = Expansion(Z, kernel, coefficients, dtype=dtype)
        expected = kernel_matrix(kernel, X, Z) @ coefficients
        atol = rounding(kernel, X, Z, dtype) * np.abs(coefficients).sum(axis=0).max()
        for rows in ([3], np.arange(130), [], [7, 7, 2]):
            np.testing.assert_allclose(known(X[rows]), expected[rows], rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_an_expansion_takes_little_memory(form):
    """Columns made ready in advance must not be a dense copy of large data."""
    rng = np.random.default_rng(0)
    Z = sp.random_array((3000, 20_000), density=1e-3, format="csr", rng=rng)
    if form == "dense":
        Z = np.ascontiguousarray(rng.normal(size=(8000, 2000)))
    kernel, coef = Kernel("rbf", gamma=0.1), np.ones((Z.shape[0], 1))
    expected = kernel_matrix(kernel, Z[:3], Z).sum(axis=1)
    tracemalloc.start()
    found = kernel_product(Z[:3], Z, kernel, coef)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10)
    assert peak < 2.5 * (Z.nbytes if form == "dense" else 2**27)


# -- data of every kind --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "laplacian"])
@pytest.mark.parametrize("width", [70_000, 2**31 + 10])
def test_wide_sparse_rows_stay_sparse(name, width):
    """Beyond 65536 features no column is made dense, and beyond 2^31 indices are 64-bit."""
    kernel, rng = BY_NAME[name], np.random.default_rng(0)
    features = np.sort(rng.choice(width, 60, replace=False))
    features[-1] = width - 1
    small = sp.random_array((50, 60), density=0.2, format="csr", rng=rng)
    X = sp.csr_array((small.data, features[small.indices], small.indptr), shape=(50, width))
    K, index, step = kernel_matrix(kernel, small), *drawn(50, 30)
    tracemalloc.start()
    gram = Gram(X, kernel, dtype="float64", cache_size=1)
    for _ in range(2):
        check(gram, K, rounding(kernel, small, small, np.float64), index, step, np.ones(30, bool))
    np.testing.assert_allclose(gram.block(index), K[np.ix_(index, index)], atol=1e-13)
    np.testing.assert_allclose(gram.diagonal, K.diagonal(), atol=1e-13)
    product = kernel_product(sp.csr_array(X[:7]), X, kernel, np.ones((50, 1)))
    np.testing.assert_allclose(product[:, 0], K[:7].sum(axis=1), atol=1e-12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("name", BY_NAME)
def test_a_matrix_without_entries(name):
    X, kernel = sp.csr_array((20, 5)), BY_NAME[name]
    gram, out = Gram(X, kernel), np.zeros(20)
    gram.add_product(out, np.arange(4), np.ones(4))
    np.testing.assert_allclose(out, 4 * kernel_matrix(kernel, np.zeros((1, 5)))[0, 0], atol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
def test_one_row(name, form):
    X, kernel = data(form)[[5]], BY_NAME[name]
    gram, K = Gram(X, kernel), kernel_matrix(BY_NAME[name], data(form)[[5]])
    for _ in range(2):
        check(gram, K, rounding(kernel, X, X, np.float32), np.array([0]), np.ones(1), np.ones(1, bool))
    np.testing.assert_allclose(gram.block(np.array([0])), K, rtol=1e-6)


def layouts(dtype=np.float64):
    X = data("dense", dtype)
    twice = np.repeat(X, 2, axis=1)
    locked, sparse = X.copy(), data("sparse", dtype)
    wide, still = sparse.copy(), sparse.copy()
    locked.flags.writeable = False
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    for part in (still.data, still.indices, still.indptr):
        part.flags.writeable = False
    return {
        "columns": twice[:, ::2],
        "backwards": X[::-1],
        "fortran": np.asfortranarray(X),
        "locked": locked,
        "sparse": sparse,
        "int64": wide,
        "locked sparse": still,
        "unsorted": unsorted(sparse),
        "matrix": sp.csr_matrix(sparse),
    }


def unsorted(X):
    """Indices of a row in falling order."""
    order = np.concatenate([np.arange(b, a, -1) - 1 for a, b in zip(X.indptr[:-1], X.indptr[1:], strict=True)])
    out = sp.csr_array((X.data[order.astype(int)], X.indices[order.astype(int)], X.indptr), shape=X.shape)
    assert not out.has_sorted_indices
    return out


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_layout_of_memory(name, layout, dtype):
    X, kernel = layouts(dtype)[layout], BY_NAME[name]
    before, K, (index, step) = float64(X).copy(), kernel_matrix(kernel, X), drawn()
    gram = Gram(X, kernel)
    check(gram, K, rounding(kernel, X, X, gram.dtype), index, step, np.ones(90, bool))
    check(gram, K, rounding(kernel, X, X, gram.dtype), index, step, np.ones(90, bool))
    np.testing.assert_allclose(gram.exact_product(index, step), K[:, index] @ step, atol=1e-9 * np.abs(K).max())
    product = kernel_product(X, X, kernel, step[:, None] * np.ones((1, 2)) if len(step) == N else np.ones((N, 2)))
    np.testing.assert_allclose(product[:, 1], K.sum(axis=1), rtol=0, atol=N * rounding(kernel, X, X, dtype))
    assert (float64(X) == before).all()


def test_rows_far_from_the_origin_cost_no_digits():
    """Distances of rbf are unchanged by the shift that is taken off, in float32 as well."""
    X = np.random.default_rng(0).normal(size=(100, 5)) + 1e4
    K = kernel_matrix(Kernel("rbf", gamma=0.1), X - 1e4)
    index, step = drawn(100, 60)
    check(Gram(X, Kernel("rbf", gamma=0.1)), K, 1e-6, index, step)


# -- callables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_callable_kernel(form, sparse, small_tiles):
    X, callers = data(form), set()

    def function(A, B):
        callers.add(threading.get_ident())
        K = float64(A) @ float64(B).T + 1.0
        return sp.csr_array(K) if sparse else K.astype(np.float32) if form == "full" else K

    kernel = Kernel(function=function)
    K, (index, step) = float64(X) @ float64(X).T + 1.0, drawn()
    gram = Gram(X, kernel, threads=4)
    assert gram.dtype == np.float64
    assert gram.exact
    atol = 1e-4 if form == "full" else 1e-12
    for _ in range(2):
        check(gram, K, atol, index, step, np.ones(90, bool))
    np.testing.assert_allclose(gram.block(index), K[np.ix_(index, index)], atol=atol)
    np.testing.assert_allclose(gram.diagonal, K.diagonal(), atol=atol)
    np.testing.assert_allclose(gram.exact_product(index, step, [3, 4]), K[[3, 4]][:, index] @ step, atol=100 * atol)
    product = kernel_product(X, X, kernel, np.ones((N, 1)), threads=4)
    np.testing.assert_allclose(product[:, 0], K.sum(axis=1), atol=N * atol)
    assert callers == {threading.get_ident()}


@pytest.mark.parametrize(
    "function", [lambda A, B: np.ones(len(A)), lambda A, B: np.ones((len(A), 2)), lambda A, B: 1.0]
)
def test_a_callable_kernel_of_the_wrong_shape(function):
    X, kernel = np.ones((5, 2)), Kernel(function=function)
    said = r"must return the matrix of shape \(len\(X\), len\(Z\)\) = \(.*; found shape"
    with pytest.raises(ValueError, match=said):
        Gram(X, kernel)
    with pytest.raises(ValueError, match=said):
        kernel_product(X[:3], X, kernel, np.ones((5, 1)))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel must be one of linear, rbf, .*callable; found 'gauss'"):
        Kernel("gauss")
    with pytest.raises(ValueError, match=r'dtype must be "auto".*found \'float16\''):
        Gram(np.eye(2), Kernel(), dtype="float16")


# -- columns kept --------------------------------------------------------------------------------


def room_for(columns, gram, X, itemsize):
    """Megabytes for so many columns besides the copy of the data; an eighth of the rest is for parts."""
    return ((columns + 0.5) * N * itemsize * 8 / 7 + module._copied_bytes(gram.rows.rows, X)) / 2**20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [0, 1, 3, 40, 1000])
@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("dear", [True, False])
def test_results_do_not_depend_on_the_cache(form, columns, precision, dear, small_tiles, monkeypatch):
    """Products whose columns are partly kept, with more of them than fit; all against the same without a cache."""
    monkeypatch.setattr(module, "_DEAR_NS", 0.0 if dear else 1e9)
    X, kernel, rng = data(form), BY_NAME["rbf"], np.random.default_rng(0)
    real = 4 if precision == "auto" else 8
    plain = Gram(X, kernel, dtype=precision, cache_size=0)
    gram = Gram(X, kernel, dtype=precision, cache_size=room_for(columns, plain, X, real))
    atol = 4 * rounding(kernel, X, X, plain.dtype)
    for _ in range(60):
        index = rng.permutation(N)[: rng.integers(1, 60)]
        step, keep = rng.normal(size=len(index)), rng.random(len(index)) < 0.7
        out, true = np.zeros(N), np.zeros(N)
        gram.add_product(out, index, step, keep)
        plain.add_product(true, index, step)
        np.testing.assert_allclose(out, true, rtol=0, atol=atol * np.abs(step).sum())
        np.testing.assert_allclose(gram.block(index), plain.block(index), rtol=0, atol=atol)
    assert gram.cache.slots == min(N, columns)
    assert gram.cache.arena.nbytes <= gram.cache_size * 2**20
    assert gram.entries < plain.entries or columns == 0


@pytest.mark.parametrize("dear", [True, False])
def test_a_kept_column_is_not_computed_again(dear, monkeypatch):
    """Cheap ones are kept at their second use only."""
    monkeypatch.setattr(module, "_DEAR_NS", 0.0 if dear else 1e9)
    gram, out, keep = Gram(data("dense"), BY_NAME["rbf"]), np.zeros(N), np.ones(90, bool)
    index, step = drawn()
    gram.add_product(out, index, step, keep)
    gram.add_product(out, index, step, keep)
    computed = 90 * N * (1 if dear else 2)
    assert gram.entries == computed
    gram.add_product(out, index, step, keep)
    gram.add_product(out, index[:50], step[:50])
    assert gram.entries == computed
    gram.raise_precision()
    gram.add_product(out, index[:50], step[:50])
    assert gram.entries == computed + 50 * N


def test_cheap_columns_stay_while_there_is_no_room(monkeypatch):
    """Scanning more columns than fit would otherwise keep each just until it is needed."""
    monkeypatch.setattr(module, "_DEAR_NS", 1e9)
    plain = Gram(data("dense"), BY_NAME["rbf"], cache_size=0)
    gram = Gram(data("dense"), BY_NAME["rbf"], cache_size=room_for(40, plain, data("dense"), 4))
    for _ in range(3):
        for first in range(0, N, 30):
            index = np.arange(first, first + 30)
            gram.add_product(np.zeros(N), index, np.ones(30), np.ones(30, bool))
    assert set(np.flatnonzero(gram.cache.slot >= 0)) == set(range(40))


@pytest.mark.parametrize("cache_size", [0, 0.3, 1, 5])
def test_the_cache_keeps_to_its_megabytes(cache_size, monkeypatch):
    """Through precision, parts and products of more columns than fit; beside it only tiles are in memory."""
    n = 3000
    X = data("dense", n=n)
    monkeypatch.setattr(module, "_DEAR_NS", 0.0)
    warm = Gram(X, BY_NAME["rbf"], cache_size=1, threads=1)
    warm.add_product(np.zeros(n), np.arange(600), np.ones(600), np.ones(600, bool))
    warm.exact_product(np.arange(600), np.ones(600))
    tracemalloc.start()
    gram = Gram(X, BY_NAME["rbf"], cache_size=cache_size, threads=1)
    for _ in range(2):
        for first in range(0, n, 600):
            gram.add_product(np.zeros(n), np.arange(first, first + 600), np.ones(600), np.ones(600, bool))
        part = gram.restrict(np.arange(1000))
        part.add_product(np.zeros(1000), np.arange(1000), np.ones(1000), np.ones(1000, bool))
        for cache in (gram.cache, part.cache):
            assert cache.arena.nbytes <= cache_size * 2**20
        assert gram.memory.nbytes + gram.reserve.nbytes <= cache_size * 2**20
        assert np.shares_memory(gram.cache.arena, gram.memory) or gram.cache.slots == 0
        assert np.shares_memory(part.cache.arena, gram.reserve) or part.cache.slots == 0
        assert not np.shares_memory(part.cache.arena, gram.cache.arena)
        gram.raise_precision()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= cache_size * 2**20 + 3 * X.nbytes + 2**20


@given(st.data())
def test_the_least_recently_used_columns_give_way(draw):
    """Against an ordered dictionary: same columns kept, none moved, none that the present product reads lost."""
    n, slots = draw.draw(st.integers(1, 12)), draw.draw(st.integers(0, 8))
    dear = draw.draw(st.booleans())
    cache = _Cache(n, np.dtype(np.float32), np.empty(slots * n * 4 + 3, np.uint8), dear)
    assert cache.slots == min(n, slots)
    model = OrderedDict()  # column -> when last used, by product
    for product in range(draw.draw(st.integers(1, 15))):
        index = np.array(draw.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
        found = cache.find(index)
        assert (found >= 0).tolist() == [k in model for k in index]
        model.update({int(k): product for k in index if k in model})
        new = index[found < 0]
        given_slots = cache.make_room(new)
        busy = sum(last == product for last in model.values())
        assert len(given_slots) == min(len(new), cache.slots - (busy if dear else len(model)))
        assert len(set(given_slots)) == len(given_slots)
        assert not set(given_slots) & set(found[found >= 0])
        for k in new[: len(given_slots)]:
            model[int(k)] = product
        stale = sorted((last, k) for k, last in model.items() if last < product)
        kept = set(np.flatnonzero(cache.slot >= 0))
        gone = set(model) - kept
        assert kept <= set(model)
        assert len(gone) == max(0, len(model) - cache.slots)
        if gone:  # ties within a product may break either way
            assert max(model[k] for k in gone) <= min([last for last, k in stale if k not in gone], default=product)
        for k in gone:
            del model[k]
        owned = cache.slot[cache.slot >= 0]
        assert len(set(owned)) == len(owned)
        assert all(cache.owner[cache.slot[k]] == k for k in kept)


# -- small matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_small_matrix_is_as_exact_as_float64(name, form, dtype, precision, monkeypatch):
    monkeypatch.setattr(module, "_SMALL_NS", np.inf)
    monkeypatch.setattr(module, "_TINY_NS", np.inf)
    X, kernel = data(form, dtype), BY_NAME[name]
    gram, K = Gram(X, kernel, dtype=precision, cache_size=1), kernel_matrix(kernel, X)
    index, step, atol = *drawn(), rounding(kernel, X, X, np.float64)
    assert gram.exact
    assert gram.dtype == np.float64
    assert gram.entries in (0, N * N)
    for everything in (np.arange(N), np.arange(N)[::-1]):
        np.testing.assert_allclose(gram.block(everything), K[np.ix_(everything, everything)], rtol=0, atol=atol)
    np.testing.assert_allclose(gram.block(index), K[np.ix_(index, index)], rtol=0, atol=atol)
    np.testing.assert_allclose(gram.diagonal, K.diagonal(), rtol=0, atol=atol)
    check(gram, K, atol, index, step)
    check(gram, K, atol, index, step, np.ones(90, bool))
    np.testing.assert_allclose(gram.exact_product(index, step, [7, 2]), K[[7, 2]][:, index] @ step, atol=90 * atol)
    entries = gram.entries
    check(gram, K, atol, index, step)
    assert gram.entries == entries or name in ("linear", "cosine")


@pytest.mark.parametrize("name", ["rbf", "poly", "laplacian"])
@pytest.mark.parametrize("form", FORMS)
def test_a_less_small_matrix_is_stored_in_float32_until_more_is_asked_for(name, form, monkeypatch):
    monkeypatch.setattr(module, "_SMALL_NS", np.inf)
    monkeypatch.setattr(module, "_TINY_NS", -1.0)
    X, kernel = data(form), BY_NAME[name]
    gram, K, (index, step) = Gram(X, kernel, cache_size=1), kernel_matrix(kernel, X), drawn()
    rough, fine = rounding(kernel, X, X, np.float32), rounding(kernel, X, X, np.float64)
    assert (gram.stored, gram.exact, gram.dtype) == (True, False, np.float32)
    check(gram, K, rough, index, step)
    np.testing.assert_allclose(gram.exact_product(index, step), K[:, index] @ step, atol=90 * fine)
    np.testing.assert_allclose(gram.block(index, np.float64), K[np.ix_(index, index)], rtol=0, atol=fine)
    gram.raise_precision()
    assert (gram.stored, gram.exact, gram.dtype) == (True, True, np.float64)
    check(gram, K, fine, index, step)


# -- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BY_NAME)
def test_results_are_the_same_for_any_number_of_threads(name, form, small_tiles):
    X, (index, step) = data(form), drawn()
    found = []
    for threads in (1, 2, 5):
        gram, out = Gram(X, BY_NAME[name], threads=threads), np.zeros(N)
        with single_threaded_blas:
            for _ in range(2):
                gram.add_product(out, index, step, np.arange(90) % 3 > 0)
            exact = gram.exact_product(index, step)
            product = kernel_product(X, X, BY_NAME[name], np.ones((N, 2)), threads=threads)
            found.append((out, gram.block(index), exact, product))
        gram.team.close()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a == b).all()


def test_threads_use_matrices_at_once(small_tiles):
    """Scratch memory and BLAS limits are a thread's own; a matrix belongs to one thread."""
    names = [name for name in BY_NAME for _ in range(2)]
    index, step = drawn()

    def work(name):
        X, out = data("sparse" if name == "rbf" else "dense"), np.zeros(N)
        gram = Gram(X, BY_NAME[name], threads=2)
        with single_threaded_blas:
            for _ in range(20):
                gram.add_product(out, index, step, np.ones(90, bool))
        gram.team.close()
        return out, gram.block(index), kernel_product(X, X, BY_NAME[name], np.ones((N, 1)), threads=2)

    alone = [work(name) for name in names]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(work, names))
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x == y).all()


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_the_limit_of_blas_is_taken_back():
    """Nested, after an error, and when threads overlap: 1 while anybody is inside, then what it was."""
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert max(before) == 2
        with single_threaded_blas:
            assert set(blas_threads()) == {1}
            with single_threaded_blas:
                assert set(blas_threads()) == {1}
            assert set(blas_threads()) == {1}
        assert blas_threads() == before
        with pytest.raises(ZeroDivisionError), single_threaded_blas:
            raise ZeroDivisionError
        assert blas_threads() == before
        kernel_product(data("dense"), data("dense"), BY_NAME["rbf"], np.ones((N, 1)))
        assert blas_threads() == before


def test_the_limit_of_blas_with_threads_that_overlap():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with single_threaded_blas:
            entered.set()
            assert leave.wait(30)

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with ThreadPoolExecutor(1) as pool:
            with single_threaded_blas:
                future = pool.submit(other)
                assert entered.wait(30)
            assert set(blas_threads()) == {1}  # the first has left, the second is inside
            leave.set()
            future.result()
        assert blas_threads() == before


def test_an_error_in_a_thread_reaches_the_caller():
    def broken(A, B):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        kernel_product(np.ones((4, 1)), np.ones((4, 1)), Kernel(function=broken), np.ones((4, 1)))


# -- limits --------------------------------------------------------------------------------------


def test_no_more_memory_is_asked_for_than_a_matrix_can_fill():
    """A cache larger than the machine is as good as one of the matrix's size."""
    gram = Gram(np.eye(5), Kernel("rbf"), cache_size=1e9)
    assert len(gram.memory) + len(gram.reserve) <= 5 * 6 * 4 * 8 / 7


def test_a_matrix_that_does_not_fit_into_the_cache_is_not_stored(monkeypatch):
    monkeypatch.setattr(module, "_SMALL_NS", np.inf)
    X = np.random.default_rng(0).normal(size=(600, 2))
    assert Gram(X, Kernel("rbf"), cache_size=3).stored
    assert not Gram(X, Kernel("rbf"), cache_size=1).stored


def test_a_copy_of_the_data_counts_as_cache():
    X = np.random.default_rng(0).normal(size=(2000, 300))  # 2.4 MB as float32
    gram = Gram(X, Kernel("rbf"), cache_size=4)
    assert len(gram.memory) + len(gram.reserve) + gram.rows.rows.nbytes <= 4 * 2**20
    assert len(Gram(X, Kernel("rbf"), cache_size=2.4).memory) > 0


@pytest.mark.parametrize(("told", "threads"), [("1", 1), ("0", 1), ("100000", None), ("", None), ("all", None)])
def test_threads_follow_the_environment(told, threads, monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    most = module.usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert module.usable_cores() == (threads or most)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BY_NAME)
def test_diagonals_of_new_rows(name, form):
    X, kernel = data(form), BY_NAME[name]
    np.testing.assert_allclose(module.kernel_diagonal(X, kernel), kernel_matrix(kernel, X).diagonal(), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BY_NAME)
def test_sizes_find_the_row_that_rounding_hits_most(name, form):
    """It is far away from the others."""
    X = data(form)
    X = sp.csr_array(X) if sp.issparse(X) else X
    row = 1e4 * abs(X[[np.argmax(abs(X).sum(axis=1))]])
    far = sp.csr_array(sp.vstack([X, row])) if sp.issparse(X) else np.vstack([X, row])
    if name != "cosine":
        assert np.argmax(Gram(far, BY_NAME[name]).sizes()) == far.shape[0] - 1


@pytest.mark.parametrize("name", BY_NAME)
def test_dense_data_of_zeros_are_taken_as_sparse(name, monkeypatch):
    monkeypatch.setattr(module, "_INLINE", 1)
    X, kernel = data("dense") * (np.random.default_rng(0).random(data("dense").shape) < 0.1), BY_NAME[name]
    gram, K = Gram(X, kernel, dtype="float64", cache_size=0), kernel_matrix(kernel, X)
    assert sp.issparse(getattr(gram.rows, "given", X)) == (name != "laplacian")
    check(gram, K, rounding(kernel, X, X, np.float64), *drawn())
