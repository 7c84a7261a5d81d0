"""The block solver against Clarabel, and by certificates computed here from the float64 matrix alone."""

import signal
import time
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from duals import BY_NAME, MACHINES, certify, clarabel_dual, feasible_within_rounding, hessian, kernel_matrix, machine
from duals import labels as labels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

from bcd import Status, _compiled
from bcd import dual as module
from bcd import gram as gram_module
from bcd.constraints import InfeasibleError
from bcd.dual import Dual, solve_dual
from bcd.gram import Gram, Kernel

LIMITS = (Status.ITERATION_LIMIT, Status.TIME_LIMIT, Status.CALLBACK, Status.INTERRUPTED)


def rows(n, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def check(result, K, dual, tol=None, exact=True):
    """The point is feasible, and what the result says of it is true; with tol: it is a solution."""
    found = certify(K, dual, result.x)
    assert feasible_within_rounding(found)
    b = result.x.reshape(-1, len(K)).sum(axis=0)
    size = float(np.abs(K).max() * np.abs(b).sum() + np.abs(dual.linear).max())  # of the numbers in a gradient
    # the gradient of a point that has not converged was not computed anew, but brought after every step
    error = (1e-13 if exact and result.status is Status.CONVERGED else 1e-11 if exact else 1e-6) * size
    np.testing.assert_allclose(result.coefficients, b, rtol=0, atol=1e-15 * np.abs(result.x).max())
    np.testing.assert_allclose(result.product, K @ b, rtol=0, atol=error)
    mass = np.abs(result.x).sum() + (dual.upper - dual.lower).sum()
    assert result.objective == pytest.approx(found.objective, abs=error * mass)
    assert result.violation == pytest.approx(found.violation, abs=2 * error)
    assert result.gap == pytest.approx(found.gap, abs=error * mass)
    assert result.seconds > 0
    assert result.columns >= 0
    if result.status is Status.CONVERGED and tol is not None:
        assert found.violation <= tol + 2e-13 * size
    check_offset(result, K, dual, error)
    return found


def check_offset(result, K, dual, error):
    """Minus the mean gradient of a sum's free coordinates; the middle of the ends where there is none."""
    grad = hessian(K, dual) @ result.x + dual.linear
    up, low = result.x < dual.upper, result.x > dual.lower
    for s in range(len(dual.totals)):
        member = labels_of(dual) == s
        if (member & up & low).any():
            expected = -grad[member & up & low].mean()
        elif (member & up).any() and (member & low).any():
            expected = -0.5 * (grad[member & up].min() + grad[member & low].max())
        else:  # any offset beyond the one end is as good
            assert np.isfinite(result.offset[s]) or not (member & (up | low)).any()
            continue
        assert result.offset[s] == pytest.approx(expected, abs=2 * error + 1e-12)


def shrink(monkeypatch, **values):
    """The sizes of large problems for small data."""
    defaults = {"PART": 24, "WHOLE": 0, "LEAST": 4, "MOST": 16}
    for name, value in (defaults | values).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(gram_module, "_SMALL_NS", -1.0)


def spy(monkeypatch, name):
    """Count the calls of a method of the solver."""
    calls, method = [], getattr(module._Point, name)

    def counted(self, *args, **options):
        out = method(self, *args, **options)
        calls.append(out)
        return out

    monkeypatch.setattr(module._Point, name, counted)
    return calls


# -- against an independent solver ---------------------------------------------------------------


@st.composite
def problems(draw, most=14):
    """A machine with a kernel matrix of any rank; some rows twice, some coordinates with l = u."""
    kind = draw(st.sampled_from(MACHINES))
    seed = draw(st.integers(0, 2**20))
    n = draw(st.integers(2, most))
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, draw(st.integers(1, 4))))
    if draw(st.booleans()):
        X[n // 2 :] = X[: n - n // 2]
    kernel = draw(st.sampled_from([Kernel("linear"), Kernel("rbf", gamma=0.5), Kernel("poly", gamma=0.5, coef0=1.0)]))
    K = kernel_matrix(kernel, X)
    dual = machine(kind, n, seed, K, draw(st.sampled_from([0.1, 1.0, 30.0])))
    if kind in ("svc", "svr") and draw(st.booleans()):
        fixed = rng.random(len(dual.linear)) < 0.3
        dual = Dual(
            dual.linear, np.where(fixed, 0, dual.lower), np.where(fixed, 0, dual.upper), dual.totals, dual.labels
        )
    return X, kernel, K, dual


@settings(max_examples=250)
@given(problems(), st.sampled_from(["matrix", "auto", "float64"]), st.sampled_from([1e-3, 1e-8]))
def test_every_machine_against_clarabel(problem, how, tol):
    """Objective within the certified gap of the optimum; a point that is feasible; numbers that are true."""
    X, kernel, K, dual = problem
    gram = Gram(K, Kernel("precomputed")) if how == "matrix" else Gram(X, kernel, dtype=how)
    result = solve_dual(gram, dual, tol=tol)
    assert result.status is Status.CONVERGED
    found = check(result, K, dual, tol)
    best, accuracy = clarabel_dual(K, dual)
    rounding = accuracy * (1 + abs(best))
    assert -rounding <= found.objective - best <= found.gap + rounding
    assert found.gap <= tol * (dual.upper - dual.lower).sum() + rounding


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
def test_every_kernel(kind, name, form, monkeypatch):
    """In blocks and from float32 entries, as large problems are."""
    shrink(monkeypatch, PART=10**6, LEAST=8, MOST=64)
    X = rows(120)
    K = kernel_matrix(BY_NAME[name], X)
    dual = machine(kind, 120, 3, K)
    result = solve_dual(Gram(form(X), BY_NAME[name]), dual, tol=1e-5)
    if np.linalg.eigvalsh(K)[0] > -1e-10:
        assert result.status is Status.CONVERGED
        best = clarabel_dual(K, dual)[0]
        assert check(result, K, dual, 1e-5).objective <= best + 1e-5 * (dual.upper - dual.lower).sum()
    else:
        check(result, K, dual, 1e-5)


# -- parts, blocks and the sampled certificate ---------------------------------------------------


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("few", [0, 5e6])
def test_nested_parts(kind, precision, few, monkeypatch):
    """Sizes for thousands of rows on 200 of them: same objective, and the violation holds in float64."""
    shrink(monkeypatch, FEW=few, SAMPLE=20)
    X, tol = rows(200), 1e-4
    kernel = Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 200, 1, K, 5.0)
    parts, decisive = spy(monkeypatch, "_solve_part"), spy(monkeypatch, "_decisive")
    result = solve_dual(Gram(X, kernel, dtype=precision), dual, tol=tol)
    assert result.status is Status.CONVERGED
    found = check(result, K, dual, tol, exact=few > 0 or precision == "float64")
    best, accuracy = clarabel_dual(K, dual)
    assert abs(found.objective - best) <= found.gap + accuracy * (1 + abs(best))
    assert len(parts) > 1
    assert (len(decisive) > 0) == (few == 0 and precision == "auto")
    if few == 0 and precision == "auto":
        assert any(not isinstance(rows, slice) for rows in decisive)
        assert found.violation <= tol  # computed from rows that were never rebuilt, too
    apart = solve_dual(Gram(X, kernel, dtype=precision), dual, tol=tol, shrinking=False)
    assert apart.status is Status.CONVERGED
    assert abs(apart.objective - result.objective) <= found.gap + apart.gap
    count = len(parts)
    check(apart, K, dual, tol, exact=few > 0 or precision == "float64")
    assert len(parts) == count


