"""Blocks under a budget: the walk against a plain loop, the rules, and three array libraries."""

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcd.selection import (
    BLOCK_RULES,
    CyclicBlocks,
    GreedyBlocks,
    ImportanceBlocks,
    RandomBlocks,
    fill_budget,
)

torch = pytest.importorskip("torch")
LIBRARIES = {"numpy": np.asarray, "torch": torch.asarray, "strict": array_api_strict.asarray}


@st.composite
def problems(draw, most=12):
    """Scores (with ties), costs, a budget and which blocks are divisible."""
    n = draw(st.integers(1, most))
    score = draw(st.lists(st.integers(-3, 3).map(float), min_size=n, max_size=n))
    cost = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    divisible = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return np.array(score), np.array(cost), draw(st.integers(0, sum(cost) + 2)), np.array(divisible)


def plain(score, cost, budget, divisible):
    """The walk, one block at a time."""
    index, amount, room = [], [], budget
    for b in sorted(range(len(score)), key=lambda b: (-score[b], b)):
        if cost[b] <= room:
            index.append(b)
            amount.append(int(cost[b]))
            room -= cost[b]
        elif divisible[b] and room:
            return [*index, b], [*amount, int(room)]
    return index, amount


@given(problems(), st.sampled_from(sorted(LIBRARIES)), st.booleans())
def test_the_walk_is_the_plain_loop(problem, library, parts):
    score, cost, budget, divisible = problem
    make = LIBRARIES[library]
    chosen = fill_budget(make(score), make(cost), budget, make(divisible) if parts else None)
    index, amount = plain(score, cost, budget, divisible if parts else np.zeros(len(cost), bool))
    assert [int(b) for b in chosen.index] == index
    assert [int(a) for a in chosen.amount] == amount


@given(problems())
def test_the_budget_is_neither_exceeded_nor_left_to_a_block_that_fits(problem):
    score, cost, budget, divisible = problem
    chosen = fill_budget(score, cost, budget, divisible)
    spent = int(chosen.amount.sum())
    assert spent <= budget
    left = np.setdiff1d(np.arange(len(cost)), chosen.index)
    assert all(cost[left] > budget - spent)
    assert not any(divisible[left]) or spent == budget


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_blocks_does_not_matter_without_ties(problem, random):
    _, cost, budget, divisible = problem
    score = np.array(random.sample(range(100), len(cost)), dtype=float)
    order = np.array(random.sample(range(len(cost)), len(cost)))
    chosen = fill_budget(score, cost, budget, divisible)
    moved = fill_budget(score[order], cost[order], budget, divisible[order])
    assert order[moved.index].tolist() == chosen.index.tolist()
    assert moved.amount.tolist() == chosen.amount.tolist()


@given(problems(), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(0, 20), st.booleans())
def test_more_visits_never_raise_a_score(problem, power, selections, per_parameter):
    score, cost, _, _ = problem
    rule = GreedyBlocks(power, per_parameter)
    before = rule.init(cost, 0)._replace(selections=selections)
    more = before._replace(visits=before.visits + 1)
    score = np.abs(score)
    assert (rule.priority(score, cost, more) <= rule.priority(score, cost, before)).all()
    if power and selections:
        assert (rule.priority(score, cost, more) < rule.priority(score, cost, before))[score > 0].all()


def test_visits_change_the_choice():
    """A block with a slightly larger score does not keep its place for ever."""
    score, cost = np.array([1.0, 0.9, 0.1]), np.array([5, 5, 5])
    for power, others in ((0.0, False), (1.0, True)):
        rule = GreedyBlocks(power)
        state, seen = rule.init(cost, 0), set()
        for _ in range(6):
            chosen, state = rule.select(score, cost, 5, state)
            seen |= set(chosen.index.tolist())
        assert (1 in seen) == others


@pytest.mark.parametrize("descending", [False, True])
def test_cyclic_takes_every_block_in_turn(descending):
    cost, rule = np.array([3, 3, 9, 3, 3]), CyclicBlocks(descending)
    state, turns = rule.init(cost, 0), []
    for _ in range(4):
        chosen, state = rule.select(None, cost, 6, state)
        turns.append(sorted(chosen.index.tolist()))
    ahead = [[0, 1], [3, 4], [0, 1], [3, 4]]  # 2 never fits
    assert turns == (ahead[1:] + ahead[:1] if descending else ahead)


def test_cyclic_goes_past_a_block_that_was_taken_in_part():
    cost, rule = np.array([9, 2, 2]), CyclicBlocks()
    state, turns = rule.init(cost, 0), []
    for _ in range(3):
        chosen, state = rule.select(None, cost, 4, state, np.ones(3, bool))
        turns.append(chosen.index.tolist())
    assert turns == [[0], [1, 2], [0]]


@given(problems(), st.sampled_from(sorted(BLOCK_RULES)), st.sampled_from(["numpy", "torch"]))
def test_every_rule_repeats_itself_and_keeps_the_budget(problem, name, library):
    score, cost, budget, divisible = (LIBRARIES[library](a) if isinstance(a, np.ndarray) else a for a in problem)
    rule = BLOCK_RULES[name]
    runs = []
    for _ in range(2):
        state, run = rule.init(cost, 7), []
        for _ in range(4):
            chosen, state = rule.select(abs(score), cost, budget, state, divisible)
            assert int(chosen.amount.sum()) <= budget
            run.append(chosen.index.tolist())
        runs.append(run)
    assert runs[0] == runs[1]


def test_random_visits_all_and_half_takes_half():
    cost = np.full(10, 3)
    for rule, most in ((RandomBlocks(), 30), (RandomBlocks(share=0.5), 15)):
        state, seen = rule.init(cost, 0), set()
        for _ in range(20):
            chosen, state = rule.select(None, cost, 30, state)
            assert chosen.amount.sum() == most
            seen |= set(chosen.index.tolist())
        assert seen == set(range(10))


def test_importance_prefers_high_averages_and_forgets_nobody():
    cost, score = np.ones(4, np.int64), np.array([8.0, 1.0, 1.0, 0.0])
    rule, counts = ImportanceBlocks(), np.zeros(4)
    state = rule.init(cost, 0)
    for _ in range(400):
        chosen, state = rule.select(score, cost, 1, state)
        counts[chosen.index] += 1
    share = np.exp(score / score.mean()) / np.exp(score / score.mean()).sum()
    np.testing.assert_allclose(counts / 400, share, atol=0.06)


@pytest.mark.parametrize(
    ("score", "cost", "message"),
    [
        (np.zeros(2), np.ones(3, np.int64), r"one length; found shapes \(2,\) and \(3,\)"),
        (np.zeros(2), np.ones(2), "cost must be int64.*found dtype float64"),
        (np.zeros(2), np.array([1, 0]), "cost must be positive; its minimum is 0"),
        (np.array([0, np.nan]), np.ones(2, np.int64), r"score\[1\] is"),
    ],
)
def test_what_is_wrong_is_said(score, cost, message):
    with pytest.raises(ValueError, match=message):
        fill_budget(score, cost, 3)


def test_nothing_fits():
    chosen = fill_budget(np.zeros(2), np.array([4, 5]), 3)
    assert chosen.index.shape == chosen.amount.shape == (0,)
