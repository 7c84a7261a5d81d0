"""Projections against exact rational arithmetic, an independent QP solver, and what every projection obeys."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcd import InfeasibleError, _compiled
from bcd.projection import project_simplex, project_sum_box

EPS = np.finfo(np.float64).eps


# -- references ----------------------------------------------------------------------------------


def exactly(v, total, lower, upper, weights):
    """The projection in rational arithmetic: the breakpoints are sorted, the piece that holds the total is solved."""
    v, w = [Fraction(float(a)) for a in v], [Fraction(float(a)) for a in weights]
    ends = [tuple(None if np.isinf(b) else Fraction(float(b)) for b in pair) for pair in zip(lower, upper, strict=True)]

    def at(t):
        x = [a - t * c for a, c in zip(v, w, strict=True)]
        x = [a if lo is None else max(a, lo) for a, (lo, _) in zip(x, ends, strict=True)]
        return [a if hi is None else min(a, hi) for a, (_, hi) in zip(x, ends, strict=True)]

    def mass(t):
        return sum(c * a for c, a in zip(w, at(t), strict=True))

    breaks = sorted((a - e) / c for a, c, pair in zip(v, w, ends, strict=True) for e in pair if e is not None and c)
    breaks = [breaks[0] - 1, *breaks, breaks[-1] + 1] if breaks else [Fraction(0), Fraction(1)]
    goal = Fraction(float(total))
    k = max(sum(mass(t) >= goal for t in breaks) - 1, 0)  # the mass falls: the total lies beyond breakpoint k
    a, b = breaks[min(k, len(breaks) - 2)], breaks[min(k, len(breaks) - 2) + 1]
    slope = (mass(a) - mass(b)) / (b - a)
    return [float(x) for x in at(a + (mass(a) - goal) / slope if slope else a)]


def by_sorting(V, total):
    """The usual method: sort every row, cumulate, take the last index at which the threshold is below the entry."""
    ordered = -np.sort(-V, axis=1)
    threshold = (np.cumsum(ordered, axis=1) - total) / np.arange(1, V.shape[1] + 1)
    last = np.count_nonzero(ordered > threshold, axis=1) - 1
    return np.maximum(V - np.take_along_axis(threshold, last[:, None], axis=1), 0)


def bounds(case):
    n = len(case["v"])
    return np.broadcast_to(case["lower"], n), np.broadcast_to(case["upper"], n)


# -- cases ---------------------------------------------------------------------------------------

# ties are frequent, magnitudes differ by sixteen orders
ENTRY = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 1 / 3]),
    st.builds(lambda m, e: m * 10.0**e, st.floats(-1, 1), st.integers(-8, 8)),
)


@st.composite
def boxes(draw, weighted=False):
    """A point, bounds some of which are infinite or equal, and a total that they allow."""
    n = draw(st.integers(1, 12))
    v = np.array(draw(st.lists(ENTRY, min_size=n, max_size=n)))
    ends = np.sort(np.array(draw(st.lists(st.tuples(ENTRY, ENTRY), min_size=n, max_size=n))), axis=1)
    lower, upper = ends.T.copy()
    lower[draw(st.lists(st.booleans(), min_size=n, max_size=n))] = -np.inf
    upper[draw(st.lists(st.booleans(), min_size=n, max_size=n))] = np.inf
    weights = np.ones(n)
    if weighted:
        weights = np.array(draw(st.lists(st.sampled_from([1.0, -1.0, 2.0, -0.3, 0.0, 5.0]), min_size=n, max_size=n)))
    inside = np.clip(np.array(draw(st.lists(ENTRY, min_size=n, max_size=n))), lower, upper)
    return {"v": v, "lower": lower, "upper": upper, "weights": weights, "total": float(weights @ inside)}


def size(case, x):
    """What rounding is measured against: the numbers of the answer."""
    return np.abs(case["weights"] * x).sum() + abs(case["total"])


def check_optimal(case, x):
    """Feasible, and v - x = t weights where free, on the right side of that at the bounds."""
    lower, upper = bounds(case)
    assert (x >= lower).all()
    assert (x <= upper).all()
    v, w = case["v"], case["weights"]
    assert abs(_compiled.exact_sum(w * x) - case["total"]) <= 8 * EPS * size(case, x)
    moves = w != 0
    with np.errstate(invalid="ignore"):
        t = np.where(moves, (v - x) / np.where(moves, w, 1.0), 0.0)
    rises, falls = np.where(w > 0, x < upper, x > lower) & moves, np.where(w > 0, x > lower, x < upper) & moves
    slop = 16 * EPS * (np.abs(v).max() + np.abs(x).max()) / np.abs(w[moves]).min(initial=1.0)
    # raising the sum through i and lowering it through j must not pay: t_i <= t_j
    assert t[rises].max(initial=-np.inf) <= t[falls].min(initial=np.inf) + slop
    still = np.clip(v[~moves], lower[~moves], upper[~moves])
    np.testing.assert_array_equal(x[~moves], still)


# -- simplex -------------------------------------------------------------------------------------


@given(st.lists(ENTRY, min_size=1, max_size=15), st.sampled_from([0.0, 1e-12, 0.3, 1.0, 7.0, 1e9]))
def test_simplex_against_rational_arithmetic(v, total):
    v = np.array(v)
    x = project_simplex(v, total)
    expected = exactly(v, total, np.zeros(len(v)), np.full(len(v), np.inf), np.ones(len(v)))
    np.testing.assert_allclose(x, expected, rtol=0, atol=8 * EPS * total)
    assert (x >= 0).all()
    assert abs(_compiled.exact_sum(x) - total) <= 4 * EPS * total
    np.testing.assert_array_equal(np.signbit(x), False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("total", [0.1, 1.0, 50.0, 1e4])
def test_simplex_against_sorting(dtype, total):
    V = np.random.default_rng(0).standard_normal((200, 57)).astype(dtype)
    x = project_simplex(V, total)
    assert x.dtype == dtype
    assert x.shape == V.shape
    np.testing.assert_allclose(
        x, by_sorting(V.astype(np.float64), total), rtol=0, atol=8 * np.finfo(dtype).eps * max(total, 4.0)
    )
    np.testing.assert_allclose(x.sum(axis=1, dtype=np.float64), total, rtol=2 * np.finfo(dtype).eps)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20), st.integers(-(2**40), 2**40))
def test_a_constant_added_to_the_point_changes_nothing_on_the_simplex(v, shift):
    """Exactly nothing where the sums v + shift are exact."""
    v = np.array(v, dtype=float) / 8
    np.testing.assert_array_equal(project_simplex(v + shift), project_simplex(v))


@given(st.lists(ENTRY, min_size=1, max_size=15), st.randoms(use_true_random=False))
def test_order_and_equal_entries(v, random):
    v = np.array(v)
    order = list(range(len(v)))
    random.shuffle(order)
    np.testing.assert_allclose(project_simplex(v[order]), project_simplex(v)[order], rtol=0, atol=4 * EPS)
    x = project_simplex(v)
    for a in set(v.tolist()):
        assert len(set(x[v == a].tolist())) == 1


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-8, 1e8, 1e150, 1e300])
def test_scaling_point_and_total_scales_the_answer(scale):
    v = np.random.default_rng(1).standard_normal(30)
    np.testing.assert_allclose(
        project_simplex(v * scale, 2.0 * scale), scale * project_simplex(v, 2.0), rtol=1e-13, atol=1e-13 * scale
    )
    box = project_sum_box(v * scale, 2.0 * scale, -0.1 * scale, 0.5 * scale)
    np.testing.assert_allclose(box, scale * project_sum_box(v, 2.0, -0.1, 0.5), rtol=1e-13, atol=1e-13 * scale)


def test_a_huge_point_loses_nothing_of_the_total():
    """The multiplier cannot be written in float64 there, the answer can."""
    np.testing.assert_array_equal(project_simplex([1e16, -1e16, 0.0]), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(project_sum_box([1e16, -1e16], 0.3, 0.0, 1.0), [0.3, 0.0], rtol=2 * EPS)
    np.testing.assert_array_equal(project_sum_box([1e16, 1e16], 0.5, 0.0, 1.0), [0.25, 0.25])
    x = project_simplex(np.full(1000, 1e300))
    np.testing.assert_array_equal(x, x[0])
    assert abs(x.sum() - 1) < 1e-13


def test_an_answer_far_smaller_than_one():
    assert project_sum_box([0.0], 1e-230, 0.0).tolist() == [1e-230]
    assert project_sum_box([0.0, 0.0], 1e-296, 0.0, [np.inf, 0.0]).tolist() == [1e-296, 0.0]
    assert project_sum_box([-1e-269], 0.0, [-1e-269], 1.0).tolist() == [0.0]
    x = project_sum_box(np.zeros(4), 1e-5, [0.0, 0.0, -np.inf, -1e-19], [0.0, 0.0, 1e-5, 0.0], [1.0, 1.0, 1.0, -1.0])
    assert abs(x[2] - x[3] - 1e-5) < 1e-20


def test_one_entry_and_nothing_to_share():
    assert project_simplex([-3.0]).tolist() == [1.0]
    assert project_simplex([-3.0], 0).tolist() == [0.0]
    assert project_simplex([5.0, 7.0], 0.0).tolist() == [0.0, 0.0]
    assert project_simplex(np.zeros(4)).tolist() == [0.25] * 4
    assert project_sum_box([-3.0], 1.0, 0.0, 1.0).tolist() == [1.0]
    assert project_sum_box([-3.0], 2.5).tolist() == [2.5]
    assert project_sum_box([4.0, 5.0], 3.0, [1.0, 2.0], [1.0, 2.0]).tolist() == [1.0, 2.0]


# -- sum and bounds ------------------------------------------------------------------------------


@given(boxes())
def test_sum_and_box_against_rational_arithmetic(case):
    x = project_sum_box(case["v"], case["total"], case["lower"], case["upper"])
    check_optimal(case, x)
    expected = exactly(case["v"], case["total"], case["lower"], case["upper"], case["weights"])
    slop = 16 * EPS * size(case, x) + (16 * EPS) ** 2 * np.abs(case["v"]).max()  # of x, not of v
    np.testing.assert_allclose(x, expected, rtol=0, atol=slop)


@given(boxes(weighted=True))
def test_weighted_sums_against_rational_arithmetic(case):
    x = project_sum_box(case["v"], case["total"], case["lower"], case["upper"], case["weights"])
    check_optimal(case, x)
    expected = exactly(case["v"], case["total"], case["lower"], case["upper"], case["weights"])
    np.testing.assert_allclose(x, expected, rtol=0, atol=64 * EPS * (np.abs(case["v"]).max() + size(case, x)))


@given(boxes())
def test_projecting_twice_is_projecting_once(case):
    x = project_sum_box(case["v"], case["total"], case["lower"], case["upper"])
    again = project_sum_box(x, case["total"], case["lower"], case["upper"])
    np.testing.assert_allclose(again, x, rtol=0, atol=8 * EPS * size(case, x))


@given(boxes(), st.lists(ENTRY, min_size=12, max_size=12))
def test_points_do_not_move_apart(case, other):
    other = np.array(other[: len(case["v"])])
    x, y = (project_sum_box(v, case["total"], case["lower"], case["upper"]) for v in (case["v"], other))
    slop = 64 * EPS * (np.abs(case["v"]).sum() + np.abs(other).sum() + size(case, x))
    assert np.linalg.norm(x - y) <= np.linalg.norm(case["v"] - other) + slop


@given(st.lists(ENTRY, min_size=1, max_size=15))
def test_the_simplex_is_a_sum_and_a_box(v):
    np.testing.assert_allclose(
        project_simplex(v, 0.7), project_sum_box(v, 0.7, lower=0), rtol=0, atol=16 * EPS * (1 + np.abs(v).max())
    )


@pytest.mark.parametrize("seed", range(6))
def test_against_a_qp_solver(seed):
    import cvxpy as cp

    rng = np.random.default_rng(seed)
    n = 12
    v, lower = rng.standard_normal(n), -rng.random(n)
    upper, weights = lower + rng.random(n), rng.standard_normal(n)
    total = float(weights @ (lower + (upper - lower) * rng.random(n)))
    x = cp.Variable(n)
    constraints = [weights @ x == total, x >= lower, x <= upper]
    cp.Problem(cp.Minimize(cp.sum_squares(x - v)), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13
    )
    np.testing.assert_allclose(project_sum_box(v, total, lower, upper, weights), x.value, atol=1e-6)


def test_float32_answers_are_within_their_bounds_and_near_the_float64_ones():
    rng = np.random.default_rng(3)
    V = rng.standard_normal((50, 40)).astype(np.float32)
    x = project_sum_box(V, 3.0, -0.1, 0.2)
    assert x.dtype == np.float32
    assert x.max() == np.float32(0.2)
    assert x.min() == np.float32(-0.1)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(x.sum(axis=1, dtype=np.float64), 3.0, atol=8 * eps)
    np.testing.assert_allclose(x, project_sum_box(V.astype(np.float64), 3.0, -0.1, 0.2), atol=4 * eps)
    # 0.7 as a float32 is below 0.7: what rounding takes from the largest sum is no contradiction
    np.testing.assert_array_equal(project_sum_box(np.zeros(10, np.float32), 7.0, 0.0, 0.7), np.float32(0.7))


# -- work ----------------------------------------------------------------------------------------


def crawling(n):
    """Every pass of Newton's method from below drops one entry, since each is a little below its threshold."""
    v, gap = [0.0] * n, 1e-14
    depth = 1.0 + gap
    v.append(-depth / n)
    for _ in range(12):
        step = 1.5 * (depth - 1.0)
        depth += len(v) * step
        v.append(v[-1] - step)
    return np.array(v)


