"""What each of two processes does in the tests of replicas; run by torch.multiprocessing, over gloo."""

import copy
import os
import tempfile
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import batches, loss_of, net

from llm import BlockLLM


def run(check, size=2):
    """Call ``check(rank)`` in so many processes of one group; an assertion that fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (os.path.join(folder, "store"), check, size), size)


def _enter(rank, store, check, size):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": size, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", **options)
    check(rank)
    dist.destroy_process_group()


def agree(tensors, what, group=None):
    """Whether both processes hold the same, bit for bit."""
    mine = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    other = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(other, mine, group=group)
    assert torch.equal(other[0], other[1]), what


def halves(n, rank):
    """Every batch of 12 rows, of which this process sees six."""
    whole = batches(n, rows=12)
    return whole, [(x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]) for x, y in whole]


def make(rank=0, alone=False, **options):
    """A model of other weights in every process, and its optimizer."""
    model = net(0 if alone else rank)
    group = "alone" if alone else "world"
    return model, BlockLLM(model, **{"lr": 1e-2, "switch_every": 4, "process_group": group, **options})


def step(model, optimizer, batch, patience=False, parts=1):
    """The batch at once, or in equal parts whose gradients add up."""
    optimizer.zero_grad()
    total = 0.0
    for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
        loss = loss_of(model, (x, y)) / parts
        loss.backward()
        total += loss.item()
    optimizer.step(**({"loss": total} if patience else {}))
    return total


def same_weights(rank, options):
    """Other batches, other first weights, the same choices and weights; and it learns."""
    model, optimizer = make(rank, **options)
    agree(model.parameters(), f"{options} at the start")
    first = [p.clone() for p in model.parameters()]
    told, losses = options.get("patience") is not None, []
    for k, batch in enumerate(halves(4, rank)[1] * 14):
        losses.append(step(model, optimizer, batch, told))
        agree(model.parameters(), f"{options} after step {k}")
        agree([torch.tensor(entry["entries"]) for entry in optimizer.history], f"{options}: choices at step {k}")
        if k == 0 and optimizer._chooser.rule.scored:
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), first, strict=True))
    assert len(optimizer.history) > 5
    if told:
        assert {entry["reason"] for entry in optimizer.history} == {"first", "patience"}
    assert sum(losses[-8:]) < 0.98 * sum(losses[:8]), (options, losses)


def as_one_process(rank, options, parts=1):
    """The steps of one process that sees all rows."""
    whole, mine = halves(13, rank)
    model, optimizer = make(rank, **options)
    alone, reference = make(alone=True, **options)
    for k, (all_rows, some) in enumerate(zip(whole, mine, strict=True)):
        step(model, optimizer, some, parts=parts)
        step(alone, reference, all_rows)
        assert optimizer.active() == reference.active(), (options, k)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6, msg=lambda text, k=k: f"{options}, step {k}: {text}")


def scores_are_means(rank):
    """A census gives the mean over both of the squared norms of rows."""
    model, optimizer = make(rank, granularity="rows", budget=0.2)
    batch = halves(1, rank)[1][0]
    reference = net(0)
    loss_of(reference, batch).backward()
    norms = reference[2].weight.grad.square().sum(1)
    dist.all_reduce(norms)
    loss_of(model, batch).backward()
    optimizer.step()
    position = optimizer.blocks.names.index("2.weight")
    torch.testing.assert_close(optimizer.census.sums[position], norms / 2)


def unused_in_one(rank):
    """A branch that one process does not take has zeros there."""
    made = []
    for alone in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        group = "alone" if alone else "world"
        made.append((model, BlockLLM(model, lr=1e-2, budget=0.7, switch_every=3, rule="cyclic", process_group=group)))
    x = torch.ones(2, 4)
    for _ in range(7):
        for (model, optimizer), alone in zip(made, (False, True), strict=True):
            optimizer.zero_grad()
            both, one = model[0](x).square().sum(), model[1](x).square().sum()
            loss = both + (one / 2 if alone else one if rank == 0 else 0.0)
            loss.backward()
            optimizer.step()
    agree(made[0][0].parameters(), "a branch unused in one")
    for p, q in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def resumes(rank, options):
    """Saved in one process, loaded in both, it goes on bit for bit."""
    data = halves(14, rank)[1]
    model, optimizer = make(rank, **options)
    for batch in data[:6]:
        step(model, optimizer, batch)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    dist.broadcast_object_list(saved, 0)
    again, fresh = make(rank, **options)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for batch in data[6:]:
        assert step(model, optimizer, batch) == step(again, fresh, batch)
    agree(again.parameters(), "resumed")


def thrown_away(rank):
    """A gradient that one process drops in a census leaves no trace in the choice."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    optimizer = BlockLLM(model, lr=1e-2, budget=0.4, switch_every=3, process_group="world")
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(8):
        if rank == 0:
            (100 * model[1](x).square().sum()).backward()
        optimizer.zero_grad()
        model[0](x).square().sum().backward()
        optimizer.step()
        agree(model.parameters(), "after a gradient was thrown away")
    assert all(entry["entries"][2:] == [0, 0] for entry in optimizer.history)


