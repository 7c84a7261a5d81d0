# SPDX-License-Identifier: BSD-3-Clause
"""What experiments/two_coordinate.py and experiments/sum_box.py measure, at sizes where it can be checked."""

import numpy as np
import pytest

import bcd
from bcd.selection import steepest_l1
from experiments import paper_rates, sum_box, two_coordinate

RNG = np.random.default_rng(0)


def gradient_and_weights(n, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n), np.abs(rng.standard_normal(n)) + 0.1


# -- pairs under a sum --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_what_they_say(seed):
    g, w = gradient_and_weights(30, seed)
    score = (g[None, :] - g[:, None]) / (w[:, None] + w[None, :])  # [i, j]: i rises, j falls
    assert two_coordinate.gs_ends(g) == (g.argmin(), g.argmax())
    ratio = (g - g.mean()) / w
    assert two_coordinate.ratio_ends(g, w) == (ratio.argmin(), ratio.argmax())
    i, j = two_coordinate.one_end(g, w)
    assert (i, j) == (score[:, g.argmax()].argmax(), g.argmax())
    pairs = [(g.argmin(), g.argmax()), (ratio.argmin(), ratio.argmax())]
    both = two_coordinate.best_of_both(g, w)
    assert both in pairs
    assert score[both] == max(score[pair] for pair in pairs)
    best = np.unravel_index(score.argmax(), score.shape)
    assert two_coordinate.enumerated(g, w) == best
    for name, choose in two_coordinate.APPROXIMATIONS.items():
        assert score[choose(g, w)] <= score.max(), name


def test_the_best_pair_lowers_f_most():
    A = RNG.standard_normal((12, 9))
    Q, g = A.T @ A, RNG.standard_normal(9)
    i, j = two_coordinate.best_pair(g, Q)
    assert g[i] < g[j]
    gains = [(g[a] - g[b]) ** 2 / (Q[a, a] + Q[b, b] - 2 * Q[a, b]) for a in range(9) for b in range(a)]
    assert (g[i] - g[j]) ** 2 / (Q[i, i] + Q[j, j] - 2 * Q[i, j]) == pytest.approx(max(gains))


@pytest.mark.parametrize(
    "made",
    [
        lambda: two_coordinate.least_squares(30, True, 0),
        lambda: two_coordinate.least_squares(30, False, 1),
        lambda: two_coordinate.hull(40, 1)[:2],
        lambda: two_coordinate.neighbours(False, 30, 0)[:2],
        lambda: two_coordinate.neighbours(True, 30, 1)[:2],
    ],
)
def test_the_minimum_is_the_minimum(made):
    """Against a null-space solve that shares no code with the closed forms."""
    problem, minimum = made()
    Q, c, n = problem.objective.hessian.matrix, problem.objective.c, problem.n
    np.testing.assert_allclose(Q, Q.T, rtol=1e-12, atol=1e-14)
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    z = np.linalg.lstsq(basis.T @ Q @ basis, -basis.T @ c, rcond=1e-12)[0]
    assert minimum == pytest.approx(problem.objective.value(basis @ z), rel=1e-9)
    assert minimum < 0 == problem.objective.value(np.zeros(n))


def test_new_rows_stay_within_the_hull_and_the_guarantee_stays():
    rows = two_coordinate.hull_rows(60, 3)
    first = two_coordinate.hull_rows(two_coordinate.INFORMATIVE, 3)
    np.testing.assert_array_equal(rows[: len(first)], first)
    assert paper_rates.width_over_diameter(rows) == pytest.approx(paper_rates.width_over_diameter(first))


def test_steps_are_counted_to_the_accuracy():
    problem, minimum = two_coordinate.least_squares(25, True, 0)
    for name, rule in two_coordinate.RULES.items():
        result = two_coordinate.follow(problem, minimum, rule)
        counts = [two_coordinate.reached(result, minimum, accuracy) for accuracy in two_coordinate.ACCURACIES]
        assert None not in counts, name
        assert counts == sorted(counts), name
        assert result.objective <= minimum * (1 - two_coordinate.ACCURACIES[-1]), name
    assert two_coordinate.reached(result, minimum, 1e-30) is None


def test_dinkelbach_finds_what_all_pairs_find():
    entry = two_coordinate.compare_choices(*two_coordinate.least_squares(60, True, 0))
    every = entry["approximations"]["all pairs"]
    assert every["points"] >= 5
    assert every["least"] == pytest.approx(1, rel=1e-12)
    assert every["largest"] == pytest.approx(1, rel=1e-12)
    for name in two_coordinate.APPROXIMATIONS:
        assert entry["approximations"][name]["largest"] <= 1 + 1e-12
    assert 2 <= entry["rounds"]["mean"] <= entry["rounds"]["most"] <= 12


