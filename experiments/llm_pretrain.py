# SPDX-License-Identifier: BSD-3-Clause
"""Pre-training a small Llama on movie reviews: BlockLLM with and without updates of what is inactive.

The model (tied token table of 2048 byte pairs) is trained on 70% of the text once, so that AdamW gets below what
counts of pairs of tokens reach. Every method gets three learning rates on one seed, and one more where the best of
them lies at the end of its grid; then three seeds (weights and order of the data) at its best rate. Rates follow half
a cosine after a warm-up. BlockLLM has 20% of the entries active, among them always the token table (18%) and the
weights of the norms, which GaLore and APOLLO give to AdamW as well. The others stay (``freeze``) or move without state
by the gradients that the backward pass computes anyway: ``sign`` by their signs, ``spectral`` by their directions in
the spectral norm. The part of the rate that these get was chosen by hand (a half for ``spectral``, a quarter for
``sign``). GaLore and APOLLO get a quarter of the width as rank, and their authors' settings.

Units, raw results and environment: :mod:`experiments.llm_common`.
"""

from __future__ import annotations

from typing import Any

from experiments import llm_report, llm_small, llm_tasks
from experiments.llm_common import Matrix, Unit, collect
from experiments.llm_methods import Method
from experiments.llm_report import LOSS, draw, summary
from experiments.llm_training import carry_out, matrix_of, quick_of
from experiments.tables import markdown

TITLE = "Pre-training a small Llama on movie reviews against AdamW, GaLore, APOLLO"
SEEDS = (0, 1, 2)
SEED = SEEDS[0]
DATA = ("reviews",)
STEPS, QUICK_STEPS = 1500, 30
EXPECTED = 60.0  # seconds of a run on a GPU where nothing is known yet
RANK = llm_small.SMALL["hidden_size"] // 4
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS = (
    "model.norm",
    *(f"model.layers.{k}.{n}" for k in range(llm_small.SMALL["num_hidden_layers"]) for n in LAYER_NORMS),
)
ROWS_20 = {"granularity": "rows", "budget": 0.2, "switch_every": 100, "embeddings": "always", "always": NORMS}
SPECTRAL = {"inactive": "spectral", "inactive_scale": 0.5}
SIGN = {"inactive": "sign", "inactive_scale": 0.25}
BARS = {"adamw": 0.05, "memory": 0.5}

METHODS = {
    "AdamW": Method("adamw", (5e-4, 1e-3, 2e-3)),
    "BlockLLM 20%, spectral": Method("blockllm", (2e-3, 4e-3, 8e-3), ROWS_20 | SPECTRAL),
    "GaLore": Method("galore", (2e-3, 5e-3, 1e-2), {"rank": RANK, "scale": 0.25, "update_proj_gap": 200}),
    "APOLLO": Method("apollo", (2e-3, 5e-3, 1e-2), {"rank": RANK, "scale": 1.0, "update_proj_gap": 200}),
}
EXTRAS = {
    "BlockLLM 20%, freeze": Method("blockllm", (1e-3, 2e-3, 4e-3), ROWS_20),
    "BlockLLM 20%, spectral, norms compete": Method(
        "blockllm", (2e-3, 4e-3, 8e-3), ROWS_20 | SPECTRAL | {"always": (), "inactive_scale": 0.25}
    ),
    "BlockLLM 20%, sign": Method("blockllm", (1e-3, 2e-3, 4e-3), ROWS_20 | SIGN),
    "BlockLLM 20%, sign, table competes": Method(
        "blockllm", (1e-3, 2e-3, 4e-3), ROWS_20 | SIGN | {"embeddings": "compete"}
    ),
    "BAdam": Method("badam", (1e-3, 2e-3, 4e-3), {"switch_every": 50}),
}
ALL = METHODS | EXTRAS

Results = dict[str, Any]


def matrix() -> Matrix:
    """The methods that are installed."""
    return matrix_of(
        "llm_pretrain",
        METHODS,
        EXTRAS,
        dict.fromkeys(DATA, STEPS),
        SEEDS,
        dict.fromkeys(DATA, LOSS),
        dict.fromkeys(DATA, EXPECTED),
    )


def quick_matrix() -> Matrix:
    """Two methods at one rate for a few steps."""
    return quick_of(matrix(), ("AdamW", "BlockLLM 20%, spectral"), QUICK_STEPS)


def work(unit: Unit) -> Results:
    """Run a unit, in a process of its own."""
    return carry_out(unit, ALL)


def run(quick: bool) -> Results:
    """Run what is missing and there is time for, then look at everything there is."""
    llm_tasks.check(DATA)
    which = quick_matrix() if quick else matrix()
    results = summary(which, collect(which, quick), ALL, dict.fromkeys(DATA, LOSS))
    results["levels"] = llm_small.levels()
    lines = {name: level for name, level in results["levels"].items() if name != "uniform"}
    there = results["data"].get(DATA[0])
    pictures = {"": draw(there, "A small Llama on movie reviews", lines)} if there else {}
    methods = {name: {"grid": method.grid} | method.settings() for name, method in ALL.items()}
    described = {"methods": methods, "steps": STEPS, "seeds": SEEDS, "task": llm_tasks.SETTINGS[DATA[0]], "bars": BARS}
    return results | {"settings": described, "bars": bars(results), "pictures": pictures}


def bars(results: Results) -> Results:
    """For every variant of ours: differences to the peers, and its optimizer's memory over GaLore's."""
    data = results["data"].get(DATA[0])
    if data is None:
        return {}
    galore = data["methods"].get("GaLore", {}).get("memory", {}).get("state", float("nan"))
    return {
        name: {
            "differences": {peer: pairs.get(peer, {}).get("steps") for peer in ("AdamW", "GaLore", "APOLLO")},
            "memory": data["methods"][name]["memory"]["state"] / galore,
        }
        for name, pairs in data["pairs"].items()
    }


def bars_table(found: Results) -> str:
    """A row for every variant."""
    head = ["loss, less that of", "AdamW", "GaLore", "APOLLO", "state over GaLore's"]
    rows = [
        [
            name,
            *(llm_report.difference(d) for d in entry["differences"].values()),
            llm_report.number(entry["memory"], 2),
        ]
        for name, entry in found.items()
    ]
    return markdown(head, [*rows, ["bar (spectral)", f"<= {BARS['adamw']}", "<= 0", "<= 0", f"<= {BARS['memory']}"]])


def levels_text(found: Results) -> str:
    """What counts alone reach."""
    return (
        f"Held-out nats a token from counts alone: uniform {found['uniform']:.3f}, token frequencies "
        f"{found['unigram']:.3f}, pairs of tokens {found['bigram']:.3f}.\n"
    )


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: reviews, reviews_steps, _cpu, _memory, _grid; bars, levels, notes, missing, runs."""
    own = {"bars": bars_table(results["bars"]), "levels": levels_text(results["levels"])}
    return llm_report.tables_of(results) | own
