# SPDX-License-Identifier: BSD-3-Clause
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import odd_units
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from experiments import (  # noqa: E402
    llm_ablation,
    llm_batches,
    llm_classes,
    llm_common,
    llm_files,
    llm_finetune,
    llm_glue,
    llm_gpu,
    llm_memory_named,
    llm_pretrain,
    llm_report,
    llm_small,
    llm_tasks,
    llm_training,
    llm_tuning,
)
from experiments.llm_batches import Batch, Task, learnt_loss  # noqa: E402
from experiments.llm_common import COST, MEMORY, START, TRAIN, Matrix, Runs, Unit, run_missing  # noqa: E402
from experiments.llm_memory import BARS  # noqa: E402
from experiments.llm_methods import BUILDERS, PACKAGES, Method, layers, low_rank_groups  # noqa: E402
from experiments.llm_report import ACCURACY, LOSS, MATTHEWS, Entry, at_cpu, at_one_speed, interval, paired, summary  # noqa: E402
from experiments.llm_training import (  # noqa: E402
    PEER_RATE,
    LiveBytes,
    _seconds,
    adamw_beside,
    carry_out,
    evaluated,
    lowest,
    measure,
    state_bytes,
    train,
)
from experiments.llm_tuning import Sequence, padded  # noqa: E402
from llm import BlockLLM  # noqa: E402
from llm.blocks import embeddings  # noqa: E402
from llm.methods import NAMED  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SUITES = [llm_finetune, llm_glue, llm_pretrain, llm_ablation]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=2, max_position_embeddings=32, hidden_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config)


