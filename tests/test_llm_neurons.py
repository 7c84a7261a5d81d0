# SPDX-License-Identifier: BSD-3-Clause
"""Slices that are columns: the same as rows of the transpose, from choice to update, and as whole gradients give."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from llm import BlockLLM  # noqa: E402
from llm.adam import Hyper  # noqa: E402
from llm.blocks import Blocks  # noqa: E402
from llm.census import Census  # noqa: E402
from llm.compact import CompactGrad, Part, restrict  # noqa: E402
from llm.moments import Update, update_  # noqa: E402

HYPER = Hyper(0.1, 0.9, 0.99, 1e-8, 0.01)
WIDTH, INSIDE = 12, 40


class Net(nn.Module):
    """Attention-like and gated blocks around a stream, with the names that transformers has for them."""

    def __init__(self, checkpointed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(30, WIDTH)
        shapes = {name: (WIDTH, WIDTH) for name in ("v_proj", "o_proj")} | {"down_proj": (INSIDE, WIDTH)}
        shapes |= {name: (WIDTH, INSIDE) for name in ("gate_proj", "up_proj")}
        layer = nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in shapes.items()})
        self.layers, self.checkpointed = nn.ModuleList([layer]), checkpointed
        self.head = nn.Linear(WIDTH, 30, bias=False)

    @property
    def o_proj(self) -> nn.Linear:
        return self.layers[0]["o_proj"]

    @property
    def down_proj(self) -> nn.Linear:
        return self.layers[0]["down_proj"]

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[0]
        x = x + self.o_proj(layer["v_proj"](x) + 1)
        return x + self.down_proj(functional.silu(layer["gate_proj"](x)) * layer["up_proj"](x))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(checkpoint(self.blocks, x, use_reentrant=False) if self.checkpointed else self.blocks(x))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(seed))
    return functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, 1).flatten())


def optimizer_of(model: nn.Module, params=None, **options) -> BlockLLM:
    options = {"budget": 0.3, "switch_every": 3, "granularity": "neurons"} | options
    return BlockLLM(model if params is None else params, 1e-2, **options)


def trained(optimizer: BlockLLM, model: nn.Module, *, steps=7, parts=1, cast=None) -> list[float]:
    losses = []
    for step in range(steps):
        for part in range(parts):
            with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
                loss = loss_of(model, step * parts + part)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_which_slices_are_columns():
    """By the name of the module, in a numbered layer; vectors, tensors of experts and heads never are."""
    inside = ["o_proj.weight", "o_proj.bias", "q_proj.weight", "attention.output.dense.weight", "down_proj"]
    inside += ["experts.down_proj.weight", "not_an_o_proj.weight"]
    names = [*(f"a.{k}.{name}" for k, name in enumerate(inside)), "classifier.out_proj.weight"]
    shapes = [(4, 6), (4,), (4, 6), (4, 6), (4, 6), (2, 4, 6), (4, 6), (4, 6)]
    blocks = Blocks.of(names, [torch.Size(shape) for shape in shapes], "neurons")
    assert blocks.columns == (True, False, False, True, False, False, False, False)
    assert blocks.units == (4, 4, 6, 4, 6, 6, 6, 6)
    assert [blocks.slices(k) for k in range(4)] == [6, 1, 4, 6]
    assert blocks.name(3) == "a.0.o_proj.weight[:, 3]"
    assert not any(Blocks.of(names, [torch.Size(shape) for shape in shapes], "rows").columns)


@given(st.permutations(range(5)), st.integers(1, 5), st.integers(0, 99))
def test_a_gradient_of_columns_is_that_of_rows_of_the_transpose(order, count, seed):
    grad, index = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)), torch.tensor(order[:count])
    part, turned = Part(4, count, index, columns=True), Part(4, count, index)
    found, expected = restrict(grad, part), restrict(grad.t().contiguous(), turned)
    assert torch.equal(found.active, expected.active)
    assert torch.equal(found.dense(), expected.dense().t())
    fewer = part.at(index[: max(1, count - 1)].flip(0))
    fewer = Part(4, len(fewer.where), fewer.where, columns=True)
    assert torch.equal(restrict(found, fewer).active, grad.t()[fewer.where])
    weight = nn.Parameter(torch.zeros(4, 5))
    weight.grad = restrict(grad, part)
    (weight * 2.0).sum().backward()
    assert torch.equal(weight.grad.active, grad.t()[index] + 2)
    with pytest.raises(AssertionError):
        restrict(weight.grad, turned)


@pytest.mark.parametrize("score", ["grad", "l1", "adam"])
def test_scores_are_those_of_rows_of_the_transpose(score, monkeypatch):
    monkeypatch.setattr("llm.census.CHUNK", 12)
    grad, index = torch.randn(7, 5), torch.tensor([3, 0])
    moments = {name: torch.rand(2, 7) for name in ("exp_avg", "exp_avg_sq")}
    cohorts = [{"count": 2, "step": 4, "ramp": 0, **moments}]
    found = Census(Blocks.of(["layers.0.o_proj.weight"], [grad.shape], "neurons"), score)
    found.add(0, grad, Part(7, 2, index, columns=True), cohorts, hyper=HYPER)
    turned = Census(Blocks.of(["layers.0.o_proj.weight"], [grad.t().shape], "rows"), score)
    turned.add(0, grad.t().contiguous(), Part(7, 2, index), cohorts, hyper=HYPER)
    torch.testing.assert_close(found.scores(), turned.scores())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", [7, 300])
def test_an_update_is_that_of_rows_of_the_transpose(unit, dtype, states, dense):
    """Also bit for bit, since the same numbers are drawn; only a compiled pass may round otherwise."""
    index = torch.tensor([4, 1, 8])
    start, grad = torch.randn(unit, 10).to(dtype), torch.randn(unit, 10).to(dtype)
    results = []
    for columns in (True, False):
        param, full = (x.clone() if columns else x.t().contiguous() for x in (start, grad))
        part = Part(unit, 3, index, columns)
        cohorts = [{"count": 2, "step": 3, "ramp": 0}, {"count": 1, "step": 0, "ramp": 5}]
        precision = "fp32-active" if dtype == torch.float16 else "stochastic"
        update = Update(param, full if dense else restrict(full, part), part, cohorts, HYPER, precision)
        for step in range(3):
            update_([update], states=states, generator=torch.Generator().manual_seed(step))
        results.append((param if columns else param.t(), cohorts))
    (ours, mine), (theirs, other) = results
    others = torch.ones(10, dtype=torch.bool)
    others[index] = False
    assert torch.equal(ours[:, others], start[:, others])
    assert not torch.equal(ours, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for a, b in zip(mine, other, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"])


OPTIONS = [
    {},
    {"score": "adam"},
    {"score": "l1", "per_parameter": True, "states": "bf16", "cautious": True},
    {"states": "8bit", "moments": "offload"},
    {"in_backward": True},
    {"max_grad_norm": 0.1},
    {"reach": 2.0, "census": "probe"},
]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_columns_alone_train_as_whole_ones_do(options, bias, checkpointed, parts):
    if parts > 1 and options.get("in_backward"):
        pytest.skip("refuses accumulation")
    if parts > 1 and bias:
        pytest.skip("what fits the budget at the end of the first batch only lacks that batch's gradient in one step")
    torch.manual_seed(0)
    ours = Net(checkpointed, bias)
    plain = copy.deepcopy(ours)
    mine, theirs = optimizer_of(ours, **options), optimizer_of(plain, plain.named_parameters(), **options)
    rounded = {"rtol": 1e-3, "atol": 1e-3} if "states" in options else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(trained(mine, ours, parts=parts), trained(theirs, plain, parts=parts), **rounded)
    assert mine.active() == theirs.active()
    assert {"layers.0.o_proj.weight", "layers.0.down_proj.weight"} & set(mine.active())
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        if "states" in options:  # where a gradient is 0 but for rounding, an entry may move or wait
            assert (p - q).abs().mean() < 1e-4
        else:
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_under_autocast():
    torch.manual_seed(0)
    ours = Net()
    plain = copy.deepcopy(ours)
    mine, theirs = optimizer_of(ours), optimizer_of(plain, plain.named_parameters())
    losses = trained(mine, ours, cast=torch.bfloat16), trained(theirs, plain, cast=torch.bfloat16)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)


def test_a_step_is_that_of_adamw_on_the_columns_with_the_largest_gradient():
    """Chosen and updated by hand, from the whole gradient."""
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = optimizer_of(model, score="l1", per_parameter=True, switch_every=None)
    others = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.0)
    masks: dict[str, torch.Tensor] = {}
    for step in range(4):
        for each in (model, plain):
            each.zero_grad()
            loss_of(each, step).backward()
        if not step:
            masks = chosen_by_hand(plain, optimizer.budget)
        for name, p in plain.named_parameters():
            p.grad *= masks[name]
        optimizer.step()
        others.step()
    assert optimizer.active() == {name: int(mask.sum()) for name, mask in masks.items() if mask.any()}
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def chosen_by_hand(model: nn.Module, budget: int) -> dict[str, torch.Tensor]:
    """By name a mask of the slices with the largest mean of |g| that fit."""
    masks = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found = []
    for name, p in model.named_parameters():
        axis = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        means = p.grad.abs().mean(axis)
        found += [(float(mean), name, axis, k) for k, mean in enumerate(means)]
    for _, name, axis, k in sorted(found, reverse=True):
        size = masks[name].shape[axis]
        if size <= budget:
            budget -= size
            masks[name].select(1 - axis, k).fill_(1)
    return masks


def test_other_columns_of_the_input_are_not_held():
    """Between forward and backward."""
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.activate({"layers.0.o_proj.weight": 2})
    seen: list[weakref.ref[torch.Tensor]] = []
    model.o_proj.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    loss = loss_of(model, 0)
    assert seen[0]() is None
    loss.backward()
    twin = copy.deepcopy(model).requires_grad_()
    loss_of(twin, 0).backward()
    assert isinstance(model.o_proj.weight.grad, CompactGrad)
    torch.testing.assert_close(model.o_proj.weight.grad.active, twin.o_proj.weight.grad[:, :2].t())


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_run_goes_on_bit_for_bit(states):
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model, states=states, moments="keep")
    trained(optimizer, model, steps=5)
    twin = copy.deepcopy(model)
    other = optimizer_of(twin, states=states, moments="keep")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(optimizer, model, steps=5) == trained(other, twin, steps=5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_rows_is_refused():
    model = Net()
    saved = optimizer_of(model, granularity="rows").state_dict()
    with pytest.raises(ValueError, match="saved with granularity='rows'"):
        optimizer_of(model).load_state_dict(saved)


@pytest.mark.parametrize("kind", ["sign", "sgd"])
def test_what_is_inactive_moves_and_active_columns_do_not_move_twice(kind):
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model, inactive=kind, inactive_scale=0.5, switch_every=None)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(model).requires_grad_()
    loss_of(model, 1).backward()
    loss_of(before, 1).backward()
    k = optimizer.blocks.names.index("layers.0.down_proj.weight")
    part = optimizer.parts[k]
    assert part is not None
    active = part.where.long()
    grad, weight = before.down_proj.weight.grad, before.down_proj.weight.detach()
    expected = weight - 5e-3 * (grad.sign() if kind == "sign" else grad)
    expected[:, active] = weight[:, active]  # until the step
    torch.testing.assert_close(model.down_proj.weight.detach(), expected)


@pytest.mark.parametrize("granularity", ["rows", "neurons"])
def test_moments_of_a_whole_matrix_become_those_of_its_rows_but_not_of_columns(granularity):
    """They lie row after row."""
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model, granularity=granularity, always=["layers.0.o_proj"], budget=0.6)
    trained(optimizer, model, steps=3)
    before = optimizer.state[model.o_proj.weight]["cohorts"][0]["exp_avg"].view(WIDTH, WIDTH).clone()
    optimizer.activate(["layers.0.o_proj.weight"])
    (cohort,) = optimizer.state[model.o_proj.weight]["cohorts"]
    if granularity == "rows":
        assert torch.equal(cohort["exp_avg"], before)
    else:
        assert cohort["step"] == 0
        assert "exp_avg" not in cohort


def test_columns_that_this_version_cuts_into_rows_are_refused(monkeypatch):
    model = Net()
    optimizer = optimizer_of(model)
    trained(optimizer, model, steps=2)
    saved = optimizer.state_dict()
    monkeypatch.setattr("llm.blocks.WRITERS", ("down_proj",))
    with pytest.raises(
        ValueError, match=r"has columns of layers\.0\.o_proj\.weight, which this version cuts into rows"
    ):
        optimizer_of(Net()).load_state_dict(saved)


@pytest.mark.parametrize("granularity", ["rows", "neurons"])
def test_what_is_always_active_has_whole_gradients_in_the_first_window(granularity, monkeypatch):
    monkeypatch.setattr("llm.optimizer.SURVEYED", 1)
    monkeypatch.setattr("llm.optimizer.HELD", 0)
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model, granularity=granularity, always=["layers.0.o_proj"], budget=0.6)
    trained(optimizer, model, steps=2)
    assert optimizer.active()["layers.0.o_proj.weight"] == WIDTH * WIDTH
