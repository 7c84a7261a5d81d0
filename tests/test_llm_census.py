"""Scores from one gradient at a time, against norms and histograms of the whole gradient."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from small_models import Bytes, TinyLM, batches, loss_of, net, tokens, train  # noqa: E402

from llm import BlockLLM, census, moments  # noqa: E402
from llm.adam import Hyper, adam_direction  # noqa: E402
from llm.blocks import Blocks  # noqa: E402
from llm.census import BINS, Census, entry_counts  # noqa: E402
from llm.compact import Part  # noqa: E402
from llm.settings import resolve_block_rule  # noqa: E402

HYPER = Hyper(1.0, 0.9, 0.99, 1e-8, 0.0)


@pytest.fixture(params=[16, 1 << 20])
def chunk(request, monkeypatch):
    """Tensors in several pieces, too."""
    monkeypatch.setattr(census, "CHUNK", request.param)
    monkeypatch.setattr(moments, "CHUNK", request.param)
    return request.param


def dense_gradients(model, batch, forward=loss_of):
    """All gradients at once, as nobody should have to hold them."""
    required = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(True)
    grads = torch.autograd.grad(forward(model, batch), list(model.parameters()))
    for p, before in zip(model.parameters(), required, strict=True):
        p.requires_grad_(before)
    return grads


def summed(blocks, grads, term):
    """By block: the sum of what ``term`` makes of the entries of its gradients."""
    total = torch.zeros(len(blocks.cost))
    for position, grad in enumerate(grads):
        rows = term(grad.reshape(-1, blocks.units[position])).sum(1)
        total[blocks.first[position] : blocks.first[position] + len(rows)] += rows
    return total


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows", "neurons", "entries"])
def test_scores_are_the_norms_of_the_whole_gradient(granularity, chunk):
    model = net()
    batch = batches(1)[0]
    grads = dense_gradients(model, batch)
    optimizer = BlockLLM(model, granularity=granularity)
    loss_of(model, batch).backward()
    found = optimizer.census
    torch.testing.assert_close(found.scores(), summed(optimizer.blocks, grads, torch.square).sqrt())
    torch.testing.assert_close(found.norms(), torch.stack([grad.norm() for grad in grads]))


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows"])
def test_l1_scores_are_sums_of_absolute_values(granularity, chunk):
    """Over the root of the size, so that the greedy rule per parameter goes by their mean."""
    model = net()
    batch = batches(1)[0]
    grads = dense_gradients(model, batch)
    optimizer = BlockLLM(model, granularity=granularity, score="l1", per_parameter=True)
    loss_of(model, batch).backward()
    blocks, found = optimizer.blocks, optimizer.census
    total = summed(blocks, grads, torch.abs)
    torch.testing.assert_close(found.scores(), total / blocks.cost.sqrt())
    torch.testing.assert_close(found.norms(), torch.stack([grad.abs().sum() / grad.numel() ** 0.5 for grad in grads]))
    rule = resolve_block_rule("greedy", 1.0, True)
    priority = rule.priority(found.scores(), blocks.cost, rule.init(blocks.cost, 0))
    torch.testing.assert_close(priority, total / blocks.cost)


def test_l1_takes_the_block_with_the_most_descent_of_equal_steps():
    """Two rows with the same norm: the one whose gradient is spread out."""
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = BlockLLM(model, 0.1, budget=4, granularity="rows", score="l1")
    (model.weight * torch.tensor([[2.0, 0, 0, 0], [1.0, 1, 1, 1]])).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight != before).any(1).tolist() == [False, True]


def test_l1_scores_age_like_norms():
    blocks = Blocks.of(["a", "b"], [torch.Size([4]), torch.Size([4])], "tensor")
    grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
    found = [Census(blocks, score) for score in ("grad", "l1")]
    before = []
    for one in found:
        one.add(0, grad, hyper=HYPER)
        before.append(one.scores())
        one.begin([1], probe=True)
    for one, score in zip(found, before, strict=True):
        torch.testing.assert_close(one.scores(), score * census.AGEING)


@pytest.mark.parametrize("score", ["grad", "l1"])
def test_scores_of_slices_larger_than_a_piece(score, monkeypatch):
    monkeypatch.setattr(census, "CHUNK", 4)
    blocks = Blocks.of(["experts"], [torch.Size([3, 2, 5])], "tensor")
    grad = torch.randn(3, 2, 5)
    found = Census(blocks, score)
    found.add(0, grad, hyper=HYPER)
    flat = grad.flatten(1)
    torch.testing.assert_close(found.scores(), flat.norm(dim=1) if score == "grad" else flat.abs().sum(1) / 10**0.5)


@pytest.mark.parametrize("unit", [1, 6, 30])
def test_adam_scores_use_moments_where_there_are_some(unit, chunk):
    """Against the dense direction with zero moments elsewhere, which is g / (|g| + eps)."""
    granularity = {1: "entries", 6: "rows", 30: "tensor"}[unit]
    blocks = Blocks.of(["weight"], [torch.Size([5, 6])], granularity)
    grad, generator = torch.randn(5, 6), torch.Generator().manual_seed(3)
    index = torch.randperm(30 // unit, generator=generator)[: max(1, 20 // unit)]
    part = Part(unit, len(index), index)
    values = {name: torch.rand(len(index), unit, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
    found = Census(blocks, "adam")
    found.add(0, grad, part, [{"count": len(index), "step": 4, "ramp": 0, **values}], hyper=HYPER)
    direction = (grad / (grad.abs() + 1e-8)).view(-1, unit)
    rows = grad.view(-1, unit)[index]
    direction[index] = adam_direction(rows, values["exp_avg"], values["exp_avg_sq"], 5, HYPER)
    torch.testing.assert_close(found.norms()[0], direction.norm())
    torch.testing.assert_close(found.scores(), direction.view(-1, blocks.units[0]).norm(dim=1))
    if unit == 1:
        largest = direction.abs().flatten().sort().values
        for count in (1, 7, 20):
            above = int(found.histogram(0)[_bin(largest[-count]) :].sum())
            assert above >= count > above - int(found.histogram(0)[_bin(largest[-count])])


def _bin(value):
    return int(value.view(1).float().view(torch.int32)) >> 19


def test_only_the_first_gradient_of_a_window_counts_unless_it_was_not_finite():
    blocks = Blocks.of(["a"], [torch.Size([2])], "entries")
    found = Census(blocks, "grad")
    for grad, norm in (([3.0, 4.0], 5.0), ([1.0, 0.0], 5.0)):
        found.add(0, torch.tensor(grad), hyper=HYPER)
        assert found.norms().tolist() == [norm]
    found.restart()
    found.add(0, torch.tensor([float("inf"), 1.0]), hyper=HYPER)
    assert found.not_finite() == ["a"]
    found.add(0, torch.tensor([0.0, 2.0]), hyper=HYPER)
    assert found.norms().tolist() == [2.0]
    assert found.histogram(0)[_bin(torch.tensor(2.0))] == 1
    assert found.not_finite() == []


def test_bins_are_ordered_and_an_eighth_apart_at_most():
    value = torch.logspace(-30, 30, 5000).sort().values
    bins = torch.tensor([_bin(v) for v in value])
    assert (bins.diff() >= 0).all()
    assert bins.max() < BINS
    for b in bins.unique():
        inside = value[bins == b]
        assert inside.max() / inside.min() < 1 + 1 / 16


@given(st.integers(1, 5), st.integers(0, 300), st.integers(0, 50))
def test_entry_counts_are_those_of_a_global_sort(tensors, budget, seed):
    """Up to the bin that the threshold cuts."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(40, generator=generator).abs() * 4.0 ** (k % 3) for k in range(tensors)]
    counts = entry_counts([census._bins(g) for g in grads], budget)
    assert sum(counts) == min(budget, 40 * tensors)
    kept = torch.cat([g.sort(descending=True).values[:k] for g, k in zip(grads, counts, strict=True)])
    best = torch.cat(grads).sort(descending=True).values[: sum(counts)]
    torch.testing.assert_close(kept.sort(descending=True).values, best, rtol=1 / 16, atol=0)


