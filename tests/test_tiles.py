"""The compiled loops of bcd._tiles against plain NumPy."""

import numpy as np
import pytest
import scipy.sparse as sp

from bcd import _tiles

REAL = (np.float32, np.float64)


def rng(seed=0):
    return np.random.default_rng(seed)


def exp_shifted(exponents, row_shift=None, column_shift=None):
    tile = np.array(exponents, np.float32, ndmin=2)
    rows, columns = tile.shape
    row_shift = np.zeros(rows, np.float32) if row_shift is None else row_shift
    column_shift = np.zeros(columns, np.float32) if column_shift is None else column_shift
    _tiles.exp_shifted(tile, row_shift, column_shift, np.empty(tile.shape, np.int32))
    return tile


# -- exp -----------------------------------------------------------------------------------------


def test_exp_is_right_to_two_units_in_the_last_place():
    """A dense grid of [-100, 0], and every float32 next to the points where the power of 2 changes."""
    edges = (-np.arange(126) - 0.5) * np.log(2)
    around = (edges.astype(np.float32).view(np.int32)[:, None] + np.arange(-20, 21)).astype(np.int32).view(np.float32)
    grid = np.concatenate([np.linspace(-100, 0, 2_000_001).astype(np.float32), around.ravel()])
    grid = grid[(grid <= 0) & (grid >= -87)]
    true = np.exp(grid.astype(np.float64))
    assert (true > np.finfo(np.float32).tiny).all()
    units = np.abs(exp_shifted(grid)[0] - true) / np.spacing(true.astype(np.float32))
    assert units.max() <= 2.0


def test_exp_of_zero_is_one_and_exponents_above_zero_count_as_zero():
    assert (exp_shifted([0.0, -0.0, 1e-7, 3.0, 1e30]) == 1.0).all()


def test_exp_below_minus_87_is_that_of_minus_87():
    """Far below every rounding of a sum, positive, and never NaN, infinite or subnormal."""
    low = exp_shifted([-87.0, -87.5, -88.0, -100.0, -1e4, -1e30, -np.inf])[0]
    assert (low == low[0]).all()
    assert low[0] == pytest.approx(np.exp(-87.0), rel=3e-7)
    assert low[0] >= np.finfo(np.float32).tiny


def test_exp_adds_the_shifts_of_row_and_column():
    tile = rng().uniform(-3, 3, (5, 70)).astype(np.float32)
    rows, columns = (rng(k).uniform(-4, -3, size).astype(np.float32) for k, size in ((1, 5), (2, 70)))
    true = np.exp(np.minimum(tile.astype(np.float64) + rows[:, None] + columns, 0.0))
    np.testing.assert_allclose(exp_shifted(tile, rows, columns), true, rtol=2e-6)


# -- inner products and distances ----------------------------------------------------------------


def panels(Z, scale, dtype):
    Z = sp.csr_array(Z.astype(dtype))
    out = np.zeros((-(-Z.shape[0] // _tiles.PANEL), Z.shape[1], _tiles.PANEL), dtype)
    _tiles.fill_panels(Z.data, Z.indices, Z.indptr.astype(np.int64), dtype(scale), out)
    return out


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_sparse_dots(dtype, index, columns):
    X = sp.random_array((50, 30), density=0.2, format="csr", rng=rng())
    X = sp.csr_array(X.toarray() * (np.arange(50) % 7 != 0)[:, None])  # some rows are empty
    Z = sp.random_array((columns, 30), density=0.3, format="csr", rng=rng(1))
    tile = np.full((20, -(-columns // _tiles.PANEL) * _tiles.PANEL), np.nan, dtype)
    parts = X.data.astype(dtype), X.indices.astype(index), X.indptr.astype(np.int64)
    _tiles.sparse_dots(*parts, 10, panels(Z, 2.0, dtype), tile)
    true = 2.0 * (X[10:30] @ Z.T).toarray()
    np.testing.assert_allclose(tile[:, :columns], true, atol=20 * np.finfo(dtype).eps)
    assert (tile[:, columns:] == 0).all()


def test_fill_panels_adds_what_is_stored_twice():
    data, indices, indptr = np.array([1.0, 2.0, 4.0]), np.array([1, 1, 0]), np.array([0, 2, 3])
    out = np.zeros((1, 2, _tiles.PANEL))
    _tiles.fill_panels(data, indices, indptr, 10.0, out)
    assert out[0, :, :3].tolist() == [[0, 40, 0], [30, 0, 0]]
    assert not out[0, :, 3:].any()


@pytest.mark.parametrize("dtype", REAL)
def test_manhattan(dtype):
    X, Z = rng().normal(size=(9, 6)).astype(dtype), rng(1).normal(size=(5, 6)).astype(dtype)
    tile = np.full((9, 5), np.nan, dtype)
    _tiles.manhattan(X, np.ascontiguousarray(Z.T), tile)
    true = -np.abs(X[:, None].astype(np.float64) - Z).sum(axis=2)
    np.testing.assert_allclose(tile, true, rtol=20 * np.finfo(dtype).eps)


# -- the use of tiles ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL)
def test_add_dots_sums_in_float64(dtype):
    """The large entry would swallow the small ones in float32."""
    tile = np.array([[1e8, 1.0, 1.0, -1e8], [1.0, 2.0, 3.0, 4.0]], dtype)
    out = np.array([5.0, 7.0])
    _tiles.add_dots(out, tile, np.array([1.0, 1.0, 1.0, 1.0]))
    assert out.tolist() == [7.0, 17.0]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(("lo", "hi"), [(0, 5000), (0, 0), (17, 4099)])
def test_add_columns(dtype, columns, lo, hi):
    """More rows than one span, whole and broken groups of four; rows outside lo .. hi stay."""
    arena = rng().normal(size=(20, 5000)).astype(dtype)
    slots, step = rng(1).permutation(20)[:columns], rng(2).normal(size=columns)
    out = rng(3).normal(size=5000)
    true = out.copy()
    true[lo:hi] += step @ arena[slots, lo:hi].astype(np.float64)
    _tiles.add_columns(out, arena, slots, step, lo, hi)
    np.testing.assert_allclose(out, true, atol=1e-14)
    assert (np.delete(out, np.s_[lo:hi]) == np.delete(true, np.s_[lo:hi])).all()


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("kept", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_keep_columns(dtype, kept, rows):
    arena = np.full((50, 60), -1.0, dtype)
    tile = rng().normal(size=(rows, 45)).astype(dtype)
    slots, columns = rng(1).permutation(50)[:kept], rng(2).permutation(45)[:kept]
    _tiles.keep_columns(arena, slots, columns, 5, tile)
    true = np.full((50, 60), -1.0, dtype)
    true[slots, 5 : 5 + rows] = tile[:, columns].T
    assert (arena == true).all()


@pytest.mark.parametrize("dtype", REAL)
def test_gather(dtype):
    """Rows without a slot stay as they are."""
    arena = rng().normal(size=(4, 9)).astype(dtype)
    slots, index = np.array([2, -1, 0]), np.array([8, 3, 5])
    out = np.full((3, 3), -7.0, dtype)
    _tiles.gather(arena, slots, index, out)
    assert (out[[0, 2]] == arena[[2, 0]][:, index]).all()
    assert (out[1] == -7.0).all()


def test_read_only_arrays_are_read():
    """As joblib maps them into other processes."""
    tile, step, out = np.ones((3, 4), np.float32), np.ones(4), np.zeros(3)
    tile.flags.writeable = step.flags.writeable = False
    _tiles.add_dots(out, tile, step)
    assert out.tolist() == [4.0, 4.0, 4.0]
