"""What BlockLLM owes its users, where no other file asks: point by point, each test fails if the defect is there."""

import inspect
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from small_models import TinyLM, batches, changed, copies, loss_of, net, tokens, train  # noqa: E402
from test_llm_compile import Counting  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import llm  # noqa: E402
from llm import BlockLLM  # noqa: E402

EVERY = ["tensor", "layer", "rows", "neurons", "entries"]
ROOT = Path(llm.__file__).parents[1]
ACTIVE = {"tensor": 1, "layer": 1, "rows": 5, "neurons": 5, "entries": 40}  # slices of a tensor


def by_hand(granularity, **options):
    """A model in which parts of two tensors are active from the first window on."""
    model = net()
    optimizer = BlockLLM(model, 1e-2, budget=1.0, granularity=granularity, switch_every=None, **options)
    optimizer.activate({"2.weight": ACTIVE[granularity], "6.bias": 5 if granularity == "entries" else 1})
    return model, optimizer


# -- the census is not felt ------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("together", [1, 2])
def test_a_census_changes_neither_the_update_nor_the_clip_norm(granularity, together):
    """The window in which scores are taken, accumulated or not, ends as if they were not."""
    runs = []
    for every in (4, None):
        model = net()
        optimizer = BlockLLM(
            model, 1e-2, eps=1e-3, budget=0.3, granularity=granularity, switch_every=every, max_grad_norm=0.05
        )
        norms, data = [], batches(4 * together)
        for k in range(4):
            assert optimizer.census_on == (k == 0 or (k == 3 and every == 4))
            optimizer.zero_grad()
            for batch in data[k * together : (k + 1) * together]:
                loss_of(model, batch).backward()
            optimizer.step()
            norms.append(optimizer.grad_norm)
        runs.append((copies(model), norms, len(optimizer.history)))
    assert [run[2] for run in runs] == [2, 1]
    exact = {"atol": 1e-7, "rtol": 1e-5} if granularity == "rows" else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(runs[0][1], runs[1][1], **exact)  # a census computes whole gradients, not rows alone
    assert max(runs[0][1]) > 0.05
    torch.testing.assert_close(runs[0][0], runs[1][0], **exact)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("active", "products"), [(["6"], 1), (["4"], 2), (["2"], 3), (["0"], 3), (["0", "2", "4", "6"], 6)]
)
def test_weight_gradients_of_what_is_inactive_are_never_computed(active, products):
    """Between censuses: one product for each active matrix, and one for each layer above the lowest."""
    model = net()
    optimizer = BlockLLM(model, budget=1.0, granularity="tensor", switch_every=None)
    optimizer.activate(active)
    loss = loss_of(model, batches(1)[0])
    with Products() as counted:
        loss.backward()
    assert counted.count == products


# -- rates, decay, clipping ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup", "polynomial"])
def test_schedulers_of_transformers_drive_blocks_that_become_active_later(schedule):
    transformers = pytest.importorskip("transformers", reason="its schedulers")
    model = net()
    optimizer = BlockLLM(model, 1e-2, rule="cyclic", budget=0.5, granularity="tensor", switch_every=2, ramp=0)
    scheduler = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=30)
    moved = set()
    for k, batch in enumerate(batches(16)):
        before, (rate,) = copies(model), scheduler.get_last_lr()
        assert (rate == 0) == (k == 0)
        train(model, optimizer, [batch])
        scheduler.step()
        steps = {
            n: float((p.detach() - b).abs().max()) for (n, p), b in zip(model.named_parameters(), before, strict=True)
        }
        moved |= {name for name, step in steps.items() if step}
        assert max(steps.values()) <= 1.5 * rate
        assert max(steps.values()) >= 0.5 * rate
    assert moved == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("granularity", EVERY)
def test_edits_of_a_group_reach_blocks_that_become_active_later(granularity):
    """No rate: nothing of that group moves any more. Decay of 1 / lr: what is active begins at zero."""
    options = {"rule": "greedy", "reach": None} if granularity == "entries" else {"rule": "cyclic"}
    model, rate = net(), 1e-2
    pairs = list(model.named_parameters())
    groups = [{"params": [(n, p) for n, p in pairs if (p.ndim > 1) == matrix]} for matrix in (True, False)]
    optimizer = BlockLLM(groups, rate, budget=0.4, granularity=granularity, switch_every=2, ramp=0, **options)
    data = batches(12)
    train(model, optimizer, data[:3])
    optimizer.param_groups[0]["weight_decay"] = 1 / rate
    optimizer.param_groups[1]["lr"] = 0.0
    matrices = set()
    for batch in data[3:]:
        before = copies(model)
        train(model, optimizer, [batch])
        for (name, p), mask in zip(pairs, changed(model, before).values(), strict=True):
            if p.ndim > 1 and mask.any():
                assert p.detach()[mask].abs().max() <= 1.5 * rate
                matrices.add(name)
            else:
                assert not mask.any()
    assert len(matrices) >= 3


@pytest.mark.parametrize("granularity", EVERY)
def test_clipping_inside_and_outside_give_the_same_weights(granularity):
    """Of whole tensors and of compact gradients; and other weights than without."""
    finals = []
    for inside, outside in ((0.02, None), (None, 0.02), (None, None)):
        model, optimizer = by_hand(granularity, eps=1e-2, max_grad_norm=inside)
        for batch in batches(6):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if outside is not None:
                nn.utils.clip_grad_norm_(model.parameters(), outside)
            optimizer.step()
        finals.append(torch.cat([p.flatten() for p in copies(model)]))
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-7)
    assert (finals[0] - finals[2]).abs().max() > 1e-4