def test_a_census_under_accumulation_is_that_of_the_first_batch_and_repeats():
    batch = batches(3)
    scores = []
    for data in (batch[:1], batch, batch):
        optimizer = BlockLLM(model := net(), granularity="tensor")
        for one in data:
            loss_of(model, one).backward()
        scores.append(optimizer.census.scores())
    assert torch.equal(scores[1], scores[0])
    assert torch.equal(scores[1], scores[2])


@pytest.mark.parametrize("checkpointing", [None, "nonreentrant", "reentrant"])
def test_tied_weights_and_checkpointing(checkpointing):
    def forward(model, x):
        return model(x, x)["loss"]

    x = tokens(1)[0]
    grads = dense_gradients(TinyLM(), x, forward)
    optimizer = BlockLLM(model := TinyLM(checkpointing=checkpointing), granularity="tensor")
    forward(model, x).backward()
    torch.testing.assert_close(optimizer.census.norms(), torch.stack([g.norm() for g in grads]))


def test_mixed_precision_scales_all_scores_alike():
    ratios = []
    for scale in (1.0, 2.0**10):
        optimizer = BlockLLM(model := net(), granularity="rows")
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batches(1)[0])
        (loss * scale).backward()
        ratios.append(optimizer.census.scores() / scale)
    torch.testing.assert_close(ratios[0], ratios[1])


