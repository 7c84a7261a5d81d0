# SPDX-License-Identifier: BSD-3-Clause
"""A fine-tuning run from its settings to a model folder: load, train, save; and go on with one that was stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from llm import methods, pictures
from llm.data import Batches, Example, load_examples, load_labelled, split
from llm.evaluate import classes_of, classifies, fitting_length
from llm.interrupt import Interrupts
from llm.peak import begin_peak, peak_memory
from llm.recipe import Recipe
from llm.rows import kind_of_file
from llm.run_folder import RunFolder
from llm.training import Show, Training, train

__all__ = ["finetune", "load", "load_config", "progress", "resume"]


def finetune(
    recipe: Recipe,
    out: str | Path,
    *,
    interrupts: Interrupts,
    time_limit: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on a file and save the result.

    Parameters
    ----------
    recipe : Recipe
    out : str or Path
        A folder that is new or empty (:mod:`llm.run_folder`).
    interrupts : Interrupts
        Entered.
    time_limit : float, optional
        Seconds of training and evaluation.
    console : Console, optional
        Where to say what happens; None: nowhere.

    Returns
    -------
    dict
        The summary: ``ended`` ("finished", "time limit" or "interrupted"), ``steps``, ``tokens``, ``seconds``,
        ``held-out loss`` (before and after; None where that was not evaluated), ``counted memory`` and, measured from
        the first step on, ``peak memory`` in bytes, and where ``model`` and ``checkpoint`` lie.

    Raises
    ------
    ValueError
        If a setting or the data are not valid.
    FloatingPointError
        If the loss or a gradient is not finite.
    """
    folder, console = RunFolder(out), console or Console(quiet=True)
    _check_time_limit(time_limit)
    folder.check_new()
    training, tokenizer = _prepare(_settled(recipe.checked()), console)
    folder.begin(training.recipe)
    return _run(training, tokenizer, folder, interrupts, time_limit, console)


