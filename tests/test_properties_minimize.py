# SPDX-License-Identifier: BSD-3-Clause
"""Properties of projection, steps and runs on problems that hypothesis makes up."""

import numpy as np
from catalogue import Plain, default_update, infeasibility_of, violation_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import bcd
from bcd.constraints import Moves
from bcd.selection import Selection

settings.register_profile("engine", deadline=None, max_examples=80, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
ENGINE = settings.get_profile("engine")

numbers = st.floats(-8, 8).map(lambda v: 0.0 if abs(v) < 1e-6 else v)
# ties and round numbers as often as anything else
values = st.one_of(st.integers(-3, 3).map(float), numbers)


def vectors(n, elements=values):
    return st.lists(elements, min_size=n, max_size=n).map(np.array)


@st.composite
def constraints(draw, n, bounded=False):
    """A SumBox over n coordinates that some point satisfies, of every kind; and that point."""
    inside = draw(vectors(n))
    room = st.one_of(st.just(0.0), st.floats(0, 4), st.just(2.0) if bounded else st.just(np.inf))
    lower, upper = inside - draw(vectors(n, room)), inside + draw(vectors(n, room))
    kind = draw(st.sampled_from(["none", "total", "range", "side", "groups"]))
    if kind == "none":
        return bcd.SumBox(lower, upper), inside

    def total(member, kind):
        s = float(inside[member].sum())
        low, high = draw(st.floats(0, 3)), draw(st.floats(0, 3))
        side = draw(st.sampled_from([(None, s + high), (s - low, None)]))
        return {"total": s, "range": (s - low, s + high), "side": side}[kind]

    if kind != "groups":
        return bcd.SumBox(lower, upper, total(np.ones(n, bool), kind)), inside
    groups = np.array(draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n)))
    count = int(groups.max()) + 1
    kinds = [draw(st.sampled_from(["total", "range", "side"])) for _ in range(count)]
    return bcd.SumBox(lower, upper, [total(groups == s, k) for s, k in enumerate(kinds)], groups), inside


@st.composite
def sets(draw):
    """A constraint bound to its coordinates, and a point in it."""
    n = draw(st.integers(1, 8))
    constraint, inside = draw(constraints(n))
    return constraint.bind(n), inside


@st.composite
def problems(draw, smallest=0.0):
    """A convex quadratic over a bounded set; singular ones, ties and fixed coordinates included."""
    n = draw(st.integers(1, 7))
    rank = draw(st.integers(0, n))
    F = np.array(draw(st.lists(vectors(max(rank, 1)), min_size=n, max_size=n)))[:, :rank]
    D = draw(st.sampled_from([smallest, 0.5, 1.0]))
    constraint, inside = draw(constraints(n, bounded=True))
    Q = F @ F.T + D * np.eye(n)
    return bcd.Problem(bcd.Quadratic(0.5 * (Q + Q.T), draw(vectors(n))), constraint), inside


def feasible_to_rounding(feasible, x):
    problem = bcd.Problem(bcd.Quadratic(np.zeros((feasible.n, feasible.n))), bcd.SumBox())
    problem.feasible = feasible
    return infeasibility_of(problem, x) <= 1e-12 * (1 + np.abs(x).sum() + np.abs(feasible.totals).sum())


# -- projection ----------------------------------------------------------------------------------


@ENGINE
@given(sets(), st.data())
def test_projection_is_feasible_idempotent_and_closest(bound, data):
    """Closest: <point - x, v - x> <= 0 for every feasible v (a variational inequality, no solver needed)."""
    feasible, inside = bound
    point = data.draw(vectors(feasible.n, st.floats(-30, 30)))
    x = feasible.project(point)
    size = 1 + np.abs(point).sum() + np.abs(inside).sum() + np.abs(x).sum()
    assert (x >= feasible.lower[: feasible.n]).all()
    assert (x <= feasible.upper[: feasible.n]).all()
    assert feasible_to_rounding(feasible, x)
    np.testing.assert_allclose(feasible.project(x), x, atol=1e-14 * size)
    others = [inside, feasible.project(data.draw(vectors(feasible.n, st.floats(-30, 30))))]
    for v in others:
        assert (point - x) @ (v - x) <= 1e-12 * size**2


