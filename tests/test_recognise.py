"""bcd.recognise: sums, bounds and factors in general quadratic programs, and the multipliers of every row."""

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

import bcd
from bcd import recognise as module
from bcd.recognise import NotSumBoxError, Recovered, recognise

TOL = 1e-10


@dataclass
class Program:
    """min 1/2 x'Px + q'x, A x = b, G x <= h, lb <= x <= ub."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    G: np.ndarray
    h: np.ndarray
    lb: np.ndarray
    ub: np.ndarray

    @classmethod
    def of(cls, P, q, A=(), b=(), G=(), h=(), lb=-np.inf, ub=np.inf):
        q = np.asarray(q, float)
        n = len(q)
        shaped = (np.asarray(M, float).reshape(-1, n) for M in (A, G))
        A, G = shaped
        box = (np.full(n, v) if np.ndim(v) == 0 else np.asarray(v, float) for v in (lb, ub))
        return cls(np.asarray(P, float), q, A, np.asarray(b, float), G, np.asarray(h, float), *box)

    def form(self, sparse=False):
        matrices = [self.P, self.A, self.G]
        P, A, G = (sp.csc_array(M) for M in matrices) if sparse else matrices
        return recognise(P, self.q, A, self.b, G, self.h, self.lb, self.ub)

    def residuals(self, at: Recovered):
        """Primal and dual residual, sign errors and complementarity, from the program alone."""
        x, y, z, box = at
        primal = max(
            np.abs(self.A @ x - self.b).max(initial=0),
            (self.G @ x - self.h).max(initial=0),
            (self.lb - x).max(initial=0),
            (x - self.ub).max(initial=0),
        )
        dual = np.abs(self.P @ x + self.q + self.A.T @ y + self.G.T @ z + box).max()
        active = np.where(box > 0, self.ub - x, np.where(box < 0, x - self.lb, 0.0))
        paid, bound = z != 0, box != 0
        slack = max(
            np.abs(z[paid] * (self.h - self.G @ x)[paid]).max(initial=0),
            np.abs(box[bound] * active[bound]).max(initial=0),
        )
        return primal, dual, max(0.0, -z.min(initial=0)), slack

    def value(self, x):
        return 0.5 * x @ self.P @ x + self.q @ x


def solve(form, **options):
    result = bcd.solve_qp(
        form.P, form.q, total=form.total, weights=form.weights, lower=form.lower, upper=form.upper,
        groups=form.groups, tol=TOL, **options,
    )  # fmt: skip
    assert result.status.ok, result
    return form.restore(result.x, result.total_multipliers, result.bound_multipliers)


def check(program, sparse=False, tol=1e-7):
    """Recognise, solve, go back; a KKT point of the program as given (which is convex) is a solution."""
    form = program.form(sparse)
    at = solve(form)
    size = max(1.0, np.abs(program.P @ at.x + program.q).max())
    assert max(program.residuals(at)) <= tol * size, program.residuals(at)
    return form, at


def dense(P):
    if isinstance(P, bcd.LowRank):
        return np.asarray(P.product(np.eye(P.n)) if not sp.issparse(P.factors) else (P.factors @ P.factors.T).toarray()
                          + np.diag(P.shift))  # fmt: skip
    if isinstance(P, LinearOperator):
        return P @ np.eye(P.shape[0])
    return P.toarray() if sp.issparse(P) else P


# -- random problems in disguise ----------------------------------------------------------------------


def plain_problem(rng, n):
    """A sum + box problem with a feasible point: bounds, disjoint sums with weights, equal or in a range."""
    root = rng.standard_normal((n, max(1, n // 2)))
    P = root @ root.T + np.diag(rng.uniform(0.1, 1, n))
    inside = rng.uniform(-1, 1, n)
    lower = np.where(rng.random(n) < 0.7, inside - rng.exponential(0.5, n), -np.inf)
    upper = np.where(rng.random(n) < 0.7, inside + rng.exponential(0.5, n), np.inf)
    fixed = rng.random(n) < 0.1
    lower[fixed] = upper[fixed] = inside[fixed]
    sums = []
    labels = rng.integers(-1, 3, n)
    for k in range(3):
        index = np.flatnonzero(labels == k)
        if len(index) > 1:
            row = np.zeros(n)
            row[index] = rng.choice([1.0, 1.0, -2.0, 0.5], len(index))
            value = row @ inside
            ends = value - rng.choice([0, 0.5, np.inf]), value + rng.choice([0, 0.5, np.inf])
            sums.append((row, *(ends if rng.random() < 0.5 else (value, value))))
    return P, 2 * rng.standard_normal(n), lower, upper, sums


def disguise(rng, P, q, lower, upper, sums):
    """The same problem as rows: scaled, repeated, looser copies besides, in any order, bounds here or there."""
    n = len(q)
    A, b, G, h = [], [], [], []
    lb, ub = np.full(n, -np.inf), np.full(n, np.inf)
    for i in range(n):
        unit = np.eye(n)[i]
        if lower[i] == upper[i] and rng.random() < 0.5:
            scale = rng.choice([1, -3.0])
            A.append(scale * unit)
            b.append(scale * lower[i])
            continue
        for value, sign, box in ((lower[i], -1, lb), (upper[i], 1, ub)):
            if not np.isfinite(value):
                continue
            if rng.random() < 0.5:
                box[i] = value
            else:
                for looser in [0.0] + [0.3] * rng.integers(0, 2):
                    scale = rng.uniform(0.2, 3)
                    G.append(sign * scale * unit)
                    h.append(sign * scale * value + looser)
    for row, lo, hi in sums:
        for _ in range(1 + (rng.random() < 0.3)):
            scale = rng.choice([1.0, -0.5, 4.0])
            if lo == hi:
                A.append(scale * row)
                b.append(scale * lo)
                continue
            for value, sign in ((lo, -1), (hi, 1)):
                if np.isfinite(value):
                    G.append(abs(scale) * sign * row)
                    h.append(abs(scale) * sign * value)
    A, b, G, h = (np.array(part) for part in (A, b, G, h))
    a, g = rng.permutation(len(b)), rng.permutation(len(h))
    return Program.of(P, q, A[a], b[a], G[g], h[g], lb, ub)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(2, 14), st.booleans())
def test_a_problem_in_disguise_is_found_and_solved(seed, n, sparse):
    rng = np.random.default_rng(seed)
    P, q, lower, upper, sums = plain_problem(rng, n)
    program = disguise(rng, P, q, lower, upper, sums)
    form, _ = check(program, sparse)
    if len(form.q) < n:  # a free variable has been solved for
        return
    np.testing.assert_allclose(form.lower, lower, rtol=1e-12)
    np.testing.assert_allclose(form.upper, upper, rtol=1e-12)
    np.testing.assert_allclose(dense(form.P), P, rtol=1e-12)
    closed = [row for row, lo, hi in sums if lo > -np.inf or hi < np.inf]
    moving = [frozenset(np.flatnonzero((row != 0) & (lower < upper))) for row in closed]
    labels = np.full(n, -1 if form.total is None else 0) if form.groups is None else form.groups
    assert {frozenset(np.flatnonzero(labels == g)) for g in range(labels.max() + 1)} == set(moving) - {frozenset()}


def lift(rng, program, rank):
    """The constraints of a program with a factor model, as variables y = F'w + c; and multiplied out."""
    n = len(program.q)
    F = rng.standard_normal((n, rank))
    D = rng.uniform(0.1, 1, n)
    c, pivot, M = rng.standard_normal(rank), rng.choice([-1.0, 1.0, 3.0], rank), rng.uniform(0.5, 2, rank)
    price = rng.standard_normal(rank)
    P = np.zeros((n + rank, n + rank))
    P[:n, :n], P[n:, n:] = np.diag(D), np.diag(M)
    A = np.block([[program.A, np.zeros((len(program.b), rank))], [-pivot[:, None] * F.T, np.diag(pivot)]])
    b = np.concatenate([program.b, pivot * c])
    order = rng.permutation(n + rank)
    rows = rng.permutation(len(b))
    G = np.hstack([program.G, np.zeros((len(program.h), rank))])
    lb, ub = np.append(program.lb, np.full(rank, -np.inf)), np.append(program.ub, np.full(rank, np.inf))
    lifted = Program.of(
        P[np.ix_(order, order)], np.append(program.q, price)[order], A[rows][:, order], b[rows],
        G[:, order], program.h, lb[order], ub[order],
    )  # fmt: skip
    flat = Program(np.diag(D) + F * M @ F.T, program.q + F @ (M * c) + F @ price, program.A, program.b,
                   program.G, program.h, program.lb, program.ub)  # fmt: skip
    constant = 0.5 * c @ (M * c) + price @ c
    return lifted, flat, constant, order


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(4, 14), st.integers(1, 5), st.booleans())
def test_factors_are_found_and_eliminated(seed, n, rank, sparse):
    rng = np.random.default_rng(seed)
    _, q, lower, upper, sums = plain_problem(rng, n)
    lower = np.where(np.isinf(upper), -3.0, lower)  # so that only the factors can be eliminated
    program = disguise(rng, np.eye(n), q, lower, upper, sums)
    lifted, flat, constant, order = lift(rng, program, rank)
    form, at = check(lifted, sparse)
    keep = order[np.isin(order, np.arange(n))]
    assert len(form.q) == n
    np.testing.assert_allclose(dense(form.P), flat.P[np.ix_(keep, keep)], atol=1e-9)
    np.testing.assert_allclose(form.q, flat.q[keep], atol=1e-9)
    assert isinstance(form.P, bcd.LowRank) == (2 * rank <= n)
    w = np.empty(n + rank)
    w[order] = at.x
    assert abs(lifted.value(at.x) - flat.value(w[:n]) - constant) <= 1e-8 * max(1, abs(constant))
    _, other = check(flat, sparse)
    assert abs(flat.value(w[:n]) - flat.value(other.x)) <= 1e-7 * max(1, abs(flat.value(other.x)))