def in_turns(rank):
    """A process without a gradient takes part with zeros, with and without patience; without any, nothing happens."""
    for options in ({}, {"patience": 2, "switch_every": None}):
        model, optimizer = make(rank, budget=0.2, **options)
        for k, batch in enumerate(halves(9, rank)[1]):
            optimizer.zero_grad()
            if k % 2 == rank:
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.observe(loss)
            optimizer.step()
            agree(model.parameters(), f"in turns, step {k}")
            agree([torch.tensor([optimizer.loss])], "the loss")
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.steps == 9


def errors_of_one(rank):
    """What is wrong in one process is an error in both, and changes nothing."""
    for what in ("nan", "missing"):
        model, optimizer = make(rank, budget=0.2, patience=3)
        step(model, optimizer, halves(1, rank)[1][0], patience=True)
        held = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = loss_of(model, halves(1, rank)[1][0])
        loss.backward()
        if rank == 0:
            optimizer.observe(loss)
        elif what == "nan":
            optimizer.observe(loss * float("nan"))
        else:
            optimizer.losses.discard()
        words = "the loss of process 1 is missing or not finite" if rank == 0 else "loss must be finite|needs the loss"
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), held, strict=True))


def other_states(rank):
    """A rate, a choice or a checkpoint of one process alone is found at the next step."""

    def rate(optimizer):
        optimizer.param_groups[0]["lr"] = 3e-3

    def choice(optimizer):
        optimizer.activate(["2"] if optimizer.budget > 600 else ["6"])

    def checkpoint(optimizer):
        optimizer.load_state_dict(copy.deepcopy(make(alone=True, budget=0.6)[1].state_dict()))

    for change in (rate, choice, checkpoint):
        model, optimizer = make(rank, budget=0.6)
        data = halves(3, rank)[1]
        step(model, optimizer, data[0])
        step(model, optimizer, data[1])
        if rank:
            change(optimizer)
        with pytest.raises(RuntimeError, match="process 1 of process_group is in another state than process 0"):
            step(model, optimizer, data[2])


class Own:
    """A rule object without a representation of its own."""

    scored = False

    def init(self, cost, seed):
        return None

    def select(self, scores, cost, budget, state, divisible):
        from bcd.selection import fill_budget

        return fill_budget(torch.ones(len(cost)), cost, budget, divisible), state


def all_start_from_the_first(rank):
    """Parameters that are not optimized and buffers too, of whatever dtype; one rule object, one set of names."""
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].running_mean.normal_()
    model.register_buffer("mask", torch.rand(5) > 0.5)
    model.register_buffer("narrow", torch.randn(3).bfloat16())
    model.register_buffer("turned", torch.randn(2, 3).t())
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("repeated", torch.ones(1).expand(4))
    optimizer = BlockLLM(
        model[2].named_parameters(), model=model, budget=10, rule=Own(), always={"bias"}, process_group="world"
    )
    kept = [t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided]
    agree(kept, "weights and buffers")
    assert optimizer.active() == {"weight": 8, "bias": 2}


