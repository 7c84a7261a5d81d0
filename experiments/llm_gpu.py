# SPDX-License-Identifier: BSD-3-Clause
"""Steps on a CUDA device: their time and memory, BlockLLM beside AdamW, LoRA and BAdam.

SmolLM2-135M takes steps on a batch of GSM8K (and on eight copies of it); Llama-2-7B, with random weights and with
gradient checkpointing, on a sequence of 512 random tokens (and on eight). The first steps are not timed. A step is the
whole of it: forward, backward, update, and the copy of the loss to the host, between two synchronisations. Switches,
which are made every few steps here, are timed apart, and a step is given with the share of a switch that it has in the
method's own period: the median of those before the switch, of which there are more, and beside it of those after. BAdam
goes once through all of its layers, three steps in each; its step is a mean over them. Float32 products are TF32. AdamW
is timed once more at the end: what differs from its first time is noise. Memory is what PyTorch had allocated at most,
in the first step (where BlockLLM chooses) or in the others.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments import llm_tasks
from experiments.llm_batches import Batch, learnt_loss
from experiments.llm_common import where
from experiments.llm_finetune import ALL
from experiments.llm_memory_runs import MODELS
from experiments.llm_methods import TIMED, Method, layers
from experiments.llm_training import moved, update
from experiments.tables import markdown
from llm import BlockLLM
from llm.hf import checkpointing

TITLE = "Steps of SmolLM2-135M and of Llama-2-7B on a GPU: BlockLLM beside AdamW, LoRA, BAdam"
SEED = 0
NAMES = (
    "AdamW",
    "BlockLLM neurons, frozen table",
    "LoRA r8",
    "BlockLLM rows, cautious",
    "BlockLLM rows of few tensors",
    "BlockLLM tensors",
    "BAdam",
    "AdamW",
)
SMALL, LARGE = "SmolLM2-135M", "Llama-2-7B"
LENGTH = 512  # tokens of a sequence of the large model


class Case(NamedTuple):
    """A model, the type of its weights, and how often the batch is repeated."""

    model: str
    dtype: str
    copies: int


CASES = (Case(LARGE, "bfloat16", 1), Case(SMALL, "float32", 1), Case(LARGE, "bfloat16", 8), Case(SMALL, "bfloat16", 8))
WARM_UP, STEPS = 3, 11
LAYER = 3  # steps of BAdam in a layer: the first makes moments, the last switches
RATE = 1e-5

Results = dict[str, Any]
Make = Callable[[str], nn.Module]  # of the name of a type


def run(quick: bool) -> Results:
    """Time every method in every case, until Ctrl-C; quick: two methods in one case.

    Raises
    ------
    FileNotFoundError
        If there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise FileNotFoundError("llm_gpu needs a CUDA device, and PyTorch sees none here")
    llm_tasks.check(("gsm8k",))
    names, cases = (NAMES[:2], CASES[1:2]) if quick else (NAMES, CASES)
    sources = {SMALL: small("cuda"), LARGE: large(MODELS[LARGE], "cuda")}
    found = []
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then is kept
        for case, name in ((case, name) for case in cases for name in names if ALL[name].installed):
            make, batch = sources[case.model]
            found.append(case._asdict() | {"method": name} | timed(make, repeated(batch, case), ALL[name], case.dtype))
            print(f"llm_gpu: {' '.join(map(str, case))}, {name}: {1e3 * found[-1]['step']:.1f} ms", flush=True)
    return {"steps": found, "device": where("cuda") | {"torch": torch.__version__}, "threads": threads()}


def small(device: str) -> tuple[Make, Batch]:
    """SmolLM2 and a batch of GSM8K."""
    task = moved(llm_tasks.make("gsm8k", SEED, 1), device)
    model = task.model.cpu()  # what is measured is a copy on the device
    return lambda dtype: copy.deepcopy(model).to(device, getattr(torch, dtype)), task.batches[0]


