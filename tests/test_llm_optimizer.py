"""BlockLLM in a plain loop: equal to AdamW where it must be, first step, accumulation, clipping, switching, errors."""

import copy
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
from small_models import TinyLM, batches, changed, copies, loss_of, net, tokens, train  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM, CompactGrad  # noqa: E402
from llm.adam import spectral_direction  # noqa: E402

EVERY = ["tensor", "layer", "rows", "neurons", "entries"]


def groups_without_decay(model):
    pairs = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in pairs if p.ndim > 1], "weight_decay": 0.2},
        {"params": [(n, p) for n, p in pairs if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


SCHEDULES = {
    "constant": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "warmup from 0": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / 5)),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 40, cycle_momentum=False),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grouped", [False, True])
def test_full_equals_adamw_step_for_step(schedule, grouped):
    models, pairs = [net(), net()], []
    for model, make in zip(models, (torch.optim.AdamW, BlockLLM), strict=True):
        params = groups_without_decay(model) if grouped else model.named_parameters()
        options = {"rule": "full"} if make is BlockLLM else {}
        optimizer = make(params, lr=1e-2, betas=(0.85, 0.99), eps=1e-7, weight_decay=0.1, **options)
        pairs.append((model, optimizer, SCHEDULES[schedule](optimizer)))
    for batch in batches(25):
        for model, optimizer, scheduler in pairs:
            train(model, optimizer, [batch])
            scheduler.step()
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("granularity", ["rows", "tensor", "entries"])
def test_cautious_entries_move_with_their_gradient_or_wait(granularity, in_backward):
    """Never uphill, where momentum alone goes at times."""
    uphill, share = {}, {}
    for cautious in (False, True):
        model, wrong, moved, active = net(), 0, 0, 0
        optimizer = BlockLLM(
            model, 1e-3, budget=0.5, granularity=granularity, cautious=cautious, in_backward=in_backward
        )
        for batch in batches(8):
            twin = net()
            twin.load_state_dict(model.state_dict())
            loss_of(twin, batch).backward()
            train(model, optimizer, [batch])
            for ours, before in zip(model.parameters(), twin.parameters(), strict=True):
                change = ours.detach() - before.detach()
                wrong += int((change * before.grad > 1e-12).sum())
                moved += int((change != 0).sum())
            active += optimizer.report()["active entries"]
        uphill[cautious], share[cautious] = wrong, moved / active
    assert uphill[True] == 0 < uphill[False]
    assert 0.4 < share[True] < share[False]


