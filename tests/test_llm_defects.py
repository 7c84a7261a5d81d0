"""What is wrong with the reference implementation of BlockLLM, point by point, and why it cannot be here."""

import logging
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from small_models import TinyLM, batches, changed, copies, loss_of, net, tokens, train  # noqa: E402

from llm import BlockLLM  # noqa: E402


def test_the_first_selection_looks_at_the_gradient():
    """Not at a shuffle: the tensor whose gradient is made a thousand times larger is chosen."""
    for target in (1, 3, 5):
        model = net()
        list(model.parameters())[target].register_hook(lambda grad: 1000 * grad)
        optimizer = BlockLLM(model, granularity="tensor", budget=0.5, seed=target)
        train(model, optimizer, batches(1))
        assert optimizer.param_groups[0]["param_names"][target] in optimizer.active()


def test_budgets_count_parameters_not_tensors():
    optimizer = BlockLLM(model := net(), granularity="tensor", budget=0.3, mask=False)
    train(model, optimizer, batches(1))
    active = {n: p.numel() for n, p in model.named_parameters() if n in optimizer.active()}
    assert sum(active.values()) <= 0.3 * 1045


def test_the_first_step_updates():
    model = net()
    before = copies(model)
    train(model, BlockLLM(model), batches(1))
    assert any(mask.any() for mask in changed(model, before).values())


def test_the_loss_arrives_by_itself():
    model = TinyLM()
    optimizer = BlockLLM(model, 0.5, patience=1, budget=0.3)  # a rate that makes the loss rise
    for x in tokens(8):
        optimizer.zero_grad()
        model(x, x)["loss"].backward()
        optimizer.step()
    assert len(optimizer.history) > 1


def test_schedulers_and_groups_reach_the_update():
    model = net()
    optimizer = BlockLLM(model, 1.0, granularity="tensor", budget=0.3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = copies(model)
    train(model, optimizer, batches(3))
    assert not any(mask.any() for mask in changed(model, before).values())


@pytest.mark.parametrize("option", [{"weight_decay": 0.5}, {"eps": 1.0}, {"betas": (0.0, 0.0)}])
def test_options_of_adamw_matter(option):
    finals = []
    for options in ({}, option):
        model = net()
        train(model, BlockLLM(model, 1e-2, **options), batches(4))
        finals.append(copies(model))
    assert any(not torch.equal(p, q) for p, q in zip(*finals, strict=True))


def test_embeddings_and_heads_train_whatever_they_are_called():
    model = TinyLM(tied=False)
    model.embed_tokens, model.lm_head = model.tokens, model.head
    seen = set()
    optimizer = BlockLLM(model, granularity="tensor", rule="cyclic", budget=0.4, switch_every=1)
    for x in tokens(10):
        optimizer.zero_grad()
        model(x, x)["loss"].backward()
        optimizer.step()
        seen |= set(optimizer.active())
    assert {"tokens.weight", "head.weight"} <= seen


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows", "neurons", "entries"])
def test_a_first_tensor_larger_than_the_budget_is_no_obstacle(granularity):
    model = net()
    next(model.parameters()).register_hook(lambda grad: 1e6 * grad)
    optimizer = BlockLLM(model, granularity=granularity, budget=0.05)
    train(model, optimizer, batches(1))
    assert 0 < sum(optimizer.active().values()) <= optimizer.budget


def test_visits_change_who_is_active():
    """With frozen weights, and so with the same gradients again and again."""
    ever = {}
    for power in (0.0, 1.0):
        model = net()
        optimizer = BlockLLM(
            model, 1e-12, granularity="tensor", budget=0.3, mask=False, visit_power=power, switch_every=1
        )
        seen = set()
        for _ in range(12):
            train(model, optimizer, batches(1))
            seen |= set(optimizer.active())
        ever[power] = len(seen)
    assert ever[1.0] > ever[0.0]


def test_scores_are_of_the_latest_census_only():
    """A tensor whose gradient vanishes after the first choice is released at the next."""
    model, gain = net(), [1e3]
    model[4].weight.register_hook(lambda grad: gain[0] * grad)
    optimizer = BlockLLM(model, granularity="tensor", budget=0.3, switch_every=3, mask=False, visit_power=0.0)
    data = batches(6)
    train(model, optimizer, data[:2])
    assert "4.weight" in optimizer.active()
    gain[0] = 0.0
    train(model, optimizer, data[2:])
    assert "4.weight" not in optimizer.active()


def test_bookkeeping_is_saved():
    model = net()
    optimizer = BlockLLM(model, switch_every=2)
    train(model, optimizer, batches(5))
    other = BlockLLM(again := net(), switch_every=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.steps == 5
    assert other.history == optimizer.history
    assert torch.equal(other.rule_state.visits, optimizer.rule_state.visits)
    del again


def test_importing_configures_nothing():
    code = "import logging, llm; print(len(logging.getLogger().handlers), logging.getLogger().level)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["0", str(logging.WARNING)]


def test_every_documented_argument_exists():
    """And every argument is documented."""
    import inspect
    import re

    documented = BlockLLM.__doc__.split("Parameters\n")[1].split("Raises\n")[0]
    names = {n for line in re.findall(r"^    (\w[\w, ]*)(?: :|$)", documented, re.M) for n in line.split(", ")}
    signature = set(inspect.signature(BlockLLM.__init__).parameters) - {"self"}
    assert names == signature


def test_nothing_is_lost_when_loss_and_gradients_come_from_another_batch_size():
    """Windows of different sizes: accumulation is never counted."""
    model = net()
    optimizer = BlockLLM(model, 1e-2, switch_every=2)
    data = batches(9)
    for count in (1, 3, 2, 1):
        optimizer.zero_grad()
        for batch in data[:count]:
            loss_of(model, batch).backward()
        optimizer.step()
    assert [s["step"] for s in optimizer.history] == [0, 2, 4]