def copy_variables(rng, program, copies):
    """Variables v = c x_k + s in place of some x_k: in rows, bounds and costs, with the row that says so."""
    n, m = len(program.q), copies
    which = rng.choice(n, m, replace=False)
    c, s = rng.choice([-2.0, -1.0, 0.5, 100.0], m), rng.standard_normal(m)
    P = np.zeros((n + m, n + m))
    P[:n, :n], P[range(n, n + m), range(n, n + m)] = program.P, rng.choice([0.0, 1.0], m) / c**2
    price = rng.standard_normal(m) / c
    lb, ub = (np.append(v, np.full(m, end)) for v, end in ((program.lb, -np.inf), (program.ub, np.inf)))
    A, G = (np.hstack([M, np.zeros((len(M), m))]) for M in (program.A, program.G))
    b, h = program.b.copy(), program.h.copy()
    for i, k in enumerate(which):
        for M, side in ((A, b), (G, h)):
            moved = rng.random(len(side)) < 0.5
            side[moved] += M[moved, k] * s[i] / c[i]
            M[moved, n + i], M[moved, k] = M[moved, k] / c[i], 0
        if rng.random() < 0.5:
            lb[n + i], ub[n + i] = sorted((c[i] * lb[k] + s[i], c[i] * ub[k] + s[i]))
            lb[k], ub[k] = -np.inf, np.inf
    link = np.zeros((m, n + m))
    scale = rng.choice([1.0, -5.0], m)
    link[range(m), which], link[range(m), range(n, n + m)] = -scale * c, scale
    copied = Program(P, np.append(program.q, price), np.vstack([A, link]), np.append(b, scale * s), G, h, lb, ub)
    flat_P, flat_q, own = program.P.copy(), program.q.copy(), P.diagonal()[n:]
    flat_P[which, which] += own * c**2
    flat_q[which] += price * c + own * c * s
    return copied, Program(flat_P, flat_q, *(getattr(program, name) for name in ("A", "b", "G", "h", "lb", "ub")))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(4, 12), st.booleans())
