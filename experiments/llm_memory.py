# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of training: BlockLLM and its peers, simulated for Llama-2-7B and measured on two small models.

* Simulated (:mod:`llm.plan`): bfloat16 weights, one sequence of 512 tokens, gradient checkpointing. The largest step
  of a run counts: the first one, censuses and switches included, with what is active led through the worst places;
  and first steps at each of these places besides.
* Measured: whole runs on the CPU, float32, with the same count of bytes on real tensors, and the resident memory of
  the process besides; next to the simulation of the same run.

GB are 10^9 bytes. What a kernel takes inside an operation, fragmentation and the context of a device are in no
simulated number; the first is in the resident memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import panels, tidy
from experiments.llm_memory_runs import PEERS, Run, measured, simulated
from experiments.tables import markdown
from llm.ledger import PARTS
from llm.plan import PLACES

TITLE = "Peak memory of BlockLLM and its peers: simulated for Llama-2-7B, measured on small models"
SEED = 0
LOW = {"states": "8bit", "in_backward": True}
OURS: dict[str, dict[str, Any]] = {  # options beside the defaults
    "default, 5%": {"budget": 0.05},
    "default, 1%": {"budget": 0.01},
    "bf16 states, 5%": {"budget": 0.05, "states": "bf16"},
    "bf16 states, 1%": {"budget": 0.01, "states": "bf16"},
    "8-bit states, in backward, 5%": {"budget": 0.05, **LOW},
    "8-bit states, in backward, 1%": {"budget": 0.01, **LOW},
}
BARS = {  # GB
    "bf16 states, 5%": 16.0,
    "bf16 states, 1%": 14.4,
    "8-bit states, in backward, 5%": 14.6,
    "8-bit states, in backward, 1%": 14.0,
}
VARIANTS: dict[str, dict[str, Any]] = {  # all with bf16 states at 5%; rows, the default, are among OURS
    "tensors": {"granularity": "tensor"},
    "layers": {"granularity": "layer"},
    "entries": {"granularity": "entries"},
    "moments kept": {"moments": "keep"},
    "rest by its sign": {"inactive": "sign"},
}
SMALL = ("SmolLM2-135M", "Llama 60M")
TINY = "Llama 6M"
MEASURED: dict[str, str | dict[str, Any]] = {
    "AdamW": "AdamW, one tensor at a time",
    "GaLore r128": "GaLore r128",
    "BAdam": "BAdam, from the bottom",
    "LoRA r8": "LoRA r8",
    "BlockLLM, default, 5%": OURS["default, 5%"],
    "BlockLLM, 8-bit states, in backward, 5%": OURS["8-bit states, in backward, 5%"],
}
SHAPE = (2, 256)  # of the measured runs


def run(quick: bool) -> dict[str, Any]:
    """All sections (quick: one tiny model in place of all, two places, two measured runs)."""
    large, places = (TINY, PLACES[:2]) if quick else ("Llama-2-7B", PLACES)
    results: dict[str, Any] = {
        "settings": {"model": large, "shape": Run._field_defaults["shape"], "measured_shape": SHAPE},
        "ours": {name: worst(large, options, places) for name, options in OURS.items()},
        "peers": {name: simulated(Run(large, name)) for name in PEERS},
        "variants": {
            name: simulated(Run(large, {"budget": 0.05, "states": "bf16", **options}, places=places))
            for name, options in VARIANTS.items()
        },
        "measured": {
            model: {name: both(model, MEASURED[name]) for name in list(MEASURED)[-2 if quick else 0 :]}
            for model in ((TINY,) if quick else SMALL)
        },
    }
    return results | {"pictures": {"": draw(results)}}


def worst(model: str, options: Mapping[str, Any], places: tuple[str, ...]) -> dict[str, Any]:
    """The largest moment of a run by these places, and of first steps at each, which are beside it in bytes."""
    long = simulated(Run(model, options, places=places))
    firsts = {place: simulated(Run(model, options, places=(place,), steps=1)) for place in dict.fromkeys(places)}
    peak = max((long, *firsts.values()), key=lambda moment: moment["bytes"])
    return peak | {"run": long["bytes"], "first_steps": {place: moment["bytes"] for place, moment in firsts.items()}}


