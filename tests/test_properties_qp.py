# SPDX-License-Identifier: BSD-3-Clause
"""Quadratic programs that hypothesis makes up: certificates, other solvers, every form, limits, re-solving."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from qps import (
    BOUNDS,
    EPS,
    LINEAR,
    MATRICES,
    SUMS,
    WEIGHTS,
    Case,
    forms,
    frank_wolfe_gap,
    judge_direction,
    judge_end,
    judge_ray,
    make_case,
    recession,
    rounding,
    sum_misses,
    sum_of,
    through_cvxpy,
    through_qpsolvers,
)  # fmt: skip

import bcd
from bcd import Status
from bcd.gram import Gram, Kernel


def examples(count):
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@st.composite
def cases(draw, most=40, matrices=MATRICES, linear=LINEAR, bounds=BOUNDS, sums=SUMS, weights=WEIGHTS, least=1):
    parts = [draw(st.sampled_from(styles)) for styles in (matrices, linear, bounds, sums, weights)]
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(least, most))
    note(f"make_case({seed}, {n}, {', '.join(map(repr, parts))})")
    return make_case(seed, n, *parts)


FINITE = ("box", "ties", "wide")  # bounds with which nothing falls without end
EASY = ("definite", "low rank", "mixed", "duplicates", "diagonal", "integers")
MODEST = ("zero", "normal", "ties")


# -- certificates --------------------------------------------------------------------------------


@examples(400)
@given(cases())
def test_a_result_is_certified_or_unbounded(case):
    judge_end(case, case.solve())


@examples(150)
@given(cases(bounds=FINITE))
def test_the_gap_is_small_where_the_set_is_bounded(case):
    """Residuals of r leave at most r times the mass that can move; no other solver is needed to believe it."""
    result = case.solve()
    verdict = judge_end(case, result)
    assert verdict.gap <= 2 * (1e-8 * verdict.scale + verdict.noise) * (case.upper - case.lower).sum()


@examples(60)
@given(cases(bounds=FINITE, linear=MODEST), st.sampled_from([1e-6, 1e-9]))
def test_a_gap_asked_for_is_reached(case, share):
    """Rounding of the gradient times the mass that can move is the least that float64 can certify."""
    least = float(rounding(case, case.solve().x).max() * (case.upper - case.lower).sum())
    target = share * (1 + case.size(case.inside)) + least
    result = case.solve(tol=1e-3, tol_gap=target)
    assert result.status is Status.CONVERGED
    assert result.gap <= target * (1 + 1e-9)
    assert frank_wolfe_gap(case, result.x) <= target * (1 + 1e-6) + least


# -- other solvers -------------------------------------------------------------------------------


@examples(150)
@given(cases(most=25, linear=MODEST, weights=("none", "positive", "signed")))
def test_values_are_those_of_clarabel(case):
    result = case.solve()
    judge_end(case, result)
    status, value = through_cvxpy(case)
    assume(status != "failed")
    if result.status is Status.UNBOUNDED:
        assert status.startswith(("unbounded", "infeasible_or_unbounded"))
        return
    assume(status in ("optimal", "optimal_inaccurate"))
    room = 1e-6 if status == "optimal" else 1e-3
    assert abs(value - result.objective) <= room * (1 + case.size(result.x))
    assert result.objective - value <= result.gap + room * (1 + case.size(result.x))


SOLVERS = {
    "piqp": {"eps_abs": 1e-9, "eps_rel": 1e-9},
    "osqp": {"eps_abs": 1e-7, "eps_rel": 1e-7, "max_iter": 40_000, "polish": True},
    "quadprog": {},
    "daqp": {},
}


@pytest.mark.parametrize("solver", SOLVERS)
@examples(60)
@given(data=st.data())
def test_values_are_those_of(solver, data):
    qpsolvers = pytest.importorskip("qpsolvers")
    if solver not in qpsolvers.available_solvers:
        pytest.skip(f"{solver} is not installed")
    definite = ("definite", "diagonal") if solver in ("quadprog", "daqp") else EASY
    case = data.draw(
        cases(most=25, matrices=definite, linear=MODEST, bounds=("simplex", "box", "mixed", "ties"),
              sums=("none", "total", "range", "side", "groups"), weights=("none", "positive"))
    )  # fmt: skip
    assume(recession(case) > -1e-9)
    result = case.solve()
    verdict = judge_end(case, result)
    x = through_qpsolvers(case, solver, **SOLVERS[solver])
    assume(x is not None)
    miss = np.maximum(np.maximum(case.lower - x, x - case.upper), 0).max() + sum_misses(case, x).max(initial=0)
    assume(miss < 1e-5)
    size = 1 + case.size(result.x) + case.size(x)
    price = np.abs(result.total_multipliers).sum() + np.abs(result.bound_multipliers).sum()
    assert result.objective <= case.value(x) + miss * price + verdict.gap + 1e-9 * size
    assert case.value(x) <= result.objective + 1e-4 * size


def test_a_solver_of_scipy_agrees():
    """SLSQP, for those who have nothing else installed."""
    from scipy.optimize import minimize

    for seed in range(20):
        case = make_case(seed, 8, "definite", "normal", "box", ("total", "range", "groups")[seed % 3], "positive")
        result = case.solve()
        judge_end(case, result)
        A, lo, hi = case.sums
        rows = [
            {"type": "eq", "fun": lambda x, r=r, t=t: r @ x - t} for r, t in zip(A[lo == hi], lo[lo == hi], strict=True)
        ]
        for sign, ends in ((1, lo), (-1, hi)):
            for r, t in zip(A, ends, strict=True):
                if np.isfinite(t) and not np.isin(t, lo[lo == hi]):
                    rows.append({"type": "ineq", "fun": lambda x, r=r, t=t, sign=sign: sign * (r @ x - t)})
        box = list(zip(case.lower, case.upper, strict=True))
        found = minimize(case.value, case.inside, jac=case.gradient, bounds=box, constraints=rows, method="SLSQP",
                         options={"ftol": 1e-13, "maxiter": 500})  # fmt: skip
        np.testing.assert_allclose(result.objective, found.fun, rtol=1e-6, atol=1e-8)


# -- every form of P -----------------------------------------------------------------------------


@examples(100)
@given(cases(most=25))
def test_all_forms_give_the_same_answer(case):
    results = {}
    for name, P in forms(case).items():
        result = bcd.solve_qp(P, case.q, **case.options)
        note(f"{name}: {result}")
        results[name] = (result, judge_end(case, result, name))
    assert len({result.status is Status.UNBOUNDED for result, _ in results.values()}) == 1
    for a, _ in results.values():
        for b, verdict in results.values():
            if verdict is not None:
                assert a.objective - b.objective <= a.gap + 1e-9 * (1 + case.size(b.x))


@examples(60)
@given(cases(most=25, linear=MODEST, bounds=("simplex", "box", "ties"), sums=("total", "vertex"), weights=("none",)),
       st.sampled_from(["linear", "precomputed"]))  # fmt: skip
def test_a_kernel_matrix_gives_the_same_answer(case, kernel):
    case = replace(case, F=case.F if case.F.shape[1] else np.zeros((case.n, 1)), D=np.zeros(case.n))
    gram = Gram(case.F if kernel == "linear" else case.P, Kernel(kernel))
    result = bcd.solve_qp(gram, case.q, **case.options)
    verdict = judge_end(case, result)
    other = case.solve()
    assert abs(result.objective - other.objective) <= verdict.gap + other.gap + 1e-9 * (1 + case.size(result.x))


# -- multipliers ---------------------------------------------------------------------------------


def with_total_moved(case, s, step):
    """The total at place s, or both of its ends, moved by a step."""

    def move(end):
        return None if end is None else end + step

    totals = [case.total] if case.groups is None else list(case.total)
    totals[s] = tuple(map(move, totals[s])) if isinstance(totals[s], tuple) else move(totals[s])
    return replace(case, total=totals[0] if case.groups is None else totals)


@examples(100)
@given(
    cases(most=20, linear=MODEST, bounds=("box", "ties", "mixed"), sums=("total", "range", "groups")),
    st.sampled_from([1e-3, 0.1]),
)
def test_multipliers_are_slopes_of_the_optimal_value(case, shift):
    """The value is convex in the totals and -y is a slope: the value at other totals lies above the tangent."""
    assume(recession(case) > -1e-9)
    result = case.solve()
    verdict = judge_end(case, result)
    room = verdict.gap if np.isfinite(verdict.gap) else 1e-6
    for s, y in enumerate(result.total_multipliers):
        for step in (-shift, shift):
            moved_case = with_total_moved(case, s, step)
            try:
                moved = moved_case.solve()
            except bcd.InfeasibleError:
                continue
            judge_end(moved_case, moved)
            slop = 1e-7 * (1 + case.size(result.x) + abs(y)) + room
            assert moved.objective >= result.objective - y * step - slop


@examples(60)
@given(
    cases(most=20, matrices=("definite",), linear=("normal",), bounds=("box", "wide"), sums=("total", "groups"),
          weights=("none", "positive"))
)  # fmt: skip
def test_multipliers_are_finite_differences(case):
    """Where a coordinate of a sum is well inside its bounds, the value is smooth in the total."""
    result = case.solve()
    judge_end(case, result)
    A, lo, hi = case.sums
    x, h = result.x, 1e-5
    for s in np.flatnonzero(lo == hi):
        if not ((A[s] != 0) & (x > case.lower + 0.05) & (x < case.upper - 0.05)).any():
            continue
        low, high = (with_total_moved(case, s, step).solve(tol=1e-11).objective for step in (-h, h))
        scale = 1 + np.abs(result.total_multipliers).max() + np.abs(case.gradient(x)).max()
        assert abs((high - low) / (2 * h) + result.total_multipliers[s]) <= 1e-4 * scale


# -- starts and limits ---------------------------------------------------------------------------


@examples(100)
@given(cases(), st.integers(0, 6), st.booleans())
def test_a_limit_returns_a_feasible_point_no_worse_than_the_start(case, limit, inside):
    start = case.inside if inside else case.inside + np.random.default_rng(0).standard_normal(case.n)
    result = case.solve(x0=start, max_iter=limit)
    x = result.x
    assert (x >= case.lower).all()
    assert (x <= case.upper).all()
    assert not sum_misses(case, x).any()
    assert result.iterations <= limit
    if inside:
        assert case.value(x) <= case.value(start) + 64 * EPS * (case.size(start) + case.size(x))
    if result.status is not Status.ITERATION_LIMIT:
        judge_end(case, result)


@examples(100)
@given(cases())
def test_the_objective_never_rises_above_the_start(case):
    seen = []
    result = case.solve(x0=case.inside, callback=lambda p: seen.append((p.objective, p.x)) and None)
    values = [case.value(x) for _, x in seen]
    room = 64 * EPS * max([case.size(x) for _, x in seen] + [case.size(case.inside)])
    for (told, _), value in zip(seen, values, strict=True):
        assert abs(told - value) <= room + 1e-9 * abs(value)
    assert (np.diff([case.value(case.inside), *values, case.value(result.x)]) <= room + 1e-12).all()
    for _, x in seen:
        assert (x >= case.lower).all()
        assert (x <= case.upper).all()


@examples(80)
@given(cases(linear=MODEST))
def test_the_solution_as_start_ends_at_once(case):
    first = case.solve()
    assume(first.status is not Status.UNBOUNDED)
    again = case.solve(x0=first.x)
    judge_end(case, again)
    assert again.iterations <= 70
    assert case.value(again.x) <= case.value(first.x) + 64 * EPS * case.size(first.x)


@st.composite
def changes(draw):
    """What changes between solves: the linear term, totals, bounds; a little or all of it."""
    return draw(
        st.lists(
            st.tuples(st.sampled_from(["q", "total", "bounds", "all", "nothing"]), st.sampled_from([1e-3, 0.1, 3.0])),
            min_size=1,
            max_size=4,
        )
    )


@examples(100)
@given(cases(most=25, linear=MODEST), changes(), st.sampled_from(["dense", "sparse", "low rank", "operator"]))
def test_solving_again_gives_what_a_fresh_solve_gives(case, sequence, form):
    rng = np.random.default_rng(0)
    P = forms(case)[form]
    qp = bcd.QP(P, weights=case.weights, groups=case.groups)
    judge_end(case, qp.solve(case.q, **case.constraints), form)
    for what, size in sequence:
        if what in ("q", "all"):
            case = replace(case, q=case.q + size * rng.standard_normal(case.n))
        if what in ("bounds", "all"):
            lower, upper = case.lower - size * rng.random(case.n), case.upper + size * rng.random(case.n)
            case = replace(case, lower=lower, upper=upper)
        if what in ("total", "all") and case.total is not None:
            inside = np.clip(case.inside + size * rng.standard_normal(case.n), case.lower, case.upper)
            A, lo, hi = case.sums
            totals = [sum_of(row, inside) if a == b else (a, b) for row, a, b in zip(A, lo, hi, strict=True)]
            case = replace(case, total=totals[0] if case.groups is None else totals)
        try:
            result = qp.solve(case.q, **case.constraints)
        except bcd.InfeasibleError:
            assert what == "all"  # a range left behind by the bounds
            return
        fresh = case.solve()
        judge_end(case, result, form)
        assert (result.status is Status.UNBOUNDED) == (fresh.status is Status.UNBOUNDED)
        if fresh.status is not Status.UNBOUNDED:
            room = 1e-7 * (1 + case.size(fresh.x) + case.size(result.x))
            assert abs(result.objective - fresh.objective) <= room


# -- what is wrong with the problem --------------------------------------------------------------


@examples(100)
@given(
    cases(most=20, bounds=("box", "ties", "fixed", "wide"), sums=("total", "range", "groups")),
    st.floats(1e-3, 10),
    st.booleans(),
)
def test_infeasible_totals_say_by_how_much(case, miss, above):
    A, lo, hi = case.sums
    closed = np.flatnonzero(np.isfinite(lo) | np.isfinite(hi))
    assume(len(closed) > 0)
    s = closed[0]
    row = A[s]
    ends = [float(sum_of(np.ones(case.n), np.minimum(row * case.lower, row * case.upper))),
            float(sum_of(np.ones(case.n), np.maximum(row * case.lower, row * case.upper)))]  # fmt: skip
    wrong = (ends[1] + miss, None) if above else (None, ends[0] - miss)
    if lo[s] == hi[s]:
        wrong = wrong[0] if above else wrong[1]
    totals = wrong if case.groups is None else [wrong if k == s else t for k, t in enumerate(case.total)]
    with pytest.raises(bcd.InfeasibleError, match="cannot be reached") as caught:
        replace(case, total=totals).solve()
    told = float(str(caught.value).split("misses it by ")[1].split(";")[0])
    assert abs(told - miss) <= 1e-4 * miss + 1e-9 * np.abs(ends).max()


@examples(100)
@given(st.integers(0, 2**32 - 1), st.integers(2, 25), st.sampled_from(["none", "total", "range"]),
       st.sampled_from(["dense", "sparse", "low rank", "operator"]))  # fmt: skip
def test_what_falls_without_end_is_reported_with_a_ray(seed, n, sums, form):
    """P is flat along a direction that keeps the sum and meets no bound, and q falls along it."""
    rng = np.random.default_rng(seed)
    ray = rng.integers(-2, 3, n).astype(float)
    if sums == "total":
        ray[0] -= ray.sum()
    if sums == "range":  # the sum may fall only
        ray = -np.abs(ray)
    assume(ray.any())
    F = rng.standard_normal((n, int(rng.integers(1, n))))
    F -= np.outer(ray, ray @ F) / (ray @ ray)
    q = rng.standard_normal(n)
    q -= ray * (q @ ray + 1) / (ray @ ray)
    lower, upper = np.where(ray < 0, -np.inf, 0.0), np.where(ray > 0, np.inf, 1.0)
    inside = np.clip(np.full(n, 0.5), lower, upper)
    total = {"none": None, "total": float(inside.sum()), "range": (None, float(inside.sum()))}[sums]
    case = Case(F, np.zeros(n), q, lower, upper, inside, total)
    result = bcd.solve_qp(forms(case)[form], q, **case.options)
    assert result.status is Status.UNBOUNDED
    judge_ray(case, result)


def free_directions(case, x):
    """A basis of the directions in which the coordinates of x between their bounds may go on.

    They keep every sum that is at an end of its range.
    """
    A, lo, hi = case.sums
    free = np.flatnonzero((x > case.lower) & (x < case.upper))
    slop = 64 * EPS * (np.abs(A) @ np.abs(x) + 1)
    rows = A[(A @ x <= lo + slop) | (A @ x >= hi - slop)][:, free]
    if not len(rows):
        return free, np.eye(len(free))
    _, sizes, basis = np.linalg.svd(rows)
    return free, basis[int((sizes > 1e-12).sum()) :].T


@examples(150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from(["none", "total", "groups"]),
       st.sampled_from(["dense", "sparse", "operator"]), st.sampled_from(["box", "free", "simplex"]),
       st.floats(0.01, 3))  # fmt: skip
def test_negative_curvature_is_an_error_or_out_of_reach(seed, n, sums, form, bounds, depth):
    """No point is returned whose free coordinates have negative curvature; the direction is what it says it is."""
    case = make_case(seed, n, "definite", "normal", bounds, sums)
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(n)
    P = case.P - depth * np.outer(v, v) / (v @ v)
    P = 0.5 * (P + P.T)
    crooked = Crooked.of(case, P)
    try:
        result = bcd.solve_qp(forms(crooked)[form], case.q, **case.options)
    except bcd.NonConvexError as error:
        judge_direction(crooked, error)
        return
    assert result.status in (Status.CONVERGED, Status.UNBOUNDED)
    if result.status is Status.CONVERGED:
        free, basis = free_directions(case, result.x)
        if basis.shape[1]:
            assert np.linalg.eigvalsh(basis.T @ P[np.ix_(free, free)] @ basis)[0] >= -1e-9 * np.abs(P).sum()


class Crooked(Case):
    """A case with a matrix that is no F F' + D."""

    @classmethod
    def of(cls, case, P):
        made = cls(
            case.F, case.D, case.q, case.lower, case.upper, case.inside, case.total, case.weights, case.groups, 1.0
        )
        made.__dict__["P"] = P
        return made


@examples(100)
@given(
    cases(
        most=25,
        linear=MODEST,
        bounds=("simplex", "box", "mixed", "ties"),
        sums=("total",),
        matrices=("definite", "mixed", "scaled"),
    ),
    st.sampled_from([0.1, 10.0, 1e3]),
    st.sampled_from(["dense", "sparse", "operator"]),
)
def test_convex_on_the_sum_is_enough(case, dent, form):
    """P - c a a' with a the coefficients of the sum: f changes by a constant on the feasible set."""
    assume(case.weights is None or (case.weights != 0).all())
    assume(recession(case) > -1e-9)
    plain = case.solve()
    dented = replace(case, dent=dent)
    result = bcd.solve_qp(forms(dented)[form], case.q, **case.options)
    assert result.status is not Status.UNBOUNDED
    judge_end(dented, result, form)
    constant = -0.5 * dent * float(case.total) ** 2
    size = 1 + case.size(plain.x) + dented.size(result.x)
    assert abs(result.objective - plain.objective - constant) <= 1e-7 * size