@pytest.mark.parametrize("granularity", EVERY)
def test_training_under_autocast_follows_training_without(granularity):
    """Through two switches, with gradients that are rounded to bfloat16 on their way."""
    finals = []
    for autocast in (False, True):
        model = net()
        optimizer = BlockLLM(model, 1e-2, budget=0.4, granularity=granularity, switch_every=10)
        losses = []
        for batch in batches(3, rows=30) * 10:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        finals.append(sum(losses[-3:]) / 3)
    assert finals[0] < 1.45
    assert finals[1] == pytest.approx(finals[0], abs=0.1)


# -- losses and switches ---------------------------------------------------------------------------


def test_a_closure_computes_loss_and_gradients_as_for_any_optimizer():
    """Positional, with gradients enabled, its loss returned and heard by patience."""
    finals = []
    for closed in (False, True):
        model = net()
        optimizer = BlockLLM(model, 1e-2, budget=0.3, patience=2, switch_every=3)
        losses = []
        for batch in batches(8):

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            if closed:
                with torch.no_grad():
                    losses.append(optimizer.step(closure).item())
            else:
                loss = closure()
                assert optimizer.step(loss=loss) is None
                losses.append(loss.item())
            assert optimizer.loss == losses[-1]
        finals.append((copies(model), losses, optimizer.history))
    assert finals[0][1:] == finals[1][1:]
    assert all(torch.equal(p, q) for p, q in zip(finals[0][0], finals[1][0], strict=True))


def test_patience_and_switch_every_together():
    """Whichever comes first, both counted from the last switch."""
    told = [10, 9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4, 3]
    optimizer = BlockLLM(
        model := net(), 1e-9, patience=2, switch_every=5, budget=0.1, rule="cyclic", granularity="tensor"
    )
    for loss in told:
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        optimizer.step(loss=loss)
    found = [(s["step"], s["reason"]) for s in optimizer.history]
    assert found == [(0, "first"), (5, "switch_every"), (8, "patience"), (13, "switch_every")]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_an_active_set_that_comes_back_is_not_compiled_again():
    torch._dynamo.reset()
    model, backend, graphs = TinyLM(layers=2), Counting(), []
    run = torch.compile(model, backend=backend)
    optimizer = BlockLLM(model, 1e-2, budget=0.5, rule="cyclic", granularity="layer", switch_every=1, mask=False)
    sets = []
    for x in tokens(18):
        optimizer.zero_grad()
        sets.append(frozenset(optimizer.active()))
        run(x, x)["loss"].backward()
        optimizer.step()
        graphs.append(backend.graphs)
    again = [k for k in range(1, 18) if sets[k] in sets[:k]]
    assert len(set(sets)) >= 3
    assert len(again) > 6
    assert all(graphs[k] == graphs[k - 1] for k in again)


# -- no name is special ----------------------------------------------------------------------------


class Named(nn.Module):
    """Parameters with the names that are often frozen by a match."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.wpe = nn.Embedding(20, 8), nn.Embedding(4, 8)
        self.embeddings = nn.Linear(8, 8, bias=False)
        self.norm, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.lm_head(self.norm(self.embeddings(self.embed_tokens(x) + self.wpe.weight)).mean(1))


@pytest.mark.parametrize("rule", ["greedy", "cyclic", "random", "half", "importance", "full"])
@pytest.mark.parametrize("granularity", ["tensor", "rows"])
def test_embeddings_and_heads_train_under_every_rule(rule, granularity):
    for target in ("embed_tokens.weight", "lm_head.weight", "wpe.weight", "embeddings.weight", "norm.weight"):
        model = Named()
        model.get_parameter(target).register_hook(lambda grad: 1e4 * grad)
        options = {} if rule == "full" else {"budget": 0.5, "switch_every": 1}
        optimizer = BlockLLM(model, 1e-2, rule=rule, granularity=granularity, **options)
        before = model.get_parameter(target).detach().clone()
        train(model, optimizer, batches(2 if rule == "greedy" else 16))
        assert not torch.equal(before, model.get_parameter(target)), target


# -- what is written is there ----------------------------------------------------------------------


def calls(text):
    """What stands between the parentheses of every call of BlockLLM."""
    for match in re.finditer(r"\bBlockLLM\(", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        inside = text[match.end() : end - 1]
        yield re.sub(r"\([^()]*\)|\"[^\"]*\"", "", inside)


def test_arguments_in_readme_and_documentation_exist():
    """In every example, and in the table of arguments."""
    known = set(inspect.signature(BlockLLM.__init__).parameters) - {"self"}
    texts = {file.name: file.read_text() for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
    found = {
        (name, argument)
        for name, text in texts.items()
        for call in calls(text)
        for argument in re.findall(r"(\w+)=(?!=)", call)
    }
    assert len(found) >= 3
    assert {argument for _, argument in found} <= known
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", texts["llm.md"].split("| argument |")[1], re.M)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 6
    assert named <= known


def test_calls_are_found():
    assert list(calls('x BlockLLM(m, lr=f(1), rule="a=b")')) == ["m, lr=f, rule="]
