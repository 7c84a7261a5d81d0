# SPDX-License-Identifier: BSD-3-Clause
"""Certificates, recomputed here by other means; what a result prints, stores and draws."""

import json

import matplotlib
import numpy as np
import pytest
from catalogue import (
    CATALOGUE,
    case,
    enumerate_active_sets,
    frank_wolfe_gap_of,
    infeasibility_of,
    random_qp,
    violation_of,
)

import bcd
from bcd.pictures import plot_traces

# -- certificates --------------------------------------------------------------------------------


def feasible_points(problem, count=4):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield problem.feasible.project(rng.choice([0.1, 1.0, 5.0]) * rng.normal(size=problem.n))


@pytest.mark.parametrize("name", CATALOGUE)
def test_violation_and_gap_at_any_feasible_point(name):
    known = case(name)
    for x in feasible_points(known.problem):
        proof = bcd.certify(known.problem, x)
        size = 1 + np.abs(known.problem.objective.gradient(x)).max()
        assert proof.infeasibility == 0
        assert proof.objective == known.problem.objective.value(x)
        assert proof.violation == pytest.approx(violation_of(known.problem, x), abs=1e-12 * size)
        wanted = frank_wolfe_gap_of(known.problem, x)
        if np.isinf(wanted):
            assert proof.gap == np.inf
        else:  # HiGHS keeps constraints to 1e-7 by default, times prices of size |g|
            assert proof.gap == pytest.approx(wanted, rel=1e-9, abs=1e-7 * size)
        # the gap bounds the distance to the minimum
        assert proof.objective - known.minimum <= proof.gap + known.accuracy * max(1, abs(known.minimum))


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_infeasible_point_has_no_certificate(name):
    problem = case(name).problem
    x = problem.feasible.project(np.zeros(problem.n))
    feasible, n = problem.feasible, problem.n
    wrong = []
    for bound, sign in ((feasible.upper, 1), (feasible.lower, -1)):
        for k in np.flatnonzero(np.isfinite(bound[:n]))[:1]:
            past = x.copy()
            past[k] = bound[k] + sign * 0.125
            wrong.append(past)
    for s, (lo, hi) in enumerate(feasible.ranges):
        member = np.flatnonzero(feasible.labels[:n] == s)
        past = x.copy()
        past[member[0]] += (hi + 0.5 if hi < np.inf else lo - 0.5) - x[member].sum()
        wrong.append(past)
    if not wrong:
        pytest.skip("nothing is infeasible here")
    for past in wrong:
        proof = bcd.certify(problem, past)
        assert proof.infeasibility == pytest.approx(infeasibility_of(problem, past), rel=1e-12)
        assert proof.infeasibility >= 0.1
        assert proof.violation == proof.gap == np.inf
        assert proof.objective == problem.objective.value(past)


def test_rounding_of_a_sum_is_not_infeasible_but_a_bound_is_exact():
    problem = bcd.Problem(bcd.Quadratic(np.eye(10)), bcd.SumBox(0, 1, 1))
    x = np.full(10, 0.1)
    x[0] += 1e-16
    assert bcd.certify(problem, x).infeasibility == 0
    x[0] += 1e-12
    assert bcd.certify(problem, x).infeasibility == pytest.approx(1e-12, rel=1e-3)
    x = np.r_[np.nextafter(1.0, 2.0), np.zeros(9)]
    assert bcd.certify(problem, x).infeasibility == pytest.approx(2.2e-16, rel=0.1)
    assert bcd.certify(problem, x).violation == np.inf


@pytest.mark.parametrize("name", CATALOGUE)
def test_multipliers_at_the_optimum(name):
    """g + y + z = 0, with z of the right sign at the bounds and 0 between; y likewise for ranges."""
    problem = case(name).problem
    result = bcd.minimize(problem, "gs1", tol=1e-8, max_iter=200_000)
    assert result.status is bcd.Status.CONVERGED
    x, y, z, feasible, n = result.x, result.total_multipliers, result.bound_multipliers, problem.feasible, problem.n
    assert len(y) == len(feasible.given)
    of_sum = feasible.as_given(np.arange(len(feasible.totals)) + 1.0)  # which sum a given total has become
    labels, price = feasible.labels[:n], np.zeros(n)
    for t, s in enumerate(of_sum.astype(int) - 1):
        price[labels == s] = y[t] if s >= 0 else 0.0
    stationarity = problem.objective.gradient(x) + price + z
    assert np.abs(stationarity).max() <= 1e-8 * (1 + 1e-6)
    upper, lower = x == feasible.upper[:n], x == feasible.lower[:n]
    assert (z[upper & ~lower] >= 0).all()
    assert (z[lower & ~upper] <= 0).all()
    assert (z[~upper & ~lower] == 0).all()
    for s, (lo, hi) in enumerate(feasible.ranges):
        total, multiplier = x[labels == s].sum(), y[int(np.flatnonzero(of_sum == s + 1)[0])]
        if lo < hi and lo + 1e-9 < total < hi - 1e-9:
            assert abs(multiplier) <= 1e-8
        elif lo < hi:
            assert multiplier >= -1e-8 if abs(total - hi) <= 1e-9 else multiplier <= 1e-8


