"""The `bcd-llm` command: what it prints, writes and returns."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import tiny_lm  # noqa: E402
from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from llm import cli, demo, hf  # noqa: E402
from llm.interrupt import Interrupts  # noqa: E402
from llm.methods import NAMED  # noqa: E402
from llm.plan import Plan  # noqa: E402
from llm.training import Training  # noqa: E402

LINES = ["finetune", "eval", "plan", "delta", "demo"]


def call(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, a file of questions, a table of reviews; paths as text."""
    made = tmp_path_factory.mktemp("tiny")
    return (
        tiny_lm.save(made / "model", chat_template=tiny_lm.CHATML),
        tiny_lm.write(made / "questions.jsonl", tiny_lm.questions()),
        tiny_lm.write(made / "reviews.tsv", tiny_lm.reviews()),
    )


def train(folder, out, *more):
    model, data, _ = folder
    common = ["--steps", 6, "--batch-size", 3, "--lr", 0.01, "--budget", 0.1, "--held-out", 4]
    return call("finetune", "--model", model, "--data", data, "--out", out, *common, *more)


# -- finetune ----------------------------------------------------------------------------------------


def test_finetune_tells_what_came_of_it(folder, tmp_path):
    done = train(folder, tmp_path / "run", "--set", "switch_every=3", "--eval-every", 3)
    assert done.exit_code == 0, done.output
    total = sum(p.numel() for p in tiny_lm.model().parameters())
    assert f"{total:,} parameters, {int(0.1 * total):,} active at most (10.0%); blockllm, lr 0.01" in done.stdout
    assert "36 examples to learn from, 4 to evaluate on; 6 steps of 3" in done.stdout
    assert len(re.findall(r"step [036]: held-out loss \d\.\d{4}, perplexity", done.stdout)) == 3
    assert re.search(r"held-out loss \d\.\d+ before, \d\.\d+ after", done.stdout)
    assert re.search(r"counted: weights 0.1 MB, gradients \S+ MB, optimizer state \S+ MB; peak in use", done.stdout)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert done.stderr == ""  # no progress bar where nobody looks


def test_finetune_as_json_and_every_option(folder, tmp_path):
    words = ["--method", "blockllm", "--set", "granularity=entries", "--set", "always=[]", "--schedule", "linear"]
    words += ["--warmup", 1, "--clip", 0, "--accumulate", 2, "--max-length", 32, "--template", "plain", "--seed", 7]
    words += ["--dtype", "bfloat16", "--device", "cpu", "--weight-decay", 0.1, "--checkpointing", "--json"]
    done = train(folder, tmp_path / "run", *words)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["ended"], summary["steps"]) == ("finished", 6)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["options"] == {"granularity": "entries", "always": []}
    assert (settings["max_length"], settings["clip"], settings["seed"]) == (32, 0.0, 7)
    assert hf.load_model(tmp_path / "run" / "model")[0].dtype == torch.bfloat16