def large(sizes: dict[str, Any], device: str) -> tuple[Make, Batch]:
    """A Llama of these sizes with random weights, checkpointed, and a sequence of random tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    def make(dtype: str) -> nn.Module:
        """The model, made where it is to be."""
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=getattr(torch, dtype))
        checkpointing(model)
        return model  # type: ignore[no-any-return]

    ids = torch.randint(sizes["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(SEED)).to(device)
    return make, Batch({"input_ids": ids, "labels": ids}, LENGTH)


def repeated(batch: Batch, case: Case) -> Batch:
    """So many copies of its sequences."""
    inputs = {name: value.repeat(case.copies, 1) for name, value in batch.inputs.items()}
    return Batch(inputs, batch.tokens * case.copies)


def threads() -> str:
    """Of the host."""
    return os.environ.get("OMP_NUM_THREADS", f"all {os.cpu_count()}")


def timed(make: Make, batch: Batch, method: Method, dtype: str) -> Results:
    """Seconds of a step and what a switch takes more; tokens of a step; bytes allocated at most.

    Parameters
    ----------
    make : callable
        Makes the model, on the device.
    batch : Batch
        On the device.
    method : Method
    dtype : str
        Of the weights.
    """
    gc.collect()  # the model before may be in a cycle of references
    torch.cuda.empty_cache()
    model = make(dtype)
    period = method.settings().get("switch_every") or math.inf
    steps = STEPS
    if method.kind == "badam":
        steps, method = LAYER * len(layers(model)), replace(method, options=method.options | {"switch_every": LAYER})
    else:
        method = method.with_timed_periods()
    model, optimizer = method.build(model, RATE, SEED)
    times, peaks = [], []
    for step in range(WARM_UP + steps):
        if step <= 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = update(model, optimizer, batch, RATE, learnt_loss)
        torch.cuda.synchronize()
        if not math.isfinite(loss):
            raise ValueError(f"the loss must be finite while steps are timed; found {loss} with {dtype}")
        times.append(time.perf_counter() - began)
        peaks.append(torch.cuda.max_memory_allocated())
    usual, switch = parts(times, optimizer)
    return {
        "step": usual + switch / period,
        "switch": switch,
        "tokens": batch.tokens,
        "first": peaks[0],
        "allocated": peaks[-1],
        "all": times,
    }


def parts(times: list[float], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds of a step without a switch, and what one with a switch takes more; the first steps do not count.

    BAdam switches a step early at first, so that those before a multiple of :data:`LAYER` switch, and the multiples are
    the first in their layer, where moments are made.
    """
    timed_steps = list(enumerate(times, 1))[WARM_UP:]
    if isinstance(optimizer, BlockLLM):
        switches = {s["step"] for s in optimizer.report()["history"]}
        others = [seconds for k, seconds in timed_steps if k in switches]
        plain = [seconds for k, seconds in timed_steps if k not in switches]
    elif hasattr(optimizer, "switch_block_every"):
        others = [seconds for k, seconds in timed_steps if k % LAYER == LAYER - 1]
        plain = [seconds for k, seconds in timed_steps if 0 < k % LAYER < LAYER - 1]
        return statistics.mean(plain), statistics.mean(others) - statistics.mean(plain)
    else:
        others, plain = [], [seconds for _, seconds in timed_steps]
    usual = statistics.median(plain)
    return usual, statistics.median(others) - usual if others else 0.0


# -- tables -------------------------------------------------------------------------------------


def steps_table(results: Results, case: Case) -> str:
    """A row for every method in one case; AdamW's two times as its range."""
    found = [row for row in results["steps"] if Case(*(row[name] for name in Case._fields)) == case]
    peer = [row["step"] for row in found if row["method"] == "AdamW"]
    rows = []
    for name in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == name]
        step = statistics.median(row["step"] for row in mine)
        rows.append(
            [
                name,
                " and ".join(f"{1e3 * row['step']:.1f}" for row in mine),
                f"{1e3 * statistics.median(mine[0]['all'][TIMED:]):.1f}" if _switches_once(mine[0]) else "-",
                f"{1e3 * mine[0]['switch']:.1f}" if mine[0]["switch"] else "-",
                f"{statistics.median(peer) / step:.2f}",
                *(f"{max(row[kind] for row in mine) / 1e6:,.0f}" for kind in ("first", "allocated")),
            ]
        )
    head = ["method", "ms a step", "after a switch", "the switch, more", "x AdamW", "peak MB, first step", "later"]
    return markdown(head, rows)


def _switches_once(row: Results) -> bool:
    """Whether there was one switch among the timed steps: afterwards slices of two ages are in a tensor."""
    return bool(row["switch"]) and ALL[row["method"]].kind == "blockllm" and len(row["all"]) > TIMED


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: one for every case, and runs."""
    device = results["device"]
    text = f"*{device['gpu']}, CUDA {device['cuda']}, PyTorch {device['torch']}, OMP_NUM_THREADS {results['threads']}*"
    cases = dict.fromkeys(Case(*(row[name] for name in Case._fields)) for row in results["steps"])
    return {"_".join(map(str, case)): steps_table(results, case) for case in cases} | {"runs": text}