def test_blocks_grow_and_shrink_within_their_limits(monkeypatch):
    shrink(monkeypatch, PART=10**6, LEAST=4, MOST=32)
    sizes, choose = [], module._Point._choose

    def noted(self, grad, size, previous):
        W = choose(self, grad, size, previous)
        sizes.append(size)
        assert len(W) == len(set(W)) <= size
        return W

    monkeypatch.setattr(module._Point, "_choose", noted)
    X = rows(300)
    result = solve_dual(Gram(X, Kernel("rbf", gamma=0.3)), machine("svc", 300, 1, None, 10.0), tol=1e-5)
    assert result.status is Status.CONVERGED
    assert sizes[0] == 8
    assert max(sizes) == 32
    assert min(sizes) >= 4
    assert all(b in (a // 2, a, 2 * a) for a, b in pairwise(sizes))


def test_rows_the_sample_misses_are_still_certified(monkeypatch):
    """Rows whose rounding is far larger than that of every row in the sample must not pass unseen."""
    shrink(monkeypatch, PART=10**6, FEW=0, SAMPLE=8)
    rng = np.random.default_rng(0)
    for seed in range(10):
        X = rng.normal(size=(160, 3)) * np.where(rng.random(160) < 0.1, 30.0, 1.0)[:, None]
        kernel = Kernel("poly", gamma=0.1, degree=2, coef0=1.0)
        K, dual = kernel_matrix(kernel, X), machine("svc", 160, seed, None, 1.0)
        result = solve_dual(Gram(X, kernel), dual, tol=1e-2)
        found = certify(K, dual, result.x)
        assert result.status is Status.CONVERGED
        assert found.violation <= 1.01e-2, (seed, found.violation)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MACHINES)
def test_parts_at_their_own_size(kind):
    """Nothing is made small: 20,000 rows are solved in parts, certified by float64 products of all rows."""
    X = rows(20_000, 6)
    gram, kernel = Gram(X, Kernel("rbf", gamma=0.1)), Kernel("rbf", gamma=0.1)
    dual = machine(kind, 20_000)
    if kind == "svdd":
        dual = Dual(dual.linear, dual.lower, np.full(20_000, 0.01), dual.totals, dual.labels)
    if kind in ("svc", "nu-svc"):
        y = np.where(X[:, 0] * X[:, 1] > 0, 1.0, -1.0)
        total = [0.0] if kind == "svc" else [0.1 * len(y), -0.1 * len(y)]
        labels = np.empty(0, np.int64) if kind == "svc" else (y < 0).astype(np.int64)
        dual = Dual(-y * (kind == "svc"), np.minimum(y, 0), np.maximum(y, 0), np.array(total), labels)
    result = solve_dual(gram, dual, tol=1e-3)
    assert result.status is Status.CONVERGED
    b = result.x.reshape(-1, 20_000).sum(axis=0)
    exact = Gram(X, kernel, dtype="float64").exact_product(np.flatnonzero(b), b[np.flatnonzero(b)])
    grad = np.tile(exact, len(dual.linear) // 20_000) + dual.linear
    for s in range(len(dual.totals)):
        member = labels_of(dual) == s
        up, low = member & (result.x < dual.upper), member & (result.x > dual.lower)
        assert grad[low].max() - grad[up].min() <= 1.001e-3


# -- precision -----------------------------------------------------------------------------------


def demanding(n=150):
    """Large multipliers on a nearly singular matrix: float32 gradients are off by more than tol."""
    X = rows(n, 2)
    kernel = Kernel("rbf", gamma=0.05)
    return X, kernel, kernel_matrix(kernel, X), machine("svc", n, 0, None, 1e5)


def test_precision_rises_where_float32_cannot_reach_tol(monkeypatch):
    shrink(monkeypatch, PART=10**6, LEAST=8, MOST=16)
    X, kernel, K, dual = demanding()
    raised, measured = spy(monkeypatch, "_sharpen"), spy(monkeypatch, "_measured")
    result = solve_dual(Gram(X, kernel), dual, tol=1e-4)
    assert raised == [True]
    assert True in measured  # rounding was seen in the gradient before the end
    assert result.dtype == np.float64
    assert result.status is Status.CONVERGED
    size = np.abs(K).max() * np.abs(result.x).sum()
    assert check(result, K, dual, 1e-4).violation <= 1e-4 + 1e-15 * size * 10


def test_precision_stays_where_float32_is_enough(monkeypatch):
    shrink(monkeypatch, PART=10**6)
    X, kernel = rows(150), Kernel("rbf", gamma=0.3)
    result = solve_dual(Gram(X, kernel), machine("svc", 150), tol=1e-3)
    assert result.dtype == np.float32
    assert result.status is Status.CONVERGED


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("small", [False, True])
def test_tolerance_zero_stops_at_a_good_point(kind, small, monkeypatch):
    if not small:
        shrink(monkeypatch)
    X, kernel = rows(150), Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 150, 2, K)
    result = solve_dual(Gram(X, kernel), dual, tol=0.0)
    found = check(result, K, dual)
    assert result.status in (Status.STAGNATED, Status.CONVERGED)
    assert result.dtype == np.float64
    assert found.violation <= 1e-9
    assert result.status is Status.STAGNATED or found.violation <= 1e-15


# -- stops ---------------------------------------------------------------------------------------


@cache
def hard(n=300):
    X = rows(n)
    kernel = Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    return X, kernel, K, machine("svc", n, 0, K, 100.0)


@cache
def best_of_hard():
    *_, K, dual = hard()
    return clarabel_dual(K, dual)[0]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ({"max_iter": 40}, Status.ITERATION_LIMIT),
        ({"max_iter": 0}, Status.ITERATION_LIMIT),
        ({"time_limit": 0.0}, Status.TIME_LIMIT),
        ({"callback": lambda at: at.iteration > 0}, Status.CALLBACK),
        ({"callback": lambda at: True}, Status.CALLBACK),
    ],
)
def test_limits_keep_a_feasible_point_and_its_gap(limit, status, parts, monkeypatch):
    shrink(monkeypatch, PART=40 if parts else 10**6)
    X, kernel, K, dual = hard()
    result = solve_dual(Gram(X, kernel), dual, tol=1e-8, **limit)
    assert result.status is status
    found = check(result, K, dual, exact=False)
    assert np.isfinite(result.gap)
    assert found.objective <= 0.0  # of the start
    assert found.objective - best_of_hard() <= found.gap + 1e-3
    if "max_iter" in limit:
        assert result.iterations <= limit["max_iter"]
    later = solve_dual(Gram(X, kernel), dual, result.x, tol=1e-3)
    assert later.status is Status.CONVERGED


