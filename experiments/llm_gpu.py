# SPDX-License-Identifier: BSD-3-Clause
"""A step of SmolLM2-135M on a CUDA device: its time and its memory, BlockLLM beside AdamW, LoRA and BAdam.

Each method takes a few steps on one batch of GSM8K (and on eight copies of it), the first ones not timed, from the same
weights. A step is the whole of it: forward, backward, update, and the copy of the loss to the host, between two
synchronisations. Switches, which are made every few steps here, are timed apart, and a step is given with the share of
a switch that it has in the method's own period. BAdam goes once through all of its layers, three steps in each; its
step is a mean over them. Float32 products are TF32. AdamW is timed once more at the end: what differs from its first
time is noise.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from experiments import llm_tasks
from experiments.llm_batches import Batch, Task
from experiments.llm_common import where
from experiments.llm_finetune import ALL
from experiments.llm_methods import Method, layers
from experiments.llm_training import moved, update
from experiments.tables import markdown
from llm import BlockLLM

TITLE = "A step of SmolLM2-135M on a GPU: BlockLLM beside AdamW, LoRA, BAdam"
SEED = 0
NAMES = (
    "AdamW",
    "LoRA r8",
    "BAdam",
    "BlockLLM rows, cautious",
    "BlockLLM neurons",
    "BlockLLM rows of few tensors",
    "BlockLLM rows 15%, 8-bit",
    "BlockLLM tensors",
    "BlockLLM entries",
    "AdamW",
)
CASES = (("float32", 1), ("bfloat16", 8), ("bfloat16", 1))  # of the weights; copies of the batch
WARM_UP, STEPS = 3, 11
LAYER = 3  # steps of BAdam in a layer: the first makes moments, the last switches
RATE = 1e-5

Results = dict[str, Any]


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
    task = llm_tasks.make("gsm8k", SEED, 1)
    task = moved(task, "cuda")._replace(model=task.model.cpu())  # what is measured is a copy on the device
    names, cases = (NAMES[:2], CASES[:1]) if quick else (NAMES, CASES)
    found = []
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then is kept
        for dtype, copies, name in ((*case, name) for case in cases for name in names if ALL[name].installed):
            found.append({"dtype": dtype, "copies": copies, "method": name} | timed(task, ALL[name], dtype, copies))
            print(f"llm_gpu: {dtype} x {copies}, {name}: {1e3 * found[-1]['step']:.1f} ms", flush=True)
    return {"steps": found, "device": where("cuda") | {"torch": torch.__version__}, "threads": threads()}


def threads() -> str:
    """Of the host."""
    return os.environ.get("OMP_NUM_THREADS", f"all {os.cpu_count()}")


def timed(task: Task, method: Method, dtype: str, copies: int) -> Results:
    """Seconds of a step and what a switch takes more; tokens of a step; bytes allocated at most.

    Parameters
    ----------
    task : Task
        Its batches are on the device, and its model, which is copied there, is not.
    method : Method
    dtype : str
        Of the weights.
    copies : int
        How often the batch is repeated.
    """
    gc.collect()  # the model before may be in a cycle of references
    one = task.batches[0]
    model = copy.deepcopy(task.model).to(one.inputs["input_ids"].device, getattr(torch, dtype))
    period = method.settings().get("switch_every") or math.inf
    steps = STEPS
    if method.kind == "badam":
        steps, method = LAYER * len(layers(model)), replace(method, options=method.options | {"switch_every": LAYER})
    else:
        method = method.with_timed_periods()
    model, optimizer = method.build(model, RATE, SEED)
    batch = Batch({name: value.repeat(copies, 1) for name, value in one.inputs.items()}, one.tokens * copies)
    times = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = update(model, optimizer, batch, RATE, task.loss)
        torch.cuda.synchronize()
        if not math.isfinite(loss):
            raise ValueError(f"the loss must be finite while steps are timed; found {loss} with {dtype}")
        times.append(time.perf_counter() - began)
    usual, switch = parts(times, optimizer)
    return {
        "step": usual + switch / period,
        "switch": switch,
        "tokens": batch.tokens,
        "allocated": torch.cuda.max_memory_allocated(),
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


def steps_table(results: Results, dtype: str, copies: int) -> str:
    """A row for every method in one case; AdamW's two times as its range."""
    found = [row for row in results["steps"] if (row["dtype"], row["copies"]) == (dtype, copies)]
    peer = [row["step"] for row in found if row["method"] == "AdamW"]
    rows = []
    for name in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == name]
        step = statistics.median(row["step"] for row in mine)
        rows.append(
            [
                name,
                " and ".join(f"{1e3 * row['step']:.1f}" for row in mine),
                f"{1e3 * mine[0]['switch']:.1f}" if mine[0]["switch"] else "-",
                f"{statistics.median(peer) / step:.2f}",
                f"{max(row['allocated'] for row in mine) / 1e6:,.0f}",
            ]
        )
    return markdown(["method", "ms a step", "a switch, more", "x AdamW", "peak MB"], rows)


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: one for every case, and runs."""
    device = results["device"]
    text = f"*{device['gpu']}, CUDA {device['cuda']}, PyTorch {device['torch']}, OMP_NUM_THREADS {results['threads']}*"
    cases = dict.fromkeys((row["dtype"], row["copies"]) for row in results["steps"])
    return {f"{dtype}_{copies}": steps_table(results, dtype, copies) for dtype, copies in cases} | {"runs": text}
