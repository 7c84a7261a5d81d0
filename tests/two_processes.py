"""What each of two processes does in the tests of replicas; run by torch.multiprocessing, over gloo."""

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import batches, loss_of, net

from llm import BlockLLM


def run(check, *args):
    """Call ``check(rank, *args)`` in two processes of one group; an assertion that fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (os.path.join(folder, "store"), check, args), 2)


def _enter(rank, store, check, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check(rank, *args)
    dist.destroy_process_group()


def agree(tensors, what):
    """Whether both processes hold the same, bit for bit."""
    mine = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    other = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(other, mine)
    assert torch.equal(other[0], other[1]), what


def halves(n, rank):
    """Every batch of 12 rows, of which this process sees six."""
    whole = batches(n, rows=12)
    return whole, [(x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]) for x, y in whole]


def make(rank=0, alone=False, **options):
    """A model of other weights in every process, and its optimizer."""
    model = net(0 if alone else rank)
    made = BlockLLM(model, lr=1e-2, switch_every=4, **options, **({} if alone else {"process_group": "world"}))
    return model, made


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
    assert len(optimizer.history) > 5 or options.get("rule") == "full"
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
        options = {} if alone else {"process_group": "world"}
        made.append((model, BlockLLM(model, lr=1e-2, budget=0.7, switch_every=3, rule="cyclic", **options)))
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


def refusals(rank):
    """Each in every process, so that none waits for another."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net())
    for call, words in (
        (lambda: make(rank, in_backward=True), "in_backward=True uses the gradient of a process before"),
        (lambda: make(rank, inactive="sign"), "inactive='sign' uses the gradient"),
        (lambda: make(rank, granularity="entries"), "granularity='entries' uses the gradient"),
        (lambda: BlockLLM(net(), process_group="all"), "must be \"world\", a ProcessGroup or None; found 'all'"),
        (lambda: BlockLLM(net(), seed=rank, process_group="world"), "found other settings in process 1 than in"),
        (lambda: BlockLLM(net() if rank else net()[2:], process_group="world"), "found other parameters in process 1"),
        (lambda: BlockLLM(model), "found DistributedDataParallel, which would hold or send"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    scaler, (model, optimizer) = torch.amp.GradScaler("cpu"), make(rank)
    scaler.scale(loss_of(model, halves(1, rank)[1][0])).backward()
    with pytest.raises(ValueError, match="GradScaler skips a step by the gradients of one process"):
        scaler.step(optimizer)
    full = torch.nn.parallel.DistributedDataParallel(net())
    optimizer = BlockLLM(full, rule="full", lr=1e-2)
    step(full, optimizer, halves(1, rank)[1][0])
    agree(full.parameters(), "full with DistributedDataParallel")


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
        {"granularity": "rows", "budget": 0.2, "patience": 3, "moments": "keep"},
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
    not_finite(rank)
    refusals(rank)
