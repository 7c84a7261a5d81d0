# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of active rows alone equal those rows of whole gradients, and cost what rows cost."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llm import BlockLLM, row_gradients
from llm.compact import CompactGrad
from llm.plan import plan
from llm.row_gradients import cover

VOCABULARY, WIDTH = 40, 12


class Tiny(nn.Module):
    """Token table, two layers, a head that may be the table."""

    def __init__(self, tied: bool, bias: bool = True, checkpointed: str = "") -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.ReLU(), nn.Linear(3 * WIDTH, WIDTH, bias=bias))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        if self.checkpointed == "reentrant" and not x.requires_grad:
            x.requires_grad_()
        for layer in self.layers:
            again = {"use_reentrant": self.checkpointed == "reentrant"}
            x = x + (checkpoint(layer, x, **again) if self.checkpointed else layer(x))
        return self.head(self.norm(x))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))
    return functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, 1).flatten())


def train(model: nn.Module, params, *, steps=7, parts=1, cast=None, model_argument=None, **options) -> list[float]:
    optimizer = BlockLLM(
        params, 3e-3, model=model_argument, budget=0.2, switch_every=3, granularity="rows", reach=None, **options
    )
    losses = []
    for step in range(steps):
        for part in range(parts):
            with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
                loss = loss_of(model, step * parts + part)
            loss.backward()
        if step and options.get("max_grad_norm") is None and not options.get("in_backward"):  # first: more is held
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.close()
    return losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", ["", "again", "reentrant"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"parts": 2},
        {"in_backward": True},
        {"max_grad_norm": 0.1, "states": "8bit"},
        {"cast": torch.bfloat16},
        {"moments": "keep", "census": "probe"},
        {"embeddings": "never"},
    ],
    ids=str,
)
@pytest.mark.parametrize("surveyed", [40, 1 << 20])
def test_same_run_as_with_whole_gradients(tied, checkpointed, how, surveyed, monkeypatch):
    monkeypatch.setattr("llm.optimizer.SURVEYED", surveyed)
    if surveyed == 40:
        monkeypatch.setattr("llm.optimizer.HELD", 0.5)  # the first window takes the table by rows as well
        monkeypatch.setattr(row_gradients, "TOGETHER", 50)  # two rows at a time
    if tied and how.get("in_backward"):
        pytest.skip("a tied table has one gradient, of which its slot knows all; below")
    torch.manual_seed(0)
    ours = Tiny(tied, checkpointed=checkpointed)
    plain = copy.deepcopy(ours)
    plain_how = how if "embeddings" not in how else {"never": ("table",) if tied else ("table", "head")}
    pairs = train(ours, ours, **how), train(plain, plain.named_parameters(), **plain_how)
    tolerance = 5e-3 if how.get("cast") else 1e-5
    torch.testing.assert_close(*(torch.tensor(losses) for losses in pairs), atol=tolerance, rtol=tolerance)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-2 if how.get("cast") else 2e-4, rtol=1e-3)


def one_step(model: nn.Module, **options) -> BlockLLM:
    optimizer = BlockLLM(model, 1e-3, budget=0.2, granularity="rows", reach=None, **options)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_tied_table_is_updated_once_in_the_backward():
    torch.manual_seed(0)
    model = Tiny(tied=True)
    optimizer = one_step(model, in_backward=True)
    assert "table.weight" in optimizer.active()
    before = model.table.weight.detach().clone()
    loss_of(model, 1).backward()
    assert not torch.equal(before, model.table.weight)
    assert all(p.grad is None for p in model.parameters())