def test_time_limit_is_met_within_a_part(monkeypatch):
    """Each level looks at the clock: no part is finished first."""
    shrink(monkeypatch, PART=40)
    X, kernel, _, dual = hard()
    clock = iter(np.arange(0.0, 1e6, 1.0))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    result = solve_dual(Gram(X, kernel), dual, tol=1e-8, time_limit=12.0)
    assert result.status is Status.TIME_LIMIT
    assert result.seconds < 40


def test_time_limit_in_seconds():
    """Nothing between two looks at the clock takes long."""
    X, kernel, K, dual = demanding(600)
    solve_dual(Gram(X[:50], kernel), machine("svc", 50), tol=1e-3)
    started = time.perf_counter()
    result = solve_dual(Gram(X, kernel), dual, tol=1e-12, time_limit=0.2)
    assert time.perf_counter() - started < 5
    assert result.status in (Status.TIME_LIMIT, Status.STAGNATED, Status.CONVERGED)
    check(result, K, dual, exact=False)


def test_ctrl_c_keeps_the_point(monkeypatch):
    shrink(monkeypatch)
    X, kernel, K, dual = hard()
    looks = []

    def press(at):
        looks.append(at.iteration)
        if len(looks) == 3:
            signal.raise_signal(signal.SIGINT)

    result = solve_dual(Gram(X, kernel), dual, tol=1e-8, callback=press)
    assert result.status is Status.INTERRUPTED
    assert len(looks) == 3
    assert check(result, K, dual, exact=False).objective < 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts():
    X, kernel, _, dual = hard()

    def press(at):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        solve_dual(Gram(X, kernel), dual, callback=press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_callback_leaves_nothing_behind():
    X, kernel, _, dual = hard()
    gram = Gram(X, kernel, threads=2)

    def broken(at):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solve_dual(gram, dual, callback=broken)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert gram.team.pool is None


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", MACHINES)
def test_the_objective_never_rises(kind, parts, monkeypatch):
    """From one outer step to the next, in float64; what the callback sees is true."""
    shrink(monkeypatch, PART=40 if parts else 10**6, LEAST=8, MOST=32)
    X, kernel, K, _ = hard()
    dual, seen = machine(kind, 300, 0, K, 10.0), []

    def look(at):
        found = certify(K, dual, at.x)
        assert feasible_within_rounding(found)
        assert at.objective == pytest.approx(found.objective, rel=1e-10, abs=1e-9)
        assert at.violation == pytest.approx(found.violation, abs=1e-9)
        seen.append((at.objective, at.iteration, at.columns, at.seconds))

    result = solve_dual(Gram(X, kernel, dtype="float64"), dual, tol=1e-6, callback=look)
    assert result.status is Status.CONVERGED
    assert len(seen) > 3
    objective, *counts = np.array(seen).T
    assert (np.diff(objective) <= 1e-13 * np.abs(objective[1:]) + 1e-15).all()
    assert all((np.diff(count) >= 0).all() for count in counts)


# -- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MACHINES)
def test_an_infeasible_start_is_mended(kind):
    X, kernel = rows(60), Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 60, 0, K)
    wild = np.random.default_rng(0).normal(size=len(dual.linear)) * 10
    kept, first = wild.copy(), []
    result = solve_dual(Gram(X, kernel), dual, wild, tol=1e-6, callback=lambda at: first.append(at.x.copy()))
    assert result.status is Status.CONVERGED
    check(result, K, dual, 1e-6)
    assert (wild == kept).all()
    assert feasible_within_rounding(certify(K, dual, first[0]))
    np.testing.assert_allclose(first[0], module._near(dual.bind(), wild), atol=1e-12)


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("parts", [False, True])
def test_a_warm_start_from_the_solution_takes_no_steps(kind, parts, monkeypatch):
    if parts:
        shrink(monkeypatch)
    X, kernel = rows(200), Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 200, 0, K)
    cold = solve_dual(Gram(X, kernel), dual, tol=1e-4)
    warm = solve_dual(Gram(X, kernel), dual, cold.x, tol=1e-4)
    assert cold.status is warm.status is Status.CONVERGED
    assert cold.iterations > 20
    assert warm.iterations <= 2
    np.testing.assert_allclose(warm.x, cold.x, atol=1e-3)


