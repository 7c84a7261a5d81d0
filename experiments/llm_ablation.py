# SPDX-License-Identifier: BSD-3-Clause
"""What each option of BlockLLM is worth: one option at a time is changed from a centre.

A small Llama that was trained on movie reviews is fine-tuned on speeches (three seeds), and SmolLM2-135M on GSM8K
(one seed). Every variant sees the same batches in the same order at the same learning rate, which was chosen for the
centre (on GSM8K the best of its four in llm_finetune; on speeches the best of five tried by hand for an earlier centre,
1e-3 to 1.6e-2, which is the largest; AdamW's the better of two); that favours the centre a little. Differences to the
centre are paired over the same held-out examples. The centre chooses once in 60 steps and twice in 300: what matters
after a switch only is changed together with a choice every 24 steps, and is to be compared with that.

Units, raw results and environment: :mod:`experiments.llm_common`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import llm_report, llm_tasks
from experiments.figures import panels, style, tidy
from experiments.llm_common import START, Matrix, Runs, Unit, collect
from experiments.llm_methods import NAMED, Method
from experiments.llm_report import LOSS, criterion, entries, together
from experiments.llm_training import carry_out
from experiments.tables import markdown

TITLE = "BlockLLM's options one at a time, on a small Llama and on GSM8K"
SEEDS = {"addresses": (0, 1, 2), "gsm8k": (0,)}
SEED = 0
DATA = ("gsm8k", "addresses")
STEPS = {"addresses": 300, "gsm8k": 60}
QUICK_STEPS = 3
EXPECTED = {"addresses": 30.0, "gsm8k": 40.0}  # seconds of a run on a GPU where nothing is known yet
RATES = {"addresses": 1.6e-2, "gsm8k": 5e-4}
FULL_RATES = {"addresses": 3e-3, "gsm8k": 1e-4}
CENTRE_OPTIONS = NAMED
CENTRE, ADAMW = "centre", "AdamW"
TENSOR = {"granularity": "tensor"}

CHANGES: tuple[dict[str, Any], ...] = (
    {"cautious": False},
    {"switch_every": 6},
    {"switch_every": 24},
    {"switch_every": None, "patience": 5},
    {"rule": "random"},
    {"reach": 1.0},
    {"reach": 2.0},
    {"reach": 4.0},
    {"embeddings": "compete"},
    {"granularity": "rows"},
    {"granularity": "tensor"},
    {"granularity": "entries"},
    {"granularity": "layer"},
    {"budget": 0.01},
    {"budget": 0.15},
    {"switch_every": 24, "moments": "keep"},
    {"switch_every": 24, "ramp": 0},
    {"switch_every": 24, "ramp": 5},
    {"switch_every": 24, "visit_power": 0.0},
    {"switch_every": 24, "census": "probe"},
    {"score": "grad"},
    {"score": "adam"},
    {"per_parameter": False},
    {"score": "grad", "per_parameter": False},
    {"states": "fp32"},
    {"states": "8bit"},
    {"inactive": "sign"},
    TENSOR | {"mask": False},
    TENSOR | {"per_parameter": False},
    TENSOR | {"rule": "cyclic", "switch_every": 24},
    TENSOR | {"rule": "random", "switch_every": 24},
    TENSOR | {"rule": "importance", "switch_every": 24},
    TENSOR | {"rule": "half", "budget": 0.5, "switch_every": 24},
    {"granularity": "layer", "rule": "cyclic", "switch_every": 24},
)


def name_of(change: dict[str, Any]) -> str:
    """A variant by what it changes.

    Examples
    --------
    >>> name_of({"granularity": "tensor", "mask": False})
    'granularity=tensor, mask=False'
    """
    return ", ".join(f"{option}={value}" for option, value in change.items())


METHODS = {
    CENTRE: Method("blockllm", (), CENTRE_OPTIONS),
    ADAMW: Method("adamw", ()),
    **{name_of(change): Method("blockllm", (), CENTRE_OPTIONS | change) for change in CHANGES},
}

Results = dict[str, Any]


def settings(unit: Unit) -> Results:
    """All that a unit's result depends on besides itself."""
    own = {"method": METHODS[unit.method].settings()} if unit.method else {}
    return {"task": llm_tasks.SETTINGS[unit.data]} | own


