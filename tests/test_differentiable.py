"""Derivatives of solutions: gradcheck, and what they mean."""

import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from bcd import InfeasibleError, LowRank, Status
from bcd.qp import QP

torch = pytest.importorskip("torch")
from bcd.differentiable import solve  # noqa: E402 - needs torch


def gradcheck(function, inputs):
    """First and second derivatives against differences (rounding may differ between two runs)."""
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=1e-12, fast_mode=True)


def wishart(n, seed, rows=None):
    A = np.random.default_rng(seed).standard_normal((rows or 2 * n, n))
    return A.T @ A / n


def leaf(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def problem(n=7, seed=0, batch=(), shift=1.0):
    """A point of general position: some coordinates at either bound, none of the multipliers near 0."""
    rng = np.random.default_rng(seed)
    return wishart(n, seed), leaf(shift * rng.standard_normal((*batch, n)))


def margins(P, q, x, y, lower, upper, labels):
    """The smallest multiplier of a bound that holds, and the smallest room of a free coordinate."""
    g = P @ x + q + np.where(labels >= 0, np.append(y, 0.0)[labels], 0.0)
    free = (x > lower) & (x < upper)
    rooms = np.minimum(x - lower, upper - x)[free]
    return np.abs(g[~free]).min(initial=np.inf), rooms.min(initial=np.inf), np.abs(g[free]).max(initial=0.0)


# -- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "seed"), [((), 0), ((), 1), ((), 2), ((3,), 3), ((2, 2), 4)])
def test_derivatives_in_everything(batch, seed):
    P, q = problem(5, seed=seed, batch=batch)
    matrix = leaf(P)
    total = leaf(np.full(batch, 1.2) + 0.1 * np.arange(np.prod(batch)).reshape(batch))
    lower, upper = leaf(np.full(5, -0.05)), leaf(np.linspace(0.4, 0.7, 5))

    def function(P, q, total, lower, upper):
        return solve(P, q, total=total, lower=lower, upper=upper, tol=1e-13)

    x = function(matrix, q, total, lower, upper)
    assert x.shape == q.shape
    assert ((x == lower).any() and (x == upper).any()) or batch == ()
    assert ((x > lower) & (x < upper)).any()
    gradcheck(function, (matrix, q, total, lower, upper))


@pytest.mark.parametrize("form", ["dense", "array", "sparse", "low rank", "low rank, more free than factors"])
def test_every_form_of_the_matrix_has_the_same_derivatives(form):
    rng = np.random.default_rng(2)
    n, k = 12, 3 if "more" in form else 11
    F, D = rng.standard_normal((n, k)), 0.1 + rng.random(n)
    P = F @ F.T + np.diag(D)
    model = {"dense": torch.tensor(P), "array": P, "sparse": sp.csc_array(P)}.get(form, LowRank(F, D))
    q, total, upper = leaf(rng.standard_normal(n)), leaf(1.0), leaf(np.full(n, 0.3))

    def function(P, q, total, upper):
        return solve(P, q, total=total, lower=0.0, upper=upper, tol=1e-13)

    gradcheck(lambda *args: function(model, *args), (q, total, upper))
    weight = torch.linspace(1.0, 2.0, n, dtype=torch.float64)
    mine, dense = (
        torch.autograd.grad((function(m, q, total, upper) * weight).sum(), (q, total, upper))
        for m in (model, torch.tensor(P))
    )
    for a, b in zip(mine, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_groups_and_coordinates_in_no_sum():
    P, q = problem(9, seed=3, batch=(2,))
    groups = np.array([0, 0, 1, 1, 1, -1, -1, 0, 2])
    total = leaf([[1.0, 0.5, 0.2], [0.7, 0.1, -0.1]])

    def function(P, q, total):
        return solve(P, q, total=total, lower=-0.4, upper=0.6, groups=groups, tol=1e-13)

    matrix = leaf(P)
    x = function(matrix, q, total)
    for s in range(3):
        torch.testing.assert_close(x[:, groups == s].sum(dim=1), total[:, s])
    gradcheck(function, (matrix, q, total))


def test_bounds_alone():
    P, q = problem(6, seed=4, shift=5.0)
    lower = leaf(np.full(6, -0.5))
    gradcheck(lambda q, a: solve(P, q, lower=a, upper=0.5, tol=1e-13), (q, lower))
    free = solve(P, q, tol=1e-13)
    torch.testing.assert_close(free, -torch.linalg.solve(torch.tensor(P), q))


def test_the_derivatives_are_those_of_the_equations():
    """Jacobians in q and total from an explicit inverse of (1)."""
    P, q = problem(8, seed=5)
    x = solve(P, q, total=1.0, lower=0.0, tol=1e-13).detach().numpy()
    F = np.flatnonzero(x > 0)
    assert 1 < len(F) < 8
    K = np.block([[P[np.ix_(F, F)], np.ones((len(F), 1))], [np.ones((1, len(F))), np.zeros((1, 1))]])
    inverse = np.linalg.inv(K)
    expected = np.zeros((8, 8))
    expected[np.ix_(F, F)] = -inverse[:-1, :-1]
    total = leaf(1.0)
    by_q, by_total = torch.autograd.functional.jacobian(
        lambda q, s: solve(P, q, total=s, lower=0.0, tol=1e-13), (q, total)
    )
    np.testing.assert_allclose(by_q, expected, atol=1e-10)
    np.testing.assert_allclose(by_total[F], inverse[:-1, -1], atol=1e-10)
    assert not by_total[x == 0].any()


def test_an_asymmetric_matrix_counts_as_its_symmetric_part():
    P, q = problem(5, seed=6)
    skew = np.triu(np.ones((5, 5)), 1)
    lopsided = leaf(P + skew - skew.T)
    x = solve(lopsided, q, total=1.0, lower=0.0)
    torch.testing.assert_close(x, solve(P, q, total=1.0, lower=0.0))
    (slope,) = torch.autograd.grad(x[0], lopsided)
    torch.testing.assert_close(slope, slope.mT)


# -- corners -------------------------------------------------------------------------------------


def test_a_corner_does_not_move():
    """All coordinates of the sum at bounds: derivatives are 0, in the total as well."""
    q, total = leaf([0.0, -3.0, 5.0]), leaf(2.0)
    x = solve(np.eye(3), q, total=total, lower=0.0, upper=torch.tensor([1.0, 1.0, 1.0]))
    assert x.tolist() == [1.0, 1.0, 0.0]
    x[0].backward()
    assert q.grad.tolist() == [0.0] * 3
    assert total.grad.item() == 0.0


def test_degenerate_points_have_the_derivative_of_the_side_on_which_the_bound_holds():
    """x_0 is at its bound with multiplier 0: where q_0 falls it leaves it, and the derivative is 0.5 there."""
    q = leaf([0.0, 0.0, 1.0])
    x = solve(np.eye(3), q, total=1.0, lower=[0.5, 0.0, 0.0])
    assert x.tolist() == [0.5, 0.5, 0.0]
    (slope,) = torch.autograd.grad(x[1], q)
    sides = []
    for step in (1e-6, -1e-6):
        there = q.detach() + torch.tensor([step, 0.0, 0.0])
        sides.append((solve(np.eye(3), there, total=1.0, lower=[0.5, 0.0, 0.0])[1] - x[1]).item() / step)
    np.testing.assert_allclose(sorted(sides), [0.0, 0.5], atol=1e-9)
    assert slope.tolist() == [0.0, 0.0, 0.0]  # x_0 stays at its bound, and x_1 with it


def test_equal_bounds_fix_a_coordinate():
    P, q = problem(5, seed=7)
    fixed = leaf(0.3)
    tail = torch.full((4,), torch.inf, dtype=torch.float64)

    def function(fixed, q):
        lower = torch.cat([fixed[None], torch.zeros(4, dtype=torch.float64)])
        return solve(P, q, total=1.0, lower=lower, upper=torch.cat([fixed[None], tail]), tol=1e-13)

    assert function(fixed, q)[0].item() == 0.3
    gradcheck(function, (fixed, q))


def test_a_singular_block_with_one_solution():
    """P_FF is singular, but not on the directions that keep the sum: the solution is unique and moves as usual."""
    rng = np.random.default_rng(8)
    F = rng.standard_normal((4, 3))
    gradcheck(lambda q, s: solve(LowRank(F), q, total=s, tol=1e-12), (leaf(F @ [0.1, 0.2, 0.3]), leaf(1.0)))


def test_many_solutions_give_the_derivative_of_least_norm():
    """Duplicated coordinates: what one of them loses or gains is split equally."""
    P = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    q, total = leaf([0.0, 0.0, 0.0]), leaf(1.0)
    x = solve(P, q, total=total, lower=-9.0, upper=9.0)
    torch.testing.assert_close(x[:2].sum(), leaf(0.5))
    by_q, by_total = torch.autograd.grad(x[0], (q, total))
    torch.testing.assert_close(by_total, torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(by_q, torch.tensor([-0.125, -0.125, 0.25], dtype=torch.float64))


def test_the_largest_problems_of_a_low_rank_model_form_no_matrix():
    n, rng = 20_000, np.random.default_rng(9)
    model = LowRank(rng.standard_normal((n, 5)), 0.5 + rng.random(n))
    q, total = leaf(0.001 * rng.standard_normal(n)), leaf(1.0)
    x = solve(model, q, total=total, lower=-1.0)
    assert (x > -1).sum() > 10_000
    (slope,) = torch.autograd.grad(x[:5].sum(), total, create_graph=True)
    step = 1e-3
    with torch.no_grad():
        after = solve(model, q, total=total + step, lower=-1.0)
    np.testing.assert_allclose(slope.item(), (after[:5].sum() - x[:5].sum()).item() / step, rtol=1e-6)


# -- interface -----------------------------------------------------------------------------------


def test_float32_in_float32_out():
    P, q = problem(6, seed=10, batch=(4,))
    small = q.detach().float().requires_grad_()
    matrix = torch.tensor(P, dtype=torch.float32, requires_grad=True)
    total = torch.tensor(1.0, requires_grad=True)
    x = solve(matrix, small, total=total, lower=0.0)
    assert x.dtype == torch.float32
    x[:, 0].sum().backward()
    for tensor in (small, matrix, total):
        assert tensor.grad.dtype == torch.float32
    y = solve(torch.tensor(P), q, total=1.0, lower=0.0)
    torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_rows():
    P, q = problem(6, seed=11, batch=(3, 4))
    total = torch.linspace(0.5, 2.0, 12, dtype=torch.float64).reshape(3, 4)
    x = solve(P, q, total=total, lower=0.0, upper=1.0, tol=1e-13)
    for k in np.ndindex(3, 4):
        torch.testing.assert_close(x[k], solve(P, q[k], total=total[k].item(), lower=0.0, upper=1.0, tol=1e-13))
    assert solve(P, q[:0], total=1.0).shape == (0, 4, 6)


def test_bounds_are_hit_exactly_and_sums_are_kept():
    P, q = problem(30, seed=12, batch=(5,), shift=3.0)
    x = solve(P, q, total=1.0, lower=0.0, upper=0.1)
    assert (x == 0.1).any()
    assert (x == 0.0).any()
    assert x.min() >= 0
    assert x.max() <= 0.1
    torch.testing.assert_close(x.sum(dim=1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_nothing_is_kept_when_nothing_requires_gradients():
    P, q = problem(5, seed=13)
    x = solve(P, q.detach(), total=1.0, lower=0.0)
    assert not x.requires_grad
    with torch.no_grad():
        assert not solve(P, q, total=1.0, lower=0.0).requires_grad


def test_a_layer_learns():
    """A linear map from features to q is found from the portfolios that it has led to."""
    rng = np.random.default_rng(14)
    P = torch.tensor(wishart(10, 14))
    features = torch.tensor(rng.standard_normal((12, 3)))
    truth = torch.tensor(rng.standard_normal((3, 10)))
    wanted = solve(P, features @ truth, total=1.0, lower=0.0)
    weight = torch.zeros((3, 10), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = ((solve(P, features @ weight, total=1.0, lower=0.0, tol=1e-8) - wanted) ** 2).sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros(3)}, "q must be a floating-point tensor of shape (..., n); found ndarray"),
        ({"q": torch.zeros(3, dtype=torch.int64)}, "found a tensor of dtype torch.int64"),
        ({"q": torch.tensor(1.0)}, "q must be a floating-point tensor"),
        ({"P": np.eye(4)}, "P must have shape (3, 3) to go with q; found (4, 4)"),
        ({"P": LowRank(np.ones((4, 1)))}, "P must have shape (3, 3) to go with q; found (4, 4)"),
        ({"P": "eye"}, "P must be a tensor, an array, a scipy sparse array or bcd.LowRank; found str"),
        ({"total": torch.ones(2)}, "total must broadcast to shape (5,); found (2,)"),
        ({"lower": torch.zeros(2)}, "lower must broadcast to shape (5, 3); found (2,)"),
        ({"q": torch.full((5, 3), torch.nan)}, "q must be finite"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"P": np.eye(3), "q": torch.zeros(5, 3), "total": 1.0} | change
    P, q = arguments.pop("P"), arguments.pop("q")
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(P, q, **arguments)


def test_what_has_no_solution_says_so():
    with pytest.raises(InfeasibleError, match=r"misses it by 0\.7"):
        solve(np.eye(3), torch.zeros(3), total=1.0, lower=0.0, upper=0.1)
    with pytest.raises(ValueError, match=r"problem 1 of the batch has no solution: .* falls without end"):
        solve(np.zeros((2, 2)), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), total=1.0)


def stagnating(monkeypatch, steps):
    """QP.solve that ends after so many steps and says that rounding has ended it."""
    original = QP.solve

    def stopped(self, *args, **options):
        result = original(self, *args, **options, max_iter=steps)
        result.status = Status.STAGNATED
        return result

    monkeypatch.setattr(QP, "solve", stopped)


def test_a_point_far_from_the_tolerance_is_an_error(monkeypatch):
    P, q = problem(30, seed=15, batch=(3,))
    stagnating(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"problem 0 of the batch: rounding stopped the solver at a violation of"):
        solve(P, q, total=1.0, lower=0.0)


@pytest.mark.parametrize("tol", [1e-8, 0.0])
def test_a_point_that_rounding_has_stopped_near_the_tolerance_serves(monkeypatch, tol):
    P, q = problem(30, seed=15)
    expected = solve(P, q, total=1.0, lower=0.0)
    stagnating(monkeypatch, None)
    torch.testing.assert_close(solve(P, q, total=1.0, lower=0.0, tol=tol), expected)


def test_import_bcd_does_not_import_torch():
    code = "import sys, bcd, bcd.qp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
