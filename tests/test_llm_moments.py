# SPDX-License-Identifier: BSD-3-Clause
"""The update of many small parts at once, against one part at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm import moments
from llm.adam import Hyper
from llm.compact import CompactGrad, Part, restrict
from llm.fused import LEAST
from llm.moments import Update, update_

HYPER = Hyper(0.1, 0.9, 0.99, 1e-8, 0.01)
SHAPES = ((7, 12), (300, 5), (1, 700), (40, 33), (1, 20_000), (1, 12))


def updates(dtype: torch.dtype, precision: str, ramp: int = 0, seed: int = 0) -> list[Update]:
    """Of two thirds of the rows of some matrices, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, columns in SHAPES:
        param = torch.randn(rows, columns, generator=generator).to(dtype)
        index = torch.randperm(rows, generator=generator)[: -(-2 * rows // 3)].int()
        part = Part(columns, len(index), index)
        grad = CompactGrad(torch.randn(len(index), columns, generator=generator).to(dtype), part, param.shape)
        first = len(index) // 2
        cohorts = [{"count": first, "step": 3, "ramp": 0}, {"count": len(index) - first, "step": 0, "ramp": ramp}]
        found.append(Update(param, grad, part, [c for c in cohorts if c["count"]], HYPER, precision))
    return found


def run(one_by_one: bool, dtype: torch.dtype, precision: str, states: str, scale: float, ramp: int) -> list[Update]:
    """Three steps."""
    made = updates(dtype, precision, ramp)
    for _ in range(3):
        generator = torch.Generator().manual_seed(1)
        for group in [[u] for u in made] if one_by_one else [made]:
            update_(group, states=states, scale=scale, generator=generator)
    return made


@pytest.mark.parametrize("cached", [64, 1 << 16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("ramp", [0, 4])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "stochastic"), (torch.float64, "stochastic"), (torch.bfloat16, "fp32-active")],
)
def test_parts_updated_together_are_as_if_alone(monkeypatch, cached, scale, ramp, dtype, precision):
    """Bit for bit where nothing is drawn; a new matrix begins in the middle of a batch, and step counts part them."""
    monkeypatch.setattr(moments, "CACHED", cached)
    together, alone = (run(apart, dtype, precision, "fp32", scale, ramp) for apart in (False, True))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.param, b.param)
        for x, y in zip(a.cohorts, b.cohorts, strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_low_precision_states_together(states):
    """Their roundings are drawn in another order, so that they are only near what they are alone."""
    exact = run(True, torch.float32, "stochastic", "fp32", 1.0, 0)
    for apart in (False, True):
        for a, b in zip(run(apart, torch.float32, "stochastic", states, 1.0, 0), exact, strict=True):
            error = (a.param - b.param).abs()
            assert 0 < error.mean() < 0.1 * HYPER.lr
            for x, y in zip(a.cohorts, b.cohorts, strict=True):
                found = moments._read(x, "exp_avg", 0, x["exp_avg"].numel(), torch.float32)
                torch.testing.assert_close(found, y["exp_avg"].view(-1), rtol=0.1, atol=0.02)


def test_inactive_entries_stay():
    before = updates(torch.float32, "stochastic")
    after = run(False, torch.float32, "stochastic", "fp32", 1.0, 0)
    for a, b in zip(before, after, strict=True):
        idle = torch.ones(len(a.param), dtype=torch.bool)
        idle[a.part.where.long()] = False
        assert torch.equal(a.param[idle], b.param[idle])
        assert not torch.isclose(a.param[~idle], b.param[~idle]).any()


@pytest.mark.parametrize(("cached", "expected"), [(1 << 16, [1, 3, 5]), (1, [1] * 9)])
def test_what_has_the_same_step_count_goes_together(monkeypatch, cached, expected):
    """Half of the rows of each matrix began later; only a large tensor is updated by itself, in place."""
    sizes: list[int] = []
    step = moments._step
    monkeypatch.setattr(moments, "CACHED", cached)
    monkeypatch.setattr(moments, "_step", lambda spans, *rest: (sizes.append(len(spans)), step(spans, *rest)))
    update_(updates(torch.float64, "stochastic"), generator=torch.Generator().manual_seed(0))
    assert sizes == expected


@pytest.mark.parametrize(("states", "compiled"), [("8bit", False), ("bf16", True), ("fp32", True)])
def test_rows_of_float32_are_updated_where_they_are(monkeypatch, states, compiled):
    """They are not gathered: what is left are short rows and whole tensors; 8-bit codes have no compiled step."""
    spans: list[moments._Span] = []
    step = moments._step
    monkeypatch.setattr(moments, "_step", lambda group, *rest: (spans.extend(group), step(group, *rest)))
    made = updates(torch.float32, "stochastic")
    update_(made, states=states, generator=torch.Generator().manual_seed(0))
    assert (not any(torch.is_tensor(span.where) and span.part.unit >= LEAST for span in spans)) == compiled
    assert all(cohort["step"] >= 1 for update in made for cohort in update.cohorts)


@pytest.mark.parametrize("error", ["in a later parameter", "in the update"])
def test_step_counts_and_weights_stay_together_where_an_update_fails(monkeypatch, error):
    """What waits, or is in the batch that fails, has neither moved nor counted."""

    def failing() -> Iterator[Update]:
        yield from made
        if error == "in a later parameter":
            raise MemoryError

    def fail(*_: object) -> None:
        raise MemoryError

    made, before = updates(torch.float32, "stochastic")[:2], updates(torch.float32, "stochastic")[:2]
    if error == "in the update":
        monkeypatch.setattr(moments, "adamw_", fail)
    with pytest.raises(MemoryError):
        update_(failing(), generator=torch.Generator())
    assert all(torch.equal(a.param, b.param) for a, b in zip(made, before, strict=True))
    assert [[c["step"] for c in u.cohorts] for u in made] == [[3, 0], [3, 0]]
    monkeypatch.undo()
    for group in (made, before):  # and can go on
        update_(group, generator=torch.Generator())
    assert all(torch.equal(a.param, b.param) for a, b in zip(made, before, strict=True))


@pytest.mark.parametrize("ramp", [0, 4])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_compiled_step_is_that_of_float64(ramp, scale, transposed):
    """Rows of two cohorts, one of which began later; a parameter whose layout is not that of a vector."""
    torch.manual_seed(0)
    weight, index = torch.randn(40, 48), torch.randperm(40)[:9].to(torch.int32)
    gradients = torch.randn(5, 40, 48)
    finals = []
    for dtype in (torch.float32, torch.float64):
        param = (weight.t().contiguous().t() if transposed else weight.clone()).to(dtype)
        assert param.is_contiguous() != transposed
        cohorts: list[dict] = [{"count": 4, "step": 0, "ramp": 0}, {"count": 5, "step": 0, "ramp": ramp}]
        for k, dense in enumerate(gradients):
            active = cohorts if k > 1 else cohorts[:1]
            part = Part(48, 9, index) if k > 1 else Part(48, 4, index[:4])
            update = Update(param, restrict(dense.to(dtype), part), part, active, HYPER, "stochastic")
            update_([update], scale=scale, generator=torch.Generator())
        finals.append([param, *(cohort[name] for cohort in cohorts for name in ("exp_avg", "exp_avg_sq"))])
        assert [cohort["step"] for cohort in cohorts] == [5, 3]
    assert not torch.isclose(finals[0][0][index.long()], weight[index.long()]).any()
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
