# SPDX-License-Identifier: BSD-3-Clause
"""A small Llama on text: from scratch on movie reviews, or trained on these and then on speeches of US presidents.

Tokens are 2048 byte pairs of the reviews. :func:`levels` says what counts of tokens alone reach.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.llm_batches import FIXED, Batch, Task, cosine, token_losses
from experiments.llm_files import cached, cached_arrays, lines, read

VOCABULARY, WINDOW = 2048, 128  # tokens
WINDOWS, HELD_OUT, EVAL_WINDOWS = 8, 128, 32  # windows a step, held out, and at a time when evaluating
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
BASE = {"steps": 1500, "lr": 3e-3}  # of the training on reviews before the speeches
SETTINGS = {"vocabulary": VOCABULARY, "window": WINDOW, "windows": WINDOWS, "held_out": HELD_OUT} | SMALL

Texts = Callable[[], tuple[list[str], list[str]]]


def reviews() -> tuple[list[str], list[str]]:
    """Movie reviews to learn from, and every tenth one held out."""
    texts = [json.loads(line)["text"] for line in lines("text/movie_reviews.jsonl.gz")]
    return [text for k, text in enumerate(texts) if k % 10], texts[::10]


def addresses() -> tuple[list[str], list[str]]:
    """Speeches of US presidents to learn from, and every tenth part of 4000 characters held out."""
    text = read("text/us_addresses.txt.gz").lower()
    parts = [text[k : k + 4000] for k in range(0, len(text), 4000)]
    return [part for k, part in enumerate(parts) if k % 10], parts[::10]


def coded_texts(name: str, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to learn from and held-out ones; a 0 ends each text. The tokens are those of the reviews."""

    def compute() -> dict[str, np.ndarray]:
        tokenizer = byte_pairs(reviews()[0])
        parts = zip(("train", "held_out"), texts(), strict=True)
        return {
            part: np.array([i for code in tokenizer.encode_batch(t) for i in (*code.ids, 0)], dtype=np.int32)
            for part, t in parts
        }

    arrays = cached_arrays(name, [VOCABULARY], compute)
    return arrays["train"], arrays["held_out"]


def byte_pairs(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of VOCABULARY tokens, trained on these texts; token 0 is the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def small_llama(seed: int) -> nn.Module:
    """The model from scratch; its token table is its output layer, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SMALL, vocab_size=VOCABULARY, max_position_embeddings=WINDOW, tie_word_embeddings=True, use_cache=False
    )
    return LlamaForCausalLM(config)


def based_llama(seed: int) -> nn.Module:
    """The same trained on the reviews with AdamW, the same for all seeds; made once."""
    from safetensors.torch import load_file, save_file

    def write(path: Path) -> None:
        start = task(small_llama, "reviews", reviews, 0, BASE["steps"])
        model, lr = start.model, BASE["lr"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for step, batch in enumerate(start.batches, 1):
            optimizer.param_groups[0]["lr"] = lr * start.rate(step)
            optimizer.zero_grad()
            model(**batch.inputs).loss.backward()
            optimizer.step()
        save_file({name: p.detach() for name, p in model.named_parameters()}, path)

    model = small_llama(0)
    weights = load_file(cached("small-llama", SETTINGS | {"base": BASE}, write))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def windows(stream: np.ndarray, order: np.ndarray) -> Batch:
    """Windows number ``order`` of a stream of tokens."""
    ids = torch.from_numpy(np.stack([stream[k * WINDOW : (k + 1) * WINDOW] for k in order])).long()
    return Batch({"input_ids": ids, "labels": ids}, ids.numel())


def task(
    model: Callable[[int], nn.Module],
    name: str,
    texts: Texts,
    seed: int,
    steps: int,
) -> Task:
    """Windows of a text in the order of a seed; every window once a round."""
    train, held_out = coded_texts(name, texts)
    rng = np.random.default_rng(seed)
    number, needed = len(train) // WINDOW, steps * WINDOWS
    order = np.concatenate([rng.permutation(number) for _ in range(-(-needed // number))])
    held = np.random.default_rng(FIXED).permutation(len(held_out) // WINDOW)[:HELD_OUT]
    return Task(
        model(seed),
        (),
        [windows(train, order[k * WINDOWS : (k + 1) * WINDOWS]) for k in range(steps)],
        [windows(held_out, held[k : k + EVAL_WINDOWS]) for k in range(0, len(held), EVAL_WINDOWS)],
        token_losses,
        {"weights": [WINDOW - 1] * len(held)},
        partial(cosine, steps=steps),
    )


def levels() -> dict[str, float]:
    """Nats a token that counts alone reach on the held-out windows of the reviews.

    Returns
    -------
    dict
        ``uniform``, ``unigram``, and ``bigram``: counts with absolute discounting, backed by the unigram.
    """
    train, held_out = coded_texts("reviews", reviews)
    held = np.random.default_rng(FIXED).permutation(len(held_out) // WINDOW)[:HELD_OUT]
    rows = np.stack([held_out[k * WINDOW : (k + 1) * WINDOW] for k in held])
    return {"uniform": math.log(VOCABULARY)} | count_levels(train, rows)


def count_levels(train: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """``unigram`` and ``bigram`` for the tokens after the first one of every row."""
    unigram = np.bincount(train, minlength=VOCABULARY) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1].astype(np.int64) * VOCABULARY + train[1:], minlength=VOCABULARY**2)
    table = pairs.reshape(VOCABULARY, VOCABULARY)
    once, twice = (table == 1).sum(), (table == 2).sum()
    discount = once / max(1, once + 2 * twice)
    before, after = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    total, kinds = np.maximum(table.sum(1), 1), (table > 0).sum(1)
    left = np.where(kinds > 0, discount * kinds / total, 1.0)
    chance = np.maximum(table[before, after] - discount, 0) / total[before] + left[before] * unigram[after]
    return {"unigram": float(-np.log(unigram[after]).mean()), "bigram": float(-np.log(chance).mean())}