def test_copies_of_variables_are_found(seed, n, sparse):
    rng = np.random.default_rng(seed)
    P, q, lower, upper, sums = plain_problem(rng, n)
    program = disguise(rng, P, q, lower, upper, sums)
    copied, flat = copy_variables(rng, program, int(rng.integers(1, n)))
    _, at = check(copied, sparse)
    _, other = check(flat, sparse)
    np.testing.assert_allclose(at.x[:n], other.x, atol=1e-6)


# -- forms --------------------------------------------------------------------------------------------


def portfolio(rng, n=12, k=3):
    return rng.standard_normal((n, k)), rng.uniform(0.1, 1, n), rng.random(n)


def test_factor_covariance_block():
    """y'My with a full M: factors by its eigenvectors, rank deficient M too."""
    rng = np.random.default_rng(0)
    F, D, mean = portfolio(rng)
    n, k = F.shape
    root = rng.standard_normal((k, k - 1))
    P = np.zeros((n + k, n + k))
    P[:n, :n], P[n:, n:] = np.diag(D), root @ root.T
    A = np.vstack([np.append(np.ones(n), np.zeros(k)), np.hstack([F.T, -np.eye(k)])])
    lb = np.r_[np.zeros(n), np.full(k, -np.inf)]
    form, _ = check(Program.of(P, np.append(-mean, np.zeros(k)), A, [1.0, 0, 0, 0], lb=lb))
    assert isinstance(form.P, bcd.LowRank)
    assert form.P.factors.shape[1] == k - 1
    np.testing.assert_allclose(dense(form.P), F @ root @ root.T @ F.T + np.diag(D), atol=1e-12)
    assert (form.total, form.weights, form.groups) == (1.0, None, None)


