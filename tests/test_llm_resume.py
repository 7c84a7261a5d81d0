"""A resumed run is the uninterrupted one, bit for bit, whatever is saved when; other checkpoints are refused."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")
from small_models import batches, copies, loss_of, net, train  # noqa: E402

from llm import BlockLLM  # noqa: E402

CONFIGURATIONS = {
    "rows": {},
    "entries": {"granularity": "entries"},
    "tensors in part": {"granularity": "tensor"},
    "layers": {"granularity": "layer"},
    "adam scores": {"granularity": "rows", "score": "adam", "reach": None},
    "scores in the L1-norm": {"granularity": "rows", "score": "l1", "per_parameter": True, "census": "probe"},
    "adam scores of entries": {"granularity": "entries", "score": "adam"},
    "cyclic": {"rule": "cyclic", "granularity": "layer"},
    "random, stochastic": {"rule": "random", "granularity": "rows", "states": "8bit"},
    "importance": {"rule": "importance", "granularity": "tensor"},
    "half": {"rule": "half", "granularity": "tensor", "budget": None},
    "full": {"rule": "full", "budget": None},
    "probe": {"granularity": "rows", "census": "probe"},
    "patience": {"patience": 2, "switch_every": None},
    "8 bits of entries": {"granularity": "entries", "states": "8bit"},
    "in backward": {"in_backward": True},
    "sign": {"inactive": "sign", "states": "bf16"},
    "spectral": {"inactive": "spectral", "granularity": "rows"},
    "keep": {"moments": "keep", "granularity": "tensor", "states": "8bit"},
    "offload": {"moments": "offload", "granularity": "entries"},
}


def make(weights=0, dtype=torch.float32, **options):
    model = net(weights).to(dtype)
    optimizer = BlockLLM(model, **{"lr": 1e-2, "budget": 0.2, "switch_every": 3, "weight_decay": 0.1, **options})
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def steps(model, optimizer, scheduler, data):
    losses = []
    for batch in data:
        losses += train(model, optimizer, [batch], tell=True)
        scheduler.step()
    return losses


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_is_uninterrupted(name, dtype):
    options, data = CONFIGURATIONS[name], batches(12)
    run = make(dtype=dtype, **options)
    saved, losses = [], []
    for batch in data:
        saved.append(through_a_file([part.state_dict() for part in run]))
        losses += steps(*run, [batch])
    assert len(run[1].history) >= 3 or options.get("rule") == "full"
    for k in range(0, 12) if dtype == torch.float32 else (0, 3, 8):
        again = make(weights=9, dtype=dtype, **{**options, "seed": 77})
        for part, state in zip(again, saved[k], strict=True):
            part.load_state_dict(state)
        assert steps(*again, data[k:]) == losses[k:]
        assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), run[0].parameters(), strict=True))
        assert again[1].history == run[1].history
        assert again[1].active() == run[1].active()


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_a_state_put_back_where_it_came_from_changes_nothing(k):
    """What Accelerate does when it wraps an optimizer."""
    data = batches(9)
    plain, wrapped = make(), make()
    steps(*plain, data[:k])
    steps(*wrapped, data[:k])
    wrapped[1].load_state_dict(wrapped[1].state_dict())
    assert steps(*wrapped, data[k:]) == steps(*plain, data[k:])


def test_dtypes_survive():
    """torch would cast moments and indices to the type of the weights."""
    run = make(dtype=torch.bfloat16, granularity="entries")
    steps(*run, batches(4))
    again = make(dtype=torch.bfloat16, granularity="entries")
    again[1].load_state_dict(through_a_file(run[1].state_dict()))
    for state in again[1].state.values():
        assert state["index"].dtype == torch.int32
        assert all(c["exp_avg"].dtype == torch.float32 for c in state["cohorts"] if "exp_avg" in c)


def test_loaded_states_are_independent_of_the_optimizer_they_came_from():
    run = make(granularity="tensor", switch_every=None)
    steps(*run, batches(3))
    state = copy.deepcopy(run[1].state_dict())
    again = make(granularity="tensor", switch_every=None)
    again[1].load_state_dict(state)
    steps(*run, batches(3))
    assert again[1].steps == 3
    assert all(c["step"] == 3 for s in again[1].state.values() for c in s["cohorts"])


def test_distributed_checkpoints_keep_the_selection():
    """get and set of torch.distributed.checkpoint, whose fake first step must not count."""
    from torch.distributed.checkpoint import state_dict as dcp

    data = batches(9)
    run = make(granularity="tensor")
    steps(*run, data[:4])
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(run[0], run[1]))
    weights = copy.deepcopy(run[0].state_dict())
    rest = steps(*run, data[4:])
    again = make(weights=5, granularity="tensor")
    again[0].load_state_dict(weights)
    some = dcp.StateDictOptions(strict=False)  # before its first step every parameter requires grad, few have state
    dcp.set_optimizer_state_dict(again[0], again[1], saved, options=some)
    for group in again[1].param_groups:
        group.setdefault("initial_lr", 1e-2)
    again[2].last_epoch = 4
    assert again[1].steps == 4
    assert steps(*again, data[4:]) == rest


def test_other_checkpoints_are_refused():
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="state_dict is not of BlockLLM: it lacks the selection"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    other = BlockLLM([(name.replace("2.", "two."), p) for name, p in net().named_parameters()])
    with pytest.raises(ValueError, match=r"it has 'two.weight' where this optimizer has '2.weight'"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("saved", "made", "message"),
    [
        ({}, {"granularity": "layer"}, "saved with granularity='rows', but this optimizer has granularity='layer'"),
        ({"rule": "cyclic", "granularity": "tensor"}, {"granularity": "tensor"}, "saved with rule='cyclic', but"),
        ({"reach": 4.0}, {}, "saved with reach=4.0, but this optimizer has reach=None"),
        ({"never": ["0"]}, {"never": ["2.bias"]}, r"saved with never=\['0.weight'\], but .* never=\['2.bias'\]"),
        ({"embeddings": "always", "budget": 0.9}, {"budget": 0.9}, r"saved with always=\['0.weight'\], but .*\[\]"),
    ],
)
def test_states_of_other_blocks_are_refused(saved, made, message):
    run = make(**saved)
    steps(*run, batches(2))
    with pytest.raises(ValueError, match=f"state_dict was {message}.*; make it with the same settings"):
        make(**made)[1].load_state_dict(run[1].state_dict())


@pytest.mark.parametrize("damage", [lambda i: i.add_(10_000), lambda i: i.sub_(10_000), lambda i: i.resize_(1)])
def test_slices_that_do_not_exist_are_refused(damage):
    """They would be written to, past the end of the parameter."""
    run = make(granularity="rows")
    steps(*run, batches(4))
    state = through_a_file(run[1].state_dict())
    index = next(entry["index"] for entry in state["state"].values() if entry["index"].numel() > 1)
    damage(index)
    with pytest.raises(ValueError, match="slices of"):
        make(granularity="rows")[1].load_state_dict(state)


def test_what_does_not_shape_the_state_may_change():
    run = make()
    steps(*run, batches(2))
    again = make(budget=0.4, patience=3, switch_every=2, max_grad_norm=1.0, moments="keep", ramp=0, visit_power=0.5)
    again[1].load_state_dict(through_a_file(run[1].state_dict()))
    steps(*again, batches(5))
    assert again[1].steps == 7


def test_history_and_losses_go_on():
    run = make(patience=4, switch_every=None)
    steps(*run, batches(5))
    again = make(patience=4, switch_every=None)
    again[1].load_state_dict(through_a_file(run[1].state_dict()))
    assert again[1].losses.losses == run[1].losses.losses
    assert again[1].report()["history"] == run[1].report()["history"]


def test_nothing_is_saved_for_inactive_tensors():
    run = make(granularity="tensor", switch_every=None)
    steps(*run, batches(3))
    names = run[1].param_groups[0]["param_names"]
    assert {names[k] for k in run[1].state_dict()["state"]} == set(run[1].active())


def test_the_weights_of_a_loaded_run_are_its_own():
    run = make()
    steps(*run, batches(2))
    before = copies(run[0])
    again = make(weights=3)
    again[1].load_state_dict(run[1].state_dict())
    loss_of(again[0], batches(1)[0]).backward()
    again[1].step()
    assert all(torch.equal(p, b) for p, b in zip(run[0].parameters(), before, strict=True))
