"""Memory that is predicted: exact against real runs, the worst places, the largest budget that fits."""

import gc

import pytest

torch = pytest.importorskip("torch")
from small_models import TinyLM, copies, tokens  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM, census, gradients, moments, optimizer  # noqa: E402
from llm.ledger import Ledger, watch  # noqa: E402
from llm.plan import PLACES, fake_model, plan, prescribe, simulate  # noqa: E402

EVERY = ["tensor", "layer", "rows", "neurons", "entries"]
BATCH = tokens(1, rows=2, length=6, vocabulary=50)[0]
HOST = 12_000  # bytes that choosing takes, which are on the CPU: counted in real runs here, not in simulated ones


def model(**options):
    return TinyLM(layers=2, width=32, vocabulary=50, tied=False, **options).train()


def loss(model, x=BATCH):
    return model(x, x)["loss"]


def peak_of(peaks):
    return max(peak.total for peak in peaks)


# -- the count -----------------------------------------------------------------------------------------


def test_adamw_in_bytes():
    """Weights, gradients and two moments, to the byte; no activation is alive when the step begins."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    x = torch.ones(1, 64)
    peaks = watch(net, lambda m: torch.optim.AdamW(m.parameters(), foreach=False), lambda: net(x).sum(), 2)
    size = sum(p.nbytes for p in net.parameters())
    last = peaks[-1].parts
    assert (last["weights"], last["gradients"], last["state"]) == (size, size, 2 * size + 8)  # two counts of steps
    assert last["activations"] == 0
    assert peaks[0].parts["gradients"] == peaks[0].parts["state"] == 0
    assert [(p.step, p.phase) for p in peaks[:4]] == [(1, "forward"), (1, "backward"), (1, "step"), (2, "forward")]


def test_what_is_freed_is_not_counted_any_longer():
    with Ledger(False) as ledger:
        x = torch.zeros(1000)
        assert ledger.now == 4000
        y = x[:10]
        del x
        assert ledger.now == 4000  # a view keeps all of it
        z = y + 1
        del y
        gc.collect()
        assert ledger.now == z.nbytes
    assert ledger.most == 4040


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), foreach=False),
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), momentum=0.9),
}


@pytest.mark.parametrize("checkpointing", [None, "nonreentrant"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_simulated_is_measured(name, checkpointing):
    real = model(checkpointing=checkpointing)
    found = [[p.total for p in watch(m, OPTIMIZERS[name], lambda m=m: loss(m), 2)] for m in (real, fake_model(real))]
    assert found[0] == pytest.approx(found[1], rel=0.002)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_total_is_that_of_torchs_tracker(name):
    from torch.distributed._tools.mem_tracker import MemTracker

    net, tracker = fake_model(model()), MemTracker()
    optimizer = OPTIMIZERS[name](net)
    tracker.track_external(net, optimizer)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            loss(net).backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    net = fake_model(model())
    assert peak_of(watch(net, OPTIMIZERS[name], lambda: loss(net), 2)) == pytest.approx(theirs, rel=0.002)


@pytest.fixture
def small_histograms(monkeypatch):
    monkeypatch.setattr(census, "BINS", 1 << 8)
    monkeypatch.setattr(census, "_SHIFT", 23)


LOW = {"in_backward": True, "states": "8bit"}


@pytest.mark.parametrize(
    ("granularity", "options"), [*((g, {}) for g in EVERY), ("rows", LOW), ("tensor", {"states": "bf16"})]
)
def test_simulated_is_measured_for_blockllm(granularity, options, small_histograms):
    """Along the same places: weights and state to the byte where nothing else is counted, peaks within a few kB."""
    options = {"budget": 0.1, "granularity": granularity, **options}
    real, fake = (simulate(m, options, lambda m=m: loss(m), PLACES[:2]) for m in (model(), fake_model(model())))
    assert [(p.step, p.phase, p.census) for p in real] == [(p.step, p.phase, p.census) for p in fake]
    assert [p.parts["weights"] for p in real] == [p.parts["weights"] for p in fake]
    largest = [peak_of(p for p in peaks if p.phase != "step" and p.step > 1) for peaks in (real, fake)]
    assert 0 <= largest[0] - largest[1] <= HOST


def test_a_simulated_run_has_all_kinds_of_steps():
    net = fake_model(model())
    peaks = simulate(net, {"budget": 0.1}, lambda: loss(net), PLACES[:2])
    assert len(peaks) == 3 * 2 * 2
    assert [peak.census for peak in peaks[::3]] == [True, True, False, True]


@pytest.mark.parametrize("rule", ["cyclic", "random", "full", "importance"])
def test_other_rules_are_simulated_too(rule):
    net = fake_model(model())
    options = {"rule": rule} if rule == "full" else {"rule": rule, "budget": 0.2, "granularity": "tensor"}
    assert peak_of(simulate(net, options, lambda: loss(net), PLACES[:1])) > sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize(("place", "first"), [("bottom", "tokens.weight"), ("top", "head.weight")])
def test_places(place, first):
    m = model()
    optimizer = BlockLLM(m, budget=0.05)
    prescribe(optimizer, [place])
    loss(m).backward()
    optimizer.step()
    assert first in optimizer.active()
    assert optimizer.budget - 32 < sum(optimizer.active().values()) <= optimizer.budget


def test_spread_is_everywhere_and_a_place_that_comes_again_is_kept_in_part():
    m = model()
    optimizer = BlockLLM(m, budget=0.3, switch_every=1)
    prescribe(optimizer, ["spread", "top", "top"])
    active = []
    for _ in range(3):
        optimizer.zero_grad()
        loss(m).backward()
        optimizer.step()
        active.append({k: part.index for k, part in enumerate(optimizer.parts) if part is not None})
    assert len(active[0]) > 6
    first, second = ({(k, int(row)) for k, rows in turn.items() for row in rows} for turn in active[1:])
    assert 0.6 * len(first) < len(first & second) < len(first)


def test_a_run_that_chooses_by_itself_stays_below_the_prediction():
    net, m = fake_model(model()), model()
    bound = peak_of(simulate(net, {"budget": 0.1}, lambda: loss(net)))
    free = watch(m, lambda m: BlockLLM(m, budget=0.1, switch_every=2), lambda: loss(m), 6)
    assert peak_of(free) <= bound + HOST


# -- what low memory rests on --------------------------------------------------------------------------

SIZE, CHUNK = 128, 1024


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (moments, census, gradients):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(optimizer, "CHUNK", CHUNK)
    for name in ("CACHED", "SMALL"):
        monkeypatch.setattr(moments, name, CHUNK)
    monkeypatch.setattr(optimizer, "SURVEYED", CHUNK)


def of_one_matrix(budget, states, places):
    """The largest moment of a run whose weights are one matrix, in bytes of that, updates in the backward."""
    net = fake_model(nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Flatten()).bfloat16())
    x = torch.ones(1, SIZE, dtype=torch.bfloat16)
    options = {"budget": budget, "in_backward": True, "states": states}
    return peak_of(simulate(net, options, lambda: net(x).float().square().mean(), places)) / (SIZE * SIZE * 2)


@pytest.mark.parametrize(("states", "state"), [("bf16", 2.0), ("8bit", 1.03)])
def test_updates_in_the_backward_copy_no_gradient(small_chunks, states, state):
    """Weights, one gradient, whatever part of it is active, and moments; temporary is what a few pieces take."""
    pieces = 20 * 4 * CHUNK / (SIZE * SIZE * 2)
    assert of_one_matrix(0.9, states, ["bottom"]) <= 2 + 0.9 * state + pieces


def test_a_switch_copies_no_moments_in_float32(small_chunks):
    """8-bit moments of rows of which most stay active: old and new codes side by side, gradients gone."""
    pieces = 20 * 4 * CHUNK / (SIZE * SIZE * 2)
    assert of_one_matrix(0.8, "8bit", ["tables", "tables"]) <= 2 + 0.8 * 1.03 + pieces


# -- plan ----------------------------------------------------------------------------------------------


def planned(memory, **options):
    return plan(model(), BATCH, budget=memory, loss=loss, places=("top",), **options)


def test_the_largest_budget_fits_and_a_larger_one_does_not():
    weights = sum(p.nbytes for p in model().parameters())
    found = planned(3 * weights)
    asked, best = found.cases
    assert asked.share == pytest.approx(0.05, rel=0.01)
    assert asked.fits
    assert best.fits
    assert 0.96 * found.memory <= best.peak.total <= found.memory
    assert found.largest(False) == best.share > asked.share
    net = fake_model(model())
    over = simulate(net, {"budget": min(1.0, 1.2 * best.share)}, lambda: loss(net), ("top",))
    assert peak_of(over) > found.memory


def test_everything_fits():
    told = []
    found = planned("1GB", tell=told.append)
    assert told == [
        f"simulating run {k} of 5 at most: without checkpointing, budget {share}"
        for k, share in ((1, "4.99%"), (2, "100.00%"))
    ]
    assert str(found).splitlines()[0].endswith("memory 1.00 GB; peaks and their parts in GB")
    assert found.largest(False) == 1.0
    for word in ("weights", "gradients", "state", "activations", "temporary", "4.99%", "fits", "100.00%"):
        assert word in str(found)


def test_nothing_fits():
    nothing = planned("10kB")
    assert nothing.largest(False) is None
    assert [case.fits for case in nothing.cases] == [False]
    assert "no budget fits" in str(nothing)


def test_a_model_is_left_alone_and_may_have_no_data():
    real = model()
    next(real.parameters()).requires_grad_(False)
    before, required = copies(real), [p.requires_grad for p in real.parameters()]
    twins = [fake_model(source) for source in (real, model().to("meta"), model)]
    peaks = [peak_of(simulate(twin, {"budget": 0.1}, lambda twin=twin: loss(twin), ("top",))) for twin in twins]
    assert peaks[0] == peaks[1] == peaks[2]
    assert all(torch.equal(p, b) for p, b in zip(real.parameters(), before, strict=True))
    assert [p.requires_grad for p in real.parameters()] == required
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in real.parameters())


def test_tied_weights_are_counted_once():
    tied, apart = (fake_model(TinyLM(tied=tied)) for tied in (True, False))
    assert sum(p.nbytes for p in apart.parameters()) - sum(p.nbytes for p in tied.parameters()) == 20 * 8 * 4
    assert tied.head.weight is tied.tokens.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "many"}, "budget must be memory of a device, such as \"24GB\"; found 'many'"),
        ({"budget": "0GB"}, "budget must be memory of a device"),
        ({"budget": None}, "budget must be memory of a device"),
        ({"optimizer": {"granularity": "word"}}, "granularity"),
        ({"optimizer": {"budget": 7.5}}, "budget"),
        ({"loss": None}, "labels"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        plan(model(), BATCH, **{"loss": loss, **options})


@pytest.mark.parametrize("batch", [(0, 16), (2, -1), (5,)])
def test_sizes_of_a_batch(batch):
    with pytest.raises(ValueError, match="batch must be how many sequences, of how many tokens, each at least 1; fou"):
        plan(model(), batch)


# -- transformers --------------------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return transformers.LlamaConfig(**sizes, num_hidden_layers=2, use_cache=False)


def test_a_configuration_of_transformers():
    found = plan(llama(), (16, 64), budget="1GB", optimizer={"budget": 1.0, "states": "bf16"}, places=("top",))
    plain, checkpointed = found.cases
    assert (plain.checkpointing, checkpointed.checkpointing) == (False, True)
    assert plain.peak.parts["activations"] > 1.5 * checkpointed.peak.parts["activations"]
    assert plain.peak.total > checkpointed.peak.total


def test_a_small_llama_is_as_predicted():
    transformers = pytest.importorskip("transformers")
    from llm.hf import checkpointing

    largest, ids = [], torch.zeros(4, 64, dtype=torch.int64)
    for make in (lambda make: make(), fake_model):
        net = make(lambda: transformers.LlamaForCausalLM(llama())).train()
        checkpointing(net)
        peaks = simulate(net, {"budget": 0.1, **LOW}, lambda net=net: net(input_ids=ids, labels=ids).loss, ("top",))
        largest.append(peak_of(peaks))
    assert largest[0] == pytest.approx(largest[1], rel=0.03)