def test_no_gradient_of_the_whole_weight_is_made():
    torch.manual_seed(0)
    model = Tiny(tied=False)
    optimizer = one_step(model)
    part = {n: k for k, n in enumerate(optimizer.blocks.names)}
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                shapes.append(tuple(out.shape))
            return out

    loss = loss_of(model, 1)
    with Watch():
        loss.backward()
    partly = [n for n in optimizer.active() if optimizer.active()[n] < model.get_parameter(n).numel()]
    assert partly
    whole = {tuple(model.get_parameter(n).shape) for n in partly}
    assert not whole & set(shapes)
    for name in partly:
        grad = model.get_parameter(name).grad
        assert isinstance(grad, CompactGrad)
        assert torch.equal(grad.part.where, optimizer.parts[part[name]].where)


def test_weights_used_outside_of_their_modules_lose_nothing():
    torch.manual_seed(0)
    model = Tiny(tied=False)
    optimizer = one_step(model)
    name = next(n for n in optimizer.active() if n.endswith("weight") and "norm" not in n)
    weight = model.get_parameter(name)

    def loss() -> torch.Tensor:
        return loss_of(model, 1) + weight.square().sum()

    loss().backward()
    grad = weight.grad.dense()
    optimizer.close()
    optimizer.zero_grad()
    loss().backward()
    torch.testing.assert_close(grad, torch.where(grad == 0, 0, weight.grad))


def test_a_census_sees_whole_gradients():
    torch.manual_seed(0)
    model = Tiny(tied=True)
    optimizer = BlockLLM(model, 1e-3, budget=0.2, switch_every=2, granularity="rows", reach=None)
    for step in range(6):
        census = optimizer.census_on
        loss_of(model, step).backward()
        if census:
            names = [optimizer.blocks.names[k] for k in optimizer.census.sums]
            assert set(names) == set(optimizer.blocks.names)
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.history) > 2


def test_copies_saved_models_and_closed_ones_are_plain():
    torch.manual_seed(0)
    model = Tiny(tied=True)
    optimizer = one_step(model)
    assert "forward" in model.head.__dict__
    twin = copy.deepcopy(model).requires_grad_()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).requires_grad_()
    for other in (twin, loaded):
        loss_of(other, 1).backward()
        assert all(p.grad is not None and not isinstance(p.grad, CompactGrad) for p in other.parameters())
    assert set(model.state_dict()) == set(twin.state_dict())
    optimizer.close()
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_other_weights_in_a_functional_call_get_their_own_gradients():
    torch.manual_seed(0)
    model = Tiny(tied=False)
    one_step(model)
    others = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    tokens = torch.arange(14).view(2, 7)
    torch.func.functional_call(model, others, tokens).sum().backward()
    assert all(p.grad is not None for p in others.values())


def test_modules_that_compute_something_else_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.ModuleList(
        [
            nn.Linear(3, 3),
            Scaled(3, 3),
            nn.Embedding(4, 3, max_norm=1.0),
            nn.Embedding(4, 3, sparse=True),
            nn.Conv1d(3, 3, 1),
        ]
    )
    model[0].bias = None
    assert list(cover(model, list(model.parameters()))) == [0]
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    assert not cover(norm, list(norm.parameters()))


# -- censuses by rows ----------------------------------------------------------------------------------


class Norm(nn.Module):
    """Of the root of the mean square, as many models write it."""

    def __init__(self, scale=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH) if scale is None else scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt())


class Gated(nn.Module):
    """A gated layer between a table and its head; the layer runs as often as told."""

    def __init__(self, tied: bool = True, times: int = 1) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(VOCABULARY, WIDTH), Norm()
        self.gate, self.up = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, 20, bias=False)
        self.down, self.head = nn.Linear(20, WIDTH, bias=False), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.times = times
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for _ in range(self.times):
            y = self.norm(x)
            x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x)


def scored(params, model: nn.Module, score: str) -> list[dict[str, torch.Tensor]]:
    """Squares of three censuses, with two backward passes in a window."""
    options = {"budget": 0.3, "switch_every": 2, "granularity": "rows", "score": score}
    optimizer, found = BlockLLM(params, 3e-3, **options), []
    for step in range(5):
        for part in range(2):
            loss_of(model, 2 * step + part).backward()
        if optimizer.census_on:
            found.append({optimizer.blocks.names[k]: s.clone() for k, s in optimizer.census.sums.items()})
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return found