@pytest.mark.parametrize("name", ["hull, constant steps", "hull, exact steps"])
def test_greedy_keeps_its_guarantee_as_rows_are_added(name):
    entry = two_coordinate.dimension(name, (20, 120), 2)
    for counts in entry["rules"]["GS"]:
        for count, bound in zip(counts, entry["GS, guaranteed"], strict=True):
            assert 0 < count <= bound * (1 + 1 / 32) + 1  # looks of the trace are up to a 32nd apart


def test_medians_count_what_was_not_reached_as_long():
    assert two_coordinate.median([3, None, 5]) == 5
    assert two_coordinate.median([None, None, 5]) is None


# -- a sum and a box ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sum_box.PROBLEMS)
def test_every_rule_comes_to_the_reference(name):
    problem = sum_box.PROBLEMS[name](30)
    start, minimum = sum_box.bounds_of_excess(problem)
    assert start > minimum
    rows = {rule: sum_box.followed(problem, rule, start, minimum) for rule in sum_box.RULES}
    sum_box.add_seconds(problem, rows)
    for rule, row in rows.items():
        marks = list(row["reached"].values())
        assert None not in marks, rule
        assert [mark["iterations"] for mark in marks] == sorted(mark["iterations"] for mark in marks)
        assert all(mark["columns"] >= 2 * mark["iterations"] for mark in marks), rule
        assert all(("seconds" in mark) == (sum_box.RULES[rule][1] is None) for mark in marks), rule


@pytest.mark.parametrize("name", sum_box.PROBLEMS)
def test_gains_of_one_model_are_in_the_order_of_the_theory(name):
    problem = sum_box.PROBLEMS[name](24)
    steps = sum_box.compare_steps(problem, *sum_box.bounds_of_excess(problem))
    q, s = (np.array(steps["model"][rule]["quantiles"]) for rule in ("GS-q", "GS-s"))
    assert q.max() <= 1 + 1e-9
    assert (s <= q + 1e-9).all()
    assert steps["f"]["GS-q"]["points"] == steps["model"]["GS-q"]["points"] > 3


def test_a_gain_is_the_decrease():
    problem = sum_box.box(15)
    x = problem.feasible.project(np.zeros(15))
    grad, Q = problem.objective.gradient(x), problem.objective.hessian.matrix
    chosen = steepest_l1(grad, np.ones(15), np.ones(15), problem.lipschitz)
    model, true = sum_box.gain(chosen, grad, Q, problem.lipschitz)
    d = np.zeros(15)
    d[chosen.index] = chosen.step
    assert true == pytest.approx(problem.objective.value(x) - problem.objective.value(x + d))
    assert model == pytest.approx(-(grad @ d + problem.lipschitz / 2 * np.abs(d).sum() ** 2))
    assert true >= model > 0


def test_tight_caps_make_gs1_move_more():
    """At the start every room to rise is the cap less the mean, and GS-1 fills many of them at once."""
    tight, loose = (sum_box.steps_of_gs1(sum_box.portfolio(60, cap))["line-search"] for cap in (1.2, 30.0))
    assert tight["mean"] > loose["mean"] >= 2


def test_quantiles_of_ratios():
    r = sum_box.ratios([1.0] * 4, [0.001, 1.0, 1.0, 2.0])
    assert r["points"] == 4
    assert r["above"] == r["trivial"] == 0.25
    assert r["quantiles"][0] == 0.001
    assert r["quantiles"][-1] == 2


# -- what is drawn and written ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [two_coordinate, sum_box])
def test_a_quick_run_has_pictures_and_tables(experiment):
    results = experiment.run(quick=True)
    pictures = results.pop("pictures")
    assert len(pictures) == 2
    assert all(table.startswith("| ") for table in experiment.tables(results).values())


def test_seconds_are_not_claimed_of_rules_in_python():
    row = {"reached": {str(a): 10 for a in two_coordinate.ACCURACIES}, "iterations": 10, "seconds": None}
    table = two_coordinate._curve_table({"rules": {"ratio": row, "GS": row | {"seconds": 1e-3}}})
    assert "| ratio | 10 | 10 | 10 | - | - |" in table
    assert "| GS | 10 | 10 | 10 | 1 | 100.00 |" in table
    assert bcd.RULES.keys() >= {"gs", "gsl", "random", "cyclic"}
