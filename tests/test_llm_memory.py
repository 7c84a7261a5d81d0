"""Memory: what a step holds, measured at every operation, and the state to the byte."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from small_models import Bytes, TinyLM, batches, net, tokens, train  # noqa: E402

from llm import BlockLLM, census, moments  # noqa: E402

EVERY = ["tensor", "layer", "rows", "neurons", "entries"]
BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}


@given(
    st.sampled_from(EVERY),
    st.sampled_from(sorted(BYTES)),
    st.floats(0.02, 1.0),
    st.sampled_from(["greedy", "cyclic", "random"]),
    st.integers(1, 6),
)
def test_state_follows_the_budget_to_the_byte(granularity, states, budget, rule, count):
    """Moments of active entries, scales of 8-bit groups, and indices of slices; nothing else."""
    if granularity == "entries" and rule != "greedy":
        rule = "greedy"
    optimizer = BlockLLM(
        model := net(), budget=budget, granularity=granularity, states=states, rule=rule, switch_every=2
    )
    train(model, optimizer, batches(count))
    memory, active = optimizer.report()["memory"], sum(optimizer.active().values())
    cohorts = [c for s in optimizer.state.values() for c in s["cohorts"] if "exp_avg" in c]
    scales = 4 * sum(-(-c["exp_avg"].numel() // 256) for c in cohorts) if states == "8bit" else 0
    assert active <= optimizer.budget <= budget * 1045
    assert memory["moments"] == BYTES[states] * sum(c["exp_avg"].numel() for c in cohorts) + 2 * scales
    settled = all(part is None or part.index is not None for part in optimizer.parts)
    assert not settled or memory["moments"] <= BYTES[states] * active + 2 * scales
    assert not settled or memory["indices"] <= 4 * sum(part.count for part in optimizer.parts if part is not None)


def run(model, optimizer, count, seed=1):
    """Peak and live bytes of ``count`` steps, weights left out."""
    peak = 0
    for x in tokens(count, rows=1, length=2, vocabulary=40, seed=seed):
        optimizer.zero_grad()
        with Bytes(model) as memory:
            loss = model(x, x)["loss"]
            loss.backward()
            del loss
            optimizer.step()
        peak = max(peak, memory.peak)
    return peak


def large():
    return TinyLM(layers=10, width=48, vocabulary=40, tied=False)


def test_released_blocks_give_their_memory_back():
    """Live bytes of state and gradients after each of many switches; none of it piles up."""
    model = large()
    optimizer = BlockLLM(model, budget=0.2, granularity="tensor", rule="random", mask=False, switch_every=2)
    with Bytes(model) as memory:
        levels = []
        for x in tokens(21, rows=1, length=2, vocabulary=40):
            optimizer.zero_grad()
            model(x, x)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            levels.append(memory.now())
    limit = 8 * optimizer.budget + 20_000  # moments; 20 kB of indices, losses and the like
    assert max(levels) <= limit < 8 * optimizer.blocks.total / 2


@pytest.mark.parametrize(("granularity", "share"), [("tensor", 0.6), ("layer", 0.6), ("rows", 0.8), ("entries", 0.9)])
def test_a_run_needs_less_than_adamw(granularity, share, monkeypatch):
    """Peak beyond the weights, censuses and switches included, and activations are small here."""
    monkeypatch.setattr(moments, "CHUNK", 2048)
    monkeypatch.setattr(census, "BINS", 1 << 8)  # histograms are no small thing beside a model of 100,000 entries
    monkeypatch.setattr(census, "_SHIFT", 23)
    peaks = {}
    for ours in (True, False):
        model = large()
        if ours:
            optimizer = BlockLLM(model, budget=0.05, granularity=granularity, switch_every=3)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            run(model, optimizer, 1)
            state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        peaks[ours] = run(model, optimizer, 7)
    assert peaks[True] < share * (peaks[False] + state)


def test_an_update_in_the_backward_holds_one_gradient():
    """Of all active gradients only one is alive at a time."""
    peaks = {}
    for in_backward in (False, True):
        model = large()
        optimizer = BlockLLM(model, rule="full", in_backward=in_backward)
        run(model, optimizer, 1)
        peaks[in_backward] = run(model, optimizer, 3)
        weights = sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
    assert peaks[False] - peaks[True] > weights - 4 * largest


@pytest.mark.parametrize("granularity", EVERY)
def test_the_first_window_holds_no_more_than_a_few_budgets_of_gradient(granularity):
    model = large()
    optimizer = BlockLLM(model, budget=0.05, granularity=granularity)
    held = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(optimizer_gradient(p) for p in model.parameters()))
        )
    x = tokens(1, vocabulary=40)[0]
    model(x, x)["loss"].backward()
    largest = max(p.numel() for p in model.parameters())
    assert max(held) <= 2 * optimizer.budget + largest
    optimizer.step()
    assert sum(optimizer_gradient(p) for p in model.parameters()) <= optimizer.budget


def optimizer_gradient(p):
    if p.grad is None:
        return 0
    return p.grad.active.numel() if hasattr(p.grad, "active") else p.grad.numel()


def test_what_is_counted_as_memory_is_what_a_budget_in_bytes_allows():
    for states, entry in (("fp32", 12), ("bf16", 8), ("8bit", 6 + 8 / 256)):
        optimizer = BlockLLM(net(), budget="2400B", states=states, granularity="tensor")
        assert optimizer.budget == int(2400 / entry)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows"])
@pytest.mark.parametrize("options", [{}, {"in_backward": True, "states": "8bit"}])
def test_steps_and_a_census_can_be_simulated_with_fake_tensors(granularity, options, monkeypatch):
    """The selection is made by hand, and numbers that fake tensors do not have are not asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llm import optimizer as module

    monkeypatch.setattr(module, "norm_of", lambda names, grads: 0.0)
    memory = []
    for fake in (True, False):
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad()
        with mode:
            model, x = TinyLM(tied=False), tokens(1)[0]
        optimizer = BlockLLM(model, budget=0.3, granularity=granularity, switch_every=4, **options)
        optimizer.activate({"layers.0.up.weight": 3} if granularity == "rows" else ["layers.0.up.weight"])
        with mode:
            for _ in range(4):  # the last backward is a census
                optimizer.zero_grad()
                model(x, x)["loss"].backward()
                if not optimizer.census_on:
                    optimizer.step()
        memory.append((optimizer.report()["memory"], len(optimizer.census.sums)))
    assert memory[0] == memory[1]
    assert memory[0][1] == len(optimizer.blocks.names)