def refusals(rank):
    """Each in every process, so that none waits for another."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped, part = DistributedDataParallel(net()), dist.new_group([0])
    for call, words in (
        (lambda: make(rank, in_backward=True), "in_backward=True uses the gradient of a process before"),
        (lambda: make(rank, inactive="sign"), "inactive='sign' uses the gradient"),
        (lambda: make(rank, granularity="entries"), "granularity='entries' uses the gradient"),
        (lambda: BlockLLM(net(), process_group="all"), 'must be "world", "alone", a ProcessGroup .* found \'all\''),
        (lambda: BlockLLM(net(), process_group=0), "this process belongs to, or None; found 0"),
        (lambda: BlockLLM(net(), seed=rank, process_group="world"), "found seed = 1 in process 1, 0 in process 0"),
        (
            lambda: BlockLLM(net(), lr=1e-2 * (1 + rank), process_group="world"),
            r"numbers of group 0 = \[0.02, .* 1, \[0.01",
        ),
        (lambda: BlockLLM(net() if rank else net()[2:], process_group="world"), "found parameters of group 0 = "),
        (lambda: BlockLLM(wrapped), "found DistributedDataParallel, which sends"),
        (lambda: BlockLLM(net()), 'process_group is missing, and 2 processes run: pass "world"'),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    groups = [{"params": [pair]} for pair in net().named_parameters()]
    with pytest.raises(ValueError, match="found numbers of group 3 = None in process 1"):
        BlockLLM(groups[: 3 if rank else 4], budget=200, process_group="world")
    if rank:
        with pytest.raises(ValueError, match="a ProcessGroup that this process belongs to"):
            BlockLLM(net(), process_group=part)
    else:
        assert BlockLLM(net(), process_group=part)._replicas is None
    scaler, (model, optimizer) = torch.amp.GradScaler("cpu"), make(rank)
    scaler.scale(loss_of(model, halves(1, rank)[1][0])).backward()
    with pytest.raises(ValueError, match="GradScaler skips a step by the gradients of one process"):
        scaler.step(optimizer)


def full_in_either_order(rank):
    """With DistributedDataParallel around it before or after."""
    from torch.nn.parallel import DistributedDataParallel

    for before in (True, False):
        model = net(rank)
        optimizer = BlockLLM(model, rule="full", lr=1e-2) if before else None
        wrapped = DistributedDataParallel(model)
        optimizer = optimizer or BlockLLM(wrapped, rule="full", lr=1e-2)
        for batch in halves(3, rank)[1]:
            step(wrapped, optimizer, batch)
        agree(model.parameters(), "full with DistributedDataParallel")


def not_finite(rank):
    """A gradient that is not finite in one process is an error in both, and changes nothing."""
    for before in (0, 1, 3):
        model, optimizer = make(rank, budget=0.2)
        data = halves(before + 1, rank)[1]
        for batch in data[:-1]:
            step(model, optimizer, batch)
        held = [p.clone() for p in model.parameters()]
        loss = loss_of(model, data[-1])
        (loss * (float("nan") if rank else 1.0)).backward()
        with pytest.raises(ValueError, match="gradient must be finite"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), held, strict=True))


def all_of_it(rank):
    """One start of two processes for every check."""
    for options in (
        {"granularity": "rows", "budget": 0.2},
        {"granularity": "neurons", "budget": 0.2, "score": "adam", "max_grad_norm": 0.5, "cautious": True},
        {"granularity": "tensor", "budget": 0.3},
        {"granularity": "layer", "budget": 0.5, "rule": "random"},
        {"granularity": "rows", "budget": 0.2, "patience": 3, "switch_every": None, "moments": "keep"},
        {"granularity": "rows", "budget": 0.2, "census": "probe", "states": "bf16", "reach": 2.0},
        {"granularity": "tensor", "budget": 0.3, "rule": "importance"},
    ):
        same_weights(rank, options)
    as_one_process(rank, {"rule": "full"})
    as_one_process(rank, {"rule": "cyclic", "granularity": "layer", "budget": 0.7})
    as_one_process(rank, {"rule": "random", "granularity": "rows", "budget": 0.2})
    as_one_process(rank, {"rule": "random", "granularity": "neurons", "budget": 0.2}, parts=2)
    scores_are_means(rank)
    unused_in_one(rank)
    resumes(rank, {"granularity": "rows", "budget": 0.2, "states": "8bit"})
    for check in (not_finite, thrown_away, in_turns, errors_of_one, other_states, all_start_from_the_first, refusals):
        check(rank)
    full_in_either_order(rank)


def the_last_two_of_three(rank):
    """A group that does not hold process 0; the first trains by itself."""
    group = dist.new_group([1, 2])
    model, optimizer = make(rank, budget=0.2, process_group=group if rank else "alone")
    if rank:
        agree(model.parameters(), "at the start", group)
    for batch in batches(6, seed=rank):
        step(model, optimizer, batch)
    if rank:
        agree(model.parameters(), "after six steps", group)