@pytest.mark.parametrize("score", ["grad", "l1", "adam"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("surveyed", [40, 1 << 20])
def test_a_census_by_rows_finds_what_one_of_whole_gradients_finds(score, tied, times, surveyed, monkeypatch):
    monkeypatch.setattr("llm.optimizer.SURVEYED", surveyed)
    torch.manual_seed(0)
    ours = Gated(tied, times)
    plain = copy.deepcopy(ours)
    pairs = scored(ours, ours, score), scored(plain.named_parameters(), plain, score)
    assert len(pairs[0]) > 1
    for mine, theirs in zip(*pairs, strict=True):
        assert set(mine) == set(theirs)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_a_census_takes_whole_gradients_of_what_is_used_outside_of_its_module_as_well():
    def loss(model: nn.Module) -> torch.Tensor:
        return loss_of(model, 0) + model.down.weight.square().sum()

    torch.manual_seed(0)
    model = Gated()
    optimizer = BlockLLM(model, 3e-3, budget=0.3, switch_every=1, granularity="rows")
    for _ in range(3):  # the second census finds out
        plain = copy.deepcopy(model).requires_grad_()
        loss(plain).backward()
        loss(model).backward()
        squares = optimizer.census.sums[optimizer.blocks.names.index("down.weight")]
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(squares, plain.down.weight.grad.square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_products_are_made_again(dtype, tokens):
    """With whole factors, scales of tokens, weights of columns, and all of them nested; in pieces, then at once."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens, WIDTH, dtype=dtype, requires_grad=True)
    left, exact = torch.randn(2 * tokens, 4, dtype=dtype), {"rtol": 1e-6, "atol": 1e-6}
    tolerance = {torch.float64: exact | {"rtol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-4}}
    tolerance[torch.bfloat16] = {"rtol": 5e-2, "atol": 5e-1}
    for frozen in (False, True):
        norm = Norm().to(dtype).requires_grad_(not frozen)
        made = (norm(x), functional.silu(x) * x.exp(), (x * 3) * norm(x), x[:, :1].exp() * x.exp(), x.exp() * norm(x))
        for y in made:
            factors = row_gradients._factors(y.grad_fn)
            assert factors is not None
            matrix, rows = row_gradients._Matrix(factors, y.shape, y.dtype), y.detach().reshape(-1, WIDTH)
            for _ in range(2):
                torch.testing.assert_close(matrix.times(left), left.t() @ rows, **tolerance[dtype])
            sums = row_gradients._Matrix(factors, y.shape, y.dtype).sums(rows)
            torch.testing.assert_close(sums, rows.square().sum(0), **tolerance[dtype])
    assert row_gradients._factors((x + 1).grad_fn) is None
    assert row_gradients._factors((x.exp() * torch.ones(WIDTH, dtype=dtype) + 1).grad_fn) is None


def test_low_precision_multiplies_as_the_model_did(monkeypatch):
    monkeypatch.setattr(row_gradients, "TOGETHER", 128 * WIDTH)
    torch.manual_seed(0)
    shapes = ((3 * 128, WIDTH), (WIDTH,), (3 * 128, 1))
    x, weight, scale = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    y = weight * (x * scale) * 0.7
    matrix = row_gradients._Matrix(row_gradients._factors(y.grad_fn), y.shape, y.dtype)
    (rows,) = matrix.pieces()  # a sum over pieces would be rounded at each
    assert torch.equal(matrix.product(rows), y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_factors_too(device, dtype):
    """Autograd holds the number in ``x * y * 0.5`` as a tensor on the CPU, wherever the others are."""
    x = torch.randn(300, WIDTH, dtype=dtype, device=device, requires_grad=True)
    for y in (x.exp() * x.sin() * 0.5, 3 * Norm().to(device, dtype)(x)):
        matrix = row_gradients._Matrix(row_gradients._factors(y.grad_fn), y.shape, y.dtype)
        found = matrix.times(x.detach())
        assert (found.shape, found.dtype, found.device) == ((WIDTH, WIDTH), dtype, x.device)
        if device == "cpu" and dtype == torch.float32:
            torch.testing.assert_close(found, x.detach().t() @ y.detach(), rtol=1e-4, atol=1e-3)


class Scaled(nn.Module):
    """A gated unit with a number in its product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x) * 0.5)


def test_rows_behind_a_product_with_a_number():
    torch.manual_seed(0)
    model = Scaled()
    twin, x = copy.deepcopy(model), torch.randn(5, 16)
    optimizer, compared = BlockLLM(model, 1e-2, budget=0.3, granularity="rows", switch_every=3), 0
    for _ in range(6):
        twin.load_state_dict(model.state_dict())
        for each in (model, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if isinstance(p.grad, CompactGrad):
                torch.testing.assert_close(p.grad.active, q.grad[p.grad.part.where.long()], rtol=1e-4, atol=1e-5)
                compared += p is model.down.weight
        optimizer.step()
    assert compared > 1


@pytest.mark.parametrize("tokens", [5, 129, 300])
def test_a_trained_number_comes_first(tokens):
    """Autograd holds it as a tensor without dimensions, on the left."""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    number = torch.tensor(0.7, requires_grad=True)
    for y in (number * functional.silu(x), 2 * number * x, number * (x.exp() * x.sin()), x.mean() * x):
        matrix = row_gradients._Matrix(row_gradients._factors(y.grad_fn), y.shape, y.dtype)
        expected = x.detach().t() @ y.detach()
        torch.testing.assert_close(matrix.times(x.detach()), expected, rtol=1e-4, atol=1e-3)


def test_sums_in_a_backward_inside_autocast_stay_in_float32():
    torch.manual_seed(0)
    a, b, w = (torch.randn(size, requires_grad=True) for size in ((9_000, WIDTH), (9_000, WIDTH), (WIDTH,)))
    y = w * ((a * b) * torch.rand(9_000, 1))
    matrix = row_gradients._Matrix(row_gradients._factors(y.grad_fn), y.shape, y.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = matrix.sums(y.detach())
    torch.testing.assert_close(found, y.detach().square().sum(0), rtol=1e-5, atol=1e-5)


def test_a_product_with_a_number_can_be_planned():
    rows = {"budget": 0.3, "granularity": "rows"}
    x = torch.empty(300, 16, device="meta")
    planned = plan(Scaled(), x, budget="1GB", loss=lambda m, x: m(x).mean(), optimizer=rows, checkpointing=[False])
    assert planned.cases


def test_a_weight_of_tokens_is_not_taken_for_that_of_columns():
    """As many tokens as columns: the weight scales rows, as a view."""

    class ByToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight[:, None] * (x * x.square().mean(-1, keepdim=True).rsqrt())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), ByToken(), nn.Linear(WIDTH, 3))
    plain = copy.deepcopy(model)
    optimizer = BlockLLM(model, 1e-2, budget=0.9, granularity="rows", always=("1",))
    x = torch.randn(WIDTH, WIDTH)
    for _ in range(2):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        plain(x).square().sum().backward()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(model[1].weight.grad, plain[1].weight.grad)
        optimizer.step()


@pytest.mark.parametrize("form", ["twice", "by its norm", "detached", "shifted", "plain"])
def test_a_weight_that_scales_in_other_ways_gets_its_gradient(form):
    """Only a plain norm makes its factor again."""
    forms = {
        "twice": lambda w, x: w * (w * x),
        "by its norm": lambda w, x: w * (x * w.norm()),
        "detached": lambda w, x: w.detach() * (x * x) + w,
        "shifted": lambda w, x: (1 + w) * (x * x),
        "plain": lambda w, x: w * (x * x.square().mean(-1, keepdim=True).rsqrt()),
    }

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forms[form](self.weight, x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Odd(), nn.Linear(WIDTH, 3))
    twin, x = copy.deepcopy(model), torch.randn(7, WIDTH)
    optimizer = BlockLLM(model, 1e-2, budget=0.9, granularity="rows", always=("1",))
    for _ in range(3):
        twin.load_state_dict(model.state_dict())
        for each in (model, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        torch.testing.assert_close(model[1].weight.grad, twin[1].weight.grad)
        optimizer.step()
    assert ("forward" in model[1].__dict__) == (form == "plain")


def test_products_out_of_a_checkpoint_are_left_alone():
    """What a checkpoint has packed can be unpacked once, by the backward pass."""
    torch.manual_seed(0)
    gate, down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
    model = nn.ModuleList([gate, down])
    optimizer = BlockLLM(model, 1e-2, budget=0.5, granularity="rows")
    x = torch.randn(4, WIDTH)
    for _ in range(3):
        optimizer.zero_grad()
        made = checkpoint(lambda x: functional.silu(gate(x)) * gate(x).sin(), x, use_reentrant=False)
        down(made).square().sum().backward()
        optimizer.step()


def test_backward_inside_autocast():
    """Ambient autocast of a backward pass whose forward was outside."""
    torch.manual_seed(0)
    model = Gated()
    optimizer = BlockLLM(model, 1e-3, budget=0.3, switch_every=None, granularity="rows")
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        optimizer.step()


@torch.no_grad()
def test_only_full_factors_are_multiplied_and_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(row_gradients, "TOGETHER", 128 * WIDTH)
    x = torch.randn(3 * 128, WIDTH)
    scale, weight = torch.rand(len(x), 1), torch.rand(WIDTH)
    matrix = row_gradients._Matrix([weight, x, scale], x.shape, x.dtype)
    assert [matrix.product(rows).data_ptr() for rows in matrix.pieces()] == [x.data_ptr()]
    matrix = row_gradients._Matrix([x, scale, x], x.shape, x.dtype)
    made = [matrix.product(rows) for rows in matrix.pieces()]
    assert [len(rows) for rows in made] == [128] * 3
    assert len({rows.data_ptr() for rows in made}) == 1  # in the same memory, one after the other
    torch.testing.assert_close(made[-1], x[256:].square())
    once, again = (matrix.product(*matrix.pieces()) for _ in range(2))  # asked again: made at once, and held
    assert len(once) == len(x)
    assert again.data_ptr() == once.data_ptr()


@torch.no_grad()
def test_what_is_multiplied_again_is_said_to_be():
    """Such a product is held if it is asked for twice, so that rows of its gradient are taken at once."""
    x, scale, weight = torch.randn(8, WIDTH), torch.rand(8, 1), torch.rand(WIDTH)
    assert not row_gradients._Matrix([x, scale, weight], x.shape, x.dtype).made_again
    assert row_gradients._Matrix([x, scale, x], x.shape, x.dtype).made_again


def test_memory_is_reused_only_where_nothing_can_tell():
    x, y = torch.rand(8, WIDTH), torch.rand(8, WIDTH)
    whole = slice(None)

    def made(*factors):
        return row_gradients._Matrix(factors, x.shape, factors[0].dtype).product(whole)

    with torch.no_grad():
        first = made(x, y)
        torch.testing.assert_close(first, x * y)
        second = made(y, 0.5, y)
        assert second.data_ptr() == first.data_ptr()
        torch.testing.assert_close(second, 0.5 * y * y)
        assert made(x.double(), y.double()).dtype == torch.float64
        low = [made(x.bfloat16(), y.bfloat16()) for _ in range(2)]
        assert low[0].data_ptr() != low[1].data_ptr()
    x.requires_grad_()
    products = [made(x, y) for _ in range(2)]  # of a backward pass that is to be differentiated
    assert products[0].requires_grad
    assert products[0].data_ptr() != products[1].data_ptr()
