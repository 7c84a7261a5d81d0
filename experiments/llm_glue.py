# SPDX-License-Identifier: BSD-3-Clause
"""Sentence classification: the MiniLM-L6 encoder with a new head on SST-2, CoLA and RTE.

Every method gets three learning rates on one seed, and one more where the best of them lies at the end of its grid;
then three seeds (order of the data, the new head) at its best rate, with the same batches in the same order (of
sentences of similar length, which saves padding). Rates fall linearly to nothing after a warm-up, and the best rate is
the one with the best measure on the development set at the end. The head is always trained and counts in the budget.
The 277 rows of RTE are shown and decide nothing.

Units, raw results and environment: :mod:`experiments.llm_common`.
"""

from __future__ import annotations

from typing import Any

from experiments import llm_report, llm_tasks
from experiments.llm_common import Matrix, Unit, collect
from experiments.llm_methods import CAUTIOUS, FEW, NAMED, NEURONS, ROWS, SIGNS, Method
from experiments.llm_report import ACCURACY, MATTHEWS, draw, summary
from experiments.llm_training import carry_out, matrix_of, quick_of
from experiments.tables import markdown

TITLE = "Classification with MiniLM-L6 on SST-2, CoLA and RTE against AdamW, LoRA, BAdam, GaLore"
SEEDS = (0, 1, 2)
SEED = SEEDS[0]
MEASURES = {"sst2": ACCURACY, "cola": MATTHEWS, "rte": ACCURACY}
DATA = ("sst2", "cola", "rte")
STEPS = {"sst2": 1000, "cola": 800, "rte": 235}  # half a round of SST-2, three rounds of the others
QUICK_STEPS = 30
EXPECTED = {"sst2": 30.0, "cola": 30.0, "rte": 30.0}  # seconds of a run on a GPU where nothing is known yet
OURS_GRID = (1e-4, 3e-4, 1e-3)
FULL_GRID = (3e-5, 1e-4, 3e-4)
BAR = -0.5  # points of accuracy

METHODS = {
    "AdamW": Method("adamw", FULL_GRID),
    "LoRA r8": Method("lora", (3e-4, 1e-3, 3e-3), {"r": 8, "alpha": 16}),
    "BlockLLM rows": Method("blockllm", OURS_GRID, ROWS),
    "BlockLLM rows, cautious": Method("blockllm", OURS_GRID, CAUTIOUS),
    "BlockLLM neurons, frozen table": Method("blockllm", OURS_GRID, NAMED),
    "BlockLLM rows of few tensors": Method("blockllm", OURS_GRID, FEW),
    "BlockLLM tensors": Method("blockllm", OURS_GRID, ROWS | {"granularity": "tensor"}),
    "BlockLLM entries": Method("blockllm", OURS_GRID, ROWS | {"granularity": "entries"}),
    "BAdam": Method("badam", OURS_GRID, {"switch_every": 25}),
    "GaLore r8": Method("galore", FULL_GRID, {"rank": 8, "scale": 4.0, "update_proj_gap": 200}),
}
EXTRAS = {
    "BlockLLM neurons": Method("blockllm", OURS_GRID, NEURONS),
    "BlockLLM neurons, frozen table, 20%": Method("blockllm", OURS_GRID, NAMED | {"budget": 0.20}),
    "BlockLLM neurons, frozen table, sign": Method("blockllm", OURS_GRID, SIGNS),
    "APOLLO r8": Method("apollo", FULL_GRID, {"rank": 8, "scale": 1.0, "update_proj_gap": 200}),
    "HFT": Method("blockllm", FULL_GRID, {"rule": "half", "granularity": "tensor", "budget": 0.5, "switch_every": 50}),
    "MISA": Method(
        "blockllm", OURS_GRID, {"rule": "importance", "granularity": "tensor", "budget": 0.05, "switch_every": 50}
    ),
}
ALL = METHODS | EXTRAS

Results = dict[str, Any]


def matrix() -> Matrix:
    """The methods that are installed, on every data set."""
    return matrix_of("llm_glue", METHODS, EXTRAS, STEPS, SEEDS, MEASURES, EXPECTED)


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
    results = summary(which, collect(which, quick), ALL, MEASURES)
    pictures = {name: draw(data, f"MiniLM-L6 on {name}") for name, data in results["data"].items()}
    methods = {name: {"grid": method.grid} | method.settings() for name, method in ALL.items()}
    described = {"methods": methods, "steps": STEPS, "seeds": SEEDS, "task": llm_tasks.SETTINGS[DATA[0]], "bar": BAR}
    return results | {"settings": described, "bars": bars(results), "pictures": pictures}


def bars(results: Results) -> Results:
    """By data set and variant of ours: the measure less AdamW's, with its interval, and the active share."""
    found: Results = {}
    for name, data in results["data"].items():
        found[name] = {
            ours: {"difference": pairs.get("AdamW", {}).get("steps"), "share": data["methods"][ours]["share"]}
            for ours, pairs in data["pairs"].items()
        }
    return found


def bars_table(found: Results) -> str:
    """A row for every variant, a column for every data set."""
    names = list(dict.fromkeys(name for variants in found.values() for name in variants))
    rows = []
    for name in names:
        there = [variants.get(name) for variants in found.values()]
        share = next((entry["share"] for entry in there if entry and entry["share"]), None)
        active = "-" if share is None else f"{100 * share:.2f}%"
        rows.append([name, active, *(llm_report.difference(entry and entry["difference"], 2) for entry in there)])
    head = ["points, less AdamW's", "active", *found]
    return markdown(head, [*rows, ["bar", "< 5%", *(f">= {BAR}" if name == "sst2" else "" for name in found)]])


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: for each data set its name, _steps, _cpu, _memory, _grid; bars, notes, missing, runs."""
    return llm_report.tables_of(results, 2) | {"bars": bars_table(results["bars"])}