def test_block_that_is_not_convex_is_refused():
    P = np.diag([1.0, 1, 0, 0])
    P[2:, 2:] = [[1, 2], [2, 1]]
    A = [[1, 2, -1, 0], [2, 1, 0, -1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"positive semidefinite.*block of 2 variables.*eigenvalue -1"):
        recognise(P, np.zeros(4), A, [0, 0, 1], lb=[0, 0, -np.inf, -np.inf], ub=np.full(4, np.inf))


def test_deviations_from_a_benchmark_stay_a_quadratic_form():
    """t = w - benchmark, 1/2 t'St: substituting costs no factorisation of S."""
    rng = np.random.default_rng(1)
    n = 6
    S = rng.standard_normal((n, n))
    S = S @ S.T
    P = np.zeros((2 * n, 2 * n))
    P[n:, n:] = S
    bench = np.full(n, 1 / n)
    A = np.vstack([np.append(np.ones(n), np.zeros(n)), np.hstack([2 * np.eye(n), -2 * np.eye(n)])])
    program = Program.of(P, np.append(-rng.random(n), np.zeros(n)), A, np.append(1, 2 * bench),
                         lb=np.append(np.zeros(n), np.full(n, -np.inf)))  # fmt: skip
    form, _ = check(program, sparse=True)
    np.testing.assert_allclose(dense(form.P), S, atol=1e-12)
    np.testing.assert_allclose(form.q, program.q[:n] - S @ bench, atol=1e-12)


def test_trades_and_holdings_are_one_variable():
    """w = w0 + t with bounds on both, a budget on w and another on t that says the same."""
    rng = np.random.default_rng(2)
    n = 8
    F, D, mean = portfolio(rng, n)
    w0 = np.full(n, 1 / n)
    P = np.zeros((2 * n, 2 * n))
    P[:n, :n], P[n:, n:] = F @ F.T + np.diag(D), np.diag(np.full(n, 0.3))
    A = np.vstack([np.append(np.ones(n), np.zeros(n)), np.append(np.zeros(n), -3 * np.ones(n)),
                   np.hstack([-np.eye(n), np.eye(n)])])  # fmt: skip
    lb, ub = np.r_[np.zeros(n), np.full(n, -0.1)], np.r_[np.full(n, 0.4), np.full(n, 0.15)]
    program = Program.of(P, np.append(-mean, np.zeros(n)), A, np.r_[1.0, 0.0, -w0], lb=lb, ub=ub)
    form, at = check(program)
    assert len(form.q) == n
    assert np.ndim(form.total) == 0
    assert np.abs(program.residuals(at)).max() < 1e-8


def test_a_chain_of_definitions_is_followed():
    """t = M y - target, y = F'w + c: one after the other."""
    rng = np.random.default_rng(3)
    F, D, _ = portfolio(rng, 10, 2)
    for M in (np.eye(2), np.array([[1.0, 2.0], [-1.0, 1.0]])):
        P = np.zeros((14, 14))
        P[:10, :10], P[12:, 12:] = np.diag(D), 2 * np.eye(2)
        A = np.zeros((5, 14))
        A[:2, :10], A[:2, 10:12] = F.T, -np.eye(2)
        A[2:4, 10:12], A[2:4, 12:] = M, -np.eye(2)
        A[4, :10] = 1
        lb = np.r_[np.zeros(10), np.full(4, -np.inf)]
        form, at = check(Program.of(P, np.zeros(14), A, [-0.1, 0.4, 0.3, -0.2, 1], lb=lb))
        assert len(form.q) == 10
        y = F.T @ at.x[:10] + [0.1, -0.4]
        np.testing.assert_allclose(at.x[10:], np.r_[y, M @ y - [0.3, -0.2]], atol=1e-12)


def test_variables_that_P_couples_with_others_are_not_taken():
    """Two rows, each with two free variables; P couples v_1 of one with v_2 of the other, and only one of them goes."""
    rng = np.random.default_rng(6)
    F = rng.standard_normal((6, 2))
    P = np.diag(np.r_[np.ones(6), 1, 1, 2, 2])
    P[7, 8] = P[8, 7] = 0.5
    A = np.vstack([np.hstack([F.T, np.kron(np.eye(2), [2.0, 1.0])]), np.r_[np.ones(6), np.zeros(4)]])
    program = Program.of(
        P, np.r_[-np.ones(6), 0.3, -0.2, 0.1, 0.4], A, [0.1, 0.2, 1], lb=np.r_[np.zeros(6), [-np.inf] * 4]
    )
    check(program)
    program.P[6, 6] = -0.1  # v_0 = y - ... is not convex alone: the other one goes
    program.P[7, 8] = program.P[8, 7] = 0.0
    assert 6 in program.form().way.left.columns


def test_rows_that_agree_to_rounding_of_large_numbers():
    """The third row follows from the others but for the last digit, which is 2e-7 here."""
    A = [[1, 1, 1, 0, 0], [1, -1, 0, 0, 0], [0.9, -0.9, 0, -1, 1], [0, 0, 0, 1, -1]]
    program = Program.of(np.eye(5), np.zeros(5), A, [1, 2345678912.9, 0, 2111111021.61], lb=-1e10)
    assert len(program.form().q) == 3


def test_scaled_differences_become_a_diagonal():
    """u = d * w in squares, from sum_squares(multiply(d, w)): no factors, a diagonal."""
    n = 7
    d = np.arange(1.0, n + 1)
    P = np.diag(np.r_[np.zeros(n), np.full(n, 2.0)])
    A = np.vstack([np.hstack([np.diag(d), -np.eye(n)]), np.r_[np.ones(n), np.zeros(n)]])
    lb = np.r_[np.zeros(n), np.full(n, -np.inf)]
    form, _ = check(Program.of(P, np.zeros(2 * n), A, np.r_[np.zeros(n), 1], lb=lb))
    np.testing.assert_allclose(dense(form.P), np.diag(2 * d**2))


def test_large_forms(monkeypatch):
    """Where H cannot be formed: low rank with any rank, and a sparse matrix plus factors as an operator."""
    rng = np.random.default_rng(4)
    F, D, mean = portfolio(rng, 6, 5)
    A = np.vstack([np.r_[np.ones(6), np.zeros(5)], np.hstack([F.T, -np.eye(5)])])
    P = np.zeros((11, 11))
    P[:6, :6], P[6:, 6:] = np.diag(D), np.eye(5)
    lb = np.r_[np.zeros(6), np.full(5, -np.inf)]
    program = Program.of(P, np.r_[-mean, np.zeros(5)], A, np.r_[1, np.zeros(5)], lb=lb)
    assert isinstance(program.form().P, np.ndarray)
    monkeypatch.setattr(module, "DENSE_UP_TO", 5)
    assert isinstance(check(program)[0].P, bcd.LowRank)
    program.P[0, 1] = program.P[1, 0] = 0.05
    form = program.form()
    assert isinstance(form.P, LinearOperator)
    np.testing.assert_allclose(dense(form.P), F @ F.T + program.P[:6, :6], atol=1e-12)


def test_sparse_stays_sparse_and_dense_is_not_copied():
    dense_P = np.eye(50) + 0.01
    assert recognise(dense_P, np.zeros(50)).P is dense_P
    form = recognise(sp.eye_array(50, format="csc"), np.zeros(50), np.ones((1, 50)), [1.0])
    assert sp.issparse(form.P)


# -- sums ---------------------------------------------------------------------------------------------


def test_groups_weights_and_ranges():
    A = [[2, 2, 0, 0, 0, 0, 0]]
    G = [[0, 0, 1, -2, 0, 0, 0], [0, 0, -2, 4, 0, 0, 0], [0, 0, 0, 0, -1, -1, 0]]
    form, _ = check(Program.of(np.eye(7), -np.ones(7), A, [2], G, [1, 3, -4], lb=-9))
    np.testing.assert_array_equal(form.groups, [0, 0, 1, 1, 2, 2, -1])
    np.testing.assert_array_equal(form.weights, [1, 1, -0.5, 1, 1, 1, 1])
    assert form.total == [1.0, (-0.5, 0.75), (4.0, np.inf)]


def test_a_sum_inside_another():
    """The sum of all, of three, of these again as a range, of the rest again: sums over disjoint sets."""
    n = 7
    part = np.r_[np.ones(3), np.zeros(4)]
    rows = [np.ones(n), part, -2 * (1 - part)]
    program = Program.of(np.diag(np.arange(1.0, 8)), np.zeros(n), rows, [1, 0.4, -1.2], [3 * part], [6], lb=0)
    form, at = check(program)
    assert sorted(form.total) == pytest.approx([0.4, 0.6])
    assert sorted(np.bincount(form.groups)) == [3, 4]
    np.testing.assert_allclose(at.x.sum(), 1)


def test_a_fixed_variable_joins_no_sums():
    """x_2 is in both sums, but fixed: its share moves to the right, and the multipliers come back."""
    A = [[1, 1, 1, 0, 0], [0, 0, 2, 1, 1], [0, 0, 3, 0, 0]]
    form, at = check(Program.of(np.eye(5), [1, 2, 3, 4, 5], A, [1, 1, 0.3], lb=-9))
    assert form.total == pytest.approx([0.9, 0.8])
    assert at.y[2] != 0


def test_the_multiplier_goes_to_the_row_that_is_active():
    """Three upper bounds on x_0 and two sums that say x_0 + x_1 <= something: the tightest of each pays."""
    G = [[1, 0], [2, 0], [4, 0], [1, 1], [3, 3]]
    program = Program.of(np.eye(2), [-9, -9], G=G, h=[0.9, 1.0, 8, 1.5, 3.0])
    _, at = check(program)
    np.testing.assert_allclose(at.x, [0.5, 0.5])
    np.testing.assert_array_equal(at.z > 0, [False, False, False, False, True])
    program.h[1] = 0.8  # x_0 <= 0.4
    _, at = check(program)
    np.testing.assert_allclose(at.x, [0.4, 0.6])
    np.testing.assert_array_equal(at.z > 0, [False, True, False, False, True])


def test_what_cancels_is_no_coefficient():
    """x_0 = 0.1 x_1 turns 3 x_0 - 0.3 x_1 into 0 x_1, not into the rounding of 3 * 0.1 - 0.3."""
    program = Program.of(np.eye(4), [1, 2, 0, 0], [[1, -0.1, 0, 0], [3, -0.3, 1, 0], [0, 1, 0, 1]], [0, 0.5, 1], lb=-9)
    form, at = check(program)
    assert at.x[2] == 0.5
    np.testing.assert_array_equal(form.lower[form.way.left.columns == 2], 0.5)


def test_rows_without_entries_and_open_sides_are_dropped():
    G = [[0, 0], [1, -1], [-1, 0]]
    form, at = check(Program.of(np.eye(2), [1, 1], [[0, 0], [1, 1]], [0, 1], G, [0.5, np.inf, np.inf], lb=-9))
    assert form.total == 1.0
    np.testing.assert_array_equal(at.z, 0)


def test_bounds_that_cross_by_rounding_are_one_value():
    program = Program.of(np.eye(2), [0, 0], [[1, 0]], [0.1], [[3, 0], [0, 1], [0, -3]], [0.3, 0.1, -0.1 * 3])
    form, _ = check(program)
    np.testing.assert_array_equal(form.lower, form.upper)


# -- refusals -----------------------------------------------------------------------------------------

REFUSED = {
    "second equality": (dict(A=[[1, 1, 1], [1, 2, 3]], b=[1, 2]), "row 1 of A has variable 0 .* row 0 of A, in other"),
    "part of a sum": (
        dict(A=[[1, 1, 1]], b=[1], G=[[1, 1, 0]], h=[0.5]),
        "row 0 of G .* row 0 of A, but not all of its",
    ),
    "beyond a range": (dict(G=[[1, 1, 0], [1, 1, 1]], h=[1, 2]), "row 1 of G .* row 0 of G, and others besides"),
    "general row": (dict(G=[[1, -1, 0], [0, 1, -1]], h=[0, 0]), "row 1 of G has variable 1 in common with row 0 of G"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_outside_is_refused_with_the_row(name):
    rows, message = REFUSED[name]
    program = Program.of(np.eye(3), np.zeros(3), **rows, lb=0)
    with pytest.raises(NotSumBoxError, match=message) as caught:
        program.form()
    assert isinstance(caught.value, ValueError)
    assert f"row {caught.value.row} of {caught.value.matrix}" in message


def test_a_bounded_factor_is_refused():
    """An exposure limit on y = F'w is a second sum over w."""
    rng = np.random.default_rng(5)
    F, D, _ = portfolio(rng, 6, 2)
    P = np.diag(np.r_[D, 1, 1])
    A = np.vstack([np.r_[np.ones(6), 0, 0], np.hstack([F.T, -np.eye(2)])])
    ub = np.r_[np.ones(6), 0.1, np.inf]
    program = Program.of(P, np.zeros(8), A, [1, 0, 0], lb=np.r_[np.zeros(6), -0.1, -np.inf], ub=ub)
    with pytest.raises(NotSumBoxError, match="row 1 of A"):
        program.form()


CONTRADICTIONS = {
    "bounds": (dict(G=[[1, 0], [-2, 0]], h=[1, -4]), r"variable 0 must be at least 2.0 \(row 1 of G\).*1.0 \(row 0"),
    "box and row": (dict(A=[[2, 0]], b=[4], ub=1.0), r"at least 2.0 \(row 0 of A\) and at most 1.0 \(lb or ub of var"),
    "empty row of A": (dict(A=[[0, 0]], b=[1]), "row 0 of A asks for 0 = 1"),
    "empty row of G": (dict(G=[[0, 0]], h=[-1]), "row 0 of G asks for 0 <= -1"),
    "minus infinity": (dict(G=[[1, 1]], h=[-np.inf]), "row 0 of G asks for a sum <= -inf"),
    "the same sum twice": (dict(A=[[1, 1], [2, 2]], b=[1, 3]), "row 1 of A contradicts .* by 1"),
    "sum above its range": (dict(A=[[1, 1]], b=[1], G=[[3, 3]], h=[2]), "row 0 of G contradicts .* by 1"),
    "range": (dict(G=[[1, 1], [-1, -1]], h=[1, -2]), r"at least 2.0 \(row 1 of G\) and at most 1.0 \(row 0 of G\)"),
    "lb": (dict(lb=np.inf), "variable 0 must be at least inf .*no bound"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_found_with_the_rows(name):
    rows, message = CONTRADICTIONS[name]
    with pytest.raises(bcd.InfeasibleError, match=message):
        Program.of(np.eye(2), np.zeros(2), **rows).form()


SMALL_CONTRADICTIONS = {
    "box": dict(lb=[2, 0], ub=[1, 1]),
    "box and row": dict(A=[[3, 0]], b=[6], lb=0, ub=1),
    "rows": dict(G=[[1, 0], [-2, 0]], h=[1, -4], lb=-9, ub=9),
    "the same sum twice": dict(A=[[1, 1], [2, 2]], b=[1, 3], lb=0, ub=9),
    "range": dict(G=[[1, 1], [-1, -1]], h=[1, -2]),
    "empty row": dict(A=[[0, 0]], b=[1]),
    "copies": dict(A=[[1, -2], [1, -2]], b=[1, 2]),
}


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("name", SMALL_CONTRADICTIONS)
def test_contradictions_are_found_in_any_unit(name, size):
    rows = {
        key: value if key in "AG" else size * np.asarray(value, float)
        for key, value in SMALL_CONTRADICTIONS[name].items()
    }
    with pytest.raises(bcd.InfeasibleError):
        Program.of(np.eye(2), np.zeros(2), **rows).form()


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e9])
def test_rounding_is_no_contradiction_in_any_unit(size):
    """Sums and bounds that cross by the last digit, also where they are what large terms have left."""
    A = [[1, 1, 1, 0], [3, 3, 3, 0], [-7, -7, -7, 0], [0, 0, 0, 3]]
    b = size * np.array([0, 2e-16, -5e-16, 2.1])  # of x = (0.1, 0.2, -0.3, 0.7), and rounding
    form = Program.of(np.eye(4), np.zeros(4), A, b, [[0, 0, 0, 0.3]], [size * 0.21], lb=-size, ub=size).form()
    assert form.lower[3] == form.upper[3]
    A, b = [[1, -1, 0], [0, 1, 1]], [size * (0.1 + 0.2), size]  # x_1 = x_0 - 0.3 is at most 0.3 - 0.3, at least 0
    form = Program.of(np.eye(3), np.zeros(3), A, b, [[3, 0, 0]], [size * 0.9], lb=[-np.inf, 0, -size]).form()
    assert (form.lower == form.upper).sum() == 1


def test_bounds_as_near_as_rounding_are_kept_apart_where_they_are_small():
    form = Program.of(np.eye(2), np.zeros(2), lb=[0, 1e-17], ub=[1e-16, 3e-17]).form()
    np.testing.assert_array_equal(form.upper, [1e-16, 3e-17])
    np.testing.assert_array_equal(form.lower, [0, 1e-17])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), np.zeros(3)), "P must be square; found shape"),
        ((np.eye(2), np.zeros(3)), "q must have shape"),
        ((np.eye(2), np.zeros(2), np.ones((1, 3)), [1]), "A must have 2 columns"),
        ((np.eye(2), np.zeros(2), np.ones((1, 2)), [1, 2]), "b must have shape"),
        ((np.eye(2), np.zeros(2), np.ones((1, 2)), [np.inf]), "b must be finite"),
        ((np.eye(2), np.zeros(2), np.ones((1, 2)), None), "A and b must be given together"),
        ((np.eye(2), np.zeros(2), None, None, np.ones((1, 2)), [np.nan]), "h must have shape .* without NaN"),
        ((np.eye(2), np.zeros(2), None, None, None, None, [0]), "lb must have shape"),
        ((np.eye(2), np.zeros(2), None, None, None, None, None, ["a", "b"]), "ub must hold real numbers"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        recognise(*arguments)


def test_x0_of_the_wrong_shape():
    with pytest.raises(ValueError, match="x0 must have shape"):
        recognise(np.eye(2), np.zeros(2)).start(np.zeros(3))