def resume(
    out: str | Path,
    *,
    interrupts: Interrupts,
    time_limit: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Go on with a run that was stopped, from its last checkpoint, bit for bit.

    Parameters
    ----------
    out : str or Path
        The folder of the run.
    interrupts, time_limit, console
        As of :func:`finetune`.

    Returns
    -------
    dict
        As of :func:`finetune`; that of a finished run is given again.

    Raises
    ------
    ValueError
        If there is no run, or if its data or its checkpoint are not what they were.
    """
    folder, console = RunFolder(out), console or Console(quiet=True)
    _check_time_limit(time_limit)
    recipe, summary = folder.recipe(), folder.summary()
    if summary is not None and summary["ended"] == "finished":
        return summary
    training, tokenizer = _prepare(recipe, console)
    training.load(folder)
    folder.rewind(training.step)
    console.print(f"going on after step {training.step:,}")
    return _run(training, tokenizer, folder, interrupts, time_limit, console)


# -- before ------------------------------------------------------------------------------------------


def _check_time_limit(seconds: float | None) -> None:
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"time_limit must be a number of seconds, at least 0; found {seconds!r}")


def _settled(recipe: Recipe) -> Recipe:
    """What does not depend on the folder where the command was given, and the rate of the method."""
    methods.check_options(recipe.method, recipe.options)
    usual = methods.default_lr(recipe.method)
    model = os.path.abspath(recipe.model) if os.path.exists(recipe.model) else recipe.model
    eval_data = recipe.eval_data and os.path.abspath(recipe.eval_data)
    lr = usual if recipe.lr is None else recipe.lr
    return replace(recipe, model=model, data=os.path.abspath(recipe.data), eval_data=eval_data, lr=lr)


def load(name: str, dtype: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer; transformers shows no bars of its own from here on.

    Parameters
    ----------
    name : str
        As of :func:`llm.hf.load_model`.
    dtype : str, optional
        Of the weights. None: as they were saved.
    device : str
        "auto": the GPU if there is one.

    Raises
    ------
    ValueError, OSError, ImportError
        If there is no such device or model, or a package is missing.
    """
    place = _device(device)
    hf = _transformers()
    hf.transformers.utils.logging.disable_progress_bar()
    model, tokenizer = hf.load_model(name, dtype=dtype and getattr(torch, dtype))
    return model.to(place), tokenizer


def load_config(name: str, dtype: str | None = None) -> Any:
    """The configuration of a model, without its weights; parameters as of :func:`load`."""
    config = _transformers().load_config(name)
    config.dtype = getattr(torch, dtype) if dtype else config.dtype
    return config


def _transformers() -> Any:
    try:
        from llm import hf
    except ImportError as missing:
        raise ImportError(f"needs transformers: in a checkout, pip install '.[hf]' ({missing})") from missing
    return hf


def _prepare(recipe: Recipe, console: Console) -> tuple[Training, Any]:
    """Load model and data and make the optimizer; what is drawn depends on the seed alone."""
    for path in filter(None, (recipe.data, recipe.eval_data)):
        kind_of_file(path)  # before a model is looked for, which takes long
    with console.status(f"loading {recipe.model}"):
        model, tokenizer = load(recipe.model, recipe.dtype, recipe.device)
        recipe = replace(recipe, max_length=fitting_length(model, recipe.max_length))
        examples, held = _examples(recipe, model, tokenizer)
    batches = Batches(examples, recipe.batch_size, recipe.seed)
    steps = recipe.steps or max(1, round(recipe.epochs * batches.per_epoch / recipe.accumulate))
    recipe = replace(recipe, steps=steps)
    model, optimizer = _method(recipe, model)
    if recipe.checkpointing:
        _transformers().checkpointing(model)
    training = Training(model, optimizer, batches, held, recipe, tokenizer.pad_token_id or 0)
    console.print(_introduction(training), highlight=False)
    return training, tokenizer


def _examples(recipe: Recipe, model: nn.Module, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """To train and to evaluate on."""
    common: dict[str, Any] = {"max_length": recipe.max_length, "rename": recipe.rename}
    read: Callable[[str, Any], list[Example]]
    if classifies(model):
        read = partial(load_labelled, classes=classes_of(model), **common)
    else:
        read = partial(load_examples, template=recipe.template, **common)
    examples = read(recipe.data, tokenizer)
    if recipe.eval_data is None:
        return split(examples, recipe.held_out, recipe.seed)
    return examples, read(recipe.eval_data, tokenizer)


def _method(recipe: Recipe, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    options = dict(recipe.options)
    if "max_grad_norm" in methods.METHODS[recipe.method].options and recipe.clip:
        options.setdefault("max_grad_norm", recipe.clip)
    torch.manual_seed(recipe.seed)
    return methods.make(
        recipe.method,
        model,
        lr=recipe.lr or methods.default_lr(recipe.method),
        weight_decay=recipe.weight_decay,
        budget=recipe.budget,
        steps=recipe.steps,
        **options,
    )


def _device(name: str) -> torch.device:
    """The device of that name, if tensors can be put there and read again."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as unusable:
        gpus = f"{torch.cuda.device_count()} as cuda" if cuda else "no GPU"
        raise ValueError(
            f"device must be auto, or one of torch's that is here (PyTorch {torch.__version__} sees cpu and {gpus}); "
            f"found {name!r}"
        ) from unusable
    return device


def _introduction(training: Training) -> str:
    recipe, blockllm = training.recipe, training.blockllm
    total = sum(p.numel() for p in training.model.parameters())
    trained = sum(p.numel() for group in training.optimizer.param_groups for p in group["params"])
    active = trained if blockllm is None else blockllm.budget
    size = training.batches.size * recipe.accumulate
    return (
        f"{total:,} parameters, {active:,} active at most ({active / total:.1%}); {recipe.method}, lr {recipe.lr:g}\n"
        f"{len(training.batches.examples):,} examples to learn from, {len(training.held):,} to evaluate on; "
        f"{training.steps:,} steps of {size}"
    )


# -- train, and after --------------------------------------------------------------------------------


def _run(
    training: Training,
    tokenizer: Any,
    folder: RunFolder,
    interrupts: Interrupts,
    time_limit: float | None,
    console: Console,
) -> dict[str, Any]:
    """Train, then save what there is to save."""
    begin_peak()
    with _without_cache(training.model), progress(training, console) as show:
        ended = train(training, folder, interrupts, time_limit=time_limit, show=show)
    if ended != "finished":
        with console.status("saving"), interrupts.whole():
            training.save(folder)
    summary = _summary(training, folder, ended)
    if ended != "interrupted":
        with console.status("saving"), interrupts.whole():
            _finish(training, tokenizer, folder, summary)
    return summary


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Keys and values are kept for generation, which training has no use for."""
    before = getattr(model.config, "use_cache", None)
    if before is None:
        yield
        return
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


def _summary(training: Training, folder: RunFolder, ended: str) -> dict[str, Any]:
    losses = {line["step"]: line["loss"] for line in folder.lines("evaluation")}
    checkpoint = folder.checkpoint()
    return {
        "ended": ended,
        "steps": training.step,
        "tokens": training.tokens,
        "seconds": round(training.seconds, 3),
        "held-out loss": {"before": losses.get(0), "after": losses.get(training.step) if training.step else None},
        "counted memory": training.peak,
        "peak memory": peak_memory(),
        "model": None if ended == "interrupted" else str(folder.model),
        "checkpoint": None if ended == "finished" else str(checkpoint),
    }


def _finish(training: Training, tokenizer: Any, folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Pictures, the model for everybody, the summary; a finished run needs no checkpoint."""
    pictures.plot_losses(folder.lines(), folder.path / "loss.png")
    if training.blockllm is not None:
        training.blockllm.plot(folder.path / "active.png")
        training.blockllm.close()
    _transformers().save_model(methods.plain(training.model.eval()), tokenizer, folder.model)
    folder.write_summary(summary)
    if summary["ended"] == "finished":
        folder.remove_checkpoints()


# -- what the user sees ------------------------------------------------------------------------------


@contextmanager
def progress(training: Training, console: Console) -> Iterator[Show]:
    """A bar on standard error, when somebody is looking; evaluations as lines on the console."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(24), TextColumn("{task.description}"), TimeRemainingColumn())
    quiet = console.quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("evaluating", total=training.steps, completed=training.step)

        def show(line: dict[str, Any]) -> None:
            """Tell a line of the log."""
            if line["event"] == "evaluation":
                loss, perplexity = line["loss"], line["perplexity"]
                console.print(f"step {line['step']:,}: held-out loss {loss:.4f}, perplexity {perplexity:.3f}")
            elif not quiet:
                bar.update(task, completed=line["step"], description=_description(training, line))

        yield show


def _description(training: Training, line: Mapping[str, Any]) -> str:
    blockllm = training.blockllm
    active = "" if blockllm is None else f"  {len(blockllm.active())} tensors active"
    speed = line["tokens"] / max(line["seconds"], 1e-9)
    return (
        f"step {line['step']:,}/{training.steps:,}  loss {line['loss']:.4f}  {speed:,.0f} tokens/s{active}"
        f"  {peak_memory() / 1e9:.2f} GB"
    )