def test_a_time_limit_returns_three_and_resume_ends_the_run(folder, tmp_path):
    done = train(folder, tmp_path / "run", "--time-limit", 0)
    assert done.exit_code == 3
    assert f"Stopped at --time-limit; go on with: bcd-llm finetune --resume {tmp_path / 'run'}" in done.stdout
    done = call("finetune", "--resume", tmp_path / "run", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["steps"] == 6
    again = call("finetune", "--resume", tmp_path / "run", "--json")
    assert (again.exit_code, again.stdout) == (0, done.stdout)


def test_a_run_that_becomes_nan_returns_four(folder, tmp_path, monkeypatch):
    def take_step(made):
        raise FloatingPointError("step 1: the loss is nan. Lower lr")

    monkeypatch.setattr(Training, "take_step", take_step)
    done = train(folder, tmp_path / "run")
    assert done.exit_code == 4
    assert done.stderr == "bcd-llm: step 1: the loss is nan. Lower lr\n"


def test_no_memory_says_what_helps(folder, tmp_path, monkeypatch):
    def take_step(made):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(Training, "take_step", take_step)
    done = train(folder, tmp_path / "run")
    assert done.exit_code == 2
    assert done.stderr.startswith("bcd-llm: memory does not suffice; lower --batch-size")


def test_under_torchrun_finetune_says_that_it_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call("finetune", "--model", "m", "--data", "d", "--out", "o")
    assert done.exit_code == 2
    assert "finetune runs in one process; start it without torchrun" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "--steps", 3], "finetune needs --model, --data and --out; or --resume with the folder of a run"),
        (["finetune", "--resume", "nowhere"], "nowhere: holds no run (it lacks run.json)"),
        (
            ["finetune", "--resume", "nowhere", "--lr", 1, "--set", "seed=1"],
            "--resume goes on with the settings of the run; drop --lr, --set",
        ),
        (["finetune", "-m", "MODEL", "-d", "nowhere.jsonl", "--out", "OUT"], "nowhere.jsonl: no such file"),
        (["finetune", "-m", "no-model", "-d", "nowhere.jsonl", "--out", "OUT"], "nowhere.jsonl: no such file"),
        (["finetune", "-m", "nowhere.gguf", "-d", "DATA", "--out", "OUT"], "nowhere.gguf"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--method", "x"], "method must be one of blockllm"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--set", "rule"], "--set needs NAME=VALUE; found"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--set", "rule=x"], "rule must be one of greedy"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--budget", "5 apples"], "budget must be a share"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--lr", -1], "lr must be positive; found -1.0"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "."], ".: must be a new or empty folder"),
        (["eval", "--model", "MODEL"], "eval needs --model and --data"),
        (["eval", "-m", "MODEL", "-d", "DATA", "--classify"], "questions.jsonl:1: needs a label"),
        (["eval", "-m", "MODEL", "-d", "DATA", "--max-length", 65], "max_length must be at most 64"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "OUT", "--budget", "2.5"], "found 2.5"),
        (["finetune", "-m", "no-model", "-d", "DATA", "--out", "OUT", "--set", "lr=3"], "(finetune: --lr), not one"),
        (["finetune", "-m", "MODEL", "-d", "DATA", "--out", "DATA/run"], "questions.jsonl is a file"),
        (["plan", "MODEL", "--memory", "much"], "--memory must be memory of a device, such as \"24GB\"; found 'much'"),
        (["plan", "MODEL", "--memory", "0"], "--memory must be memory of a device"),
        (["plan", "MODEL", "--max-length", 65], "max_length must be at most 64, which is what the model can read"),
        (["plan", "MODEL", "--set", "foo=1"], "method blockllm has no option 'foo'; it has always, betas"),
        (["plan", "MODEL", "--set", "budget=0.1"], "budget is an argument by itself"),
        (["demo", "--out", "DATA"], "questions.jsonl: must be a folder"),
        (["delta", "info", "nowhere"], "nowhere"),
        (["delta", "apply", "nowhere", "nowhere"], "nowhere"),
        (["delta", "merge", "nowhere", "--out", "OUT", "--conflict", "x"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_two(folder, tmp_path, words, message):
    places = {"MODEL": folder[0], "DATA": folder[1], "DATA/run": folder[1] + "/run", "OUT": tmp_path / "run"}
    done = call(*(places.get(word, word) for word in words))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("bcd-llm: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words",
    [["finetune", "--no-such-option"], ["finetune", "--steps", "many"], ["tune"], ["plan", "MODEL", "--batch-size", 0]],
)
def test_unknown_options_return_two(words):
    assert call(*words).exit_code == 2


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm.hf", None)
    monkeypatch.delattr("llm.hf")
    done = train(folder, tmp_path / "run")
    assert done.exit_code == 2
    assert "needs transformers: in a checkout, pip install '.[hf]'" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ("0.05", 0.05), ("1", 1.0), ("1.0", 1.0), ("70000", 70000), ("1e6", 10**6), ("500MB", "500MB")],
)
def test_budgets(given, expected):
    found = cli._budget(given)
    assert found == expected
    assert type(found) is type(expected)


