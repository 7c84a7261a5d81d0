"""Frontiers: every point recomputed, against cvxpy, limits, and pictures."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import bcd
from bcd import InfeasibleError, LowRank, Status
from bcd.frontier import frontier
from bcd.gram import Gram, Kernel
from bcd.qp import QP

GAMMAS = np.array([np.inf, 100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01])


def market(n=60, k=4, seed=0):
    """Expected returns, factor loadings and specific variances."""
    rng = np.random.default_rng(seed)
    return 0.1 * rng.random(n), 0.2 * rng.standard_normal((n, k)), 0.01 + 0.05 * rng.random(n)


def covariance(F, D):
    return F @ F.T + np.diag(D)


def violation(P, mu, gamma, w, lower, upper):
    """Largest gradient that can fall minus smallest that can rise, over the largest in size."""
    g = P @ w - mu / gamma
    return max(0.0, g[w > lower].max(initial=-np.inf) - g[w < upper].min(initial=np.inf)) / np.abs(g).max()


@pytest.mark.parametrize("form", ["dense", "sparse", "low rank"])
def test_every_point_is_optimal_and_the_curve_rises(form):
    mu, F, D = market()
    P = covariance(F, D)
    model = {"dense": P, "sparse": sp.csc_array(P), "low rank": LowRank(F, D)}[form]
    curve = frontier(mu, model, GAMMAS, upper=0.2)
    assert curve.status is Status.CONVERGED
    assert curve.unfinished is None
    np.testing.assert_array_equal(curve.gammas, GAMMAS)
    for gamma, w, risk, gain, holdings in zip(
        GAMMAS, curve.weights, curve.risk, curve.expected_return, curve.holdings, strict=True
    ):
        assert abs(w.sum() - 1) < 1e-14
        assert w.min() >= 0
        assert w.max() <= 0.2
        assert violation(P, mu, gamma, w, 0.0, 0.2) <= 1e-8
        np.testing.assert_allclose(risk, np.sqrt(w @ P @ w), rtol=1e-12)
        np.testing.assert_allclose(gain, mu @ w, rtol=1e-12)
        assert holdings == np.sum(w > 0)
    assert (np.diff(curve.risk) >= -1e-9).all()
    assert (np.diff(curve.expected_return) >= -1e-9).all()
    assert curve.seconds >= sum(result.seconds for result in curve.results)


@settings(max_examples=15)
@given(st.integers(2, 25), st.integers(0, 10**6), st.sampled_from([None, 0.5]), st.booleans())
def test_against_cvxpy(n, seed, cap, short):
    import cvxpy as cp

    mu, F, D = market(n, 3, seed)
    P = covariance(F, D)
    gammas = [np.inf, 2.0, 0.2]
    lower = -0.3 if short else 0.0
    curve = frontier(mu, LowRank(F, D), gammas, lower=lower, upper=cap)
    for gamma, w in zip(gammas, curve.weights, strict=True):
        x = cp.Variable(n)
        constraints = [cp.sum(x) == 1, x >= lower] + ([] if cap is None else [x <= cap])
        linear = 0 if np.isinf(gamma) else mu @ x / gamma
        problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(P)) - linear), constraints)
        problem.solve(solver=cp.CLARABEL)
        value = 0.5 * w @ P @ w - (0 if np.isinf(gamma) else mu @ w / gamma)
        assert value <= problem.value + 1e-7 * max(1.0, abs(problem.value))
        np.testing.assert_allclose(w, x.value, atol=2e-4)


def test_points_stand_in_the_order_given():
    mu, F, D = market()
    order = np.random.default_rng(1).permutation(len(GAMMAS))
    straight, mixed = (frontier(mu, LowRank(F, D), gammas) for gammas in (GAMMAS, GAMMAS[order]))
    np.testing.assert_array_equal(mixed.gammas, GAMMAS[order])
    np.testing.assert_array_equal(mixed.weights, straight.weights[order])
    assert [result.iterations for result in mixed.results] == [straight.results[k].iterations for k in order]


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_units_do_not_matter(scale):
    """Daily variances are solved as accurately as yearly ones."""
    mu, F, D = market()
    unit = frontier(mu, covariance(F, D), GAMMAS)
    scaled = frontier(scale * mu, scale * covariance(F, D), GAMMAS)
    np.testing.assert_allclose(scaled.weights, unit.weights, atol=1e-6)
    for gamma, w in zip(GAMMAS, scaled.weights, strict=True):
        assert violation(scale * covariance(F, D), scale * mu, gamma, w, 0.0, np.inf) <= 2e-8


def test_groups_have_budgets_of_their_own():
    mu, F, D = market()
    groups = np.arange(60) % 3
    curve = frontier(mu, LowRank(F, D), [np.inf, 1.0], total=[0.5, 0.3, (0.0, 0.2)], groups=groups)
    assert curve.status is Status.CONVERGED
    for w in curve.weights:
        np.testing.assert_allclose([w[groups == 0].sum(), w[groups == 1].sum()], [0.5, 0.3], atol=1e-14)
        assert -1e-15 <= w[groups == 2].sum() <= 0.2 + 1e-15


def test_the_callback_sees_every_point_and_can_end_the_run():
    mu, F, D = market()
    seen = []
    curve = frontier(
        mu, LowRank(F, D), GAMMAS[::-1], callback=lambda gamma, result: seen.append((gamma, result)) or len(seen) == 3
    )
    assert [gamma for gamma, _ in seen] == [np.inf, 100.0, 10.0]
    assert curve.status is Status.CALLBACK
    assert curve.gammas.tolist() == [10.0, 100.0, np.inf]
    assert curve.results[0] is seen[2][1]


def test_limits_keep_what_there_is():
    mu, F, D = market()
    nothing = frontier(mu, LowRank(F, D), GAMMAS, time_limit=0.0)
    assert nothing.status is Status.TIME_LIMIT
    assert nothing.weights.shape == (0, 60)
    with pytest.raises(ValueError, match="no points to draw"):
        nothing.plot()


def press(gamma, result):
    """Ctrl-C between two points, at the second."""
    if gamma == 100.0:
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_there_is():
    mu, F, D = market()
    curve = frontier(mu, LowRank(F, D), GAMMAS, callback=press)
    assert curve.status is Status.INTERRUPTED
    assert curve.gammas.tolist() == [np.inf, 100.0]


def test_ctrl_c_inside_of_a_solve_leaves_that_point_out(monkeypatch):
    mu, F, D = market()
    solve, calls = QP.solve, []

    def interrupted(self, *args, **options):
        result = solve(self, *args, **options)
        calls.append(result)
        if len(calls) == 3:
            result.status = Status.INTERRUPTED
        return result

    monkeypatch.setattr(QP, "solve", interrupted)
    curve = frontier(mu, LowRank(F, D), GAMMAS)
    assert curve.status is Status.INTERRUPTED
    assert curve.gammas.tolist() == [np.inf, 100.0]
    assert curve.unfinished is calls[2]


def test_a_warm_start_where_the_gradient_cancels_asks_for_no_more():
    """Without a sum P w = mu / gamma at the solution, where the next gamma starts: that is no scale."""
    mu, F, D = market()
    for scale in (1.0, 1e-6):
        gammas = [2.0, 2.0, 2.0 * (1 + 1e-12)]
        curve = frontier(scale * mu, LowRank(F, D), gammas, total=None, lower=None, tol=1e-10)
        assert curve.status is Status.CONVERGED, [result.violation for result in curve.results]
        P = covariance(F, D)
        for w in curve.weights:
            np.testing.assert_allclose(P @ w, scale * mu / 2, atol=1e-9 * scale * mu.max())


def stagnating(steps, monkeypatch):
    """QP.solve whose second call ends after so many steps, and says that rounding has ended it."""
    solve, calls = QP.solve, []

    def stopped(self, *args, **options):
        calls.append(solve(self, *args, **options, max_iter=steps if len(calls) == 1 else None))
        if len(calls) == 2:
            calls[-1].status = Status.STAGNATED
        return calls[-1]

    monkeypatch.setattr(QP, "solve", stopped)
    return calls


def test_a_point_that_stagnates_far_from_its_tolerance_is_no_point_of_the_curve(monkeypatch):
    mu, F, D = market()
    calls = stagnating(0, monkeypatch)
    curve = frontier(mu, LowRank(F, D), [100.0, 1.0, 0.1])
    assert curve.status is Status.STAGNATED
    assert curve.gammas.tolist() == [100.0]
    assert curve.unfinished is calls[1]
    assert curve.unfinished.violation > 1e-4


def test_a_point_that_stagnates_near_its_tolerance_is_kept_and_reported(monkeypatch):
    mu, F, D = market()
    stagnating(None, monkeypatch)
    curve = frontier(mu, LowRank(F, D), [100.0, 1.0, 0.1])
    assert curve.status is Status.STAGNATED
    assert len(curve.gammas) == 3
    assert curve.unfinished is None
    assert [result.status.ok for result in curve.results] == [True, False, True]


def test_without_bounds_a_singular_model_has_no_frontier():
    mu, F, _ = market()
    curve = frontier(mu, LowRank(F), [np.inf, 1.0], lower=None)
    assert curve.status is Status.UNBOUNDED
    assert curve.gammas.tolist() == [np.inf]
    ray = curve.unfinished.ray
    assert abs(ray.sum()) <= 1e-8 * np.abs(ray).sum()
    assert np.linalg.norm(F.T @ ray) <= 1e-6 * np.linalg.norm(ray)
    assert mu @ ray > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gammas": [1.0, 0.0]}, "gammas must be a list of positive numbers"),
        ({"gammas": 3.0}, "gammas must be a list of positive numbers"),
        ({"gammas": [1.0, np.nan]}, "gammas must be a list of positive numbers"),
        ({"gammas": ["a"]}, "gammas must hold real numbers"),
        ({"mu": np.zeros(3)}, r"mu must have shape \(60,\)"),
        ({"mu": np.full(60, np.inf)}, "mu must be finite"),
        ({"upper": np.zeros(3)}, "upper must be a scalar or have shape"),
        ({"risk_model": np.ones((3, 4))}, "square"),
        ({"risk_model": Gram(np.ones((60, 2)), Kernel("linear"))}, "risk_model must be an array, .* found a Gram"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    mu, F, D = market()
    arguments = {"mu": mu, "risk_model": LowRank(F, D), "gammas": [1.0]} | change
    with pytest.raises(ValueError, match=message):
        frontier(**arguments)


def test_an_impossible_budget_says_by_how_much():
    mu, F, D = market()
    with pytest.raises(InfeasibleError, match=r"misses it by 0\.4"):
        frontier(mu, LowRank(F, D), [1.0], upper=0.01)


def test_it_is_reached_through_qp():
    assert bcd.qp.frontier is frontier


# -- pictures ------------------------------------------------------------------------------------


def test_picture_has_the_curve_and_what_it_consists_of(tmp_path):
    mu, F, D = market()
    curve = frontier(mu, LowRank(F, D), GAMMAS, upper=0.2)
    file = tmp_path / "frontier.png"
    figure = curve.plot(file, largest=5)
    assert file.read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    line = left.lines[0].get_xydata()
    np.testing.assert_array_equal(line, np.column_stack([curve.risk, curve.expected_return]))
    names = right.get_legend_handles_labels()[1]
    largest = np.argsort(-curve.weights.mean(axis=0))[:5]
    assert names[:5] == [f"asset {k}" for k in largest]
    assert names[5].endswith(" others")
    top = max(path.vertices[:, 1].max() for area in right.collections for path in area.get_paths())
    np.testing.assert_allclose(top, 1.0)


def test_short_positions_hang_below_zero(tmp_path):
    mu, F, D = market(6, 2)
    curve = frontier(mu, LowRank(F, D), GAMMAS, lower=-0.5, upper=1.0)
    assert (curve.weights < 0).any()
    figure = curve.plot(names=list("abcdef"))
    right = figure.axes[1]
    assert sorted(right.get_legend_handles_labels()[1]) == list("abcdef")
    heights = np.concatenate([path.vertices[:, 1] for area in right.collections for path in area.get_paths()])
    np.testing.assert_allclose(heights.min(), np.minimum(curve.weights, 0).sum(axis=1).min())
    np.testing.assert_allclose(heights.max(), np.maximum(curve.weights, 0).sum(axis=1).max())


@pytest.mark.parametrize("names", [[], list("abcde"), list("abcdefg")])
def test_names_are_one_an_asset(names):
    mu, F, D = market(6, 2)
    with pytest.raises(ValueError, match=f"names must be one an asset, 6 in all; found {len(names)}"):
        frontier(mu, LowRank(F, D), [1.0]).plot(names=names)


def test_names_may_be_an_array():
    mu, F, D = market(6, 2)
    figure = frontier(mu, LowRank(F, D), [1.0], upper=0.5).plot(names=np.array(list("abcdef")))
    assert set(figure.axes[1].get_legend_handles_labels()[1]) <= set("abcdef")


def test_one_point_can_be_drawn():
    mu, F, D = market(6, 2)
    figure = frontier(mu, LowRank(F, D), [np.inf]).plot()
    assert [text.get_text() for text in figure.axes[0].texts] == ["minimum variance"]
    with pytest.raises(ValueError, match="largest must be between 1 and 9"):
        frontier(mu, LowRank(F, D), [1.0]).plot(largest=0)
