# SPDX-License-Identifier: BSD-3-Clause
"""The demo: SmolLM2-135M learns Python's own documentation for two minutes, and shows what that took.

The text is what ``help()`` prints for keywords and topics (``pydoc_data.topics`` of the standard library). Every tenth
topic is held out. Time, not steps, ends the training, so that it is as long on a slow machine.
"""

from __future__ import annotations

import base64
import html
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm import methods, pictures
from llm.data import Batches, Example, load_examples
from llm.evaluate import evaluate, fitting_length
from llm.finetune import load, progress
from llm.interrupt import Interrupts
from llm.peak import begin_peak, peak_memory
from llm.recipe import Recipe
from llm.run_folder import RunFolder, check_writable
from llm.training import Training, log_evaluation, train

BUDGET, LR, SWITCHES = 0.05, 1e-3, 4
BATCH, LENGTH = 2, 128  # examples of a batch, tokens of an example
EVERY, HELD = 10, 16  # each how many-th topic is held out; examples of these that are evaluated
FEWEST = 8  # steps, however slow the machine


def run_demo(out: Path, console: Console, interrupts: Interrupts, seconds: float, model: str = "smollm2") -> int:
    """Train for so many seconds, print what came of it, write ``out/llm.html``; returns 0 if the loss fell, else 3."""
    folder = RunFolder(out / "llm")
    for path in (out, folder.path):
        check_writable(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.log_file.unlink(missing_ok=True)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load(model)
        length = min(LENGTH, fitting_length(loaded, None))
        learn, held = (load_examples(file, tokenizer, max_length=length) for file in _write_topics(folder.path))
    loaded.config.use_cache = False
    batches, pad = Batches(learn, BATCH, seed=0), tokenizer.pad_token_id or 0
    with console.status("timing a step"):
        steps = max(FEWEST, round(seconds / _seconds_of_a_step(loaded, batches[0], pad)))
    recipe = Recipe(
        model=model, data="pydoc_data.topics", lr=LR, budget=BUDGET, steps=steps, schedule="linear",
        warmup=min(5, steps // 4), batch_size=BATCH, save_every=0, eval_every=max(1, steps // 4),
    )  # fmt: skip
    _, optimizer = methods.make(
        "blockllm", loaded, lr=LR, budget=BUDGET, switch_every=max(2, steps // SWITCHES), max_grad_norm=1.0
    )
    training = Training(loaded, optimizer, batches, held[:HELD], recipe, pad)
    console.print(
        f"{model} learns Python's documentation: {len(learn):,} pieces of {length} tokens, {HELD} held out, about "
        f"{steps} steps of {BATCH} pieces, {BUDGET:.0%} of the parameters active."
    )
    begin_peak()
    with progress(training, console) as show:
        log_evaluation(training, folder, show)
        ended = train(training, folder, interrupts, time_limit=1.5 * seconds, show=show)
    if ended == "interrupted":
        console.print(f"Interrupted after step {training.step} of {steps}; the log so far: {folder.log_file}")
        return 3
    return _report(training, folder, out / "llm.html", console)


def _write_topics(folder: Path) -> list[Path]:
    """Two JSONL files: to learn from, and held out."""
    from pydoc_data.topics import topics

    files = [folder / "learn.jsonl", folder / "held_out.jsonl"]
    texts = [topics[name] for name in sorted(topics)]
    for file, held in zip(files, (False, True), strict=True):
        mine = [text for k, text in enumerate(texts) if (k % EVERY == 0) == held]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in mine), encoding="utf-8")
    return files


def _seconds_of_a_step(model: Any, batch: Sequence[Example], pad: int) -> float:
    """Three times a forward pass, the second one; measured, steps take 2.5 times as long as that."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        evaluate(model, batch, batch_size=BATCH, pad=pad)
        seconds = 3 * (time.perf_counter() - start)
    return seconds


# -- what it took ------------------------------------------------------------------------------------


def _report(training: Training, folder: RunFolder, page: Path, console: Console) -> int:
    scores = folder.lines("evaluation")
    before, after = scores[0], scores[-1]
    rows, active = _memory(training), _active(folder)
    speed = training.tokens / max(training.seconds, 1e-9)
    result = (
        f"Held-out loss {before['loss']:.3f} before, {after['loss']:.3f} after {training.step} steps (perplexity "
        f"{before['perplexity']:.2f} and {after['perplexity']:.2f}); {training.seconds:.0f} s, {speed:.0f} tokens/s."
    )
    console.print("\n" + result + "\n")
    console.print(_table(["memory, MB", "BlockLLM", "AdamW"], rows))
    console.print(
        f"\n{NOTE}\nMeasured: the whole process has used {peak_memory() / 1e9:.2f} GB at most while it was training.\n"
    )
    console.print(_table(["from step", "where the active parameters are"], active))
    pictures.plot_losses(folder.lines(), folder.path / "loss.png")
    training.optimizer.plot(folder.path / "active.png")  # type: ignore[attr-defined]
    page.write_text(_page(result, rows, active, folder.path), encoding="utf-8")
    console.print(f"\nPictures: {page}")
    return 0 if after["loss"] < before["loss"] else 3


NOTE = (
    "Counted: bytes of gradients before an update and of the optimizer's state after it, the most in any step; of "
    "AdamW (which was not run) a gradient and two moments of every parameter. While BlockLLM scores a tensor, the "
    "gradient of that one tensor is there as well."
)


def _memory(training: Training) -> list[list[str]]:
    """Counted bytes beside those of AdamW on the same model."""
    sizes = [p.nbytes for p in training.model.parameters()]
    optimizer: Any = training.optimizer
    scored = [p.nbytes for k, p in enumerate(optimizer._params()) if k not in optimizer._chooser.never]
    ours = [training.peak["gradients"], max(scored), training.peak["optimizer state"]]
    adamw = [sum(sizes), 0, 2 * sum(sizes)]
    names = ["gradients", "one tensor's gradient", "optimizer state", "together"]
    columns = zip(names, [*ours, sum(ours)], [*adamw, sum(adamw)], strict=True)
    return [[name, f"{a / 1e6:,.1f}", f"{b / 1e6:,.1f}"] for name, a, b in columns]


def _active(folder: RunFolder) -> list[list[str]]:
    """For every choice the layers that have the most of the active parameters."""
    rows = []
    for switch in folder.lines("switch"):
        layers: Counter[str] = Counter()
        for name, entries in switch["active"].items():
            layers[re.sub(r"(\.\d+)\..*", r"\1", name)] += entries
        total = sum(layers.values())
        first = ", ".join(f"{name} {entries / total:.0%}" for name, entries in layers.most_common(4))
        rows.append([f"{switch['step']:,}", f"{first}, in all {len(layers)} layers"])
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k == 0 or len(columns) == 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _page(result: str, rows: Sequence[Sequence[str]], active: Sequence[Sequence[str]], folder: Path) -> str:
    """One self-contained page, light and dark."""
    shown = [
        ("loss.png", "Loss against steps. Grey lines: the choice of what is active changed."),
        ("active.png", "Which share of every parameter was active when, from the input upwards."),
    ]
    figures = "".join(
        f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for name, text in shown
    )
    return _HTML.format(
        result=html.escape(result),
        budget=f"{BUDGET:.0%}",
        note=html.escape(NOTE),
        memory=_rows(["memory, MB", "BlockLLM", "AdamW"], rows),
        active=_rows(["from step", "where the active parameters are"], active),
        figures=figures,
        version=metadata.version("blockdescent"),
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{first}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bcd-llm demo: a language model learns in two minutes</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; }}
th:first-child, td:first-child, th:last-child:nth-child(2), td:last-child:nth-child(2) {{ text-align: left; }}
tr + tr {{ border-top: 1px solid #8885; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; background: white; border-radius: 4px; }}
figcaption, small {{ opacity: .8; font-size: .9rem; }}
</style>
<h1>A language model learns Python's documentation</h1>
<p>SmolLM2-135M-Instruct, BlockLLM with {budget} of the parameters active at a time. <b>{result}</b></p>
<div>{memory}</div>
<p><small>{note}</small></p>
{figures}
<div>{active}</div>
<p>Made by <code>bcd-llm demo</code>, blockdescent {version}, on this machine, one run.</p>
</html>
"""