def test_options_are_json_where_they_can_be():
    given = [
        "switch_every=3",
        "patience=null",
        "mask=false",
        "rule=greedy",
        'always=["model.norm"]',
        "lr=1e-3",
        "x=a=b",
    ]
    assert cli._options(given) == {
        "switch_every": 3, "patience": None, "mask": False, "rule": "greedy", "always": ["model.norm"], "lr": 1e-3,
        "x": "a=b",
    }  # fmt: skip


# -- eval, plan, delta -------------------------------------------------------------------------------


def test_eval_prints_loss_and_perplexity(folder):
    model, data, _ = folder
    done = call("eval", "--model", model, "--data", data, "--json", "--limit", 7)
    answer = json.loads(done.stdout)
    assert answer["examples"] == 7
    assert answer["perplexity"] == pytest.approx(torch.tensor(answer["loss"]).exp().item(), rel=1e-4)
    assert re.match(r"loss \d\.\d{4}, perplexity \d+\.\d{4}, tokens \d+, examples 40", call(
        "eval", "--model", model, "--data", data).stdout)  # fmt: skip
    plain = json.loads(call("eval", "-m", model, "-d", data, "--template", "plain", "--json").stdout)
    assert plain["tokens"] < 40 * answer["tokens"] / 7


def test_eval_classifies(folder, tmp_path):
    model, _, reviews = folder
    words = ["--label", "0=bad", "--label", "1=good", "--classify", "--json"]
    answer = json.loads(call("eval", "--model", model, "--data", reviews, *words).stdout)
    assert (answer["rows"], answer["majority"]) == (24, 0.5)
    head = tiny_lm.save(tmp_path / "head", tiny_lm.classifier())
    done = call("eval", "--model", head, "--data", reviews)
    assert re.match(r"accuracy [01]\.\d+, standard error \d\.\d+, rows 24, majority 0\.5000", done.stdout)


def test_a_folder_without_deltas_says_so(tmp_path):
    done = call("delta", "info", tmp_path)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"bcd-llm: {tmp_path}: holds no delta\n")