@ENGINE
@given(sets(), st.data())
def test_projection_does_not_lengthen_distances(bound, data):
    feasible, _ = bound
    a, b = (data.draw(vectors(feasible.n, st.floats(-30, 30))) for _ in range(2))
    far, near = np.linalg.norm(a - b), np.linalg.norm(feasible.project(a) - feasible.project(b))
    assert near <= far + 1e-12 * (1 + np.abs(a).sum() + np.abs(b).sum() + np.abs(feasible.totals).sum())


@ENGINE
@given(sets())
def test_a_feasible_point_is_its_own_projection(bound):
    feasible, inside = bound
    np.testing.assert_allclose(feasible.project(inside), inside, atol=1e-14 * (1 + np.abs(inside).sum()))


# -- moves ---------------------------------------------------------------------------------------


@ENGINE
@given(sets(), st.data())
def test_any_sequence_of_pair_moves_keeps_the_set(bound, data):
    """Steps of any size, clipped to the rooms: bounds are kept to the bit, sums to rounding, rooms are right."""
    feasible, inside = bound
    moves = Moves(feasible, feasible.project(inside))
    for _ in range(data.draw(st.integers(1, 12))):
        s = data.draw(st.integers(0, len(feasible.totals)))
        member = feasible.members(s) if s < len(feasible.totals) else np.flatnonzero(feasible.labels < 0)
        if len(member) < (2 if s < len(feasible.totals) else 1):
            continue
        wish = data.draw(st.one_of(st.just(np.inf), st.floats(0, 5)))
        if s == len(feasible.totals):
            k = int(data.draw(st.sampled_from(member.tolist())))
            t = min(wish, moves.rise[k])
            chosen = Selection(np.array([k]), np.array([t]))
        else:
            i, j = data.draw(st.permutations(member.tolist()))[:2]
            t = min(wish, moves.rise[i], moves.fall[j])
            chosen = Selection(np.array([i, j]), np.array([t, -t]))
        if not np.isfinite(t):
            continue
        used_up = [k for k, d in zip(chosen.index, chosen.step, strict=True) if d > 0 and d == moves.rise[k]]
        moves.shift(chosen)
        assert (moves.x[used_up] == feasible.upper[used_up]).all()
        assert (moves.x >= feasible.lower).all()
        assert (moves.x <= feasible.upper).all()
        np.testing.assert_array_equal(moves.rise, feasible.upper - moves.x)
        np.testing.assert_array_equal(moves.fall, moves.x - feasible.lower)
    assert feasible_to_rounding(feasible, moves.x[: feasible.n])


# -- runs ----------------------------------------------------------------------------------------


RULES = [rule for rule in bcd.RULES if rule != "gs"]


@ENGINE
@given(problems(), st.sampled_from(RULES), st.booleans(), st.data())
def test_a_run_ends_feasible_certified_and_no_higher_than_any_feasible_point(case, rule, plain, data):
    problem, inside = case
    start = data.draw(vectors(problem.n))
    result = bcd.minimize(
        problem, Plain(rule) if plain else rule, default_update(rule), x0=start, max_iter=20_000, tol=1e-7
    )
    f, size = problem.objective.value, 1 + np.abs(problem.objective.gradient(inside)).sum()
    assert infeasibility_of(problem, result.x) <= 1e-12 * (1 + np.abs(result.x).sum())
    assert result.certificate.infeasibility == 0
    assert f(result.x) <= f(problem.feasible.project(start)) + 1e-12 * size
    assert f(result.x) - result.gap <= f(inside) + 1e-9 * size
    if result.status is bcd.Status.CONVERGED:
        assert result.violation <= 1e-7
        assert violation_of(problem, result.x) <= 1e-7 + 1e-12 * size
    else:
        assert result.status in (bcd.Status.ITERATION_LIMIT, bcd.Status.STAGNATED)
        assert result.status is not bcd.Status.STAGNATED or result.violation <= 1e-9 * size


