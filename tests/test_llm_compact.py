"""Gradients that are stored for the active slices only, against the dense ones with zeros elsewhere."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llm.compact import CompactGrad, Part, pick_largest, restrict  # noqa: E402


@st.composite
def parts(draw):
    """A dense gradient of shape (6, 4) and some slices of 24, 4 or 1 entries, in any order."""
    unit = draw(st.sampled_from([1, 4, 12]))
    slices = 24 // unit
    index = draw(st.permutations(range(slices)))[: draw(st.integers(1, slices))]
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return grad, Part(unit, len(index), torch.tensor(index, dtype=torch.int32))


def zeroed(grad, part):
    out = torch.zeros_like(grad)
    out.view(-1, part.unit)[part.index] = grad.view(-1, part.unit)[part.index]
    return out


@given(parts())
def test_it_is_the_dense_gradient_with_zeros(case):
    grad, part = case
    found = restrict(grad, part)
    assert torch.equal(found.dense(), zeroed(grad, part))
    assert found.shape == grad.shape
    assert found.active.shape == (part.count, part.unit)
    assert found.active.numel() == part.entries


@given(parts())
def test_clipping_and_accumulation_are_those_of_the_dense_one(case):
    grad, part = case
    weights = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in range(3)]
    weights[0].grad, weights[1].grad, other = restrict(grad, part), zeroed(grad, part), torch.ones(6, 4)
    weights[2].grad = other.clone()
    for weight in weights[:2]:
        (weight * torch.full((6, 4), 2.0)).sum().backward()
    weights[1].grad = zeroed(weights[1].grad, part)
    norms = []
    for weight in weights[:2]:
        weights[2].grad = other.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([weight, weights[2]], 0.5))
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(weights[0].grad.dense(), weights[1].grad)


@given(parts(), st.integers(0, 99))
def test_narrowing_keeps_what_is_held_and_zero_elsewhere(case, seed):
    grad, part = case
    slices = 24 // part.unit
    index = torch.randperm(slices, generator=torch.Generator().manual_seed(seed))[: max(1, slices // 2)]
    found = restrict(restrict(grad, part), Part(part.unit, len(index), index))
    assert torch.equal(found.dense(), zeroed(zeroed(grad, part), Part(part.unit, len(index), index)))


def test_the_whole_tensor_is_itself():
    grad = torch.randn(3, 2)
    assert restrict(grad, Part.whole(6)) is grad


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 14))
def test_the_largest_entries_with_ties_by_index(values, count):
    grad = torch.tensor(values, dtype=torch.float32)
    part = pick_largest(grad, count)
    order = sorted(range(len(values)), key=lambda k: (-abs(values[k]), k))[:count]
    assert part.index.tolist() == sorted(order)
    assert (part.unit, part.count) == (1, len(order))


def test_the_largest_of_a_compact_gradient_are_named_as_in_the_dense_one():
    grad = torch.tensor([[5.0, 1.0], [-7.0, 2.0]])
    held = restrict(grad, Part(1, 3, torch.tensor([3, 0, 2])))
    assert pick_largest(held, 2).index.tolist() == [0, 2]


def test_what_it_is_not_made_for_is_refused_with_advice():
    grad = restrict(torch.ones(2, 2), Part(1, 1, torch.tensor([0])))
    with pytest.raises(NotImplementedError, match=r"use \.grad\.active .* or max_grad_norm="):
        grad + 1
    assert repr(grad) == "CompactGrad(1 slices of 1 entries, shape=(2, 2))"


def test_grad_scaler_unscales_it_and_finds_infinities():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([weight])
    weight.grad = restrict(torch.full((2, 2), 8.0), Part(1, 2, torch.tensor([0, 3])))
    scaler.unscale_(optimizer)
    assert weight.grad.active.tolist() == [[2.0], [2.0]]
    assert isinstance(weight.grad, CompactGrad)