def test_a_run_is_repeated_bit_for_bit():
    X, kernel, _, dual = hard()
    one, two = (solve_dual(Gram(X, kernel), dual, tol=1e-5) for _ in range(2))
    assert (one.x == two.x).all()
    assert one.iterations == two.iterations


# -- hard and degenerate problems ----------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-12, 1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("kind", MACHINES)
def test_an_indefinite_matrix_ends_with_true_numbers(kind, noise):
    """PSD plus noise: a status, a feasible point, and the violation that it says."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(80, 3))
        E = rng.normal(size=(80, 80))
        K = kernel_matrix(Kernel("rbf", gamma=0.3), X) + noise * (E + E.T) / 2
        dual = machine(kind, 80, seed, K, 3.0)
        objective = []
        result = solve_dual(
            Gram(K, Kernel("precomputed")),
            dual,
            tol=1e-4,
            time_limit=20,
            callback=lambda at, seen=objective: seen.append(at.objective),
        )
        found = check(result, K, dual, 1e-4)
        assert result.status in (Status.CONVERGED, Status.STAGNATED)
        assert (result.status is Status.CONVERGED) == (found.violation <= 1e-4)
        assert (np.diff(objective) <= 1e-12 * np.abs(objective[1:]) + 1e-13).all()
        assert noise > 1e-3 or result.status is Status.CONVERGED


def test_a_sigmoid_kernel_that_is_indefinite(monkeypatch):
    shrink(monkeypatch)
    X = rows(200, 5)
    kernel = Kernel("sigmoid", gamma=0.5, coef0=-1.0)
    K, dual = kernel_matrix(kernel, X), machine("svc", 200)
    assert np.linalg.eigvalsh(K)[0] < -1
    result = solve_dual(Gram(X, kernel), dual, tol=1e-3, time_limit=20)
    found = check(result, K, dual, 1e-3, exact=False)
    assert result.status in (Status.CONVERGED, Status.STAGNATED)
    assert result.status is Status.STAGNATED or found.violation <= 1e-3 * 1.001


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("how", ["zero matrix", "zero rows", "rbf"])
def test_tiny_and_zero_matrices(kind, n, how):
    """A linear program where the matrix is zero; one row; two rows."""
    X = np.zeros((n, 3)) if how == "zero rows" else rows(n)
    kernel = Kernel("rbf" if how == "rbf" else "linear")
    K = np.zeros((n, n)) if how == "zero matrix" else kernel_matrix(kernel, X)
    dual = machine(kind, n, 0, K)
    if n == 1 and kind == "nu-svc":
        pytest.skip("one row has one label only")
    gram = Gram(K, Kernel("precomputed")) if how == "zero matrix" else Gram(X, kernel)
    result = solve_dual(gram, dual, tol=1e-9)
    assert result.status is Status.CONVERGED
    found = check(result, K, dual, 1e-9)
    assert found.gap <= 1e-8
    assert np.isfinite(result.offset).all()


@pytest.mark.parametrize("kind", ["svc", "svr", "one-class"])
@pytest.mark.parametrize("small", [False, True])
def test_rows_twice_with_opposite_labels(kind, small, monkeypatch):
    if not small:
        shrink(monkeypatch)
    X = np.repeat(rows(40), 3, axis=0)
    kernel = Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 120, 0, K, 1e3)
    result = solve_dual(Gram(X, kernel), dual, tol=1e-3)
    assert result.status is Status.CONVERGED
    check(result, K, dual, 1e-3, exact=False)


def test_rows_twice_are_weights():
    X, kernel = rows(50), Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine("svc", 50)
    twice = Dual(
        *(np.concatenate([part, part]) for part in (dual.linear, dual.lower, dual.upper)), dual.totals, dual.labels
    )
    heavy = Dual(dual.linear, 2 * dual.lower, 2 * dual.upper, dual.totals, dual.labels)
    one = solve_dual(Gram(np.concatenate([X, X]), kernel), twice, tol=1e-8)
    two = solve_dual(Gram(X, kernel), heavy, tol=1e-8)
    assert one.objective == pytest.approx(two.objective, abs=1e-6)
    np.testing.assert_allclose(K @ one.coefficients.reshape(2, 50).sum(axis=0), K @ two.coefficients, atol=1e-4)


@pytest.mark.parametrize("kind", MACHINES)
def test_coordinates_that_cannot_move_stay(kind):
    """The bounds are equal, here at values that are not zero."""
    X, kernel = rows(60), Kernel("rbf", gamma=0.3)
    K = kernel_matrix(kernel, X)
    dual = machine(kind, 60, 0, K)
    start = dual.bind().project(0.5 * (dual.lower + dual.upper))
    fixed = np.arange(len(start)) % 3 == 0
    tight = Dual(
        dual.linear, np.where(fixed, start, dual.lower), np.where(fixed, start, dual.upper), dual.totals, dual.labels
    )
    result = solve_dual(Gram(X, kernel), tight, tol=1e-7)
    assert result.status is Status.CONVERGED
    assert (result.x[fixed] == start[fixed]).all()
    found = check(result, K, tight, 1e-7)
    assert abs(found.objective - clarabel_dual(K, tight)[0]) <= found.gap + 1e-5


def test_all_coordinates_fixed():
    dual = Dual(
        np.ones(3), np.array([1.0, 2.0, 0.0]), np.array([1.0, 2.0, 0.0]), np.array([3.0]), np.empty(0, np.int64)
    )
    result = solve_dual(Gram(rows(3), Kernel()), dual)
    assert result.status is Status.CONVERGED
    assert result.x.tolist() == [1, 2, 0]
    assert (result.violation, result.gap) == (0, 0)


@pytest.mark.parametrize("totals", [[5.0], [-0.1]])
def test_totals_out_of_reach_are_refused(totals):
    dual = Dual(np.zeros(4), np.zeros(4), np.ones(4), np.array(totals), np.empty(0, np.int64))
    with pytest.raises(InfeasibleError, match="cannot be reached"):
        solve_dual(Gram(rows(4), Kernel()), dual)
    two = Dual(np.zeros(4), np.zeros(4), np.ones(4), np.array([1.0, *totals]), np.array([0, 0, 1, 1]))
    with pytest.raises(InfeasibleError, match=r"total\[1\]"):
        solve_dual(Gram(rows(4), Kernel()), two)


def test_crossed_bounds_are_refused():
    dual = Dual(np.zeros(2), np.ones(2), np.zeros(2), np.zeros(1), np.empty(0, np.int64))
    with pytest.raises(InfeasibleError, match="lower must not exceed upper"):
        solve_dual(Gram(rows(2), Kernel()), dual)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("C", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("kernel", [Kernel("linear"), Kernel("rbf", gamma=1 / 30)])
def test_large_multipliers_converge(C, kernel, parts, monkeypatch):
    """Where pair steps crawl and LIBSVM does not end in time."""
    if parts:
        shrink(monkeypatch, PART=60, LEAST=16, MOST=64)
    bunch = load_breast_cancer()
    X, y = scale(bunch.data)[:250], np.where(bunch.target[:250] == 1, 1.0, -1.0)
    K = kernel_matrix(kernel, X)
    dual = Dual(-y, np.minimum(y, 0) * C, np.maximum(y, 0) * C, np.zeros(1), np.empty(0, np.int64))
    result = solve_dual(Gram(X, kernel), dual, tol=1e-3, time_limit=60)
    assert result.status is Status.CONVERGED
    check(result, K, dual, exact=False)
    assert certify(K, dual, result.x).violation <= 1e-3 + 1e-13 * np.abs(K).max() * np.abs(result.x).sum()


def test_blocks_that_crawl_are_finished_by_second_order_steps(monkeypatch):
    """And without them the same problem needs many times the pair steps."""
    X, kernel, K, dual = demanding()
    calls = spy(monkeypatch, "_second_order")
    result = solve_dual(Gram(X, kernel), dual, tol=1e-4)
    assert len(calls) > 0
    assert result.status is Status.CONVERGED
    check(result, K, dual, 1e-4)
    x, grad = np.zeros(150), dual.linear.copy()
    steps = _compiled.pair_loop(K, grad, x, dual.lower, dual.upper, K.diagonal().copy(), 1e-4, 10 * result.iterations)[
        0
    ]
    assert steps == 10 * result.iterations


def test_the_columns_that_are_counted(monkeypatch):
    """Few support vectors need few columns."""
    shrink(monkeypatch, PART=10**6, LEAST=16, MOST=64)
    X = rows(600, 2)
    y = np.sign(X[:, 0] + 0.01)
    X[:, 0] += y
    dual = Dual(-y, np.minimum(y, 0), np.maximum(y, 0), np.zeros(1), np.empty(0, np.int64))
    result = solve_dual(Gram(X, Kernel("rbf", gamma=0.2)), dual, tol=1e-3)
    vectors = np.count_nonzero(result.x)
    assert vectors < 100
    assert vectors <= result.columns < 400


# -- starts --------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_a_start_near_a_point_is_feasible_and_keeps_its_zeros(seed, sums):
    """Where what a sum lacks fits into its other coordinates."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % sums
    lower, upper = -rng.random(60), rng.random(60) + 0.1
    x0 = np.where(rng.random(60) < 0.5, 0.0, rng.uniform(lower, upper))
    totals = np.bincount(labels, x0, minlength=sums) * rng.uniform(0.9, 1.1, sums)
    feasible = Dual(np.zeros(60), lower, upper, totals, labels if sums > 1 else np.empty(0, np.int64)).bind()
    x = module._near(feasible, x0)
    assert (x >= lower).all()
    assert (x <= upper).all()
    np.testing.assert_allclose(np.bincount(labels, x, minlength=sums), totals, atol=1e-12)
    for s in range(sums):
        mine = (labels == s) & (x0 != 0)
        excess = x0[mine].sum() - totals[s]
        if (x0[mine] - lower[mine] if excess > 0 else upper[mine] - x0[mine]).sum() >= abs(excess):
            assert (x[(labels == s) & (x0 == 0)] == 0).all()


def test_a_start_that_its_own_coordinates_cannot_mend_is_projected():
    feasible = Dual(np.zeros(3), np.zeros(3), np.ones(3), np.array([2.5]), np.empty(0, np.int64)).bind()
    np.testing.assert_allclose(module._near(feasible, [1.0, 0.0, 0.0]), feasible.project([1.0, 0.0, 0.0]))
