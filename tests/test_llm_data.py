"""Files to examples: what is learnt of them, what is wrong with them, and the order in which they come."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="a tokenizer")
import tiny_lm  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llm import data, rows  # noqa: E402
from llm.data import IGNORED, Batches, Example, collate, load_choices, load_examples, load_labelled, split  # noqa: E402

PLAIN, CHAT = tiny_lm.tokenizer(), tiny_lm.tokenizer(tiny_lm.CHATML)
SUFFIXES = [".txt", ".jsonl", ".json", ".tsv"]


def load(path, tokenizer=PLAIN, max_length=1000, **options):
    return load_examples(path, tokenizer, max_length=max_length, **options)


def written(tmp_path, *rows, name="a.jsonl"):
    return tiny_lm.write(tmp_path / name, rows)


def texts(example, tokenizer=PLAIN):
    """All of it, and what is learnt."""
    learnt = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    assert all(label in (token, IGNORED) for token, label in zip(example.ids, example.labels, strict=True))
    return tokenizer.decode(example.ids), tokenizer.decode(learnt)


# -- what is learnt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "asked", "answered"),
    [
        ({"prompt": "Hi", "response": "Ho"}, "Hi", "Ho"),
        ({"prompt": "Hi", "completion": "Ho"}, "Hi", "Ho"),
        ({"question": "Hi", "answer": 7}, "Hi", "7"),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "Add\n1, 2", "3"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add", "3"),
        ({"instruction": "Add", "output": "3", "history": []}, "Add", "3"),
        ({"sentence": "Nice .", "label": 1, "index": 5}, "Nice .", "1"),
        ({"sentence1": "A", "sentence2": "B", "label": "entailment"}, "A\nB", "entailment"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "Hi", "Ho"),
    ],
)
def test_prompts_are_masked(tmp_path, row, asked, answered):
    path = written(tmp_path, row)
    (plain,) = load(path)
    assert texts(plain) == (f"{asked}\n{answered}<|end|>", f"{answered}<|end|>")
    (chat,) = load(path, CHAT)
    whole = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
    assert texts(chat, CHAT) == (whole, f"{answered}<|im_end|>\n")
    assert load(path, CHAT, template="plain") == [plain]


def test_a_chat_prompt_is_the_one_that_generation_uses(tmp_path):
    row = {"prompt": "What is\nthis?", "response": "That"}
    (example,) = load(written(tmp_path, row), CHAT)
    asked = CHAT.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
    )
    assert example.ids[: len(asked)] == asked
    assert example.labels[: len(asked)] == [IGNORED] * len(asked)
    assert IGNORED not in example.labels[len(asked) :]


def test_every_answer_of_a_conversation_is_learnt(tmp_path):
    history = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    roles = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = {"messages": [{"role": role, "content": text} for role, text in roles]}
    first, second = load(written(tmp_path, history, messages), CHAT)
    assert texts(first, CHAT)[1] == texts(second, CHAT)[1] == "b<|im_end|>\nd<|im_end|>\n"
    first, second = load(written(tmp_path, history, messages))
    assert texts(first) == ("a\nb<|end|>c\nd<|end|>", "b<|end|>d<|end|>")
    assert texts(second)[0] == "s\na\nb<|end|>c\nd<|end|>e\n"


def test_a_chat_template_that_rewrites_earlier_answers_teaches_the_last(tmp_path):
    """As those do that leave out the thoughts of earlier turns."""
    forgetful = tiny_lm.tokenizer(
        "{% for m in messages %}[{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}]{% endfor %}"
    )
    (example,) = load(written(tmp_path, {"instruction": "c", "output": "d", "history": [["a", "b"]]}), forgetful)
    assert texts(example, forgetful) == ("[a][-][c][d]", "[d]")


def test_chat_templates_that_cannot_serve_are_named(tmp_path):
    path = written(tmp_path, {"prompt": "a", "response": "b"})
    refusing = tiny_lm.tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"a.jsonl:1: .*refuses this conversation .*roles must alternate.*plain"):
        load(path, refusing)
    with pytest.raises(ValueError, match=r"a.jsonl:1: .*cannot be told apart; use template='plain'"):
        load(path, tiny_lm.tokenizer("{{ messages | length }}"))


def test_templates_with_fields(tmp_path):
    path = written(tmp_path, {"question": "1+1", "answer": "2", "level": 3})
    asked = "Q{level}: {question} {x y}\nA:|||{answer}"
    (example,) = load(path, CHAT, template=asked)
    assert texts(example) == ("Q3: 1+1 {x y}\nA:2<|end|>", "2<|end|>")
    (example,) = load(path, template="{question}={answer}")
    assert texts(example) == ("1+1=2<|end|>", "1+1=2<|end|>")
    with pytest.raises(ValueError, match=r"a.jsonl:1: the template names the field 'reply'; found answer, level, ques"):
        load(path, template="{reply}")
    with pytest.raises(ValueError, match="template must be 'plain' or name fields in braces"):
        load(path, template="question")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_is_cut_into_pieces_and_all_of_it_is_learnt(tmp_path, name):
    text = "".join(chr(97 + k % 26) for k in range(25))
    path = tmp_path / name
    path.write_text(text if name == "a.txt" else json.dumps({"text": text, "label": 0}))
    pieces = load(path, max_length=5)  # 25 letters and the end: the last piece, one token, teaches nothing
    assert [len(piece.ids) for piece in pieces] == [5] * 5
    assert "".join(texts(piece)[1] for piece in pieces) == text
    assert PLAIN.decode(load(path, max_length=100)[0].ids) == text + "<|end|>"


def test_what_begins_a_text_is_there_if_the_tokenizer_puts_it_there(tmp_path):
    class Beginning:
        bos_token_id, eos_token_id = 77, 88

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [77] * add_special_tokens + list(text.encode())}

    path = written(tmp_path, {"prompt": "a", "response": "b"}, {"text": "c"})
    answer, text = load(path, Beginning())
    assert answer == Example([77, 97, 10, 98, 88], [IGNORED] * 3 + [98, 88])
    assert text == Example([77, 99, 88], [77, 99, 88])


def test_what_is_too_long_loses_its_end_and_rows_without_rest_are_counted(tmp_path, caplog):
    path = written(tmp_path, {"prompt": "ab", "response": "cdef"}, {"prompt": "abcdefgh", "response": "c"})
    with caplog.at_level(logging.WARNING, "llm"):
        (example,) = load(path, max_length=5)
    assert texts(example) == ("ab\ncd", "cd")
    assert "1 of 2 rows have no token to learn within max_length=5" in caplog.text
    with pytest.raises(ValueError, match=r"a.jsonl: no row has a token to learn within max_length=3; raise it"):
        load(path, max_length=3)
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens; found 1"):
        load(path, max_length=1)


def test_labels_get_words(tmp_path):
    path = written(tmp_path, *tiny_lm.reviews(2), name="a.tsv")
    learnt = [texts(example)[1] for example in load(path, rename={"0": "bad", "1": "good"})]
    assert learnt == ["bad<|end|>", "good<|end|>"]


# -- files -------------------------------------------------------------------------------------------


def test_all_kinds_of_files_say_the_same(tmp_path):
    row = {"prompt": "é \u2028 1", "response": "ß"}
    contents = {
        "a.jsonl": json.dumps(row, ensure_ascii=False) + "\r\n\r\n",
        "a.json": "\ufeff" + json.dumps([row], indent=1),
        "a.tsv": "Prompt\tresponse \né \u2028 1\tß\n",
    }
    found = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(content.encode()))
        found += [load(tmp_path / name), load(str(tmp_path / f"{name}.GZ"))]
    assert all(examples == found[0] for examples in found)
    assert texts(found[0][0])[0] == "é \u2028 1\nß<|end|>"


PAIR = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: must end in .txt, .jsonl, .json, .tsv, each also with .gz"),
        ("a.jsonl", " \n\n", "a.jsonl: holds no rows"),
        ("a.txt", " \n", "a.txt: holds no rows"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv: holds no rows"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.jsonl", PAIR + "{'a': 1}", "a.jsonl:2: must be JSON; Expecting property name"),
        ("a.jsonl", PAIR + "\n[1]", "a.jsonl:3: must be a JSON object; found a list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: must be JSON of reasonable depth"),
        ("a.jsonl", '{"a": ' + "1" * 10_000 + "}", "a.jsonl:1: must be JSON of reasonable depth and numbers"),
        ("a.json", '{"prompt": "a"}', "a.json: must hold a JSON list of objects; found an object"),
        ("a.json", "[\n{}\n,]", "a.json: must be JSON; "),
        ("a.json", '[{"text": "a"}, 3]', "a.json: row 2: must be a JSON object; found a number"),
        ("a.jsonl", '{"story": "a", "b": 1}', "a.jsonl:1: needs text, messages, or a pair such as prompt and response"),
        ("a.jsonl", '{"text": null}', "a.jsonl:1: text must be text; found null"),
        ("a.jsonl", '{"prompt": "a", "response": ["b"]}', "a.jsonl:1: response must be text; found a list"),
        ("a.jsonl", '{"prompt": "a", "response": true}', "a.jsonl:1: response must be text; found true or false"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl:1: text must be text that UTF-8 can hold; found half of"),
        ("a.jsonl", '{"instruction": "a", "output": "b", "history": [["a"]]}', "a.jsonl:1: history must be a list of"),
        ("a.jsonl", '{"messages": {"role": "user"}}', "a.jsonl:1: messages must be a list of objects with role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "a.jsonl:1: messages must hold one"),
        ("a.tsv", "sentence\tlabel\na\t1\nb\n", "a.tsv:3: found 1 columns; the first line names 2"),
        ("a.tsv", "a\ta\n1\t2", "a.tsv:1: the first line must name each column once"),
        ("a.tsv", "gj04\t1\t\tThe sailors .\ncj99\t1\t\tMary .\n", "a.tsv:2: needs text, messages, or a pair"),
        ("a.txt", b"ab\nc\xff", "a.txt:2: must be UTF-8; found byte 0xff"),
        ("a.txt.gz", gzip.compress(b"\n\xe9"), "a.txt.gz:2: must be UTF-8; found byte 0xe9"),
        ("a.txt.gz", b"ab", "a.txt.gz: must be a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"abc" * 100)[:-9], "a.txt.gz: must be a whole gzip file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r".") as caught:
        load(path)
    assert str(caught.value).startswith(f"{tmp_path}{os.sep}{message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"a.jsonl: no such file|must end in"):
            load(path)


def refused_by_name(path, tokenizer=CHAT):
    """Loads, or says in one ValueError where the trouble is."""
    try:
        examples = load(path, tokenizer, max_length=9)
    except ValueError as error:
        examples, message = [], str(error)
    assert all(2 <= len(example.ids) <= 9 for example in examples)
    assert examples or message.startswith(str(path))


@settings(max_examples=150)
@given(st.binary(max_size=60), st.sampled_from(SUFFIXES), st.booleans())
def test_random_bytes_are_read_or_refused(tmp_path_factory, content, suffix, zipped):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content, 1) if zipped and len(content) % 2 else content)
    refused_by_name(path)


NAMES = ["prompt", "response", "question", "answer", "instruction", "input", "output", "history", "messages", "text"]
NAMES += ["sentence", "sentence1", "sentence2", "label", "role", "content"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6) | VALUES, max_size=4)


@settings(max_examples=60)
@given(ROWS, st.sampled_from([CHAT, PLAIN]))
def test_random_rows_are_read_or_refused(tmp_path_factory, fields, tokenizer):
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzz.jsonl").write_text("\n".join(map(json.dumps, fields)))
    (folder / "fuzz.json").write_text(json.dumps(fields))
    refused_by_name(folder / "fuzz.jsonl", tokenizer)
    refused_by_name(folder / "fuzz.json", tokenizer)


@settings(max_examples=100)
@given(st.lists(st.lists(st.sampled_from([*NAMES[10:14], "1", "é", "\x00", "\r"]), min_size=1, max_size=3), max_size=5))
def test_random_tables_are_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzz.tsv"
    path.write_bytes("\n".join(map("\t".join, lines)).encode())
    refused_by_name(path)


@pytest.mark.skipif("BCD_DATA" not in os.environ, reason="BCD_DATA names the folder of the data sets")
@pytest.mark.parametrize(
    ("name", "examples"),
    [
        pytest.param("math/gsm8k_train.jsonl.gz", 7473, marks=pytest.mark.slow),
        pytest.param("sft/lima.json.gz", 1029, marks=pytest.mark.slow),
        ("glue/SST-2/dev.tsv.gz", 872),
    ],
)
def test_data_sets(name, examples):
    found = load(Path(os.environ["BCD_DATA"]) / "llm" / name, CHAT, max_length=10**6)
    assert len(found) == examples


# -- classification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, "bad", "0"])
def test_classes_by_name_or_number(tmp_path, label):
    path = written(tmp_path, {"text": "oh", "label": label}, {"sentence1": "a", "sentence2": "b", "label": "1"})
    first, second = load_labelled(path, PLAIN, max_length=3, classes={0: "bad", 1: "good"})
    assert (first, second.labels) == (Example(PLAIN("oh")["input_ids"], [0]), [1])


def test_unknown_classes_and_rows_without_label_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl:1: label must be one of 0, 1, no, yes; found '2'"):
        load_labelled(
            written(tmp_path, {"sentence": "a", "label": 2}), PLAIN, max_length=9, classes={0: "no", 1: "yes"}
        )
    with pytest.raises(ValueError, match=r"a.jsonl:1: needs a label, and sentence, text, or .* found the fields text"):
        load_labelled(written(tmp_path, {"text": "a"}), PLAIN, max_length=9, classes={0: "no"})


def test_choices_differ_in_the_label_alone(tmp_path):
    path = written(tmp_path, *tiny_lm.reviews(4), name="a.tsv")
    choices, labels = load_choices(path, PLAIN, max_length=100, rename={"0": "bad", "1": "good"})
    assert labels == ["bad", "good"]
    assert [choice.right for choice in choices] == [0, 1, 0, 1]
    assert [texts(option) for option in choices[1].options] == [
        ("good film 1\nbad<|end|>", "bad<|end|>"),
        ("good film 1\ngood<|end|>", "good<|end|>"),
    ]


def test_choices_of_a_template_and_of_texts_that_are_too_long(tmp_path):
    path = written(tmp_path, *({"text": "x" * 50, "label": k} for k in "ab"))
    choices, _ = load_choices(path, PLAIN, max_length=9, template="{sentence}:|||{label}")
    assert texts(choices[0].options[1]) == ("xxxxxx:b<|end|>", "b<|end|>")
    with pytest.raises(ValueError, match="must hold from 2 to 100 different labels; found 1"):
        load_choices(written(tmp_path, {"text": "x", "label": 1}), PLAIN, max_length=9)


# -- batches -----------------------------------------------------------------------------------------


def numbered(n):
    return [Example([k, k], [k, k]) for k in range(n)]


def test_every_epoch_is_a_new_permutation():
    batches = Batches(numbered(7), 2, seed=3)
    assert batches.per_epoch == 3
    epochs = [[e.ids[0] for k in range(3 * epoch, 3 * epoch + 3) for e in batches[k]] for epoch in range(20)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 15
    assert set().union(*epochs) == set(range(7))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.lists(st.integers(0, 60), min_size=2, max_size=9))
def test_a_batch_depends_on_its_number_alone(n, size, seed, numbers):
    """So that the position in the stream is all that a checkpoint must hold."""
    first, second = Batches(numbered(n), size, seed), Batches(numbered(n), size, seed)
    expected = {k: first[k] for k in sorted(numbers)}
    assert all(second[k] == expected[k] for k in numbers)
    assert all(len(batch) == min(n, size) for batch in expected.values())


def test_seeds_differ():
    orders = {tuple(e.ids[0] for e in Batches(numbered(20), 20, seed)[0]) for seed in range(10)}
    assert len(orders) == 10


def test_batches_need_examples():
    with pytest.raises(ValueError, match="found 0 and 2"):
        Batches([], 2, 0)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_a_split_is_a_partition(n, held_out, seed):
    train, held = split(numbered(n), held_out, seed)
    assert sorted(e.ids[0] for e in train + held) == list(range(n))
    assert len(held) == (0 if n < 2 else min(held_out, max(1, n // 10)))
    assert (train, held) == split(numbered(n), held_out, seed)


def test_padding():
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert collate([Example([1, 2], [1]), Example([3], [0])], pad=0)["labels"].tolist() == [[1], [0]]


def test_modules_name_what_exists():
    assert all(hasattr(module, name) for module in (data, rows) for name in module.__all__)