@pytest.mark.parametrize("command", ["finetune", "demo"])
def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch, folder, command):
    monkeypatch.setattr("llm.run_folder.os.access", lambda path, mode: False)
    monkeypatch.setattr("llm.hf.load_model", lambda *_, **__: pytest.fail("work began"))
    words = ["--data", folder[1]] if command == "finetune" else []
    done = call(command, "--model", folder[0], "--out", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert f"there is no permission to write into {tmp_path}" in done.stderr


@pytest.fixture
def configured(tmp_path):
    """A folder with nothing but the configuration of a model."""
    tiny_lm.model().config.save_pretrained(tmp_path)
    return tmp_path


def test_plan_loads_no_weights(configured):
    words = ["--memory", "10MB", "--budget", 0.2, "--max-length", 16, "--no-checkpointing"]
    done = call("plan", configured, *words)
    assert done.exit_code == 0, done.output
    assert "20.00%" in done.stdout
    assert "without checkpointing the largest budget that fits is" in done.stdout
    lines = done.stderr.splitlines()
    assert lines[0] == "simulating run 1 of 5 at most: without checkpointing, budget 20.00%"
    assert all(line.startswith("simulating run ") for line in lines)


def test_plan_passes_on_what_is_asked(configured, monkeypatch):
    asked = []

    def plan(config, batch, **options):
        asked.append((config, batch, options))
        return Plan(7, 5, ())

    monkeypatch.setattr("llm.plan.plan", plan)
    words = ["--memory", "7GB", "--batch-size", 3, "--dtype", "bfloat16", "--set", "states=8bit", "--json"]
    done = call("plan", configured, *words)
    assert json.loads(done.stdout) == {"memory": 7, "parameters": 5, "cases": []}
    ((config, batch, options),) = asked
    assert (config.dtype, config.hidden_size, batch) == (torch.bfloat16, 16, (3, 64))  # what the model can read
    assert done.stderr == ""
    assert callable(options.pop("tell"))
    optimizer = NAMED | {"states": "8bit"}  # what finetune would use
    assert options == {"budget": "7GB", "optimizer": optimizer, "checkpointing": None}


def test_a_delta_from_base_to_result_and_back(folder, tmp_path):
    train(folder, tmp_path / "run")
    base, tuned, delta = folder[0], tmp_path / "run" / "model", tmp_path / "a.safetensors"
    done = call("delta", "save", base, tuned, delta)
    assert done.exit_code == 0, done.output
    info = call("delta", "info", delta)
    assert info.stdout.startswith(done.stdout.rstrip("\n") + "\n  ")
    assert json.loads(call("delta", "info", delta, "--json").stdout)
    assert call("delta", "info", tmp_path).stdout == info.stdout
    applied = tmp_path / "applied"
    assert call("delta", "apply", base, delta, "--out", applied).exit_code == 0
    ours, theirs = (hf.load_model(path)[0].state_dict() for path in (applied, tuned))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    scores = [call("eval", "-m", m, "-d", folder[1], *more).stdout for m, more in (
        (base, ["--delta", delta]), (applied, []), (base, []))]  # fmt: skip
    assert scores[0] == scores[1] != scores[2]
    assert call("delta", "remove", applied, delta).exit_code == 0
    ours, theirs = (hf.load_model(path)[0].state_dict() for path in (applied, base))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    merged = call("delta", "merge", delta, delta, "--out", tmp_path / "b.safetensors", "--conflict", "last", "--json")
    assert merged.exit_code == 0, merged.output


# -- the rest ----------------------------------------------------------------------------------------


HELP = """
import sys
from llm import cli
try:
    cli.app(["--help"])
except SystemExit:
    print({"torch", "transformers"} & set(sys.modules))
"""


def test_help_names_every_command_and_needs_no_model():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120, check=True)
    assert all(f" {name} " in done.stdout for name in LINES)
    assert done.stdout.endswith("set()\n")


def test_version():
    assert "bcd-llm (blockdescent)" in call("--version").stdout


def test_demo_shows_losses_memory_and_what_was_active(folder, tmp_path):
    text = io.StringIO()
    with Interrupts() as interrupts:
        code = demo.run_demo(tmp_path / "demo", Console(file=text, width=140), interrupts, 1.0, folder[0])
    assert code == 0, text.getvalue()
    page = (tmp_path / "demo" / "llm.html").read_text(encoding="utf-8")
    for shown in ("Held-out loss", "optimizer state", "AdamW", "one tensor's gradient", "from step"):
        assert shown in text.getvalue()
    assert "Held-out loss" in page
    assert page.count("data:image/png;base64") == 2
    assert "http" not in page
    again = call("demo", "--out", tmp_path / "demo", "--seconds", 1, "--model", folder[0])
    assert again.exit_code == 0, again.output


def test_a_demo_that_is_interrupted_while_it_trains_says_so(folder, tmp_path, monkeypatch):
    real = Training.take_step

    def take_step(made):
        signal.raise_signal(signal.SIGTERM)
        return real(made)

    monkeypatch.setattr(Training, "take_step", take_step)
    done = call("demo", "--out", tmp_path / "demo", "--model", folder[0], "--seconds", 1)
    assert done.exit_code == 143
    assert "Interrupted after step 1 of" in done.stdout
    assert not (tmp_path / "demo" / "llm.html").exists()


def test_a_demo_that_is_interrupted_before_it_trains_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_seconds_of_a_step", lambda *_: signal.raise_signal(signal.SIGINT))
    done = call("demo", "--out", tmp_path / "demo", "--model", folder[0])
    assert done.exit_code == 130
    assert done.stderr == "bcd-llm: interrupted\n"