@ENGINE
@given(problems(smallest=0.5), st.data())
def test_all_rules_agree_on_the_minimum(case, data):
    problem, _ = case
    rules = data.draw(st.lists(st.sampled_from(RULES), min_size=2, max_size=3, unique=True))
    results = [bcd.minimize(problem, rule, max_iter=50_000, tol=1e-8) for rule in rules]
    assume(all(result.status is bcd.Status.CONVERGED for result in results))
    for a in results:
        for b in results:  # each gap bounds the distance to the minimum, so to the other value as well
            assert a.objective - b.objective <= a.gap + 1e-11 * (1 + abs(a.objective))


@ENGINE
@given(problems(), st.integers(-20, 20), st.sampled_from(["gs1", "wss2", "gss", "gsl", "random"]))
def test_a_power_of_two_times_f_changes_no_step(case, k, rule):
    problem, _ = case
    scaled = bcd.Problem(
        bcd.Quadratic(2.0**k * problem.objective.hessian.matrix, 2.0**k * problem.objective.c), problem.constraint
    )
    a = bcd.minimize(problem, rule, max_iter=30, tol=1e-6)
    b = bcd.minimize(scaled, rule, max_iter=30, tol=2.0**k * 1e-6)
    np.testing.assert_array_equal(a.x, b.x)
    assert a.iterations == b.iterations


@ENGINE
@given(st.integers(2, 7), st.integers(-1000, 1000).map(float), st.data())
def test_a_constant_in_the_linear_term_changes_nothing_under_a_sum(n, constant, data):
    """x sums to a constant, so f moves by a constant: the minimum moves with it."""
    Q = np.diag(data.draw(vectors(n, st.floats(0.5, 4))))
    c, bound = data.draw(vectors(n, st.floats(-3, 3))), data.draw(st.floats(0.5, 2))
    total = data.draw(st.floats(-0.9, 0.9)) * n * bound
    runs = [
        bcd.minimize(bcd.Problem(bcd.Quadratic(Q, c + shift), bcd.SumBox(-bound, bound, total)), tol=1e-9)
        for shift in (0.0, constant)
    ]
    moved = runs[1].objective - runs[0].objective
    assert abs(moved - constant * total) <= 1e-11 * (1 + abs(constant) * n * bound) + runs[0].gap + runs[1].gap
    np.testing.assert_allclose(runs[0].x, runs[1].x, atol=1e-5)


@ENGINE
@given(problems(smallest=0.5), st.randoms(use_true_random=False))
def test_renaming_the_coordinates_renames_the_minimiser(case, random):
    problem, _ = case
    order = list(range(problem.n))
    random.shuffle(order)
    box = problem.constraint
    renamed = bcd.SumBox(
        box.lower[order], box.upper[order], box.total, None if box.groups is None else box.groups[order]
    )
    if box.groups is not None and len(box.groups) and box.groups.max() < 0:
        renamed = bcd.SumBox(box.lower[order], box.upper[order])
    Q, c = problem.objective.hessian.matrix, problem.objective.c
    a = bcd.minimize(problem, tol=1e-9)
    b = bcd.minimize(bcd.Problem(bcd.Quadratic(Q[np.ix_(order, order)], c[order]), renamed), tol=1e-9)
    # strongly convex with mu >= 1/2: |x - x*|^2 <= 4 gap
    near = 2 * (np.sqrt(a.gap) + np.sqrt(b.gap)) + 1e-9
    assert np.linalg.norm(a.x[order] - b.x) <= near


@ENGINE
@given(problems(), st.data())
def test_a_certificate_is_a_function_of_the_point_alone(case, data):
    """The gap at any feasible point bounds f there minus f at any other."""
    problem, inside = case
    x = problem.feasible.project(data.draw(vectors(problem.n)))
    proof = bcd.certify(problem, x)
    f, size = problem.objective.value, 1 + np.abs(problem.objective.gradient(x)).sum() * (1 + np.abs(inside).sum())
    assert proof.infeasibility == 0
    assert f(x) - f(inside) <= proof.gap + 1e-11 * size
    assert proof.gap >= problem.objective.gradient(x) @ (x - inside) - 1e-11 * size
    assert (proof.violation == 0) == (proof.gap == 0)
