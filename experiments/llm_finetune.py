# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tuning SmolLM2-135M on GSM8K and LIMA: BlockLLM beside AdamW, LoRA, BAdam, GaLore and others.

Every method gets three learning rates on one seed, and one more where the best of them lies at the end of its grid;
then three seeds at its best rate. All see the same batches in the same order (8 sequences of at most 128 tokens a
step, loss on the answer) and are judged on the same 128 held-out sequences at five steps. Rates are constant after five
steps of warm-up, so that every point of a curve is as good as the end of a shorter run: results are compared at equal
steps, at equal CPU seconds, and within equal peak memory. No weight decay, no clipping, float32.

Units, raw results and environment: :mod:`experiments.llm_common`.
"""

from __future__ import annotations

from typing import Any

from experiments import llm_report, llm_tasks
from experiments.llm_common import Matrix, Unit, collect
from experiments.llm_methods import CAUTIOUS, FEW, NAMED, NEURONS, ROWS, SIGNS, Method
from experiments.llm_report import LOSS, draw, summary
from experiments.llm_training import carry_out, matrix_of, quick_of
from experiments.tables import markdown

TITLE = "Fine-tuning SmolLM2-135M on GSM8K and LIMA against AdamW, LoRA, BAdam, GaLore"
SEEDS = (0, 1, 2)
SEED = SEEDS[0]
DATA = ("gsm8k", "lima")
STEPS, QUICK_STEPS = 120, 2
EXPECTED = 40.0  # seconds of a run on a GPU where nothing is known yet
OURS_GRID = (3e-4, 5e-4, 1e-3)
FULL_GRID = (3e-5, 1e-4, 3e-4)
BARS = {"adamw": 0.02, "peer": 0.0, "speed": 1.3}

BY_NORMS = {"granularity": "rows", "budget": 0.05, "switch_every": 100}

METHODS = {
    "AdamW": Method("adamw", FULL_GRID),
    "LoRA r8": Method("lora", (1e-3, 2e-3, 4e-3), {"r": 8, "alpha": 16}),
    "BlockLLM rows": Method("blockllm", OURS_GRID, ROWS),
    "BlockLLM rows, cautious": Method("blockllm", OURS_GRID, CAUTIOUS),
    "BlockLLM neurons, frozen table": Method("blockllm", OURS_GRID, NAMED),
    "BlockLLM rows of few tensors": Method("blockllm", OURS_GRID, FEW),
    "BlockLLM rows 15%, 8-bit": Method("blockllm", (1e-4, 2e-4, 5e-4), ROWS | {"budget": 0.15, "states": "8bit"}),
    "BlockLLM tensors": Method("blockllm", OURS_GRID, ROWS | {"granularity": "tensor"}),
    "BlockLLM entries": Method("blockllm", OURS_GRID, ROWS | {"granularity": "entries"}),
    "BAdam": Method("badam", (3e-4, 1e-3, 3e-3), {"switch_every": 5}),
    "GaLore r64": Method("galore", (1e-4, 3e-4, 1e-3), {"rank": 64, "scale": 1.0, "update_proj_gap": 200}),
}
EXTRAS = {
    "AdamW, cautious": Method("blockllm", (5e-5, 1.5e-4, 5e-4), {"rule": "full", "cautious": True}),
    "BlockLLM rows 20%": Method("blockllm", (1e-4, 2e-4, 5e-4), ROWS | {"budget": 0.2}),
    "BlockLLM rows 1%": Method("blockllm", OURS_GRID, ROWS | {"budget": 0.01}),
    "BlockLLM rows, 8-bit, in backward": Method("blockllm", OURS_GRID, ROWS | {"states": "8bit", "in_backward": True}),
    "BlockLLM rows, frozen table": Method("blockllm", OURS_GRID, ROWS | {"embeddings": "never"}),
    "BlockLLM rows, cautious, frozen table": Method("blockllm", OURS_GRID, CAUTIOUS | {"embeddings": "never"}),
    "BlockLLM rows of few tensors, reach 1, every 24": Method(
        "blockllm", OURS_GRID, FEW | {"reach": 1.0, "switch_every": 24, "ramp": 5}
    ),
    "BlockLLM rows, cautious, frozen table, 15%, 8-bit": Method(
        "blockllm",
        (2e-4, 3e-4, 5e-4),
        CAUTIOUS | {"embeddings": "never", "budget": 0.15, "states": "8bit"},
    ),
    "BlockLLM neurons": Method("blockllm", OURS_GRID, NEURONS),
    "BlockLLM neurons, frozen table, sign": Method("blockllm", OURS_GRID, SIGNS),
    "BlockLLM neurons, frozen table, every 24": Method("blockllm", OURS_GRID, NAMED | {"switch_every": 24}),
    "Rows by norms": Method("blockllm", OURS_GRID, BY_NORMS),
    "Rows by root mean squares": Method("blockllm", OURS_GRID, BY_NORMS | {"per_parameter": True}),
    "Rows by norms, every 25, moments kept": Method(
        "blockllm", OURS_GRID, BY_NORMS | {"switch_every": 25, "moments": "keep"}
    ),
    "Rows by norms, every 25, no visits": Method(
        "blockllm", OURS_GRID, BY_NORMS | {"switch_every": 25, "visit_power": 0.0}
    ),
    "Tensors by norms": Method("blockllm", (2e-4, 5e-4, 1e-3), BY_NORMS | {"granularity": "tensor"}),
    "BAdam, 25 steps a layer": Method("badam", (3e-4, 1e-3, 3e-3), {"switch_every": 25}),
    "APOLLO r64": Method("apollo", (1e-4, 3e-4, 1e-3), {"rank": 64, "scale": 1.0, "update_proj_gap": 200}),
    "LISA": Method(
        "blockllm",
        FULL_GRID,
        {
            "rule": "random",
            "granularity": "layer",
            "budget": 0.27,  # the token table, which is the head too, and two layers
            "embeddings": "always",
            "always": ("model.norm",),
            "mask": False,
            "switch_every": 5,
        },
    ),
    "HFT": Method("blockllm", FULL_GRID, {"rule": "half", "granularity": "tensor", "budget": 0.5, "switch_every": 25}),
    "MISA": Method(
        "blockllm",
        OURS_GRID,
        {"rule": "importance", "granularity": "tensor", "budget": 0.05, "switch_every": 25},
    ),
}
ALL = METHODS | EXTRAS
SHOWN = (  # the named configuration first
    "BlockLLM neurons, frozen table",
    "BlockLLM rows, cautious",
    "BlockLLM rows of few tensors",
)

Results = dict[str, Any]


def matrix() -> Matrix:
    """The methods that are installed, on both data sets."""
    return matrix_of(
        "llm_finetune",
        METHODS,
        EXTRAS,
        dict.fromkeys(DATA, STEPS),
        SEEDS,
        dict.fromkeys(DATA, LOSS),
        dict.fromkeys(DATA, EXPECTED),
    )


def quick_matrix() -> Matrix:
    """Two methods at one rate for a few steps."""
    return quick_of(matrix(), ("AdamW", "BlockLLM rows"), QUICK_STEPS)


def work(unit: Unit) -> Results:
    """Run a unit, in a process of its own."""
    return carry_out(unit, ALL)


def run(quick: bool) -> Results:
    """Run what is missing and there is time for, then look at everything there is."""
    llm_tasks.check(DATA)
    which = quick_matrix() if quick else matrix()
    results = summary(which, collect(which, quick), ALL, dict.fromkeys(DATA, LOSS))
    pictures = {name: draw(data, f"SmolLM2-135M on {name}") for name, data in results["data"].items()}
    return results | {"settings": described(), "bars": bars(results), "pictures": pictures}


def described() -> Results:
    """Grids and options."""
    methods = {name: {"grid": method.grid} | method.settings() for name, method in ALL.items()}
    return {"methods": methods, "steps": STEPS, "seeds": SEEDS, "task": llm_tasks.SETTINGS[DATA[0]], "bars": BARS}


# -- bars ---------------------------------------------------------------------------------------


def bars(results: Results) -> Results:
    """What the bars are about, for every variant of ours on every data set; nan where runs are missing."""
    return {
        data: {name: _bars(found, name) for name in found["pairs"] if name in METHODS}
        for data, found in results["data"].items()
    }


def _bars(found: Results, name: str) -> Results:
    pairs, methods = found["pairs"][name], found["methods"]

    def gap(peer: str, when: str = "steps") -> float:
        there = pairs.get(peer, {}).get(when)
        return there["mean"] if there else float("nan")

    def memory(peer: str) -> float:
        there = methods.get(peer)
        return (methods[name]["memory"]["peak"] - there["memory"]["peak"]) / 1e6 if there else float("nan")

    return {
        "less_lora": gap("LoRA r8"),
        "less_badam": gap("BAdam"),
        "less_adamw": gap("AdamW"),
        "less_badam_cpu": gap("BAdam", "cpu"),
        "speed": methods[name]["speed"],
        "memory_less_lora": memory("LoRA r8"),
        "memory_less_badam": memory("BAdam"),
    }


def bars_table(columns: Results) -> str:
    """A row for every bar, a column for every variant by the name that it has here."""
    lines = [
        ("less_lora", "loss, less LoRA r8's", "<= 0", 4),
        ("less_badam", "loss, less BAdam's", "<= 0", 4),
        ("less_adamw", "loss, less AdamW's", f"<= {BARS['adamw']}", 4),
        ("less_badam_cpu", "the same at equal CPU seconds, less BAdam's", "< 0", 4),
        ("speed", "tokens a CPU second over AdamW's", f">= {BARS['speed']}", 2),
        ("memory_less_lora", "peak MB, less LoRA r8's", "<= 0", 0),
        ("memory_less_badam", "peak MB, less BAdam's", "<= 0", 0),
    ]
    rows = [
        [label, bar, *(llm_report.number(found[key], digits) for found in columns.values())]
        for key, label, bar, digits in lines
    ]
    return markdown(["", "bar", *columns], rows)


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: for each data set its name, _steps, _cpu, _memory, _grid, _bars; bars, notes, missing, runs.

    In "bars" are the named configuration and what is shown beside it, on every data set.
    """
    found = {
        f"{name}, {data}": variants[name]
        for name in SHOWN
        for data, variants in results["bars"].items()
        if name in variants
    }
    by_data = {f"{data}_bars": bars_table(variants) for data, variants in results["bars"].items()}
    return llm_report.tables_of(results) | {"bars": bars_table(found)} | by_data