@pytest.mark.parametrize("clip", [0.05, 10.0])
def test_full_clips_like_torch(clip):
    a, b = net(), net()
    adamw, ours = (
        torch.optim.AdamW(a.parameters()),
        BlockLLM(b, 1e-3, rule="full", max_grad_norm=clip, weight_decay=0.01),
    )
    for batch in batches(10):
        adamw.zero_grad()
        loss_of(a, batch).backward()
        norm = nn.utils.clip_grad_norm_(a.parameters(), clip)
        adamw.step()
        train(b, ours, [batch])
        assert abs(ours.grad_norm - float(norm)) < 1e-5
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("rule", ["greedy", "cyclic", "random", "importance"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_first_step_updates_what_is_active_and_nothing_else(granularity, rule, in_backward):
    if granularity == "entries" and rule in ("cyclic", "random"):
        pytest.skip("entries need scores")
    model = net()
    before = copies(model)
    optimizer = BlockLLM(model, 1e-2, budget=0.1, rule=rule, granularity=granularity, in_backward=in_backward)
    train(model, optimizer, batches(1))
    moved = {name: int(mask.sum()) for name, mask in changed(model, before).items()}
    active = optimizer.active()
    assert 0 < sum(active.values()) <= optimizer.budget
    assert sum(moved.values()) > 0
    for name, count in moved.items():
        assert count <= active.get(name, 0)


@pytest.mark.parametrize("granularity", EVERY)
def test_the_first_choice_is_the_greedy_one_of_the_true_gradient(granularity):
    """Whatever the first window dropped on its way."""
    model = net()
    loss_of(model, batches(1)[0]).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    optimizer = BlockLLM(model, 1.0, budget=0.1, granularity=granularity, reach=None, visit_power=0.0)
    before = copies(model)
    train(model, optimizer, batches(1))
    moved = changed(model, before)
    active = torch.cat([grad[mask] for grad, mask in zip(grads, moved.values(), strict=True)])
    rest = torch.cat([grad[~mask] for grad, mask in zip(grads, moved.values(), strict=True)])
    if granularity == "entries":
        assert active.abs().min() >= rest.abs().max() * (1 - 1 / 16)
        assert len(active) == optimizer.budget
    else:
        assert active.norm() / len(active) ** 0.5 > rest.norm() / len(rest) ** 0.5


@pytest.mark.parametrize("granularity", EVERY)
def test_one_first_step_is_that_of_adam_on_the_active_entries(granularity):
    model, reference = net(), net()
    optimizer = BlockLLM(model, 1e-2, budget=0.2, granularity=granularity, weight_decay=0.1)
    adamw = torch.optim.AdamW(reference.parameters(), 1e-2, weight_decay=0.1)
    before = copies(model)
    train(model, optimizer, batches(1))
    train(reference, adamw, batches(1))
    moved = changed(model, before)
    for (name, p), q, b in zip(model.named_parameters(), reference.parameters(), before, strict=True):
        torch.testing.assert_close(p, torch.where(moved[name], q, b), rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", EVERY)
def test_accumulated_batches_are_one_large_batch(granularity):
    """Through several switches, the first choice included; the census sees the first batch in both."""
    finals = []
    data = batches(10, rows=4)
    for parts in (1, 2):
        model = net()
        optimizer = BlockLLM(model, 1e-2, budget=0.2, granularity=granularity, switch_every=3, patience=None, ramp=0)
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            for _ in range(parts):
                (loss_of(model, (x, y)) / parts).backward()
                seen.append(len(optimizer.history))
            optimizer.step()
        assert all(a == b for a, b in zip(seen[::parts], seen[parts - 1 :: parts], strict=True))
        finals.append((copies(model), optimizer.history))
    assert finals[0][1] == finals[1][1]
    for p, q in zip(*(f[0] for f in finals), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", EVERY)
def test_clipping_is_over_the_active_entries_inside_and_outside(granularity):
    """max_grad_norm= and clip_grad_norm_ on the model's parameters give the same run."""
    finals = []
    for inside in (True, False):
        model, norms = net(), []
        optimizer = BlockLLM(
            model, 1e-2, budget=0.2, granularity=granularity, switch_every=4, max_grad_norm=0.1 if inside else None
        )
        for batch in batches(9)[1:]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if not inside and optimizer.steps:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            if inside and optimizer.steps > 1:
                norms.append(optimizer.grad_norm)
        finals.append(norms)
    for a, b in zip(finals[0][:2], finals[1][:2], strict=True):
        assert abs(a - b) < 0.05 * a
    held = sum(p.grad.active.numel() if isinstance(p.grad, CompactGrad) else p.grad.numel() for p in with_grad(model))
    assert held <= optimizer.budget


def with_grad(model):
    return [p for p in model.parameters() if p.grad is not None]


def test_inactive_tensors_have_no_gradient_and_no_state():
    model = net()
    optimizer = BlockLLM(model, budget=0.2, granularity="tensor")
    train(model, optimizer, batches(3))
    active = optimizer.active()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in active)
        assert (p.grad is not None) == (name in active)
        assert (p in optimizer.state) == (name in active)


def test_the_backward_stops_below_the_lowest_active_layer():
    model = TinyLM(tied=False)
    optimizer = BlockLLM(model, rule="cyclic", granularity="layer", budget=0.3, always=["head"], switch_every=100)
    optimizer.activate(["layers.2"])
    hidden = []
    model.layers[1].register_forward_hook(lambda module, args, out: hidden.append(out.requires_grad))
    x = tokens(1)[0]
    model(x, x)["loss"].backward()
    assert hidden == [False]


# -- switching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["greedy", "cyclic", "random", "importance"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_switch_every_so_many_steps(rule, every):
    model = net()
    optimizer = BlockLLM(model, rule=rule, budget=0.1, granularity="tensor", switch_every=every)
    train(model, optimizer, batches(11))
    steps = [switch["step"] for switch in optimizer.history]
    expected = [k for k in range(0, 12) if k % every == 0]
    if every == 1 and optimizer._chooser.rule.scored:
        expected.remove(1)  # the first window's census chose at 0
    assert steps == expected


def test_without_patience_and_switch_every_nothing_changes_after_the_first_choice():
    optimizer = BlockLLM(model := net(), budget=0.1, switch_every=None)
    train(model, optimizer, batches(8))
    assert [switch["reason"] for switch in optimizer.history] == ["first"]


@pytest.mark.parametrize("way", ["step", "observe", "hook", "closure"])
def test_patience_switches_when_the_loss_is_no_better_than_the_mean(way):
    model = net()
    optimizer = BlockLLM(model, 1e-9, patience=3, switch_every=None, budget=0.1, rule="cyclic", granularity="tensor")
    told = [5.0, 4.0, 3.0, 3.9, 1.0, 3.0, 0.8, 0.9, 0.1, 0.5]  # 3.9 < 4 goes on, 3 >= 2.63 does not
    expected = []
    window = []
    for loss in told:
        optimizer.zero_grad()
        logits = model(batches(1)[0][0])
        (logits.sum() * 0 + loss).backward()
        give(optimizer, way, loss, model)
        if len(window) >= 3 and loss >= sum(window[-3:]) / 3:
            expected.append(optimizer.steps - 1)
            window = []
        else:
            window.append(loss)
    assert [s["step"] - 1 for s in optimizer.history[1:]] == expected
    assert len(expected) >= 1
    assert {s["reason"] for s in optimizer.history[1:]} == {"patience"}


def give(optimizer, way, loss, model):
    if way == "step":
        optimizer.step(loss=torch.tensor(loss))
    elif way == "observe":
        optimizer.observe(loss)
        optimizer.step()
    elif way == "closure":
        optimizer.step(lambda: loss)
    else:
        model._forward_hooks[next(iter(model._forward_hooks))](model, (), {}, {"loss": torch.tensor(loss)})
        optimizer.step()


def test_the_hook_on_the_model_hears_training_losses_only():
    model = TinyLM()
    optimizer = BlockLLM(model, patience=2, budget=0.2)
    x = tokens(2)
    model.eval()
    model(x[0], x[0])
    model.train()
    with torch.no_grad():
        model(x[0], x[0])
    heard = []
    for one in x:  # two batches accumulate: their mean
        loss = model(one, one)["loss"]
        heard.append(loss.item())
        (loss / 2).backward()
    optimizer.step()
    assert optimizer.loss == pytest.approx(sum(heard) / 2)


def test_blocks_activated_later_do_train_and_schedulers_drive_them():
    """Every tensor moves once it is active, by no more than the rate of that step allows."""
    model = net()
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer = BlockLLM(model, 1e-2, rule="cyclic", budget=0.4, granularity="tensor", switch_every=2, ramp=0)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    moved = set()
    for batch in batches(12):
        before = copies(model)
        rate = optimizer.param_groups[0]["lr"]
        train(model, optimizer, [batch])
        scheduler.step()
        step = {n: (p.detach() - b).abs().max() for (n, p), b in zip(model.named_parameters(), before, strict=True)}
        moved |= {name for name, size in step.items() if size > 0}
        assert max(step.values()) <= 1.5 * rate
    assert moved == {name for name, _ in model.named_parameters()}


def test_edits_of_a_group_apply():
    model = net()
    optimizer = BlockLLM(groups_without_decay(model), 1e-2, rule="full")
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.param_groups[1].update(lr=1.0, weight_decay=0.9)
    before = copies(model)
    train(model, optimizer, batches(1))
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b) == (p.ndim > 1)
        assert p.ndim > 1 or torch.allclose(p, b * 0.1, atol=1.001)


def test_new_slices_start_slowly_after_a_switch_and_at_once_in_the_beginning():
    model = net()
    optimizer = BlockLLM(model, 1e-2, granularity="tensor", budget=0.6, rule="cyclic", switch_every=None, ramp=10)
    sizes = []
    for k, batch in enumerate(batches(8)):
        if k == 3:
            optimizer.activate(["4", "6"])
        before = copies(model)
        train(model, optimizer, [batch])
        sizes.append(max(float((p.detach() - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True)))
    assert sizes[0] == pytest.approx(1e-2, rel=1e-3)
    assert sizes[3] == pytest.approx(1e-3, rel=1e-3)
    assert sizes[4] < sizes[5] < sizes[7] < 1e-2


# -- what stays, what goes -------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("granularity", ["tensor", "rows", "entries"])
@pytest.mark.parametrize("moments", ["reset", "offload", "keep"])
def test_moments_of_what_stays_are_kept_and_of_the_rest_as_asked(states, granularity, moments):
    """After a switch every active slice with moments has those that it had, and steps that went on."""
    model = net()
    optimizer = BlockLLM(
        model, 1e-2, granularity=granularity, budget=0.3, switch_every=4, states=states, moments=moments, reach=2.0
    )
    before, kept = {}, 0
    for batch in batches(13):
        train(model, optimizer, [batch])
        now = dense_moments(optimizer)
        for key in now.keys() & before.keys():
            kept += len(optimizer.history) > 1
            assert now[key][1] == before[key][1] + 1
        before = now
    assert kept > 0
    shelf = optimizer.report()["memory"]["shelf"]
    assert (shelf > 0) == (moments != "reset")
    on_shelf = [r for s in optimizer.state.values() for r in s.get("shelf", [])]
    assert all(r["exp_avg"].device.type == "cpu" for r in on_shelf)


def dense_moments(optimizer):
    """(position, slice) -> (first moment, step) of everything that has moments and is not on the shelf."""
    found = {}
    for position in range(len(optimizer.parts)):
        lo, state = 0, optimizer.state.get(optimizer.param(position), {})
        for cohort in state.get("cohorts", []):
            for k in range(cohort["count"] if "exp_avg" in cohort else 0):
                found[position, int(state["index"][lo + k])] = (cohort["exp_avg"][k].float().clone(), cohort["step"])
            lo += cohort["count"]
    return found


def test_kept_moments_come_back_with_their_steps():
    model = net()
    optimizer = BlockLLM(model, 1e-2, granularity="tensor", moments="keep", budget=0.6, switch_every=None)
    train(model, optimizer, batches(2))
    optimizer.activate(["2"])
    train(model, optimizer, batches(3))
    moments = dense_moments(optimizer)
    optimizer.activate(["4"])
    train(model, optimizer, batches(2))
    optimizer.activate(["2.weight"])
    back = dense_moments(optimizer)
    assert back.keys() == {(1, 0)}
    assert torch.equal(back[1, 0][0], moments[1, 0][0])
    assert back[1, 0][1] == moments[1, 0][1]
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert dense_moments(optimizer)[1, 0][1] == moments[1, 0][1] + 1


def test_update_without_state_reaches_inactive_entries_only():
    for granularity in EVERY:
        model = net()
        optimizer = BlockLLM(
            model, 1e-2, granularity=granularity, budget=0.2, inactive="sign", inactive_scale=0.5, switch_every=None
        )
        train(model, optimizer, batches(1))
        before = copies(model)
        moments = dense_moments(optimizer)
        train(model, optimizer, batches(2)[1:])
        for position, (p, b) in enumerate(zip(model.parameters(), before, strict=True)):
            step = (p.detach() - b).abs().flatten()
            active = torch.zeros_like(step, dtype=torch.bool)
            part = optimizer.parts[position]
            if part is not None:
                active.view(-1, part.unit)[part.index.long()] = True
            idle = step[~active]
            assert ((idle - 5e-3).abs().lt(1e-6) | (idle == 0)).all()
        assert dense_moments(optimizer).keys() == moments.keys()


@pytest.mark.parametrize("granularity", EVERY)
def test_spectral_update_reaches_inactive_entries_only(granularity):
    """Matrices move by the direction of their whole gradient, vectors by signs."""
    model = net()
    options = {"granularity": granularity, "budget": 0.2, "inactive": "spectral", "inactive_scale": 0.5}
    optimizer = BlockLLM(model, 1e-2, switch_every=None, **options)
    train(model, optimizer, batches(1))
    before, moments = copies(model), dense_moments(optimizer)
    params, loss = list(model.parameters()), loss_of(model, batches(2)[1])
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for position, (p, old, grad) in enumerate(zip(params, before, grads, strict=True)):
        expected = old - 5e-3 * (spectral_direction(grad) if grad.dim() > 1 else grad.sign())
        idle = torch.ones(p.numel(), dtype=torch.bool)
        part = optimizer.parts[position]
        if part is not None:
            idle.view(-1, part.unit)[part.index.long()] = False
        torch.testing.assert_close(p.detach().flatten()[idle], expected.flatten()[idle], atol=1e-6, rtol=1e-5)
    assert dense_moments(optimizer).keys() == moments.keys()


@pytest.mark.parametrize("granularity", EVERY)
def test_update_without_state_leaves_active_entries_to_adam(granularity):
    """At the second step weights and gradients are still those of a run that freezes the rest."""
    finals = []
    for inactive in ("freeze", "sign"):
        model = net()
        optimizer = BlockLLM(model, 1e-2, granularity=granularity, budget=0.2, inactive=inactive, switch_every=None)
        train(model, optimizer, batches(2))
        finals.append(active_entries(optimizer))
    torch.testing.assert_close(*finals, atol=1e-6, rtol=1e-5)  # of rows, gradients are computed in another way


def active_entries(optimizer):
    found = []
    for position, part in enumerate(optimizer.parts):
        if part is not None:
            found.append(optimizer.param(position).detach().reshape(-1, part.unit)[part.index.long()].flatten())
    return torch.cat(found)


# -- mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(granularity, unscale):
    """Scaled and plain runs agree; a step with infinities is skipped, at a census as well."""
    finals = []
    for scaled in (False, True):
        model = net()
        optimizer = BlockLLM(model, 1e-2, granularity=granularity, budget=0.2, switch_every=3, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for k, batch in enumerate(batches(9)):
            if scaled and k in (0, 2, 5):  # an overflow, which the scaler answers by skipping the step
                before = copies(model)
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                assert not any(mask.any() for mask in changed(model, before).values())
            model.zero_grad()  # as Trainer does it
            scaler.scale(loss_of(model, batch)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        finals.append((copies(model), optimizer.history))
    assert finals[0][1] == finals[1][1]
    for p, q in zip(*(f[0] for f in finals), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"in_backward": True}, {"inactive": "spectral"}, {"inactive": "sign"}])
def test_grad_scaler_is_refused_where_it_comes_too_late(options):
    optimizer = BlockLLM(model := net(), **options)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    with pytest.raises(
        ValueError, match="uses gradients before GradScaler unscales them; drop it, or train in bfloat16"
    ):
        scaler.step(optimizer)


@pytest.mark.parametrize("precision", ["auto", "stochastic", "fp32-active"])
@pytest.mark.parametrize("granularity", EVERY)
def test_bfloat16_weights_follow_float32_ones(precision, granularity):
    """Updates far below the spacing of bfloat16 add up."""
    drift = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(64, 64, bias=False)
        nn.init.ones_(model.weight)
        model = model.to(dtype)
        optimizer = BlockLLM(model, 1e-4, granularity=granularity, precision=precision, budget=0.5, ramp=0)
        for _ in range(60):
            optimizer.zero_grad()
            model(torch.ones(1, 64, dtype=dtype)).sum().backward()
            optimizer.step()
        active = next(iter(optimizer.active().values()))
        drift[dtype] = float((model.weight.detach().float() - 1).sum()) / active
        assert model.weight.dtype == dtype
    assert drift[torch.float32] == pytest.approx(-60e-4, rel=1e-3)
    tolerance = 4e-3 if precision == "fp32-active" else 1e-3  # nearest: half a spacing; stochastic: averages out
    assert drift[torch.bfloat16] == pytest.approx(-60e-4, abs=tolerance)


def test_float16_weights_keep_float32_copies():
    model = nn.Linear(8, 8).half()
    optimizer = BlockLLM(model, budget=0.5)
    model(torch.ones(2, 8, dtype=torch.float16)).float().sum().backward()
    optimizer.step()
    assert optimizer.report()["memory"]["masters"] == 4 * sum(optimizer.active().values())


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("granularity", EVERY)
def test_low_precision_states_train_about_as_well(states, granularity):
    losses = {}
    for kind in ("fp32", states):
        model = net()
        optimizer = BlockLLM(model, 1e-2, budget=0.5, granularity=granularity, states=kind, switch_every=20)
        data = batches(3, rows=30) * 20
        losses[kind] = sum(train(model, optimizer, data)[-3:]) / 3
    assert losses["fp32"] < 1.3
    assert losses[states] == pytest.approx(losses["fp32"], abs=0.12)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["nonreentrant", "reentrant"])
@pytest.mark.parametrize("granularity", EVERY)
def test_gradient_checkpointing_changes_nothing(checkpointing, granularity):
    finals = []
    for how in (None, checkpointing):
        model = TinyLM(checkpointing=how)
        optimizer = BlockLLM(model, 1e-2, budget=0.2, granularity=granularity, switch_every=2)
        for x in tokens(7):
            optimizer.zero_grad()
            model(x, x)["loss"].backward()
            optimizer.step()
        finals.append((copies(model), optimizer.history))
    assert finals[0][1] == finals[1][1]
    for p, q in zip(*(f[0] for f in finals), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_backward", [False, True])
def test_tied_weights_are_updated_once_with_the_whole_gradient(in_backward):
    model, reference = TinyLM(), TinyLM()
    optimizer = BlockLLM(model, 1e-2, rule="full", in_backward=in_backward)
    adamw = torch.optim.AdamW(reference.parameters(), 1e-2, weight_decay=0.0)
    for x in tokens(5):
        for m, o in ((model, optimizer), (reference, adamw)):
            o.zero_grad()
            m(x, x)["loss"].backward()
            o.step()
    assert model.head.weight is model.tokens.weight
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("policy", ["compete", "always", "never", "auto"])
def test_embeddings_are_treated_as_asked(policy):
    model = TinyLM(tied=False, layers=6)
    optimizer = BlockLLM(model, budget=0.35, embeddings=policy, granularity="tensor", rule="cyclic", switch_every=1)
    seen = []
    for x in tokens(12):
        optimizer.zero_grad()
        model(x, x)["loss"].backward()
        optimizer.step()
        seen.append({"tokens.weight", "head.weight"} & set(optimizer.active()))
    full = {"tokens.weight", "head.weight"}
    assert {"always": all(s == full for s in seen), "never": not any(seen)}.get(policy, set().union(*seen) == full)
    auto = BlockLLM(TinyLM(tied=False), budget=0.05, embeddings="auto", granularity="tensor")
    assert auto._chooser.never


def test_fused_experts_are_blocks_of_their_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts_up = nn.Parameter(torch.randn(4, 3, 5))

        def forward(self, x, expert):
            return x @ self.experts_up[expert]

    model = Experts()
    optimizer = BlockLLM(model, 1e-2, budget=0.25, granularity="tensor")
    before = model.experts_up.detach().clone()
    model(torch.ones(2, 3), 2).sum().backward()
    optimizer.step()
    moved = (model.experts_up.detach() != before).flatten(1).any(1)
    assert moved.tolist() == [False, False, True, False]


def test_odd_parameters_do_no_harm():
    """Layouts that are no vectors, single numbers, nothing at all, whole numbers, sparse gradients."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
            self.scale, self.empty = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0, 3))
            self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
            self.table = nn.Embedding(6, 3, sparse=True)

        def forward(self, x):
            return self.conv(x).square().mean() * self.scale + self.empty.sum() + self.table(torch.arange(3)).sum()

    for granularity in EVERY:
        torch.manual_seed(0)
        model, reference = Odd(), Odd()
        reference.load_state_dict(model.state_dict())
        optimizer = BlockLLM(model, 1e-2, budget=1.0, granularity=granularity, reach=None)
        others = [p for n, p in reference.named_parameters() if n not in ("codes", "table.weight")]
        adamw = torch.optim.AdamW(others, 1e-2, weight_decay=0.0)
        for k in range(3):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(k))
            for m, o in ((model, optimizer), (reference, adamw)):
                o.zero_grad()
                m(x).backward()
                o.step()
        assert not torch.equal(model.table.weight, reference.table.weight)
        for name, p in reference.named_parameters():
            if name != "table.weight":
                torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-6)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "newton"}, "rule must be one of greedy, .*full or an object with select.*'newton'"),
        ({"rule": 3}, r"rule must be a name or an object with scored, init\(\) and select\(\); found 3"),
        ({"states": "4bit"}, "states must be one of fp32, bf16, 8bit; found '4bit'"),
        ({"cautious": "False"}, "cautious must be True or False; found 'False'"),
        ({"patience": 0}, "patience must be a positive number of steps, or None; found 0"),
        ({"switch_every": 1.5}, "switch_every must be a positive number of steps"),
        ({"switch_every": True}, "switch_every must be a positive number of steps"),
        ({"visit_power": -1}, "visit_power must be a number, at least 0; found -1"),
        ({"visit_power": "x"}, "visit_power must be a number, at least 0; found 'x'"),
        ({"inactive_scale": [1]}, r"inactive_scale must be a number, at least 0; found \[1\]"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a positive number, or None"),
        ({"max_grad_norm": "x"}, "max_grad_norm must be a positive number, or None; found 'x'"),
        ({"reach": "x"}, "reach must be a positive number, or None; found 'x'"),
        ({"ramp": "x"}, "ramp must be a number of steps, at least 0; found 'x'"),
        ({"ramp": 1.5}, "ramp must be a number of steps, at least 0; found 1.5"),
        ({"seed": "x"}, r"seed must be a whole number from 0 to 2\^63 - 1; found 'x'"),
        ({"seed": 2**63}, r"seed must be a whole number from 0 to 2\^63 - 1; found 9223372036854775808"),
        ({"always": 5}, "always must be names of parameters or modules; found 5"),
        ({"never": [5]}, r"never must be names of parameters or modules; found \[5\]"),
        ({"max_grad_norm": 1.0, "in_backward": True}, "in_backward=True frees each at once; drop one"),
        ({"rule": "cyclic", "granularity": "entries"}, "needs scores, which rule='cyclic' does not take"),
        ({"census": "probe", "granularity": "entries"}, 'use granularity="rows" or "tensor"'),
        ({"rule": "full", "budget": 0.1}, "trains every parameter at every step; drop budget"),
        (
            {"budget": 10, "mask": False, "granularity": "layer"},
            "the smallest block, 6, has 85; raise budget, or use mask",
        ),
        ({"budget": 10, "always": ["2"]}, "the parameters that are always active have 528; raise budget"),
        ({"always": ["2"], "never": ["2.bias"]}, "always and never both name '2.bias'"),
        ({"always": ["encoder"]}, "always: no parameter or module is called 'encoder'"),
        ({"never": ["0", "2", "4", "6"]}, "no parameter is left to train"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        BlockLLM(net(), **options)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lr": -1}, "lr must be a number, at least 0; found -1"),
        ({"lr": float("nan")}, "lr must be a number, at least 0; found nan"),
        ({"lr": "x"}, "lr must be a number, at least 0; found 'x'"),
        ({"eps": -1}, "eps must be a number, at least 0; found -1"),
        ({"weight_decay": -1}, "weight_decay must be a number, at least 0; found -1"),
        ({"betas": (-1, 0.9)}, r"betas must be two numbers, at least 0 and below 1; found \(-1, 0.9\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1; found \(0.9, 1.0\)"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"betas": "ab"}, "betas must be two numbers"),
        ({"betas": 0.9}, "betas must be two numbers"),
    ],
)
def test_rates_out_of_range_are_refused_as_by_adamw_in_groups_too(rates, message):
    with pytest.raises(ValueError, match=message):
        BlockLLM(net(), **rates)
    with pytest.raises(ValueError, match=message):
        BlockLLM([{"params": net().named_parameters(), **rates}])


def test_rates_may_be_tensors_and_zero():
    rates = {"lr": torch.tensor(0.1), "betas": [torch.tensor(0.5), 0], "eps": 0.0, "weight_decay": torch.tensor(0.0)}
    assert BlockLLM(net(), **rates)._hyper(0)[:4] == pytest.approx((0.1, 0.5, 0.0, 0.0))


def test_embeddings_need_the_model():
    with pytest.raises(ValueError, match=r"embeddings='never' needs the model to find them: pass model="):
        BlockLLM(net().parameters(), embeddings="never")
    model = net()
    BlockLLM(model.parameters(), embeddings="never", model=model)


def test_missing_and_nonfinite_losses():
    optimizer = BlockLLM(model := net(), patience=3)
    before = copies(model)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(
        ValueError, match=r"patience=3 needs the loss of every step: call step\(loss=loss\), or observe"
    ):
        optimizer.step()
    with pytest.raises(ValueError, match=r"loss must be finite; found nan\. Nothing was updated. Lower lr"):
        optimizer.step(loss=torch.tensor(float("nan")))
    assert not any(mask.any() for mask in changed(model, before).values())


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named_before_anything_is_updated(granularity, at, value):
    model = net()
    optimizer = BlockLLM(model, budget=1.0, granularity=granularity)
    data = batches(3)
    train(model, optimizer, data[:at])
    before = copies(model)
    handle = model[4].weight.register_hook(lambda grad: grad * value)
    with pytest.raises(ValueError, match=r"gradient must be finite; that of 4.weight is not"):
        train(model, optimizer, data[at:])
    assert not any(mask.any() for mask in changed(model, before).values())
    handle.remove()
    train(model, optimizer, data)


@pytest.mark.parametrize("options", [{"in_backward": True}, {"inactive": "sign"}])
def test_accumulation_is_refused_where_weights_change_during_the_backward(options):
    optimizer = BlockLLM(model := net(), budget=0.5, **options)
    data = batches(4)
    train(model, optimizer, data[:1])
    optimizer.zero_grad()
    loss_of(model, data[1]).backward()
    with pytest.raises(RuntimeError, match=r"came twice\); drop them to accumulate gradients"):
        loss_of(model, data[2]).backward()
    train(model, optimizer, data[3:])


def test_groups_cannot_be_added_later():
    with pytest.raises(ValueError, match="takes all parameters at construction, frozen ones included"):
        BlockLLM(net()).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_activate_refuses_what_is_unknown_or_too_much():
    optimizer = BlockLLM(net(), budget=0.1, granularity="rows")
    with pytest.raises(ValueError, match="activate: no parameter or module is called '8'"):
        optimizer.activate(["8"])
    with pytest.raises(ValueError, match="activate: budget allows 104 active entries; found 528"):
        optimizer.activate(["2"])
    optimizer.activate({"2.weight": 3})
    assert optimizer.active() == {"2.weight": 96}


# -- steps that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_step_without_gradients_and_the_fake_one_of_checkpoints_do_not_count(steps):
    model = net()
    optimizer = BlockLLM(model, budget=0.2, switch_every=2, granularity="tensor")
    train(model, optimizer, batches(steps))
    before, history, count = copies(model), copy.deepcopy(optimizer.history), optimizer.steps
    optimizer.zero_grad()
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = rate
    assert (optimizer.steps, optimizer.history) == (count, history)
    assert not any(mask.any() for mask in changed(model, before).values())


def test_a_real_step_at_rate_zero_counts():
    model = net()
    optimizer = BlockLLM(model, 0.0, budget=0.2)
    train(model, optimizer, batches(2))
    assert optimizer.steps == 2


def test_gradients_set_by_hand_are_taken():
    model = net()
    optimizer = BlockLLM(model, 1e-2, budget=0.2, granularity="tensor")
    before = copies(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sum(int(mask.sum()) for mask in changed(model, before).values()) == sum(optimizer.active().values())


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("in_backward", [False, True])
def test_every_way_to_zero_gradients_gives_the_same_run(granularity, in_backward):
    """Of the optimizer, of the model, and of the model in place, which keeps what is stored in a compact form."""
    finals = []
    for zero in (
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
    ):
        model = net()
        optimizer = BlockLLM(model, 1e-2, granularity=granularity, budget=0.2, switch_every=3, in_backward=in_backward)
        for batch in batches(8):
            loss_of(model, batch).backward()
            optimizer.step()
            zero(model, optimizer)
        finals.append((copies(model), optimizer.history))
    for other in finals[1:]:
        assert other[1] == finals[0][1]
        assert all(torch.equal(p, q) for p, q in zip(other[0], finals[0][0], strict=True))


# -- manners ---------------------------------------------------------------------------------------


def test_torch_generators_are_left_alone():
    model = net()
    optimizer = BlockLLM(
        model.to(torch.bfloat16), rule="random", granularity="tensor", budget=0.3, switch_every=2, states="8bit"
    )
    data = batches(5)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(model, optimizer, data)
    assert torch.equal(torch.get_rng_state(), state)


def test_roundings_have_a_stream_for_every_step_and_parameter():
    optimizer = BlockLLM(model := net(), seed=1)
    draws = []
    for k in range(3):
        draws += [torch.rand(4, generator=optimizer._generator(position)).tolist() for position in (0, 1)]
        train(model, optimizer, batches(3)[k : k + 1])
    draws.append(torch.rand(4, generator=BlockLLM(net(), seed=2)._generator(0)).tolist())
    assert len({tuple(draw) for draw in draws}) == 7


def test_close_gives_the_model_back():
    model = net()
    model[2].weight.requires_grad_(False)
    optimizer = BlockLLM(model, budget=0.1, patience=2)
    optimizer.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["2.weight"]
    loss_of(model, batches(1)[0]).backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters() if p.requires_grad)
    assert not model._forward_hooks


def test_hooks_do_not_keep_the_optimizer_alive():
    model = net()
    optimizer = BlockLLM(model, patience=2)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    loss_of(model, batches(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_rule_of_ones_own():
    class Last:
        scored = False

        def init(self, cost, seed):
            return {"times": 0}

        def select(self, score, cost, budget, state, divisible=None):
            from bcd.selection import Fill

            last = torch.tensor([len(cost) - 1])
            return Fill(last, cost[last]), {"times": state["times"] + 1}

    optimizer = BlockLLM(model := net(), rule=Last(), granularity="tensor", switch_every=1)
    train(model, optimizer, batches(2))
    assert optimizer.active() == {"6.bias": 5}
    assert optimizer.state_dict()["param_groups"][0]["selection"]["rule"] == {"times": 3}


def test_report_and_picture(tmp_path):
    model = net()
    optimizer = BlockLLM(model, budget=0.2, switch_every=2)
    assert optimizer.report()["active entries"] == 0
    train(model, optimizer, batches(5), tell=True)
    report = optimizer.report()
    assert report["active entries"] == sum(report["active"].values()) <= report["budget"]
    assert report["memory"]["weights"] == 4 * 1045
    assert report["memory"]["moments"] == 8 * report["active entries"]
    assert report["loss"] > 0 < report["grad norm"]
    assert [h["step"] for h in report["history"]] == [0, 2, 4]
    assert report["history"][-1]["entries"] == {
        name: report["active"].get(name, 0) for name, _ in model.named_parameters()
    }
    optimizer.plot(tmp_path / "active.png")
    assert (tmp_path / "active.png").stat().st_size > 1000
