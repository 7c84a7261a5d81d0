# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of the configuration that ``bcd-llm finetune`` uses, simulated for Llama-2-7B; see llm_memory.

A run by all places, and first steps at each of them, for both budgets and both ways to store moments.
"""

from __future__ import annotations

import contextlib
from typing import Any

from experiments.llm_memory import BARS, LOW, TINY, worst
from experiments.llm_methods import NAMED
from experiments.tables import markdown
from llm.plan import PLACES

TITLE = "Peak memory of BlockLLM's named configuration: simulated for Llama-2-7B"
SEED = 0
OURS: dict[str, dict[str, Any]] = {  # by the name of its bar
    "bf16 states, 5%": NAMED | {"budget": 0.05},
    "bf16 states, 1%": NAMED | {"budget": 0.01},
    "8-bit states, in backward, 5%": NAMED | {"budget": 0.05, **LOW},
    "8-bit states, in backward, 1%": NAMED | {"budget": 0.01, **LOW},
}


def run(quick: bool) -> dict[str, Any]:
    """All four, until Ctrl-C (quick: two of a tiny model, at two places)."""
    model, places = (TINY, PLACES[:2]) if quick else ("Llama-2-7B", PLACES)
    found: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then is kept
        for name, options in list(OURS.items())[: 2 if quick else None]:
            found[name] = worst(model, options, places)
            print(f"llm_memory_named: {name}: {found[name]['bytes'] / 1e9:.3f} GB", flush=True)
    return {"settings": {"model": model, "options": OURS}, "ours": found}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown by name: bars."""
    rows = []
    for name, moment in results["ours"].items():
        sizes = moment["bytes"], moment["run"], *moment["first_steps"].values()
        peak, *others = (f"{size / 1e9:.3f}" for size in sizes)
        rows.append([name, peak, f"<= {BARS[name]:.1f}", *others])
    firsts = (f"first step, {place}" for place in next(iter(results["ours"].values()))["first_steps"])
    return {"bars": markdown(["named configuration", "peak, GB", "bar, GB", "run through all places", *firsts], rows)}