def toy_task(steps=6, model=llama, rate=lambda step: 1.0):
    """A causal model that sees the same few sequences again and again."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (4, 8), generator=generator)
    batches = [Batch({"input_ids": ids, "labels": ids}, ids.numel()) for _ in range(steps)]
    truth = {"weights": [7] * 4}
    return Task(model(), (), batches, batches[:1], llm_batches.token_losses, truth, rate)


def toy_classes(steps=6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (8, 6), generator=generator)
    labels = ids[:, 0] % 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batches = [Batch(inputs, ids.numel())] * steps
    truth = {"labels": "".join(map(str, labels.tolist()))}
    return Task(bert(), ("classifier",), batches, batches[:1], llm_batches.predictions, truth, lambda step: 1.0)


# -- raw results and units ----------------------------------------------------------------------


def toy_matrix(**changes):
    """Two methods and an extra; the criterion is what the result says."""
    given = {
        "name": "toy",
        "data": ("a", "b"),
        "methods": ("x", "y"),
        "extras": ("z",),
        "grid": lambda data, method: (1.0, 2.0, 4.0),
        "seeds": {"a": (0, 1), "b": (0,)},
        "steps": {"a": 5, "b": 5},
        "settings": lambda unit: {"option": 1},
        "criterion": dict.fromkeys("ab", lambda result: result["loss"]),
        "memory": True,
        "expected": {"a": 10.0, "b": 10.0},
    }
    return Matrix(**(given | changes))


def done(runs, unit, loss, settings=None, seconds=3.0):
    line = {"unit": unit._asdict(), "settings": settings or {"option": 1}, "made": {"seconds": seconds}}
    runs.append(line | {"result": {"loss": loss}})


def test_raw_results_are_read_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    unit = Unit(TRAIN, "a", "x", 1.0, 0, 5)
    runs = Runs(path)
    assert runs.line(unit, {"option": 1}) is None
    done(runs, unit, 3.0)
    assert Runs(path).line(unit, {"option": 1})["result"] == {"loss": 3.0}
    assert Runs(path).line(unit, {"option": 2}) is None
    assert Runs(path).line(unit._replace(seed=1), {"option": 1}) is None
    done(runs, unit, 2.0)
    assert Runs(path).line(unit, {"option": 1})["result"] == {"loss": 2.0}  # the last one counts


def test_a_line_that_was_cut_off_costs_that_line_only(tmp_path):
    path = tmp_path / "runs.jsonl"
    units = [Unit(TRAIN, "a", "x", lr, 0, 5) for lr in (1.0, 2.0)]
    runs = Runs(path)
    done(runs, units[0], 3.0)
    with path.open("ab") as file:
        file.write(b'{"unit": {"kind": "tr')
    again = Runs(path)
    done(again, units[1], 4.0)
    assert [Runs(path).line(unit, {"option": 1})["result"]["loss"] for unit in units] == [3.0, 4.0]


def test_the_order_of_units(tmp_path):
    """Middle rates of all methods first; then the others, memory, seeds; other data sets; extras last."""
    matrix, runs = toy_matrix(), Runs(tmp_path / "runs.jsonl")
    names = [(u.kind, u.data, u.method, u.lr) for u in matrix.missing(runs)]
    assert names[:3] == [(START, "a", "", 0.0), (TRAIN, "a", "x", 2.0), (TRAIN, "a", "y", 2.0)]
    assert names.index((TRAIN, "a", "y", 4.0)) < names.index((COST, "a", "x", 0.0)) < names.index((START, "b", "", 0))
    assert names.index((COST, "a", "y", 0.0)) < names.index((MEMORY, "a", "x", 0.0))
    assert [name[2] for name in names].index("z") > names.index((MEMORY, "b", "y", 0.0))
    assert not any(unit.seed for unit in matrix.missing(runs))  # the best rate is not known


def test_seeds_follow_when_the_best_rate_is_known(tmp_path):
    matrix, runs = toy_matrix(), Runs(tmp_path / "runs.jsonl")
    for lr, loss in ((1.0, 3.0), (2.0, 1.0), (4.0, 2.0)):
        done(runs, matrix.unit(TRAIN, "a", "x", lr), loss)
    assert matrix.tuned(runs, "a", "x") == ({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, [], 2.0, False)
    assert matrix.unit(TRAIN, "a", "x", 2.0, 1) in matrix.missing(runs)


@pytest.mark.parametrize(("losses", "more"), [((1.0, 2.0, 3.0), 0.5), ((3.0, 2.0, 1.0), 8.0)])
def test_a_grid_grows_once_where_its_end_is_best(tmp_path, losses, more):
    matrix, runs = toy_matrix(), Runs(tmp_path / "runs.jsonl")
    for lr, loss in zip((1.0, 2.0, 4.0), losses, strict=True):
        done(runs, matrix.unit(TRAIN, "a", "x", lr), loss)
    assert matrix.tuned(runs, "a", "x").missing == [more]
    assert matrix.tuned(runs, "a", "x").best is None
    done(runs, matrix.unit(TRAIN, "a", "x", more), 0.5)
    assert matrix.tuned(runs, "a", "x")[1:] == ([], more, True)


def instead_of_processes(monkeypatch, result):
    """Units end at once with what ``result`` gives; returns those that ran, and at most how many at a time."""
    ran, most, running = [], [0], []

    class Pool:
        def submit(self, call, name, unit):
            ran.append(unit)
            running.append(unit)
            most[0] = max(most[0], len(running))
            return unit

        def shutdown(self, **options):
            assert not running

    def outcome(unit):
        running.remove(unit)
        return {"made": {"seconds": 7.0}} | result(unit)

    monkeypatch.setattr(llm_common, "processes", lambda workers: Pool())
    monkeypatch.setattr(llm_common, "wait", lambda running, **options: SimpleNamespace(done=list(running)[:1]))
    monkeypatch.setattr(llm_common, "outcome", outcome)
    monkeypatch.setattr(Unit, "exception", lambda unit: None, raising=False)
    return ran, most


def test_everything_runs_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def result(unit):
        if unit.kind == MEMORY and unit.method == "y":
            return {"error": "no memory"}
        return {"result": {"loss": abs(unit.lr - 2) + 0.1}}

    ran, most = instead_of_processes(monkeypatch, result)
    matrix, path = toy_matrix(), tmp_path / "runs.jsonl"
    run_missing(matrix, Runs(path), minutes=None, only=("train a x",))
    assert {unit.method for unit in ran} == {"x"}
    assert len(ran) == 4  # three rates, and a second seed at the best
    run_missing(matrix, Runs(path))
    assert len(ran) == len(set(ran))
    left = matrix.missing(Runs(path))
    assert [(unit.kind, unit.method) for unit in left] == [(MEMORY, "y")] * 2  # failed: not tried again at once
    run_missing(matrix, Runs(path))
    assert len(ran) == len(set(ran)) + 2
    assert most == [1]
    changed = replace(matrix, settings=lambda unit: {"option": 2})
    assert len(changed.missing(Runs(path))) > 15


def test_several_at_a_time_but_alone_on_the_cpu(tmp_path, monkeypatch):
    _ran, most = instead_of_processes(monkeypatch, lambda unit: {"result": {"loss": abs(unit.lr - 2)}})
    matrix = toy_matrix()
    monkeypatch.setenv("LLM_DEVICE", "cuda")
    run_missing(matrix, Runs(tmp_path / "runs.jsonl"), workers=3)
    assert most == [3]
    monkeypatch.delenv("LLM_DEVICE")
    assert not matrix.missing(Runs(tmp_path / "runs.jsonl"))  # where they ran does not matter
    most[0] = 0
    run_missing(matrix, Runs(tmp_path / "others.jsonl"), workers=3)
    assert most == [1]


def test_no_unit_begins_that_would_not_end_in_time(tmp_path, monkeypatch):
    ran, _ = instead_of_processes(monkeypatch, lambda unit: {"result": {"loss": 1.0}})
    runs = Runs(tmp_path / "runs.jsonl")
    run_missing(toy_matrix(), runs, minutes=0)
    assert not ran
    run_missing(toy_matrix(), runs, minutes=0.1)  # 6 seconds: only what is expected to take 5
    assert {unit.kind for unit in ran} == {START, MEMORY, COST}


def test_times_of_runs_come_from_the_same_method_first(tmp_path):
    runs, unit = Runs(tmp_path / "runs.jsonl"), Unit(TRAIN, "a", "x", 1.0, 0, 5)
    assert runs.seconds(unit) is None
    done(runs, unit._replace(method="y"), 1.0, seconds=9.0)
    assert runs.seconds(unit) == 9.0
    done(runs, unit, 1.0, seconds=4.0)
    assert runs.seconds(unit._replace(lr=2.0)) == 4.0
    assert runs.seconds(unit._replace(steps=50)) is None


def test_times_of_another_device_say_nothing(tmp_path, monkeypatch):
    runs, unit = Runs(tmp_path / "runs.jsonl"), Unit(TRAIN, "a", "x", 1.0, 0, 5)
    done(runs, unit, 1.0, seconds=900.0)
    runs.append({"unit": unit._asdict(), "settings": {}, "made": {"seconds": 9.0, "gpu": "a card"}, "result": {}})
    assert runs.seconds(unit) == 900.0
    monkeypatch.setenv("LLM_DEVICE", "cuda")
    assert runs.seconds(unit) == 9.0


def test_a_worker_hands_its_result_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.toy", SimpleNamespace(work=lambda unit: {"seen": unit.name}))
    future = Future()
    future.set_result(llm_common.carry("toy", Unit(TRAIN, "a", "x", 1.0, 0, 5)))
    found = llm_common.outcome(future)
    assert found["result"] == {"seen": "train a x, lr 1, seed 0"}
    assert found["made"]["seconds"] >= 0


def test_a_unit_that_fails_says_why(tmp_path):
    runs = Runs(tmp_path / "runs.jsonl")
    run_missing(toy_matrix(name="no_such_experiment"), runs, only=("start a",))
    assert "no_such_experiment" in runs.lines[0]["error"]
    assert "result" not in runs.lines[0]


def test_a_process_that_dies_costs_its_unit_only(monkeypatch, tmp_path):
    monkeypatch.setattr(llm_common, "carry", odd_units.die_once)
    monkeypatch.setenv("ODD_UNITS", str(tmp_path / "died"))
    runs = Runs(tmp_path / "runs.jsonl")
    run_missing(toy_matrix(), runs, only=("start",))
    assert "terminated abruptly" in runs.lines[0]["error"]
    assert runs.lines[1]["result"] == {"loss": 1.0}


def test_sigterm_ends_the_process_of_a_unit(monkeypatch, tmp_path):
    """Nothing is left running when a benchmark is ended from outside."""
    monkeypatch.setattr(llm_common, "carry", odd_units.sleep)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit), llm_common.sigterm_as_exit():
        run_missing(toy_matrix(), Runs(tmp_path / "runs.jsonl"))
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.01)  # the pool's thread may have reaped a process and not yet said so
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


KILLED_AT_WORK = """
import os, signal, time
from experiments.llm_common import processes
pool = processes(2)
pool.submit(os.getpid).result()
work = pool.submit(time.sleep, 600)
while not work.running():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_a_process_that_is_killed():
    """Its output, which the worker inherits, comes to an end long before the work does."""
    run = subprocess.run([sys.executable, "-c", KILLED_AT_WORK], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_minutes_from_the_environment(monkeypatch):
    monkeypatch.setenv("LLM_MINUTES", "2.5")
    monkeypatch.setenv("LLM_ONLY", "gsm8k;LoRA")
    assert llm_common.from_environment() == (2.5, ("gsm8k", "LoRA"), 1)
    monkeypatch.setenv("LLM_WORKERS", "8")
    assert llm_common.from_environment()[2] == 8
    monkeypatch.setenv("LLM_WORKERS", "many")
    with pytest.raises(ValueError, match=r"LLM_WORKERS.*'many'"):
        llm_common.from_environment()
    monkeypatch.setenv("LLM_MINUTES", "soon")
    with pytest.raises(ValueError, match=r"LLM_MINUTES.*'soon'"):
        llm_common.from_environment()


# -- statistics ---------------------------------------------------------------------------------


def test_intervals_are_those_of_the_t_test():
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 2.0, 17)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert np.allclose(interval(values), ((low + high) / 2, (high - low) / 2))
    a, b = rng.normal(size=(2, 3, 40))
    found = paired(a, b)
    low, high = stats.ttest_rel(a.mean(0), b.mean(0)).confidence_interval(0.95)
    assert (found["mean"], found["examples"]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    low, high = stats.ttest_rel(a.mean(1), b.mean(1)).confidence_interval(0.95)
    assert (found["mean"], found["seeds"]) == pytest.approx(((low + high) / 2, (high - low) / 2))


def test_the_textbook_interval():
    """Student's sleep data: mean 1.58, 95% interval 0.70 to 2.46."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    mean, half = interval(second - first)
    assert (mean, mean - half, mean + half) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4)


def test_nothing_is_clear_from_one_seed_or_inside_an_interval():
    gaps = np.full((1, 30), 0.5) + np.random.default_rng(0).normal(0, 0.01, (1, 30))
    assert not paired(gaps, np.zeros_like(gaps))["clear"]
    assert math.isnan(paired(gaps, np.zeros_like(gaps))["seeds"])
    three = np.concatenate([gaps, gaps + 0.01, gaps - 0.01])
    assert paired(three, np.zeros_like(three))["clear"]
    apart = np.concatenate([gaps, gaps + 3, gaps - 3])
    assert not paired(apart, np.zeros_like(apart))["clear"]
    assert math.isnan(interval([np.inf, 1.0])[1])


def test_losses_are_weighted_by_their_tokens():
    run = {"weights": [1, 3]}
    values = LOSS.values(run, {"losses": [2.0, 3.0]})
    assert values.mean() == pytest.approx(5.0 / 4)


def test_accuracy_and_matthews():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    predicted = np.where(rng.random(60) < 0.8, labels, 1 - labels)
    run, point = ({"labels": "".join(map(str, labels))}, {"predicted": "".join(map(str, predicted))})
    assert ACCURACY.values(run, point).mean() == pytest.approx(100 * (labels == predicted).mean())
    whole = matthews_corrcoef(labels, predicted)
    without = [matthews_corrcoef(np.delete(labels, k), np.delete(predicted, k)) for k in range(60)]
    assert MATTHEWS.values(run, point) == pytest.approx(100 * (60 * whole - 59 * np.array(without)))
    assert MATTHEWS.values(run, {"predicted": "0" * 60}).mean() == pytest.approx(0.0)


def test_values_between_evaluations():
    points = [{"step": 4, "losses": [4.0, 8.0]}, {"step": 8, "losses": [2.0, 4.0]}]
    run = {"weights": [1, 1], "points": points, "selection": {"switches": [1, 6]}}
    entry = Entry(None, {0: run}, None, {"step": 2.0, "switch": 2.0})
    assert [entry.cpu(run, step) for step in (4, 8)] == [10.0, 20.0]
    assert at_cpu(LOSS, entry, run, 15.0) == pytest.approx([3.0, 6.0])
    assert at_cpu(LOSS, entry, run, 20.0) == pytest.approx([2.0, 4.0])
    assert at_cpu(LOSS, entry, run, None) == pytest.approx([2.0, 4.0])
    assert at_cpu(LOSS, entry, run, 5.0) is None
    assert at_cpu(LOSS, entry._replace(cost=None), run, 15.0) is None  # its time is not known


def test_times_of_a_slow_hour_compare():
    """What was timed while AdamW took twice as long counts half; what has no times stays as it is."""
    quiet, busy = {"step": 3.0, "switch": 1.0, "tokens": 9, "adamw": 4.0}, {"step": 6.0, "switch": 2.0, "adamw": 8.0}
    entries = {name: Entry(None, {}, None, cost) for name, cost in {"a": quiet, "b": busy, "c": None}.items()}
    a, b, c = at_one_speed(entries).values()
    assert a.cost == {"step": 4.5, "switch": 1.5, "tokens": 9, "adamw": 6.0}
    assert b.cost == {"step": 4.5, "switch": 1.5, "adamw": 6.0}
    assert c.cost is None


# -- methods ------------------------------------------------------------------------------------

OPTIONS = {
    "lora": {"r": 2, "alpha": 4},
    "badam": {"switch_every": 10},
    "galore": {"rank": 2, "scale": 1.0, "update_proj_gap": 3},
    "apollo": {"rank": 2, "scale": 1.0, "update_proj_gap": 3},
    "blockllm": {"budget": 0.3, "switch_every": 2, "granularity": "rows"},
}


def method_of(kind):
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind], reason=f"the peer {kind} is not installed")
    return Method(kind, (1e-2,), OPTIONS.get(kind, {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_method_trains(kind, capfd):
    """Training lowers the loss, twice the same way; there is state, and it is counted."""
    method = method_of(kind)
    first = train(toy_task(25), method, 1e-2, 3)
    assert first["points"][-1]["value"] < first["points"][0]["value"] < math.log(64) + 0.2
    assert not first["diverged"]
    assert first["seconds"] > 0
    second = train(toy_task(25), method, 1e-2, 3)
    assert second["points"][-1]["losses"] == pytest.approx(first["points"][-1]["losses"], abs=2e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_method_always_trains_the_head(kind, capfd):
    task = toy_classes(3)
    method = method_of(kind)
    before = task.model.classifier.weight.detach().clone()
    model, optimizer = method.build(task.model, 1e-2, 0, task.head)
    for batch in task.batches:
        optimizer.zero_grad()
        model(**batch.inputs).loss.backward()
        optimizer.step()
        heads = [p for name, p in model.named_parameters() if "classifier" in name and name.endswith("weight")]
        assert any((p != before).all(dim=1).any() for p in heads)
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    point = train(toy_classes(8), method, 1e-2, 0)["points"][-1]
    assert len(point["predicted"]) == 8


def test_only_those_that_are_there_take_part(monkeypatch):
    monkeypatch.setitem(PACKAGES, "lora", "no_such_package_at_all")
    assert not Method("lora", ()).installed
    assert "LoRA r8" not in llm_finetune.matrix().methods
    assert "AdamW" in llm_finetune.matrix().methods


def test_a_changed_default_of_the_optimizer_is_another_setting():
    found = Method("blockllm", (), {"budget": 0.1}).settings()
    assert found["budget"] == 0.1
    assert {"rule", "granularity", "ramp", "reach", "score"} <= found.keys()
    assert json.loads(json.dumps(found)) == llm_common.plain(found)


def test_parts_of_models():
    assert layers(llama()) == ["model.layers.0.", "model.layers.1."]
    assert layers(bert()) == ["bert.encoder.layer.0.", "bert.encoder.layer.1."]
    rest, inside = low_rank_groups(llama(), {"rank": 2})
    assert len(inside["params"]) == 14
    assert sum(len(group["params"]) for group in (rest, inside)) == len(list(llama().parameters()))
    with pytest.raises(ValueError, match="layers"):
        layers(torch.nn.Linear(2, 2))


# -- training and memory ------------------------------------------------------------------------


def test_a_run_is_evaluated_at_equal_distances():
    assert evaluated(75) == [15, 30, 45, 60, 75]
    assert evaluated(10) == [10]


def test_a_loss_that_is_not_finite_ends_a_run(capfd):
    task = toy_task(30)
    found = train(task, Method("blockllm", (), {"budget": 0.3}), math.inf, 0)
    assert found["diverged"]
    assert len(found["points"]) < 5
    assert llm_report.final(LOSS, found) == math.inf


def test_rates_follow_their_schedule():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])

    method = SimpleNamespace(build=lambda model, lr, seed, head: (model, Spy(model.parameters(), lr)))
    train(toy_task(8, rate=lambda step: llm_batches.constant(step, 4)), method, 0.5, 0)
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert [round(llm_batches.cosine(k, 100), 2) for k in (1, 5, 100)] == [0.2, 1.0, 0.1]
    assert [round(llm_batches.linear(k, 100), 2) for k in (1, 5, 6, 100)] == [0.2, 1.0, 0.99, 0.01]


def test_live_bytes():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[10:] + 1
        assert live.now == 4000 + 3960
        del b
        assert live.now == 4000
        c = torch.ones(500).view(5, 100)
        del c
    assert live.peak == 4000 + 3960
    live.watch([a, torch.nn.Parameter(a)])
    assert live.now == 4000
    del a
    assert live.now == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BUILDERS)
def test_memory_of_every_method(kind, capfd):
    found = measure(toy_task(), method_of(kind), 1e-3, 0)
    assert found["peak"] >= found["natural"] > found["weights"] > 0
    assert 0 < found["state"] < found["peak"]
    if kind == "adamw":
        entries = sum(p.numel() for p in llama().parameters())
        assert found["weights"] == pytest.approx(4 * entries, abs=200)  # and the buffers of rotary embeddings
        assert found["state"] == pytest.approx(8 * entries, rel=0.01)
        assert found["peak"] > 16 * entries
    if kind == "blockllm":
        assert found["state"] < 8 * found["weights"] / 4


@pytest.mark.parametrize("granularity", ["rows", "tensor", "entries", "layer"])
def test_memory_at_the_worst_place(granularity):
    method = Method("blockllm", (), {"budget": 0.2, "granularity": granularity})
    found = measure(toy_task(), method, 1e-3, 0)
    assert found["peak"] >= found["natural"]


def test_state_inside_other_objects_is_counted():
    model = torch.nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.own = [SimpleNamespace(matrix=torch.zeros(25))]
    model.weight.grad = torch.zeros(10, 10)
    assert state_bytes(optimizer, model) == 100


# -- tasks --------------------------------------------------------------------------------------


def test_sequences_are_padded_and_prompts_ignored():
    rows = [Sequence(np.array([5, 6, 7, 8]), 2), Sequence(np.array([9, 3]), 1)]
    batch = padded(rows)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch.inputs["labels"].tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]
    assert batch.tokens == 6


def test_losses_of_rows_are_those_of_the_model():
    model = llama()
    batch = padded([Sequence(np.array([5, 6, 7, 8]), 2), Sequence(np.array([9, 3, 4]), 1)])
    losses = llm_batches.token_losses(model, batch)["losses"]
    assert sum(losses) / 4 == pytest.approx(float(model(**batch.inputs).loss.detach()), rel=1e-5)


def test_batches_are_those_of_the_seed():
    rows = [Sequence(np.arange(2 + k % 5), 1) for k in range(40)]
    first, same, other = (llm_tuning.in_order(rows, seed, 5) for seed in (0, 0, 1))
    ids = [[b.inputs["input_ids"].shape for b in batches] for batches in (first, same, other)]
    assert ids[0] == ids[1] != ids[2]
    assert sum(b.tokens for b in first) == sum(len(row.ids) for row in rows)  # every row once
    assert len(llm_tuning.in_order(rows, 0, 25)) == 25  # more than one round


def test_what_fits():
    assert llm_tuning.fits(20, 108, cut=False)
    assert not llm_tuning.fits(20, 109, cut=False)
    assert llm_tuning.fits(48, 5000, cut=True)
    assert not llm_tuning.fits(49, 5, cut=True)


def test_levels_of_counts(monkeypatch):
    """The pairs' chances add up to one, and they are those of the formula."""
    monkeypatch.setattr(llm_small, "VOCABULARY", 5)
    rng = np.random.default_rng(0)
    train_tokens = rng.choice(4, 60, p=[0.4, 0.3, 0.2, 0.1])
    every = np.array([(a, b) for a in range(5) for b in range(5)])
    for a in range(5):
        chances = [
            math.exp(-llm_small.count_levels(train_tokens, row[None])["bigram"]) for row in every[every[:, 0] == a]
        ]
        assert sum(chances) == pytest.approx(1.0)
    rows = rng.integers(0, 5, (3, 7))
    unigram = (np.bincount(train_tokens, minlength=5) + 1) / 65
    assert llm_small.count_levels(train_tokens, rows)["unigram"] == pytest.approx(-np.log(unigram[rows[:, 1:]]).mean())


def test_missing_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("BCD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"llm/math/gsm8k_train.jsonl.gz.*BCD_DATA"):
        llm_tasks.check(["gsm8k"])
    monkeypatch.delenv("BCD_DATA")
    with pytest.raises(FileNotFoundError, match="BCD_DATA"):
        llm_tasks.check(["reviews"])


def test_the_cache_computes_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return {"a": np.arange(3)}

    for key in (1, 1, 2):
        assert llm_files.cached_arrays("toy", [key], compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2


# -- reports ------------------------------------------------------------------------------------


def synthetic(which, path, methods, missing=lambda unit: False):
    """Raw results in which every method has a loss of its own and memory."""
    runs, rng = Runs(path), np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (3, 8))
    for _ in range(12):
        for unit in which.missing(runs):
            if missing(unit):
                continue
            rank = list(methods).index(unit.method) if unit.method else 0
            level = 2.0 + 0.1 * rank
            points = [
                {"step": s, "tokens": 100 * s} | outcome(unit.data, level + 1 / s + noise[unit.seed], rank)
                for s in (10, 20, 30)
            ]
            result = {"points": points, "allocated": 10**9, "diverged": unit.method == "GaLore r64" and unit.lr > 5e-4}
            result |= {"weights": [4] * 8, "labels": "01010101", "selection": {"share": 0.04}}
            if unit.kind == MEMORY:
                result = {"peak": 1e9 + 1e7 * rank, "natural": 1e9, "state": 1e6 + rank, "weights": 1}
            if unit.kind == COST:
                result = {"step": 1.0 + rank / 3, "switch": 0.5, "tokens": 100, "adamw": 1.0}
            made = {"seconds": 1.0, "cpu": "c", "threads": "2", "versions": {}, "date": "2026-01-01", "commit": "a"}
            line = {"unit": unit._asdict(), "settings": which.settings(unit), "made": made, "result": result}
            runs.append(line)
    return runs


def outcome(data, losses, rank):
    if data in ("sst2", "cola", "rte"):
        return {"value": 0.5, "predicted": "01010111" if rank % 2 else "01010101"}
    return {"value": float(losses.mean()), "losses": [4 * float(x) for x in losses]}


@pytest.fixture(params=SUITES[:3], ids=lambda suite: suite.__name__.split(".")[1])
def suite(request):
    return request.param


def measures(suite):
    return getattr(suite, "MEASURES", dict.fromkeys(suite.DATA, LOSS))


@pytest.fixture
def everyone(monkeypatch):
    """As if all packages were installed."""
    monkeypatch.setattr(Method, "installed", property(lambda self: True))


def test_reports_of_complete_results(suite, everyone, tmp_path):
    which = suite.matrix()
    runs = synthetic(which, tmp_path / "runs.jsonl", suite.ALL)
    results = summary(which, runs, suite.ALL, measures(suite))
    assert not results["missing"]
    results = json.loads(json.dumps(results | {"bars": suite.bars(results), "levels": dict.fromkeys(LEVELS, 1.0)}))
    found = suite.tables(results)
    for name in suite.DATA:
        assert len(results["data"][name]["methods"]) == len(suite.ALL)
        assert len(found[name].splitlines()) == len(suite.ALL) + 2
        first = results["data"][name]["methods"]["AdamW"]
        assert len(first["ends"]) == 3
        assert first["speed"] == 1.0
        llm_report.draw(results["data"][name], name, {"level": 1.0})
    assert "Nothing is missing" in found["missing"]
    assert found["bars"].count("\n") > 2


LEVELS = ("uniform", "unigram", "bigram")


def test_reports_of_what_is_there(suite, everyone, tmp_path):
    """Half of the units are missing: tables are made all the same and say so."""
    which = suite.matrix()
    runs = synthetic(which, tmp_path / "runs.jsonl", suite.ALL, lambda u: u.kind == MEMORY or u.seed > 0 or u.lr > 1e-3)
    results = summary(which, runs, suite.ALL, measures(suite)) | {"levels": dict.fromkeys(LEVELS, 1.0)}
    found = suite.tables(results | {"bars": suite.bars(results)})
    assert found["missing"].startswith("Missing: ")
    empty = summary(which, Runs(tmp_path / "none.jsonl"), suite.ALL, measures(suite))
    assert suite.tables(empty | {"bars": suite.bars(empty), "levels": dict.fromkeys(LEVELS, 1.0)})


def test_pairs_and_memory_of_the_report(everyone, tmp_path):
    which = llm_finetune.matrix()
    runs = synthetic(which, tmp_path / "runs.jsonl", llm_finetune.ALL)
    data = summary(which, runs, llm_finetune.ALL, measures(llm_finetune))["data"]["gsm8k"]
    ranks = {name: k for k, name in enumerate(llm_finetune.ALL)}
    found = data["pairs"]["BlockLLM rows"]["BAdam"]
    assert found["steps"]["mean"] == pytest.approx(0.1 * (ranks["BlockLLM rows"] - ranks["BAdam"]))
    assert found["steps"]["clear"]
    assert found["cpu"]["mean"] < found["steps"]["mean"]  # ours was the faster one here
    assert data["equal_memory"]["AdamW"] is None  # needs less than all of ours
    assert data["equal_memory"]["BAdam"]["ours"] == "BlockLLM rows"
    assert data["methods"]["GaLore r64"]["lr"] < 5e-4  # the others diverged


# -- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_experiment_needs_one():
    with pytest.raises(FileNotFoundError, match="llm_gpu needs a CUDA device"):
        llm_gpu.run(quick=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["adamw", "badam", "blockllm"])
def test_steps_and_switches_are_timed_apart(kind, monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    make, batch = llm_gpu.large(sizes | {"num_hidden_layers": 2}, "cpu")
    batch = llm_gpu.repeated(batch, llm_gpu.Case("x", "bfloat16", 3))
    found = llm_gpu.timed(make, batch, method_of(kind), "bfloat16")
    assert found["tokens"] == 3 * llm_gpu.LENGTH
    timed = llm_gpu.LAYER * 2 if kind == "badam" else llm_gpu.STEPS  # BAdam: both of its layers
    assert len(found["all"]) == llm_gpu.WARM_UP + timed
    assert min(found["all"]) < found["step"] < max(found["all"])
    assert (found["switch"] != 0) == (kind != "adamw")
    if kind == "badam":  # of its own ten steps in a layer one has a switch
        plain = [found["all"][k] for k in (3, 6)]  # the steps 4 and 7; 5 and 8 switch, 6 and 9 are the first of a layer
        assert found["step"] == pytest.approx(sum(plain) / 2 + found["switch"] / 10)


def test_the_table_of_the_gpu_has_both_times_of_adamw():
    own = {"model": "M", "dtype": "float32", "copies": 1, "switch": 0.0, "first": 3e6, "allocated": 2e6, "all": [1.0]}
    later = {"step": 0.008, "switch": 0.001, "all": [9.0] * llm_gpu.TIMED + [0.020, 0.022]}
    rows = [own | {"method": "AdamW", "step": 0.010}, own | later | {"method": "BlockLLM rows"}]
    rows.append(own | later | {"method": "BAdam"})
    rows.append(own | {"method": "AdamW", "step": 0.014})
    results = {"steps": rows, "device": {"gpu": "a card", "cuda": "1", "torch": "2"}, "threads": "1"}
    found = llm_gpu.tables(results)
    assert "| AdamW | 10.0 and 14.0 | - | - | 1.00 | 3 | 2 |" in found["M_float32_1"]
    assert "| BlockLLM rows | 8.0 | 21.0 | 1.0 | 1.50 | 3 | 2 |" in found["M_float32_1"]
    assert "| BAdam | 8.0 | - | 1.0 | 1.50 | 3 | 2 |" in found["M_float32_1"]
    assert "a card" in found["runs"]


def test_the_named_configuration_is_what_finetune_uses():
    expected = NAMED | {"budget": 0.05}
    for suite in (llm_finetune, llm_glue):
        assert suite.METHODS[llm_finetune.SHOWN[0]].options == expected


def test_the_named_configuration_is_simulated_for_every_bar():
    assert set(llm_memory_named.OURS) == set(BARS)
    moment = {"bytes": 15.9e9, "run": 15.8e9, "first_steps": {"top": 15.9e9}}
    found = llm_memory_named.tables({"ours": {"bf16 states, 5%": moment}})["bars"]
    assert "| bf16 states, 5% | 15.900 | <= 16.0 | 15.800 | 15.900 |" in found


def test_a_step_is_told_its_loss():
    """Also where the model returns none, so that patience has something to go by."""
    task = toy_task(1)
    method = Method("blockllm", (1e-2,), {"budget": 0.3, "switch_every": None, "patience": 2, "granularity": "tensor"})
    model, optimizer = method.build(task.model, 1e-2, 0)
    loss = llm_training.update(model, optimizer, task.batches[0], 1e-2, learnt_loss)
    assert optimizer.loss == pytest.approx(loss)


def test_every_variant_of_the_ablation_is_one():
    """None of them is the centre under another name (a default that changed, say), or another variant."""
    known = [json.dumps(method.settings(), sort_keys=True) for method in llm_ablation.METHODS.values()]
    assert len(set(known)) == len(known)


def test_what_matters_after_a_switch_is_changed_where_there_is_one():
    for change in llm_ablation.CHANGES:
        if change.keys() & {"ramp", "census", "moments", "visit_power"}:
            assert change["switch_every"] < min(llm_ablation.STEPS.values())


def test_the_ablation_compares_with_its_centre(tmp_path):
    which = llm_ablation.matrix()
    runs = synthetic(which, tmp_path / "runs.jsonl", llm_ablation.METHODS)
    rows = llm_ablation.compared(which, runs, "addresses")
    assert len(rows) == len(llm_ablation.METHODS)
    assert rows[0]["difference"] is None
    assert rows[2]["difference"]["mean"] == pytest.approx(0.2)
    results = {"data": {"addresses": rows}, "missing": [], "not_installed": [], "machines": []}
    assert len(llm_ablation.tables(results)["addresses"].splitlines()) == len(rows) + 2
    llm_ablation.draw(rows, "addresses")


@pytest.mark.parametrize("suite_", SUITES, ids=lambda suite: suite.__name__.split(".")[1])
def test_the_options_of_our_methods_are_accepted(suite_):
    """All variants can be built, on a model with names and shapes of their own."""
    for method in getattr(suite_, "ALL", getattr(suite_, "METHODS", {})).values():
        if method.kind == "blockllm":
            always = [name for name in method.options.get("always", ()) if name == "model.norm"]
            room = bool(always) or method.options.get("embeddings") == "always"
            options = method.options | {"always": always} | ({"budget": 0.7} if room else {})
            replace(method, options=options).build(llama(), 1e-3)


def test_a_unit_is_carried_out(monkeypatch, capfd):
    monkeypatch.setitem(llm_tasks.TASKS, "toy", lambda seed, steps: toy_task(steps))
    methods = {"AdamW": Method("adamw", (1e-3,))}
    assert carry_out(Unit(START, "toy"), methods)["points"][0]["step"] == 0
    assert carry_out(Unit(TRAIN, "toy", "AdamW", 1e-3, 0, 4), methods)["points"][0]["step"] == 4
    assert carry_out(Unit(MEMORY, "toy", "AdamW", 0.0, 0, 4), methods)["peak"] > 0


def thread_for_process(*, target, args, daemon):
    """A process would not know what a test has put in place; like one it has its own copy of its end of the pipe."""
    unit, pipe = args
    return threading.Thread(target=target, args=(unit, Connection(os.dup(pipe.fileno()))), daemon=daemon)


def test_steps_are_timed_in_turn_with_adamw_which_ends_with_them(monkeypatch):
    started, stepped = [], []

    def noted(task, model, optimizer, batch, lr):
        stepped.append((threading.current_thread() is started[0], lr))
        return _seconds(task, model, optimizer, batch, lr)

    def process(**arguments):
        started.append(thread_for_process(**arguments))
        return started[0]

    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Pipe=Pipe, Process=process))
    monkeypatch.setattr(llm_training, "_seconds", noted)
    monkeypatch.setitem(llm_tasks.TASKS, "toy", lambda seed, steps: toy_task(steps))
    seconds = carry_out(Unit(COST, "toy", "AdamW", 0.0, 0, 4), {"AdamW": Method("adamw", (1e-3,))})
    assert min(seconds["step"], seconds["adamw"]) > 0
    assert stepped[:4] == [(False, 1e-3), (True, PEER_RATE)] * 2
    assert not started[0].is_alive()


def test_a_process_of_adamw_that_fails_is_told(monkeypatch):
    def failing(seed, steps):
        raise FileNotFoundError("no data here")

    context = SimpleNamespace(Pipe=Pipe, Process=thread_for_process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    monkeypatch.setitem(llm_tasks.TASKS, "toy", failing)
    with pytest.raises(RuntimeError, match="no data here"), adamw_beside(Unit(COST, "toy")) as adamw:
        adamw()


def test_steps_have_all_rows_once_a_round_in_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(3, 60, 4000)
    batches = llm_classes.ordered(lengths, 150, np.random.default_rng(1))
    assert {len(batch) for batch in batches} == {llm_classes.ROWS}
    assert len(batches) == 150
    index = np.concatenate(batches)
    assert (np.bincount(index[: 100 * llm_classes.ROWS], minlength=4000) <= 1).all()  # four whole pools of a round
    assert np.bincount(index, minlength=4000).max() == 2
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 6  # 55 in batches drawn at random
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # not from short to long


def test_the_lowest_place_holds_what_is_always_active_once():
    model = llama()
    norms = [name for name, p in model.named_parameters() if p.dim() < 2]
    optimizer = BlockLLM(model, 1e-3, granularity="rows", budget=0.7, embeddings="always", always=norms)
    place, blocks = lowest(optimizer), optimizer.blocks
    assert {*norms, *embeddings(model)} <= set(place)
    units = dict(zip(blocks.names, blocks.units, strict=True))
    taken = sum(count * units[name] for name, count in place.items())
    assert optimizer.budget - max(blocks.units) < taken <= optimizer.budget


def test_timed_steps():
    """One in each layer of BAdam that its run reaches."""
    badam = Method("badam", (1e-3,), {"switch_every": 5})
    assert [badam.timed_steps(steps, 30) for steps in (7, 120, 1000)] == [2, 24, 30]
    assert Method("adamw", (1e-3,)).timed_steps(120, 30) > 5
