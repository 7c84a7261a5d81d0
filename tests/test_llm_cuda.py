# SPDX-License-Identifier: BSD-3-Clause
"""The optimizer on a CUDA device: the same as on a CPU, with its memory measured by the device's allocator."""

from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from small_models import TinyLM, batches, net, tokens, train, train_on_itself  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM  # noqa: E402

CUDA = torch.device("cuda")
WAYS = [
    {"granularity": granularity, "in_backward": in_backward}
    for granularity in ("tensor", "layer", "rows", "entries")
    for in_backward in (False, True)
]


def there(data):
    return [(x.to(CUDA), y.to(CUDA)) for x, y in data]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("score", ["grad", "l1", "adam"])
def test_it_chooses_and_trains_as_on_a_cpu(way, score):
    found = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = BlockLLM(model, 1e-2, budget=0.3, switch_every=4, score=score, **way)
        data = batches(12)
        train(model, optimizer, data if device == "cpu" else there(data))
        found[device] = optimizer.active(), [p.detach().cpu() for p in model.parameters()]
    assert found["cuda"][0] == found["cpu"][0]
    for here, far in zip(found["cpu"][1], found["cuda"][1], strict=True):
        torch.testing.assert_close(far, here, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows", "neurons", "entries"])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_low_precision_states_train_as_well_as_on_a_cpu(granularity, states, in_backward):
    """Roundings differ, and with them which entries are chosen; what is learnt does not."""
    options = {"granularity": granularity, "states": states, "in_backward": in_backward}
    losses = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = BlockLLM(model, 1e-2, budget=0.3, switch_every=10, **options)
        data = batches(1) * 40
        losses[device] = train(model, optimizer, data if device == "cpu" else there(data))
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=1e-4)
    assert losses["cuda"][-1] < 0.7 * losses["cuda"][0]
    assert losses["cuda"][-1] == pytest.approx(losses["cpu"][-1], rel=0.2, abs=0.02)


@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32-active", "stochastic"])
def test_low_precision_weights_train(granularity, dtype, precision):
    if dtype == torch.float16 and precision == "stochastic":
        pytest.skip("stochastic rounding is for bfloat16")
    model = TinyLM(layers=2, width=32, vocabulary=40, tied=True).to(CUDA, dtype)
    optimizer = BlockLLM(model, 3e-3, budget=0.3, granularity=granularity, precision=precision, switch_every=10)
    x = tokens(1, rows=4, length=8, vocabulary=40)[0].to(CUDA)
    losses = train_on_itself(model, optimizer, x)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_autocast_and_the_scaler(granularity, cast):
    model = net().to(CUDA)
    optimizer = BlockLLM(model, 1e-2, budget=0.4, granularity=granularity, switch_every=8)
    scaler = torch.amp.GradScaler("cuda", enabled=cast == torch.float16, init_scale=2.0**10)
    data, losses = there(batches(1)) * 40, []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=cast):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
def test_cautious_updates(granularity, states):
    """As on a CPU: the first steps are equal, and the loss falls."""
    own = {"granularity": granularity, "states": states, "score": "l1"}
    losses = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = BlockLLM(model, 1e-2, budget=0.3, switch_every=10, cautious=True, **own)
        data = batches(1) * 40
        losses[device] = train(model, optimizer, data if device == "cpu" else there(data))
    assert losses["cuda"][:3] == pytest.approx(losses["cpu"][:3], rel=1e-3)
    assert losses["cuda"][-1] < 0.7 * losses["cuda"][0]


@pytest.mark.parametrize("inactive", ["sign", "sgd", "spectral"])
@pytest.mark.parametrize("granularity", ["tensor", "rows"])
def test_inactive_entries_move_as_on_a_cpu(granularity, inactive):
    found = {}
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = BlockLLM(model, 1e-2, budget=0.3, switch_every=4, granularity=granularity, inactive=inactive)
        data = batches(9)
        train(model, optimizer, data if device == "cpu" else there(data))
        found[device] = [p.detach().cpu() for p in model.parameters()]
    for here, far in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(far, here, rtol=1e-2, atol=2e-3)


def test_rows_of_a_llama_as_on_a_cpu():
    """Gradients of active rows alone, behind norms and gated units, with the census of rows."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, vocab_size=96, tie_word_embeddings=True, use_cache=False)
    ids = tokens(10, rows=8, length=24, vocabulary=96)
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(device)
        optimizer = BlockLLM(model, 1e-3, budget=0.2, switch_every=4, score="l1", per_parameter=True, cautious=True)
        losses[device] = []
        for x in (x.to(device) for x in ids):
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_full_equals_adamw():
    found = []
    for ours in (True, False):
        model = net().to(CUDA)
        options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
        optimizer = (
            BlockLLM(model, 1e-2, rule="full", **options)
            if ours
            else torch.optim.AdamW(model.parameters(), 1e-2, **options)
        )
        train(model, optimizer, there(batches(20)))
        found.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
def test_a_resumed_run_goes_on_where_it_stopped(granularity):
    def fresh():
        model = net().to(CUDA)
        return model, BlockLLM(model, 1e-2, budget=0.3, granularity=granularity, switch_every=4)

    data = there(batches(14))
    model, optimizer = fresh()
    train(model, optimizer, data)
    half, first = fresh()
    train(half, first, data[:6])
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, second = fresh()
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(again, second, data[6:])
    assert second.active() == optimizer.active()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def peak_of(make, steps=9):
    """Bytes allocated at most beyond the weights, and live ones at the end beyond them."""
    torch.cuda.synchronize()
    model = TinyLM(layers=12, width=512, vocabulary=1000, tied=False).to(CUDA)
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make(model)
    for x in tokens(steps, rows=1, length=4, vocabulary=1000):
        optimizer.zero_grad()
        x = x.to(CUDA)
        model(x, x)["loss"].backward()
        optimizer.step()
    optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - weights, torch.cuda.memory_allocated() - weights


@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
def test_memory_by_the_allocator(granularity):
    """Switches included, well below AdamW's; the state follows the budget."""
    adamw, _ = peak_of(lambda model: torch.optim.AdamW(model.parameters(), 1e-3))
    total = sum(p.numel() for p in TinyLM(layers=12, width=512, vocabulary=1000, tied=False).parameters())
    ours, live = peak_of(
        lambda model: BlockLLM(model, 1e-3, budget=0.05, granularity=granularity, switch_every=3, mask=True)
    )
    assert ours < 0.5 * adamw
    assert live < (0.05 * 16 + 0.05) * total + 2**21


@pytest.mark.parametrize("granularity", ["tensor", "rows"])
def test_compiled_models(granularity):
    model = net().to(CUDA)
    optimizer = BlockLLM(model, 1e-2, budget=0.4, granularity=granularity, switch_every=None)
    compiled = torch.compile(model)
    losses = train(compiled, optimizer, there(batches(1)) * 30)
    assert losses[-1] < 0.7 * losses[0]