@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
def test_a_census_takes_one_gradient_of_memory(granularity):
    """Live bytes at the worst moment of a backward, beyond those when only the active tensors have gradients."""

    def forward(model, x):
        return model(x, x)["loss"]

    peaks, x = {}, tokens(1, rows=1, length=2)[0]
    model = TinyLM(layers=8, width=32, vocabulary=40, tied=False)
    largest = max(p.nbytes for p in model.parameters())
    everything = sum(p.nbytes for p in model.parameters())
    optimizer = BlockLLM(model, budget=0.05, granularity=granularity, switch_every=3)
    for step in range(4):
        optimizer.zero_grad()
        with Bytes(model) as memory:
            forward(model, x).backward()
        peaks[step] = (optimizer.census_on, memory.peak)
        optimizer.step()
    assert [peaks[k][0] for k in range(4)] == [True, False, True, False]
    histogram = BINS * 8 * (2 + len(optimizer.blocks.names)) if granularity == "entries" else 0
    scores = 4 * len(optimizer.blocks.cost)
    pieces = 4 * largest  # float32 and squares of the piece at hand
    extra = peaks[2][1] - max(peaks[1][1], peaks[3][1])
    assert extra <= largest + pieces + scores + histogram
    assert extra < everything / 2 or granularity == "entries"


def test_probes_take_turns_and_old_scores_fade():
    model = net()
    optimizer = BlockLLM(model, granularity="tensor", census="probe", switch_every=1, budget=0.3)
    turns = []
    for batch in batches(12):
        train(model, optimizer, [batch])
        assert {k for k, p in enumerate(model.parameters()) if p.requires_grad} == optimizer.census.turns | {
            k for k, part in enumerate(optimizer.parts) if part is not None
        }
        turns.append(optimizer.census.turns)
    assert all(len(turn) == 1 for turn in turns)
    assert len(set().union(*turns)) >= 5
    found = Census(optimizer.blocks, "grad")
    for position, size in enumerate(optimizer.blocks.sizes):
        found.add(position, torch.ones(size), hyper=HYPER)
    fresh = found.norms()
    found.begin(list(range(len(fresh))), probe=True)
    torch.testing.assert_close(found.norms(), fresh * census.AGEING)
    found.begin(list(range(len(fresh))), probe=False)
    assert (found.norms() == 0).all()


def test_scores_and_norms_ask_the_device_once(monkeypatch):
    """On a GPU every copy waits for all that was asked before it, so that one a tensor would cost most of a switch."""
    shapes = [torch.Size(size) for size in ((4, 3), (5, 3), (7,))]
    found = Census(Blocks.of(["a", "b", "c"], shapes, "rows", set()), "grad")
    for position, shape in enumerate(shapes):
        found.add(position, torch.randn(shape), hyper=HYPER)
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(1), cpu(tensor))[1])
    found.scores()
    assert len(copies) == 1
    found.norms()
    assert len(copies) == 2