def matrix() -> Matrix:
    """Every variant at one rate."""
    return Matrix(
        name="llm_ablation",
        data=DATA,
        methods=tuple(METHODS),
        extras=(),
        grid=lambda data, method: (FULL_RATES[data] if method == ADAMW else RATES[data],),
        seeds=SEEDS,
        steps=STEPS,
        settings=settings,
        criterion=dict.fromkeys(DATA, criterion(LOSS)),
        memory=False,
        expected=EXPECTED,
    )


def quick_matrix() -> Matrix:
    """The centre and one change for a few steps of the small model."""
    data = DATA[-1:]
    names = (CENTRE, name_of(CHANGES[0]))
    seeds, steps = {data[0]: (SEED,)}, {data[0]: QUICK_STEPS}
    return replace(matrix(), data=data, methods=names, seeds=seeds, steps=steps)


def work(unit: Unit) -> Results:
    """Run a unit, in a process of its own."""
    return carry_out(unit, METHODS)


def run(quick: bool) -> Results:
    """Run what is missing and there is time for, then look at everything there is."""
    llm_tasks.check(DATA)
    which = quick_matrix() if quick else matrix()
    runs = collect(which, quick)
    data = {name: rows for name in which.data if (rows := compared(which, runs, name))}
    results: Results = {"data": data, "missing": [unit.name for unit in which.missing(runs)], "not_installed": []}
    results["machines"] = llm_report.machines(runs)
    described = {"centre": CENTRE_OPTIONS, "rates": RATES, "steps": STEPS, "seeds": SEEDS}
    return results | {"settings": described, "pictures": {name: draw(rows, name) for name, rows in data.items()}}


def compared(which: Matrix, runs: Runs, data: str) -> list[Results]:
    """The centre first, then every variant with its difference."""
    found = entries(which, runs, data)
    if CENTRE not in found:
        return []
    start = which.result(runs, which.unit(START, data)._replace(steps=0))
    before = float(LOSS.values(start, start["points"][0]).mean()) if start else float("nan")
    rows = []
    for name in (name for name in METHODS if name in found):
        entry = llm_report.row(LOSS, found[name])
        kept = {key: entry[key] for key in ("mean", "half", "ends")}
        gap = together(LOSS, found[name], found[CENTRE]) if name != CENTRE else None
        rows.append({"name": name, "start": before, "difference": gap} | kept)
    return rows


def draw(rows: list[Results], title: str) -> Figure:
    """Differences to the centre with their wider interval."""
    there = [row for row in rows if row["difference"]][::-1]
    figure, ((axes,),) = panels(1, 1, 7.0, 1.2 + 0.24 * max(4, len(there)))
    for k, row in enumerate(there):
        gap = row["difference"]
        half = np.nanmax([gap["examples"], gap["seeds"]])
        axes.errorbar([gap["mean"]], [k], xerr=[half], marker="o", markersize=4, **(style(0) | {"linestyle": "none"}))
    axes.axvline(0, color="black", linewidth=0.8)
    tidy(axes, "held-out loss, less the centre's", "", title, "linear")
    axes.set_yticks(range(len(there)), [row["name"] for row in there], fontsize=8)
    return figure


def table(rows: list[Results]) -> str:
    """A row for every variant."""
    head = ["change", "seeds", "loss", "less the centre's"]
    return markdown(
        head,
        [
            [
                row["name"],
                str(len(row["ends"])),
                f"{row['mean']:.4f}",
                llm_report.difference(row["difference"], 4),
            ]
            for row in rows
        ],
    )


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: addresses, gsm8k, missing, runs."""
    found = {"missing": llm_report.missing_text(results), "runs": llm_report.machines_text(results)}
    return found | {name: table(rows) for name, rows in results["data"].items()}