def families(n):
    rng = np.random.default_rng(7)
    yield "normal", rng.standard_normal(n), 0.0, 0.01, 1.0
    yield "wide", rng.standard_normal(n), -1.0, 1.0, 0.1 * n
    yield "uneven", np.exp(30 * rng.standard_normal(n)), 0.0, np.inf, 1.0
    yield "steps", np.repeat(np.arange(10.0), n // 10), 0.0, 0.5, 0.3 * n
    yield "uneven bounds", rng.standard_normal(n), -np.exp(20 * rng.random(n)), np.exp(20 * rng.random(n)), 1.0
    yield "crawling", crawling(n), 0.0, np.inf, 1.0
    yield "from both sides", 10.0 ** rng.uniform(-12, 12, n) * rng.choice([-1, 1], n), -1.0, 1.0, 0.0


@pytest.mark.parametrize("name", [family[0] for family in families(10)])
def test_work_is_a_few_passes(name, monkeypatch):
    """Coordinates looked at, counted in Python: at most 15 n."""
    seen, split = [], _compiled._split

    def counted(t, low, high, count, *rest):
        seen.append(count)
        return split(t, low, high, count, *rest)

    monkeypatch.setattr(_compiled, "_split", counted)
    _, v, lower, upper, total = next(family for family in families(3000) if family[0] == name)
    n = len(v)
    lower, upper = np.broadcast_to(lower, n).copy(), np.broadcast_to(upper, n).copy()
    t = _compiled.multiplier.py_func(v, np.empty(0), lower, upper, total, np.empty(n, np.int64))
    assert sum(seen) <= 15 * n
    x = np.clip(v - t, lower, upper)
    assert abs(x.sum() - total) <= 1e-9 * (np.abs(x).sum() + total + np.abs(v).max())


@pytest.mark.parametrize("n", [20, 500, 5000])
def test_simplex_where_newton_crawls(n):
    v = crawling(n)
    np.testing.assert_allclose(project_simplex(v), by_sorting(v[None], 1.0)[0], rtol=0, atol=8 * EPS)


# -- interface -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_and_any_leading_shape(axis):
    rng = np.random.default_rng(4)
    V = rng.standard_normal((3, 4, 5))
    n = V.shape[axis]
    total = rng.random(np.delete(V.shape, axis % 3))
    upper = 2.0 * rng.random(V.shape) + 1.0
    for project in (project_simplex, lambda v, s, axis: project_sum_box(v, s, 0.0, upper, np.arange(1.0, n + 1), axis)):
        x = project(V, total, axis=axis)
        assert x.shape == V.shape
        for k in np.ndindex(*total.shape):
            where = list(k)
            where.insert(axis % 3, slice(None))
            if project is project_simplex:
                alone = project_simplex(V[tuple(where)], total[k])
            else:
                alone = project_sum_box(V[tuple(where)], total[k], 0.0, upper[tuple(where)], np.arange(1.0, n + 1))
            np.testing.assert_array_equal(x[tuple(where)], alone)


def test_bounds_broadcast():
    V = np.random.default_rng(5).standard_normal((6, 8))
    for upper in (0.3, np.full(8, 0.3), np.full((6, 1), 0.3), np.full((6, 8), 0.3), np.full((1, 8), 0.3)):
        np.testing.assert_array_equal(project_sum_box(V, 1.0, 0.0, upper), project_sum_box(V, 1.0, 0.0, 0.3))


def test_inputs_are_not_touched_and_need_not_be_contiguous():
    V = np.random.default_rng(6).standard_normal((9, 14))
    kept = V.copy()
    np.testing.assert_array_equal(project_simplex(V[::2, ::3]), project_simplex(V[::2, ::3].copy()))
    np.testing.assert_array_equal(project_simplex(V.T, axis=0), project_simplex(V).T)
    project_sum_box(V, 1.0, -1.0, 1.0)
    np.testing.assert_array_equal(V, kept)


def test_integers_and_empty_batches():
    assert project_simplex([3, 0]).tolist() == [1.0, 0.0]
    assert project_simplex(np.zeros((0, 4))).shape == (0, 4)
    assert project_sum_box(np.zeros((2, 0, 4)), 1.0, 0.0, 1.0).shape == (2, 0, 4)


def test_weights_of_zero_leave_a_coordinate_to_its_bounds():
    x = project_sum_box([5.0, 1.0, -1.0], 1.0, 0.0, 2.0, weights=[0.0, 1.0, -1.0])
    assert x.tolist() == [2.0, 1.0, 0.0]
    assert project_sum_box([5.0, 1.0], 0.0, 0.0, 2.0, weights=[0.0, 0.0]).tolist() == [2.0, 1.0]
    scaled = project_sum_box([0.3, 0.1], 1e-200, weights=[1e-200, 2e-200])
    np.testing.assert_allclose(scaled, project_sum_box([0.3, 0.1], 1.0, weights=[1.0, 2.0]), rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project_simplex([1.0, 2.0], -1.0), r"total = -1.0 .* from 0.0 to inf, which misses it by 1;"),
        (lambda: project_simplex(np.ones((3, 2)), [1.0, -2.0, 0.0]), r"total of vector 1 = -2.0 .* misses it by 2;"),
        (lambda: project_sum_box([0.0] * 4, 1.0, 0.0, 0.2), r"total = 1.0 .* from 0.0 to 0.8, which misses it by 0.2;"),
        (lambda: project_sum_box([0.0] * 3, -9.0, [-1, -2, -3], 5.0), r"from -6.0 to 15.0, which misses it by 3;"),
        (lambda: project_sum_box([0.0] * 2, 9.0, 0.0, 1.0, [2.0, -1.0]), r"from -1.0 to 2.0, which misses it by 7;"),
        (lambda: project_sum_box([0.0] * 2, 1.0, 0.0, 1.0, [0.0, 0.0]), r"from 0.0 to 0.0, which misses it by 1;"),
        (lambda: project_sum_box(np.zeros((3, 2)), 1.0, 0, [[9], [0.4], [9]]), r"vector 1 .* misses it by 0.2;"),
        (lambda: project_sum_box([0.0] * 2, 1.0, [0.0, 3.0], 2.0), "lower must not exceed upper; .* 3.0 and 2.0 at en"),
        (lambda: project_sum_box([0.0] * 2, 1.0, np.inf), r"lower must not be \+inf"),
    ],
)
def test_what_cannot_be_says_by_how_much(call, message):
    with pytest.raises(InfeasibleError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project_simplex([[1.0, np.nan]]), r"V must be finite; V\[0, 1\] is nan"),
        (lambda: project_simplex([1.0, -np.inf]), r"V must be finite; V\[1\] is -inf"),
        (lambda: project_simplex(3.0), "V must have an axis"),
        (lambda: project_simplex([1.0], axis=1), "V must have an axis 1"),
        (lambda: project_simplex(np.zeros((3, 0))), "V must have entries along axis -1"),
        (lambda: project_simplex(["a"]), "V must hold real numbers"),
        (lambda: project_simplex(np.ones((2, 3)), [1.0, 2.0, 3.0]), r"total must be a number or have shape \(2,\)"),
        (lambda: project_simplex([1.0], np.nan), "total must be finite"),
        (lambda: project_sum_box([1.0, 2.0], 1.0, [0.0, 0.0, 0.0]), r"lower must broadcast to the shape \(2,\)"),
        (lambda: project_sum_box([1.0, 2.0], 1.0, upper=[np.nan, 0.0]), "upper must not be NaN"),
        (lambda: project_sum_box([1.0, 2.0], 1.0, weights=[1.0]), r"weights must be finite with shape \(2,\)"),
        (lambda: project_sum_box([1.0, 2.0], 1.0, weights=[1.0, 1e-200]), "within a factor of 1e100"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_finite_entries_are_no_infinities():
    x = project_simplex(np.full(100, 1e308))
    np.testing.assert_allclose(x, 0.01)