@pytest.mark.parametrize(
    ("name", "which"),
    [("sum, no bounds", 0), ("sum and box, enumerated", 0), ("half bounds", 0), ("groups", 0), ("groups", 1),
     ("groups", 2), ("range, upper end", 0), ("one side, active", 0), ("range, inside", 0), ("some in no sum", 1)],
)  # fmt: skip
def test_the_multiplier_of_a_total_is_the_sensitivity_of_the_minimum(name, which):
    """d f* / d total = -y, by central differences; f* is piecewise quadratic, so these are exact inside a piece."""
    problem, h = case(name).problem, 1e-3
    constraint = problem.constraint

    def minimum(shift):
        def moved(total):
            if isinstance(total, tuple):
                return tuple(None if t is None else t + shift for t in total)
            return total + shift

        if constraint.groups is None:
            total = moved(constraint.total)
        else:
            total = [moved(t) if s == which else t for s, t in enumerate(constraint.total)]
        shifted = bcd.SumBox(constraint.lower, constraint.upper, total, constraint.groups)
        result = bcd.minimize(bcd.Problem(problem.objective, shifted), "wss2", tol=1e-10, max_iter=200_000)
        assert result.status is bcd.Status.CONVERGED
        return result.objective

    y = bcd.minimize(problem, "wss2", tol=1e-10).total_multipliers[which]
    slope = (minimum(h) - minimum(-h)) / (2 * h)
    assert slope == pytest.approx(-y, abs=2e-6)
    if name == "range, inside":
        assert abs(y) <= 1e-9
    else:
        assert abs(y) > 1e-2


def test_the_multiplier_of_a_bound_is_a_sensitivity_too():
    """Raising the upper bound by a unit changes the minimum by -z; values from the enumeration of active sets."""
    Q, c = random_qp(3, 6)
    lower, upper, h = np.full(6, -0.3), np.full(6, 0.6), 1e-4
    problem = bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(lower, upper, 1.0))
    z = bcd.minimize(problem, tol=1e-11).bound_multipliers
    assert (np.abs(z) > 1e-2).sum() >= 2
    for k in np.flatnonzero(np.abs(z) > 1e-2):
        bound = upper if z[k] > 0 else lower
        values = []
        for sign in (1, -1):
            bound[k] += sign * h
            values.append(enumerate_active_sets(Q, c, lower, upper, 1.0)[0])
            bound[k] -= sign * h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(-z[k], abs=1e-6)


def test_the_gap_is_infinite_without_bounds_unless_nothing_descends():
    problem = bcd.Problem(bcd.Quadratic(np.eye(2), [1.0, 0.0]), bcd.SumBox(total=0))
    assert bcd.certify(problem, [0.0, 0.0]).gap == np.inf
    assert bcd.certify(problem, [-0.5, 0.5]).gap == 0.0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], r"x must be finite with shape \(2,\); found shape \(1,\)"),
        ([0.0, np.nan], r"x must be finite with shape \(2,\)"),
        ([0.0, np.inf], r"x must be finite with shape \(2,\)"),
    ],
)
def test_certify_names_a_malformed_point(x, message):
    with pytest.raises(ValueError, match=message):
        bcd.certify(bcd.Problem(bcd.Quadratic(np.eye(2))), x)


def test_certify_does_not_change_or_keep_the_point():
    problem = bcd.Problem(bcd.Quadratic(np.eye(3)), bcd.SumBox(0, 1, 1))
    x = np.array([0.2, 0.3, 0.5000000001])
    copy = x.copy()
    bcd.certify(problem, x)
    np.testing.assert_array_equal(x, copy)


# -- what a result shows -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    return bcd.minimize(case("sum and box, condition 300").problem, "gss", trace=True)


def test_a_result_prints_its_certificate_and_a_sentence(traced):
    text = str(traced)
    rows = dict(line.rsplit("  ", 1) for line in text.splitlines()[:-1])
    rows = {key.strip(): value.strip() for key, value in rows.items()}
    assert rows["status"] == "converged"
    assert float(rows["objective"]) == pytest.approx(traced.objective, rel=1e-9)
    assert float(rows["violation"]) == pytest.approx(traced.violation, rel=1e-2)
    assert int(rows["iterations"].replace(",", "")) == traced.iterations
    assert int(rows["coordinates"]) == 40
    assert text.splitlines()[-1] == bcd.Status.CONVERGED.value


