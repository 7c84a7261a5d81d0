"""The training loop: its gradient, its limits, and resuming that is the uninterrupted run, bit for bit."""

import math
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tiny_lm  # noqa: E402

from llm import evaluate, finetune, hf, methods, pictures, recipe  # noqa: E402
from llm.data import IGNORED, Batches, Example, collate, load_examples, load_labelled  # noqa: E402
from llm.interrupt import Interrupts  # noqa: E402
from llm.optimizer import BlockLLM  # noqa: E402
from llm.peak import begin_peak, peak_memory  # noqa: E402
from llm.recipe import Recipe  # noqa: E402
from llm.run_folder import RunFolder  # noqa: E402
from llm.training import Training, train  # noqa: E402

# peft asks transformers in a way that is to go
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def needs(method):
    if method == "lora":
        pytest.importorskip("peft", reason="low-rank adapters")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request):
    """Pictures take longer than these runs."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(pictures, "plot_losses", lambda log, path: None)
        monkeypatch.setattr(BlockLLM, "plot", lambda optimizer, path: None)


@pytest.fixture
def drawn():
    """Pictures are drawn."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a file of questions; paths as text."""
    made = tmp_path_factory.mktemp("tiny")
    return tiny_lm.save(made / "model"), tiny_lm.write(made / "questions.jsonl", tiny_lm.questions())


def asked(folder, **options):
    common = {"lr": 1e-2, "steps": 8, "batch_size": 3, "held_out": 4, "eval_every": 3, "save_every": 0}
    model, data = folder
    return Recipe(**{"model": model, "data": data, **common, **options})


def run(recipe, out, stop_at=None, **options):
    """A run, stopped after some step as if by Ctrl-C."""
    with Interrupts() as interrupts:
        if stop_at is not None:
            real = Training.take_step

            def take_step(training):
                line = real(training)
                if training.step == stop_at:
                    signal.raise_signal(signal.SIGINT)
                return line

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Training, "take_step", take_step)
                return finetune.finetune(recipe, out, interrupts=interrupts, **options)
        return finetune.finetune(recipe, out, interrupts=interrupts, **options)


def resumed(out, **options):
    with Interrupts() as interrupts:
        return finetune.resume(out, interrupts=interrupts, **options)


