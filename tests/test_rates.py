# SPDX-License-Identifier: BSD-3-Clause
"""Rates as inequalities that every single step must satisfy, and how iterations grow with n.

Symbols as in THEORY: L1 the constant of the 1-norm, L2 = 2 L1, mu2 the strong convexity on sum(d) = 0 in
the 2-norm, mu1 in the 1-norm, for which mu2 / n <= mu1 <= mu2 / 2.
"""

import itertools

import numpy as np
import pytest
from catalogue import Plain, case, enumerate_active_sets, path, random_qp

import bcd
from bcd.selection import Selection
from bcd.updates import PairStep

QUADRATICS = [(0, 4, 2.0), (1, 6, 20.0), (2, 9, 5.0), (3, 15, 50.0)]


def unbounded(seed, n, cond):
    Q, c = random_qp(seed, n, cond)
    kkt = np.block([[Q, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    x = np.linalg.solve(kkt, np.r_[-c, 1.0])[:n]
    return Q, bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(total=1)), float(0.5 * x @ Q @ x + c @ x)


def strong_convexity(Q):
    """mu2 on sum(d) = 0."""
    n = len(Q)
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    return float(np.linalg.eigvalsh(basis.T @ Q @ basis)[0])


def strong_convexity_1(Q):
    """mu1 on sum(d) = 0, n <= 9: min d'Qd over ||d||_1 = 1, one convex problem for each choice of signs.

    With d = p - m, p on the chosen side and m on the other, both of sum 1/2, ||d||_1 = 1.
    """
    n, best = len(Q), np.inf
    for size in range(1, n // 2 + 1):
        for side in itertools.combinations(range(n), size):
            if 2 * size == n and 0 not in side:
                continue  # d and -d are the same
            s = np.where(np.isin(np.arange(n), side), 1.0, -1.0)
            groups = (s < 0).astype(int)
            problem = bcd.Problem(bcd.Quadratic(s[:, None] * Q * s), bcd.SumBox(0, None, [0.5, 0.5], groups))
            result = bcd.minimize(problem, "wss2", tol=1e-9)
            assert result.status is bcd.Status.CONVERGED
            best = min(best, 2 * (result.objective - result.gap))  # a lower bound
    return best


@pytest.mark.parametrize(("seed", "n", "cond"), QUADRATICS)
@pytest.mark.parametrize("update", ["model", "line-search"])
def test_rate_of_gs1_without_bounds(seed, n, cond, update):
    """f(x+) - f* <= (1 - mu1 / L1) (f(x) - f*) at every step, with the lower bound mu1 >= mu2 / n."""
    Q, problem, minimum = unbounded(seed, n, cond)
    mu1 = strong_convexity(Q) / n
    if n <= 6:  # small enough for mu1 itself, which must lie where THEORY says
        exact = strong_convexity_1(Q)
        assert mu1 * (1 - 1e-9) <= exact <= strong_convexity(Q) / 2 * (1 + 1e-9)
        mu1 = exact
    points, _ = path(problem, "gs1", update, 400, x0=3 * np.random.default_rng(seed).normal(size=n), tol=1e-9)
    assert len(points) > 5
    excess = np.array([problem.objective.value(x) for x in points]) - minimum
    rounding = 1e-13 * max(1, abs(minimum))
    assert (excess[1:] <= (1 - mu1 / problem.lipschitz) * excess[:-1] + rounding).all()


@pytest.mark.parametrize("seed", range(4))
def test_rate_of_gs1_with_bounds(seed):
    """The same under bounds, where the proximal PL inequality takes the place of strong convexity (THEORY 2.8)."""
    Q, c = random_qp(seed, 6, 8.0)
    lower, upper = np.full(6, -0.4), np.full(6, 0.7)
    minimum, _ = enumerate_active_sets(Q, c, lower, upper, 1.0)
    problem = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(lower, upper, 1.0))
    mu1 = strong_convexity_1(Q)
    for start in range(5):
        x0 = np.random.default_rng(10 * seed + start).normal(size=6)
        points, _ = path(problem, "gs1", "model", 400, x0=x0, tol=1e-9)
        excess = np.array([problem.objective.value(x) for x in points]) - minimum
        assert (excess >= -1e-12).all()
        assert (excess[1:] <= (1 - mu1 / problem.lipschitz) * excess[:-1] + 1e-13).all()


@pytest.mark.parametrize(
    "name",
    [
        "sum and box, condition 300",
        "SVM dual",
        "sum, no bounds",
        "groups",
        "range, upper end",
        "some in no sum",
        "box, no sum",
        "logistic",
        "least squares",
        "low rank",
        "sparse",
        "smooth, known constant",
    ],
)
def test_every_gs1_step_fulfils_the_model_inequality(name):
    """f(x+d) <= f(x) + <g, d> + L1/2 ||d||_1^2; slacks count in the norm."""
    problem = case(name).problem
    points, _ = path(problem, "gs1", "model", 300, x0=np.random.default_rng(0).normal(size=problem.n))
    assert len(points) >= 3
    f, feasible, worst = problem.objective.value, problem.feasible, 0.0
    for x, after in itertools.pairwise(points):
        d = after - x
        norm = np.abs(d).sum()
        for s, (lo, hi) in enumerate(feasible.ranges):
            norm += abs(d[feasible.labels[: problem.n] == s].sum()) if lo < hi else 0.0
        model = problem.objective.gradient(x) @ d + 0.5 * problem.lipschitz * norm**2
        assert f(after) - f(x) <= model + 1e-13 * max(1, abs(f(x)))
        assert model <= 1e-15
        worst = min(worst, model)
    assert worst < -1e-4  # and the promise is not empty


@pytest.mark.parametrize(("seed", "n", "cond"), QUADRATICS[:3])
def test_rate_of_random_pairs_in_expectation(seed, n, cond):
    """Mean over all pairs of f(x+) - f* is at most (1 - mu2 / ((n-1) L2)) (f - f*): the expectation, computed."""
    Q, problem, minimum = unbounded(seed, n, cond)
    mu2, L2 = strong_convexity(Q), 2 * problem.lipschitz

    class One(Plain):
        def select(self, at, moves, state):
            return Selection(np.array(self.rule)), state

    One.init = lambda self, moves, seed: None
    for start in range(4):
        x0 = np.random.default_rng(start).normal(size=n)
        before = bcd.minimize(problem, x0=x0, max_iter=0).objective - minimum
        after = [
            bcd.minimize(problem, One((i, j)), PairStep("l2"), x0=x0, max_iter=1).objective - minimum
            for i, j in itertools.combinations(range(n), 2)
        ]
        assert len(after) == n * (n - 1) // 2
        assert np.mean(after) <= (1 - mu2 / ((n - 1) * L2)) * before * (1 + 1e-12)


# -- iterations as n grows -----------------------------------------------------------------------


def fixed_rank(n):
    """Eight informative rows of A, r = 4, the rest zero; the linear term in the range of A A'."""
    rng = np.random.default_rng(0)
    A = np.zeros((n, 4))
    A[:8] = rng.normal(size=(8, 4))
    return bcd.Problem(bcd.Quadratic(bcd.LowRank(A), A @ rng.normal(size=4)), bcd.SumBox(total=0))


def iterations(problem, rule, update, tol, **options):
    result = bcd.minimize(problem, Plain(rule), update, tol=tol, **options)
    assert result.status is bcd.Status.CONVERGED
    return result.iterations


def test_greedy_steps_do_not_grow_with_n_where_rows_are_only_added():
    """THEORY, "checked": n = 10 .. 3000, greedy 17 .. 22 iterations, random pairs 99 .. 12454."""
    sizes = (10, 100, 1000, 3000)
    for rule, update in (("gs1", "line-search"), ("gss", "pair")):
        greedy = [iterations(fixed_rank(n), rule, update, 1e-4) for n in sizes]
        assert max(greedy) <= 2 * min(greedy), greedy
        assert max(greedy) <= 100
    chance = [
        iterations(fixed_rank(n), "random", "pair", 1e-4, random_state=1, max_iter=400_000, time_limit=100)
        for n in sizes[:3]
    ]
    assert chance[1] >= 4 * chance[0]
    assert chance[2] >= 4 * chance[1]


@pytest.mark.slow
def test_random_pairs_keep_growing_with_n():
    chance = [iterations(fixed_rank(n), "random", "pair", 1e-4, random_state=1) for n in (100, 1000, 3000)]
    assert chance[1] >= 4 * chance[0]
    assert chance[2] >= 2 * chance[1]


def test_greedy_steps_grow_with_n_for_the_identity():
    """Q = I: mu1 = 1/n hides the dimension, and each pair step can set only two coordinates right."""
    counts = []
    for n in (10, 40, 160):
        problem = bcd.Problem(bcd.Quadratic(np.eye(n), np.random.default_rng(1).normal(size=n)), bcd.SumBox(total=0))
        counts.append(iterations(problem, "gs1", "line-search", 1e-4))
    assert counts[1] >= 2.5 * counts[0]
    assert counts[2] >= 2.5 * counts[1]


def test_a_boxed_svm_dual_is_free_of_n_only_when_c_scales_like_one_over_n():
    """THEORY, GS-1 with exact line search to 1e-4: C = 1 grows (22, 71, 161, 428), C = 10/n does not (18 .. 20).

    The rows come from a box, so that the diameter of their hull does not grow with n either. Both classes
    overlap: a share of the coordinates ends at its bound, and that is the mass to move.
    """
    counts = {"C = 1": [], "C = 10/n": []}
    for n in (30, 100, 300, 1000):
        rng = np.random.default_rng(2)
        y = np.where(np.arange(n) % 2, 1.0, -1.0)
        X = 0.3 * rng.uniform(-1, 1, size=(n, 5)) + 0.067 * y[:, None]
        for name, C in (("C = 1", 1.0), ("C = 10/n", 10 / n)):
            bounds = np.minimum(0, y * C), np.maximum(0, y * C)
            problem = bcd.Problem(bcd.Quadratic(bcd.LowRank(X), -y), bcd.SumBox(*bounds, 0))
            counts[name].append(iterations(problem, "gs1", "line-search", 1e-4))
    grows, stays = counts["C = 1"], counts["C = 10/n"]
    assert grows[-1] >= 5 * grows[0], counts  # n grows by 33
    assert max(stays) <= 2 * min(stays), counts
    assert grows[-1] >= 10 * stays[-1], counts