def both(model: str, method: str | Mapping[str, Any]) -> dict[str, Any]:
    """A run simulated and measured; of BlockLLM the measured one once along the same places, once free to choose."""
    run = Run(model, method, SHAPE, "float32", checkpointing=False)
    moments = {"simulated": simulated(run), "measured": measured(run)}
    return moments if isinstance(method, str) else moments | {"free": measured(run._replace(places=None))}


# -- picture -------------------------------------------------------------------------------------------


def draw(results: dict[str, Any]) -> Figure:
    """One bar a method, in parts."""
    moments = {f"BlockLLM, {name}": moment for name, moment in results["ours"].items()} | results["peers"]
    moments = {name: moment for name, moment in moments.items() if "bytes" in moment}
    names = sorted(moments, key=lambda name: moments[name]["bytes"])
    figure, ((axes,),) = panels(1, 1, 8.5, 0.6 + 0.28 * len(names))
    start = [0.0] * len(names)
    for part in PARTS:
        sizes = [moments[name]["parts"][part] / 1e9 for name in names]
        axes.barh(names, sizes, left=start, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for k, total in enumerate(start):
        axes.text(total, k, f" {total:.1f}" if total >= 10 else f" {total:.2f}", va="center", fontsize=8)
    title = f"{results['settings']['model']}, bfloat16, 512 tokens, checkpointing: simulated peak"
    tidy(axes, "GB", title=title, scale="linear")
    axes.set_yscale("linear")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(start))
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


# -- tables --------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown of every section."""
    ours = {f"BlockLLM, {name}": moment for name, moment in results["ours"].items()}
    return {
        "bars": _bars(results["ours"]),
        "simulated": _moments(ours | results["peers"]),
        "variants": _moments(results["variants"]),
        "measured": _measured(results["measured"]),
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f}"


def _moment(moment: dict[str, Any]) -> str:
    return f"{moment['phase']}, {'census' if moment['census'] else 'first step' if moment['step'] == 1 else 'step'}"


def _bars(ours: dict[str, Any]) -> str:
    places = list(next(iter(ours.values()))["first_steps"])
    rows = [
        [name, _gb(moment["bytes"]), f"<= {BARS[name]:.1f}" if name in BARS else "", _gb(moment["run"])]
        + [_gb(moment["first_steps"][place]) for place in places]
        for name, moment in ours.items()
    ]
    heads = (f"first step, {place}" for place in places)
    return markdown(["configuration", "peak, GB", "bar, GB", "run through all places", *heads], rows)


def _moments(moments: dict[str, Any]) -> str:
    rows = [
        [name, "not installed", *[""] * (len(PARTS) + 1)]
        if "missing" in moment
        else [name, _gb(moment["bytes"]), *(_gb(moment["parts"][part]) for part in PARTS), _moment(moment)]
        for name, moment in moments.items()
    ]
    return markdown(["method", "peak, GB", *PARTS, "moment"], rows)


def _measured(models: dict[str, Any]) -> str:
    head = ["model", "method", "simulated, GB", "measured, GB", "measured / simulated", "resident, GB"]
    rows = []
    for model, methods in models.items():
        for name, runs in methods.items():
            if any("missing" in moment for moment in runs.values()):
                rows.append([model, name, *["not installed"] * 5])
                continue
            simulated, real = runs["simulated"]["bytes"], runs["measured"]
            free = _gb(runs["free"]["bytes"]) if "free" in runs else ""
            ratio = f"{real['bytes'] / simulated:.3f}"
            grown = _gb(real["resident"]) if "resident" in real else "-"
            rows.append([model, name, _gb(simulated), _gb(real["bytes"]), ratio, grown, free])
    return markdown([*head, "measured, own choice, GB"], rows)