def test_every_status_is_a_sentence_and_only_one_is_ok():
    assert [status for status in bcd.Status if status.ok] == [bcd.Status.CONVERGED]
    for status in bcd.Status:
        assert status.value[0].isupper()
        assert status.value.endswith(".")
        assert len(status.value) > 30


@pytest.mark.parametrize("name", ["sum and box, condition 300", "sum, no bounds", "some in no sum", "one coordinate"])
def test_a_result_survives_json(name):
    """Infinities (the gap without bounds) included, in the form that Python's json reads."""
    result = bcd.minimize(case(name).problem, trace=True)
    plain = result.as_dict()
    again = json.loads(json.dumps(plain))
    assert again == plain
    np.testing.assert_array_equal(again["x"], result.x)
    np.testing.assert_array_equal(again["bound_multipliers"], result.bound_multipliers)
    assert again["status"] == "converged"
    assert again["message"] == result.status.value
    assert again["gap"] == result.gap
    assert again["iterations"] == result.iterations
    assert "ray" not in again


def test_the_ray_of_an_unbounded_problem_is_stored():
    problem = bcd.Problem(bcd.Quadratic(np.zeros((2, 2)), [1.0, 0.0]), bcd.SumBox(total=0))
    again = json.loads(json.dumps(bcd.minimize(problem).as_dict()))
    assert again["status"] == "unbounded"
    assert again["ray"][0] == -again["ray"][1] < 0


def test_a_trace_is_one_row_a_look_and_ends_at_the_result(traced):
    trace = traced.trace
    columns = (trace.iteration, trace.columns, trace.seconds, trace.objective, trace.violation, trace.gap)
    assert {len(column) for column in columns} == {len(trace)}
    assert len(trace) > 20
    assert trace.iteration[0] == 0
    assert (np.diff(trace.iteration) > 0).all()
    assert (np.diff(trace.seconds) >= 0).all()
    assert (np.diff(trace.objective) <= 1e-12).all()
    assert trace.columns == [2 * k for k in trace.iteration]
    assert trace.iteration[-1] == traced.iterations
    assert trace.objective[-1] == pytest.approx(traced.objective, rel=1e-12)
    assert trace.violation[-1] == pytest.approx(traced.violation, abs=1e-12)
    assert trace.gap[-1] == pytest.approx(traced.gap, abs=1e-12)


@pytest.mark.parametrize("options", [{"max_iter": 37}, {"tol": 1e-8}, {"callback": lambda p: p.iteration >= 50}])
@pytest.mark.parametrize("rule", ["gs1", "wss2", "random", "block"])
def test_a_trace_ends_at_the_last_step_however_the_run_ends(rule, options):
    result = bcd.minimize(case("sum and box, condition 300").problem, rule, trace=True, **options)
    assert result.trace.iteration[-1] == result.iterations


def test_no_trace_unless_asked_for():
    result = bcd.minimize(case("simplex projection").problem)
    assert result.trace is None
    with pytest.raises(ValueError, match=r"no trace; call minimize\(\.\.\., trace=True\)"):
        result.plot()


def png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_plot_writes_a_picture(traced, tmp_path):
    before = matplotlib.get_backend()
    figure = traced.plot(tmp_path / "run.png")
    assert png(tmp_path / "run.png")
    assert [axes.get_xlabel() for axes in figure.axes] == ["iterations", "columns of the Hessian"]
    drawn = {line.get_label() for line in figure.axes[0].lines}
    assert {"violation", "Frank-Wolfe gap"} <= drawn
    assert matplotlib.get_backend() == before  # off screen, without touching the user's windows


@pytest.mark.parametrize("name", ["simplex projection", "sum, no bounds", "one coordinate, fixed by its sum"])
def test_plot_of_runs_with_nothing_positive_to_show(name, tmp_path):
    """Gaps that are infinite, violations that are 0 from the start: a picture without a warning."""
    bcd.minimize(case(name).problem, trace=True).plot(tmp_path / "run.png")
    assert png(tmp_path / "run.png")


def test_traces_of_many_rules_in_one_picture(tmp_path):
    problem = case("sum and box, condition 300").problem
    traces = {rule: bcd.minimize(problem, rule, trace=True).trace for rule in bcd.RULES if rule != "gs"}
    figure = plot_traces(traces, tmp_path / "rules.png", quantity="gap", against=("seconds",), tol=1e-6)
    assert png(tmp_path / "rules.png")
    lines = [line for line in figure.axes[0].lines if line.get_label() in traces]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(traces)