def weights(out):
    return {n: p for n, p in hf.load_model(str(out / "model"))[0].state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def training(recipe, examples=None, held=(), seed=0, dropout=0.0, **options):
    """Without a folder."""
    torch.manual_seed(recipe.seed)
    model = tiny_lm.model(seed, attention_dropout=dropout)
    model, optimizer = methods.make(recipe.method, model, lr=recipe.lr, budget=recipe.budget, **options)
    examples = examples or [Example(list(range(k, k + 5)), [IGNORED, *range(k + 1, k + 5)]) for k in range(20)]
    return Training(model, optimizer, Batches(examples, recipe.batch_size, recipe.seed), held, recipe)


# -- a whole run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_learns(folder, tmp_path, method):
    needs(method)
    settings = {"budget": 0.2} if method in ("blockllm", "misa") else {}
    summary = run(asked(folder, method=method, steps=60, lr=3e-2, eval_every=None, **settings), tmp_path / "run")
    loss = summary["held-out loss"]
    assert loss["after"] < 0.97 * loss["before"]
    model, tokenizer = hf.load_model(summary["model"])
    assert type(model) is transformers.LlamaForCausalLM
    examples = load_examples(folder[1], tokenizer, max_length=64)
    assert evaluate.evaluate(model, examples).loss < loss["before"]


def test_a_run_leaves_a_model_a_log_and_pictures(folder, tmp_path, drawn):
    summary = run(asked(folder, steps=60, eval_every=None), tmp_path / "run")
    loss = summary["held-out loss"]
    assert (summary["ended"], summary["steps"], summary["checkpoint"]) == ("finished", 60, None)
    found = RunFolder(tmp_path / "run")
    assert found.summary() == summary
    assert [line["step"] for line in found.lines("step")] == list(range(1, 61))
    assert [(line["step"], line["loss"]) for line in found.lines("evaluation")] == [
        (0, loss["before"]),
        (60, loss["after"]),
    ]
    for picture in ("loss.png", "active.png"):
        assert (found.path / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(found.path.glob("checkpoint*"))
    assert hf.load_model(str(found.model))[0].config.use_cache


@pytest.mark.parametrize("method", ["blockllm", "badam", "lisa", "hft", "misa"])
def test_what_is_active_is_logged_and_counted(folder, tmp_path, method):
    budget = {"blockllm": 0.1, "misa": 0.1}.get(method)
    summary = run(asked(folder, method=method, budget=budget), tmp_path / "run")
    found = RunFolder(tmp_path / "run")
    total = sum(p.numel() for p in tiny_lm.model().parameters())
    switches = found.lines("switch")
    assert switches[0]["step"] == 0
    for switch in switches:
        assert all(switch["active"].values())
        assert 0 < sum(switch["active"].values()) <= (budget or 1) * total
    counted = summary["counted memory"]
    assert counted["weights"] == 4 * total
    assert counted["optimizer state"] <= (8 + 4) * max(sum(s["active"].values()) for s in switches)
    assert counted["gradients"] <= 4 * total


def test_the_picture_of_many_parameters_is_of_layers(drawn):
    """Their shares are those of all their parameters together."""
    model = tiny_lm.model(num_hidden_layers=12)
    optimizer = methods.make("badam", model, lr=1e-2)[1]
    optimizer.steps = 7
    axes = optimizer.plot().axes[0]
    layers = [f"model.layers.{k}" for k in range(12)]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    shares = dict(zip(names, axes.images[0].get_array()[:, 0], strict=True))
    assert {name: share for name, share in shares.items() if share} == {"model.layers.0": 1}


def test_the_result_holds_what_was_trained_and_nothing_else(folder, tmp_path):
    run(asked(folder, budget=0.05, options={"switch_every": 100}), tmp_path / "run")
    before, after = hf.load_model(folder[0])[0].state_dict(), weights(tmp_path / "run")
    (switch,) = RunFolder(tmp_path / "run").lines("switch")
    changed = {name: int((before[name] != after[name]).sum()) for name in before}
    assert {name for name, count in changed.items() if count} <= set(switch["active"])
    assert all(changed[name] <= count for name, count in switch["active"].items())


def test_adamw_is_counted_whole(folder, tmp_path):
    counted = run(asked(folder, method="adamw"), tmp_path / "run")["counted memory"]
    assert counted["gradients"] == counted["weights"]
    steps = 4 * len(list(tiny_lm.model().parameters()))  # torch keeps the number of steps as a tensor
    assert counted["optimizer state"] == 2 * counted["weights"] + steps


def test_a_classifier_is_trained_on_its_classes(tmp_path):
    model = tiny_lm.save(tmp_path / "model", tiny_lm.classifier())
    data = tiny_lm.write(tmp_path / "reviews.tsv", tiny_lm.reviews(40))
    summary = run(asked((model, data), steps=60, lr=3e-2, eval_every=None), tmp_path / "run")
    assert summary["held-out loss"]["after"] < 0.5 * summary["held-out loss"]["before"]
    trained, tokenizer = hf.load_model(summary["model"])
    assert evaluate.accuracy(trained, tokenizer, data, max_length=64).accuracy > 0.9


def test_a_run_without_held_out_examples(folder, tmp_path):
    summary = run(asked(folder, held_out=0), tmp_path / "run")
    assert summary["held-out loss"] == {"before": None, "after": None}
    summary = run(asked(folder, eval_data=folder[1]), tmp_path / "other")
    assert RunFolder(tmp_path / "other").lines("evaluation")[0]["tokens"] > 80
    assert summary["held-out loss"]["after"] < summary["held-out loss"]["before"]


def test_epochs(folder, tmp_path):
    """40 questions, 4 of them held out, 6 in a step."""
    summary = run(asked(folder, steps=None, epochs=1.5, accumulate=2), tmp_path / "run")
    assert summary["steps"] == 9
    assert RunFolder(tmp_path / "run").recipe().steps == 9


# -- the gradient of a step --------------------------------------------------------------------------


def uneven():
    """Examples with 1, ..., 8 tokens to learn."""
    return [Example(list(range(9)), [IGNORED] * (9 - k) + list(range(9 - k, 9))) for k in range(1, 9)]


@pytest.mark.parametrize("method", ["adamw", "blockllm"])
def test_accumulation_is_a_larger_batch(method):
    finals = []
    for size, accumulate in ((8, 1), (2, 4)):
        settings = Recipe(
            model="", data="", method=method, lr=1e-2, steps=4, batch_size=size, accumulate=accumulate, clip=0.0
        )
        made = training(settings, uneven())
        losses = [made.take_step()["loss"] for _ in range(3)]
        finals.append((losses, [p.detach().clone() for p in made.model.parameters()]))
    (one, p), (other, q) = finals
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    if method == "adamw":
        assert one == pytest.approx(other, rel=1e-4)
        for a, b in zip(p, q, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_loss_is_that_of_transformers():
    made = training(Recipe(model="", data="", method="adamw", lr=1e-2, steps=2, batch_size=8), uneven())
    batch = collate(made.batches[0], 0)
    expected = made.model(**batch).loss.item()
    assert made.take_step()["loss"] == pytest.approx(expected, rel=1e-6)
    assert evaluate.learnt(uneven()) == sum(range(1, 9))


@pytest.mark.parametrize("method", ["adamw", "blockllm"])
def test_clipping(method):
    """A tiny limit makes the first gradient tiny, and Adam divides by it: so compare second moments."""
    seconds = []
    for clip in (0.0, 1e-3):
        options = {"max_grad_norm": clip} if clip and method == "blockllm" else {}
        made = training(Recipe(model="", data="", method=method, lr=1e-2, steps=2, batch_size=4, clip=clip), **options)
        norm = made.take_step()["gradient norm"]
        states = made.optimizer.state.values()
        moments = [t for s in states for c in s.get("cohorts", [s]) for k, t in c.items() if k == "exp_avg_sq"]
        seconds.append(float(sum(m.sum() for m in moments)))
    assert norm > 1e-2  # before clipping
    assert seconds[1] == pytest.approx(1e-6 * (1 - 0.999), rel=1e-2)
    assert seconds[0] > 100 * seconds[1]


def test_the_rate_follows_the_schedule():
    settings = Recipe(model="", data="", method="adamw", lr=1e-2, steps=5, warmup=1, batch_size=2, schedule="linear")
    made = training(settings)
    rates = [made.take_step()["lr"] for _ in range(5)]
    assert rates == pytest.approx([1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert made.optimizer.param_groups[0]["lr"] == rates[-1]


@pytest.mark.parametrize("schedule", recipe.SCHEDULES)
def test_schedules_rise_and_then_never_do(schedule):
    settings = Recipe(model="", data="", steps=200, schedule=schedule)
    rates = [settings.rate(step) for step in range(200)]
    assert rates[:6] == pytest.approx([k / 6 for k in range(1, 7)])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[199] == (1.0 if schedule == "constant" else pytest.approx(0, abs=0.01))


@pytest.mark.parametrize("method", ["adamw", "blockllm"])
def test_weight_decay_is_of_matrices(method):
    made = training(Recipe(model="", data="", method=method, lr=1e-2, steps=2, batch_size=2), weight_decay=0.1)
    groups = {group["weight_decay"]: group["params"] for group in made.optimizer.param_groups}
    assert {p.ndim for p in groups[0.1]} == {2}
    assert {p.ndim for p in groups[0.0]} == {1}


def test_accumulation_with_options_that_use_gradients_at_once_is_refused(folder):
    for options in ({"in_backward": True}, {"inactive": "sign"}):
        with pytest.raises(ValueError, match="accumulate must be 1 with the option in"):
            asked(folder, accumulate=2, options=options).checked()
    assert asked(folder, options={"in_backward": True}).checked().clip == 0
    assert asked(folder).checked().clip == 1


def test_steps_in_the_backward_are_not_clipped_silently(folder, tmp_path):
    assert run(asked(folder, options={"in_backward": True}), tmp_path / "run")["steps"] == 8
    with pytest.raises(ValueError, match="max_grad_norm needs all gradients"):
        run(asked(folder, options={"in_backward": True}, clip=1.0), tmp_path / "other")


# -- stopping and resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("blockllm", {"switch_every": 3}),
        ("blockllm", {"switch_every": 2, "granularity": "entries", "states": "8bit"}),
        ("blockllm", {"patience": 2, "switch_every": None}),
        ("badam", {}),
        ("lisa", {}),
        ("adamw", {}),
        ("lora", {"dropout": 0.3}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, method, options):
    """Weights, losses, choices and memory; stopped before, at and after an evaluation and a switch."""
    needs(method)
    settings = asked(folder, method=method, options=options, steps=5, accumulate=2)
    whole = run(settings, tmp_path / "whole")
    for stop_at in (1, 3):
        out = tmp_path / str(stop_at)
        part = run(settings, out, stop_at)
        assert (part["ended"], part["steps"], part["model"]) == ("interrupted", stop_at, None)
        assert part["checkpoint"] == str(out / f"checkpoint-{stop_at}")
        again = resumed(out)
        for name in ("held-out loss", "tokens", "counted memory"):
            assert again[name] == whole[name]
        assert same(weights(out), weights(tmp_path / "whole"))
        assert timeless(out) == timeless(tmp_path / "whole")


def timeless(out):
    """The log without the time that steps took."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in RunFolder(out).lines()]
    return sorted(lines, key=lambda line: (line["event"], line["step"]))


def test_dropout_goes_on_where_it_stopped(tmp_path):
    """torch's generator is part of a checkpoint."""
    settings = Recipe(model="", data="", lr=1e-2, steps=6, batch_size=2, budget=0.1)
    out = RunFolder(tmp_path)
    made = training(settings, dropout=0.5)
    losses = [made.take_step()["loss"] for _ in range(6)]
    made = training(settings, dropout=0.5)
    first = [made.take_step()["loss"] for _ in range(2)]
    made.save(out)
    torch.manual_seed(99)
    again = training(settings, seed=5, dropout=0.5)
    again.load(out)
    assert first + [again.take_step()["loss"] for _ in range(4)] == losses


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(folder, tmp_path, monkeypatch):
    """Its log is ahead of the checkpoint, and its last line is torn."""
    settings = asked(folder, save_every=2)
    run(settings, tmp_path / "whole")
    real = Training.take_step

    def take_step(made):
        line = real(made)
        if made.step == 6:
            raise RuntimeError("the power is gone")
        return line

    monkeypatch.setattr(Training, "take_step", take_step)
    with pytest.raises(RuntimeError, match="power"):
        run(settings, tmp_path / "part")
    monkeypatch.undo()
    assert [c.name for c in (tmp_path / "part").glob("checkpoint*")] == ["checkpoint-4"]
    with (tmp_path / "part" / "training_log.jsonl").open("a") as log:
        log.write('{"event": "step", "step": 6, "loss": 99.0}\n{"event": "st')
    resumed(tmp_path / "part")
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    steps = RunFolder(tmp_path / "part").lines("step")
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(line["loss"] != 99 for line in steps)


def test_a_half_written_checkpoint_is_passed_over(folder, tmp_path):
    run(asked(folder), tmp_path / "whole")
    run(asked(folder), tmp_path / "part", stop_at=2)
    (tmp_path / "part" / "checkpoint.new").mkdir()
    (tmp_path / "part" / "checkpoint.new" / "optimizer.pt").write_bytes(b"half")
    resumed(tmp_path / "part")
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_run_without_checkpoint_starts_again(folder, tmp_path):
    """Killed before the first one."""
    run(asked(folder), tmp_path / "whole")
    run(asked(folder), tmp_path / "part", stop_at=2)
    RunFolder(tmp_path / "part").remove_checkpoints()
    resumed(tmp_path / "part")
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_time_limit_saves_a_model_and_the_run_can_go_on(folder, tmp_path):
    run(asked(folder), tmp_path / "whole")
    part = run(asked(folder), tmp_path / "part", time_limit=0.0)
    assert (part["ended"], part["steps"]) == ("time limit", 0)
    assert same(weights(tmp_path / "part"), hf.load_model(folder[0])[0].state_dict())
    assert resumed(tmp_path / "part")["ended"] == "finished"
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_finished_run_is_told_again(folder, tmp_path):
    summary = run(asked(folder), tmp_path / "run")
    assert resumed(tmp_path / "run") == summary


def test_a_signal_during_an_evaluation_ends_it_at_once(folder, tmp_path, monkeypatch):
    run(asked(folder), tmp_path / "whole")
    real, calls = Training.evaluate, []

    def evaluating(made):
        calls.append(made.step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return real(made)

    monkeypatch.setattr(Training, "evaluate", evaluating)
    part = run(asked(folder), tmp_path / "part")
    assert (part["ended"], part["steps"], calls) == ("interrupted", 3, [0, 3])
    resumed(tmp_path / "part")
    assert calls == [0, 3, 3, 6, 8]
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_second_signal_in_a_step_saves_nothing(folder, tmp_path, monkeypatch):
    def take_step(made):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the step went on")

    monkeypatch.setattr(Training, "take_step", take_step)
    with pytest.raises(KeyboardInterrupt):
        run(asked(folder), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.number is None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("what", ["data", "weights", "optimizer", "settings", "empty"])
def test_what_cannot_be_resumed_is_named(folder, tmp_path, what):
    data = tiny_lm.write(tmp_path / "data.jsonl", tiny_lm.questions())
    out = tmp_path / "run"
    run(asked((folder[0], data)), out, stop_at=2)
    broken = {"weights": "checkpoint-2/model.safetensors", "optimizer": "checkpoint-2/optimizer.pt"}
    if what == "data":
        tiny_lm.write(tmp_path / "data.jsonl", tiny_lm.questions(41))
    elif what == "settings":
        (out / "run.json").write_text('{"model": 3}')
    elif what != "empty":
        (out / broken[what]).write_bytes(b"broken")
    messages = {
        "data": "the data are not those of the run: .*data.jsonl has changed",
        "settings": r"run.json: must be the settings of a run",
        "empty": "holds no run",
    }
    with pytest.raises(ValueError, match=messages.get(what, "checkpoint-2: cannot be read, or is of another model")):
        resumed(tmp_path if what == "empty" else out)


def test_a_folder_with_something_in_it_is_refused(folder, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        run(asked(folder), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_run_that_cannot_begin_leaves_no_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="method must be one of blockllm"):
        run(asked(folder, method="sgd"), tmp_path / "run")
    with pytest.raises(ValueError, match="budget"):
        run(asked(folder, budget=-1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


COMMAND = [sys.executable, "-m", "llm.cli", "finetune"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_command_writes_a_checkpoint_that_goes_on(folder, tmp_path, number):
    """In a process of its own: killed when some steps are logged, resumed, compared."""
    model, data = folder
    options = ["--model", model, "--data", data, "--steps", "150", "--batch-size", "3", "--lr", "0.01"]
    options += ["--budget", "0.1", "--set", "switch_every=7", "--save-every", "0", "--held-out", "4"]
    log = tmp_path / "part" / "training_log.jsonl"
    process = subprocess.Popen(
        [*COMMAND, *options, "--out", str(tmp_path / "part")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and (not log.exists() or log.stat().st_size < 2000):
        time.sleep(0.01)
    process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said + errors
    assert "Traceback" not in errors
    assert f"Interrupted; go on with: bcd-llm finetune --resume {tmp_path / 'part'}" in said
    stopped = RunFolder(tmp_path / "part").checkpoint()
    assert 0 < int(stopped.name.partition("-")[2]) < 150
    assert not (tmp_path / "part" / "model").exists()
    with Interrupts() as interrupts:
        finetune.resume(tmp_path / "part", interrupts=interrupts)
        given = {"budget": 0.1, "options": {"switch_every": 7}, "eval_every": None, "steps": 150}
        finetune.finetune(asked(folder, **given), tmp_path / "whole", interrupts=interrupts)
    assert same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


# -- what goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adamw", "blockllm"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_does_harm(method, where):
    made = training(Recipe(model="", data="", method=method, lr=1e-2, steps=4, batch_size=2, clip=1.0))
    made.take_step()
    before = [p.detach().clone() for p in made.model.parameters()]
    if where == "loss":
        made.model.lm_head.register_forward_hook(lambda module, args, output: output * math.nan)
    else:  # the derivative of sqrt at 0
        made.model.lm_head.register_forward_hook(lambda module, args, output: output + (output * 0).sqrt())
    with pytest.raises(FloatingPointError, match=r"step 2: .*Lower lr, lengthen warmup"):
        made.take_step()
    assert all(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"max_length": 1}, "max_length must be at least 2; found 1"),
        ({"lr": 0.0}, "lr must be positive; found 0.0"),
        ({"lr": math.nan}, "lr must be positive; found nan"),
        ({"warmup": -1}, "warmup must be at least 0; found -1"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant; found 'step'"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16; found 'int8'"),
        ({"device": "tpu9000"}, r"device must be auto, or one of torch's .* sees cpu and .*; found 'tpu9000'"),
        ({"device": "cuda:77"}, "device must be auto, or one of torch's .*; found 'cuda:77'"),
        ({"device": "meta"}, "device must be auto, or one of torch's .*; found 'meta'"),
        ({"seed": 2**63}, r"seed must be at most 2\^63 - 1; found 9223372036854775808"),
        ({"options": {"lr": 3}}, r"lr is an argument by itself \(finetune: --lr\), not one of the options"),
        ({"options": {"name": "x"}}, r"name is an argument by itself \(finetune: --method\)"),
        ({"method": "lora", "options": {"weight_decay": 1}}, r"weight_decay is an argument by itself \(finetune: --w"),
        ({"method": "adamw", "options": {"model": "x"}}, r"model is an argument by itself \(finetune: --model\)"),
        ({"method": "badam", "options": {"budget": 0.1}}, r"budget is an argument by itself \(finetune: --budget\)"),
        ({"max_length": 65}, "max_length must be at most 64, which is what the model can read; found 65"),
        ({"method": "adamw", "budget": 0.1}, "method adamw trains everything and has no budget; found 0.1"),
        ({"options": {"rank": 4}}, "method blockllm has no option 'rank'; it has always, betas"),
        ({"method": "lora", "budget": 0.1}, "method lora is sized by its option rank"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_wrong_settings_are_named(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(asked(folder, **options), tmp_path / "run")


@pytest.mark.parametrize("limit", [-1, math.nan])
def test_time_limits_that_make_no_sense(folder, tmp_path, limit):
    with pytest.raises(ValueError, match="time_limit must be a number of seconds, at least 0; found"):
        run(asked(folder), tmp_path / "run", time_limit=limit)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adamw", {"betas": [1, 2]}, r"betas must be two numbers, at least 0 and below 1; found \[1, 2\]"),
        ("adamw", {"eps": "x"}, "eps must be a number, at least 0; found 'x'"),
        ("lora", {"betas": 0.9}, "betas must be two numbers, at least 0 and below 1; found 0.9"),
        ("lora", {"rank": "x"}, "rank must be a whole number, at least 1; found 'x'"),
        ("lora", {"rank": 0}, "rank must be a whole number, at least 1; found 0"),
        ("lora", {"alpha": "x"}, "alpha must be a positive number; found 'x'"),
        ("lora", {"dropout": "x"}, "dropout must be a number, at least 0 and below 1; found 'x'"),
        ("lora", {"dropout": 1}, "dropout must be a number, at least 0 and below 1; found 1"),
        ("lora", {"targets": 5}, "targets must be names of linear layers; found 5"),
        ("lora", {"targets": []}, r"targets must be names of linear layers; found \[\]"),
    ],
)
def test_options_of_the_wrong_kind_are_named(method, options, message):
    if method == "lora":
        pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        methods.make(method, tiny_lm.model(), lr=0.1, **options)


def test_methods_by_layer_need_layers():
    with pytest.raises(ValueError, match="lies in a numbered layer"):
        methods.make("badam", torch.nn.Linear(2, 2), lr=0.1)


def test_methods_without_their_package_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="method lora needs the package peft"):
        methods.make("lora", tiny_lm.model(), lr=0.1)


def test_methods_are_what_they_are_named_for():
    names = {name for name, _ in tiny_lm.model().named_parameters()}
    outside = {name for name in names if "layers" not in name}
    made = {m: methods.make(m, tiny_lm.model(), lr=0.1, steps=40)[1] for m in ("badam", "lisa", "hft", "misa")}
    layer = sum(p.numel() for name, p in tiny_lm.model().named_parameters() if "layers.0." in name)
    assert made["badam"].budget == layer
    assert made["badam"].settings.switch_every == 20
    assert set(made["badam"].active()) == {name for name in names if "layers.0." in name}
    assert outside <= set(made["lisa"].active())
    assert made["hft"].budget == made["hft"].blocks.total // 2
    assert made["misa"].settings.rule == "importance"
    assert all(isinstance(optimizer, BlockLLM) for optimizer in made.values())


def test_blockllm_is_the_configuration_that_is_measured_unless_told_otherwise():
    measured = pytest.importorskip("experiments.llm_finetune").METHODS["BlockLLM neurons, frozen table"].options
    settings = methods.make("blockllm", tiny_lm.model(), lr=0.1)[1].settings
    assert {name: getattr(settings, name) for name in measured} == measured
    settings = methods.make("blockllm", tiny_lm.model(), lr=0.1, cautious=False, states="fp32")[1].settings
    assert (settings.cautious, settings.states, settings.score) == (False, "fp32", "l1")


# -- evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_losses_by_hand(batch_size):
    model = tiny_lm.model().train()
    examples = [*uneven(), Example([1, 2], [1, 2])]
    total = 0.0
    with torch.no_grad():
        for example in examples:
            log = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            pairs = enumerate(example.labels[1:])
            total -= sum(float(log[k, label]) for k, label in pairs if label != IGNORED)
    score = evaluate.evaluate(model, examples, batch_size=batch_size)
    assert (score.tokens, score.examples) == (37, 9)
    assert score.loss == pytest.approx(total / 37, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / 37), rel=1e-4)
    assert model.training


def test_accuracy_of_a_language_model_that_knows_the_answer(tmp_path, monkeypatch):
    data = tiny_lm.write(tmp_path / "a.tsv", tiny_lm.reviews(10))
    tokenizer, model = tiny_lm.tokenizer(), tiny_lm.model()
    words = {"0": "bad", "1": "good"}

    def losses(model, batch):
        """Low where the label is the first word."""
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
        return torch.tensor([float(text.split(" ")[0] != text.split("\n")[1]) for text in texts])

    common = {"max_length": 64, "rename": words}
    assert 0 <= evaluate.accuracy(model, tokenizer, data, **common).accuracy <= 1
    monkeypatch.setattr(evaluate, "losses_of", losses)
    found = evaluate.accuracy(model, tokenizer, data, **common)
    assert (found.correct, found.rows, found.majority, found.standard_error) == (10, 10, 5, 0)
    assert evaluate.accuracy(model, tokenizer, data, limit=3, **common).rows == 3


def test_accuracy_of_a_classifier_by_hand(tmp_path):
    data = tiny_lm.write(tmp_path / "a.tsv", tiny_lm.reviews(10))
    tokenizer, model = tiny_lm.tokenizer(), tiny_lm.classifier()
    examples = load_labelled(data, tokenizer, max_length=64, classes={0: "bad", 1: "good"})
    model.eval()
    told = [int(model(torch.tensor([e.ids])).logits.argmax()) for e in examples]
    right = sum(a == e.labels[0] for a, e in zip(told, examples, strict=True))
    found = evaluate.accuracy(model, tokenizer, data, max_length=64)
    assert (found.correct, found.rows) == (right, 10)


def test_train_without_a_command(tmp_path):
    """The loop takes any model, optimizer and batches."""
    settings = Recipe(model="", data="", method="adamw", lr=1e-2, steps=3, batch_size=2, eval_every=1, save_every=2)
    seen = []
    with Interrupts() as interrupts:
        ended = train(training(settings, held=uneven()), RunFolder(tmp_path), interrupts, show=seen.append)
    assert ended == "finished"
    assert [line["step"] for line in seen if line["event"] == "evaluation"] == [0, 1, 2, 3]
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_measured_peak_can_begin_anew():
    large = torch.ones(50_000_000)
    before = peak_memory()
    del large
    begin_peak()
    after = peak_memory()
    if after == before:
        pytest.skip("this system does not let a process forget its peak")
    assert before - after > 100e6
    large = torch.ones(30_000_000)
    assert peak_memory() - after > 100e6
    assert large[0] == 1
