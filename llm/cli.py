# SPDX-License-Identifier: BSD-3-Clause
"""The ``bcd-llm`` command.

Exit codes: 0 done; 2 the command line, a file or the model is not valid, or memory does not suffice; 3 stopped at the
time limit, with the model so far and a checkpoint; 4 the loss or a gradient became NaN or infinite; 130 and 143
interrupted by Ctrl-C or SIGTERM, with a checkpoint if a run had begun.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llm.interrupt import Interrupts
from llm.recipe import Recipe

app = typer.Typer(
    help="Fine-tune language models with a small, changing set of active parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
delta_app = typer.Typer(help="Sparse deltas: what fine-tuning changed, in a file.", no_args_is_help=True)
app.add_typer(delta_app, name="delta")
INVALID, EXIT = 2, {"finished": 0, "time limit": 3}

# Options that several commands share
Data = Annotated[str | None, typer.Option("--data", "-d", help=".txt, .jsonl, .json or .tsv, perhaps .gz.")]
ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="smollm2, a folder, a .gguf file, or an id on the hub.")
]
BatchSize = Annotated[int, typer.Option(help="Examples of a batch.", min=1)]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens of an example at most; default: 512, or the model's limit.", show_default=False),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="plain (no chat template), or fields in braces: 'Q: {question} A:||| {answer}' learns the answer."
    ),
]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="LABEL=WORD", help="Word for a label.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the method, as of llm.BlockLLM.")
]
Budget = Annotated[
    str | None, typer.Option(help="What may be active: 0.05 (a share), 1000000 (entries), 500MB.", show_default=False)
]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as saved.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bcd-llm (blockdescent) {metadata.version('blockdescent')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fine-tune language models with a small, changing set of active parameters."""


@app.command(no_args_is_help=True)
def finetune(
    ctx: typer.Context,
    model: ModelName = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run, new or empty.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    method: Annotated[str, typer.Option(help="blockllm, adamw, lora, badam, lisa, hft or misa.")] = Recipe.method,
    budget: Budget = None,
    options: Settings = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: of the method.", show_default=False)] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = Recipe.weight_decay,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = Recipe.schedule,
    warmup: Annotated[int | None, typer.Option(help="Steps; default: 3%, 100 at most.", show_default=False)] = None,
    clip: Annotated[float | None, typer.Option(help="Norm of the gradient at most; 0: any; default: 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: --epochs times through the data.")] = None,
    epochs: Annotated[float, typer.Option(help="Where --steps is not given.")] = Recipe.epochs,
    time_limit: Annotated[float | None, typer.Option(help="Seconds of training and evaluation at most.")] = None,
    batch_size: BatchSize = Recipe.batch_size,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = Recipe.accumulate,
    max_length: MaxLength = None,
    template: Template = None,
    rename: Labels = None,
    held_out: Annotated[int, typer.Option(help="Examples kept for evaluation, a tenth at most.")] = Recipe.held_out,
    eval_data: Annotated[str | None, typer.Option(help="Evaluate on this file instead.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps; default: before and after.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: when stopped.")] = Recipe.save_every,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = Recipe.device,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = Recipe.seed,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on a file; write a model folder, a log and pictures. Ctrl-C saves a checkpoint."""
    with _errors() as interrupts:
        from llm import finetune as runs

        console = _console(as_json)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "finetune runs in one process; start it without torchrun, or write the loop yourself with "
                'BlockLLM(model, process_group="world")'
            )
        if resume is not None:
            _check_alone(ctx)
            summary = runs.resume(resume, interrupts=interrupts, time_limit=time_limit, console=console)
        else:
            if model is None or data is None or out is None:
                raise ValueError("finetune needs --model, --data and --out; or --resume with the folder of a run")
            asked = {f.name: ctx.params[f.name] for f in fields(Recipe)}
            asked |= {"options": _options(options), "rename": _pairs("--label", rename), "budget": _budget(budget)}
            recipe = Recipe(**asked)
            summary = runs.finetune(recipe, out, interrupts=interrupts, time_limit=time_limit, console=console)
        print(json.dumps(summary) if as_json else _told(summary, resume or out))
        raise typer.Exit(EXIT.get(summary["ended"], interrupts.exit_code))


def _check_alone(ctx: typer.Context) -> None:
    """Settings come from the run that is resumed."""
    other = _given(ctx) - {"resume", "time_limit", "as_json"}
    if other:
        raise ValueError(f"--resume goes on with the settings of the run; drop {_spelled(other)}")


def _given(ctx: typer.Context) -> set[str]:
    """Parameters that the command line names."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _spelled(params: set[str]) -> str:
    names = {"options": "--set", "rename": "--label"}
    return ", ".join(names.get(name, "--" + name.replace("_", "-")) for name in sorted(params))


def _told(summary: dict[str, Any], folder: Path | None) -> str:
    """The summary in a few lines."""
    loss, counted = summary["held-out loss"], summary["counted memory"]
    speed = summary["tokens"] / max(summary["seconds"], 1e-9)
    lines = [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['seconds']:,.1f} s, {speed:,.0f} tokens/s"
    ]
    if loss["before"] is not None and loss["after"] is not None:
        lines.append(
            f"held-out loss {loss['before']:.4f} before, {loss['after']:.4f} after "
            f"(perplexity {_exp(loss['before'])} and {_exp(loss['after'])})"
        )
    mb = {part: f"{size / 1e6:,.1f} MB" for part, size in counted.items()}
    lines.append(
        f"counted: weights {mb['weights']}, gradients {mb['gradients']}, optimizer state {mb['optimizer state']}; "
        f"peak in use {summary['peak memory'] / 1e9:.2f} GB"
    )
    if summary["model"] is not None:
        lines.append(f"model: {summary['model']}")
    if summary["ended"] != "finished":
        cause = {"interrupted": "Interrupted", "time limit": "Stopped at --time-limit"}[summary["ended"]]
        lines.append(f"{cause}; go on with: bcd-llm finetune --resume {folder}")
    return "\n".join(lines)


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.3f}"


@app.command("eval", no_args_is_help=True)
def evaluate(
    ctx: typer.Context,
    model: ModelName = None,
    data: Data = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks of lm-eval instead: arc_easy,hellaswag.")] = None,
    classify: Annotated[bool, typer.Option(help="Tell the label of every row; default: loss and perplexity.")] = False,
    delta: Annotated[Path | None, typer.Option(help="Put this delta on the model first.")] = None,
    template: Template = None,
    rename: Labels = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with more tasks.", show_default=False)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before a question; default: of the task.", min=0)
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask tasks by the chat template.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="The first so many examples only (of every task).", min=1, show_default=False)
    ] = None,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 4,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity on a file, the accuracy of a classification (a classifier, or label words), or benchmarks."""
    with _errors():
        if model is None or (data is None) == (tasks is None):
            raise ValueError("eval needs --model and --data, or --model and --tasks")
        _check_useful(ctx, "--data" if tasks is None else "--tasks")
        from llm import finetune as runs

        words = _pairs("--label", rename)
        sizes: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "dtype": dtype}
        asked = Recipe(model=model, data=data or "", **sizes).checked()
        with _console(as_json).status(f"loading {model}"):
            loaded, tokenizer = runs.load(asked.model, asked.dtype, device)
        if delta is not None:
            from llm.delta import apply_delta

            apply_delta(loaded, delta)
        if tasks is not None:
            options = {"include_path": task_folder, "shots": shots, "chat": chat, "limit": limit}
            scores = _benchmarks(loaded, tokenizer, asked, tasks, options)
            print(json.dumps(scores) if as_json else "\n".join(f"{task}: {_listed(s)}" for task, s in scores.items()))
        else:
            answer = _evaluation(loaded, tokenizer, asked, classify, template, words, limit)
            print(json.dumps(answer) if as_json else _listed(answer))


def _check_useful(ctx: typer.Context, of: str) -> None:
    """Some options are for files alone, some for benchmarks."""
    useless = {"--data": {"task_folder", "shots", "chat"}, "--tasks": {"classify", "template", "rename"}}
    found = _given(ctx) & useless[of]
    if found:
        raise ValueError(f"eval {of} makes no use of {_spelled(found)}")


def _benchmarks(model: Any, tokenizer: Any, asked: Recipe, tasks: str, options: dict[str, Any]) -> dict[str, Any]:
    from llm import benchmarks, evaluate

    length = None if asked.max_length is None else evaluate.fitting_length(model, asked.max_length)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return benchmarks.run(model, tokenizer, names, batch_size=asked.batch_size, max_length=length, **options)


def _evaluation(
    model: Any, tokenizer: Any, asked: Recipe, classify: bool, template: str | None, words: Any, limit: int | None
) -> dict[str, Any]:
    from llm import data, evaluate

    length = evaluate.fitting_length(model, asked.max_length)
    common: dict[str, Any] = {"max_length": length, "template": template, "rename": words}
    if classify or evaluate.classifies(model):
        found = evaluate.accuracy(model, tokenizer, asked.data, batch_size=asked.batch_size, limit=limit, **common)
        answer = {"accuracy": found.accuracy, "standard error": found.standard_error}
        return answer | {"rows": found.rows, "majority": found.majority / found.rows}
    examples = data.load_examples(asked.data, tokenizer, **common)[:limit]
    score = evaluate.evaluate(model, examples, batch_size=asked.batch_size, pad=tokenizer.pad_token_id or 0)
    perplexity = score.perplexity if math.isfinite(score.perplexity) else None  # JSON has no infinity
    return {"loss": score.loss, "perplexity": perplexity, "tokens": score.tokens, "examples": score.examples}


def _listed(answer: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in answer.items())


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@app.command(no_args_is_help=True)
def plan(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or an id on the hub.")],
    memory: Annotated[str, typer.Option(help="Of the device, such as 24GB.")] = "24GB",
    budget: Budget = None,
    batch_size: BatchSize = 1,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence; default: 512, or the model's limit.", min=1, show_default=False),
    ] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="With or without alone; default: both.")] = None,
    dtype: Dtype = None,
    options: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of finetune with method blockllm, and the largest budget that fits; loads no weights."""
    with _errors():
        from dataclasses import asdict

        from llm.evaluate import fitting_length
        from llm.finetune import load_config
        from llm.methods import NAMED, check_options
        from llm.plan import memory_of
        from llm.plan import plan as predict

        more = _options(options)
        check_options("blockllm", more)
        memory_of(memory, "--memory")
        asked = NAMED | more | ({} if budget is None else {"budget": _budget(budget)})
        ways = None if checkpointing is None else (checkpointing,)
        console = Console(stderr=True, quiet=as_json, highlight=False)
        with console.status(f"reading the configuration of {model}") as status:
            tell = status.update if console.is_terminal else partial(console.print, soft_wrap=True)
            config = load_config(model, dtype)
            batch = (batch_size, fitting_length(config, max_length))
            found = predict(config, batch, budget=memory, optimizer=asked, checkpointing=ways, tell=tell)
        print(json.dumps(asdict(found)) if as_json else found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for llm.html and its pictures.")] = Path("demo"),
    seconds: Annotated[float, typer.Option(help="Of training.", min=1)] = 120.0,
    model: Annotated[str, typer.Option(help="As of finetune.")] = "smollm2",
) -> None:
    """Fine-tune SmolLM2-135M on Python's documentation for two minutes; write pictures."""
    with _errors() as interrupts:
        from llm.demo import run_demo

        code = run_demo(out, _console(False), interrupts, seconds, model)
        raise typer.Exit(interrupts.exit_code if interrupts.number is not None else code)


# -- deltas ------------------------------------------------------------------------------------------

DeltaFile = Annotated[Path, typer.Argument(metavar="DELTA", help="File of a delta.")]
Folder = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or safetensors file.")]
Result = Annotated[Path | None, typer.Option(help="Write the result here; default: change MODEL.")]


@delta_app.command("save", no_args_is_help=True)
def delta_save(
    base: Annotated[str, typer.Argument(help="Folder, safetensors file, or any model that finetune takes.")],
    tuned: Annotated[str, typer.Argument(help="The same model after training.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    as_json: AsJson = False,
) -> None:
    """Write what differs between two models, bit by bit."""
    with _errors():
        from llm.delta import save_delta

        _tell_delta(save_delta(_tensors_of(base), _tensors_of(tuned), out), as_json)


@delta_app.command("apply", no_args_is_help=True)
def delta_apply(model: Folder, delta: DeltaFile, out: Result = None, as_json: AsJson = False) -> None:
    """Put a delta on its base model."""
    with _errors():
        from llm.delta import apply_delta

        _tell_delta(apply_delta(Path(model), delta, out), as_json)


@delta_app.command("remove", no_args_is_help=True)
def delta_remove(model: Folder, delta: DeltaFile, out: Result = None, as_json: AsJson = False) -> None:
    """Take a delta off; the model is its base again, bit for bit."""
    with _errors():
        from llm.delta import remove_delta

        _tell_delta(remove_delta(Path(model), delta, out), as_json)


@delta_app.command("info", no_args_is_help=True)
def delta_info(
    path: Annotated[Path, typer.Argument(help="A delta, or a folder with deltas.")], as_json: AsJson = False
) -> None:
    """Say what a delta changes, or list the deltas of a folder."""
    with _errors():
        from llm import delta

        every = delta.list_deltas(path) if path.is_dir() else [delta.delta_info(path)]
        if not every:
            typer.echo(f"bcd-llm: {path}: holds no delta", err=True)
        for found in every:
            print(json.dumps(found.as_dict()) if as_json else found)


@delta_app.command("merge", no_args_is_help=True)
def delta_merge(
    paths: Annotated[list[Path], typer.Argument(metavar="DELTA...", help="Deltas of one base.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    conflict: Annotated[str, typer.Option(help="What several change: error, last or sum.")] = "error",
    base: Annotated[str | None, typer.Option(help="The model that they are of; for sum.")] = None,
    as_json: AsJson = False,
) -> None:
    """One delta that does what several deltas of one base do."""
    with _errors():
        from llm.delta import merge_deltas

        model = None if base is None else _tensors_of(base)
        _tell_delta(merge_deltas(paths, out, conflict=conflict, base=model), as_json)


def _tensors_of(name: str) -> Any:
    """A path as it is; anything else is loaded."""
    path = Path(name)
    if path.exists() and path.suffix.lower() != ".gguf":
        return path
    from llm.finetune import load

    return load(name, device="cpu")[0]


def _tell_delta(delta: Any, as_json: bool) -> None:
    """Without its tensors, which ``info`` lists."""
    print(json.dumps(delta.as_dict()) if as_json else str(delta).partition("\n  ")[0])


# -- what the commands share -------------------------------------------------------------------------


def _console(as_json: bool) -> Console:
    """For what is said on the way; next to JSON that goes nowhere."""
    return Console(width=None if sys.stdout.isatty() else 120, quiet=as_json, highlight=False)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE to a mapping."""
    pairs = [text.partition("=") for text in given or ()]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ValueError(f"{option} needs NAME=VALUE; found {name!r}")
    return {name.strip(): value for name, _, value in pairs}


def _options(given: list[str] | None) -> dict[str, Any]:
    """Values are read as JSON where that is possible: numbers, true, null, lists; else they are text."""
    found: dict[str, Any] = {}
    for name, value in _pairs("--set", given).items():
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _budget(given: str | None) -> float | int | str | None:
    """A whole number above 1 is a count, another number a share, anything else an amount of memory."""
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        return given
    return int(number) if number > 1 and number.is_integer() else number


@contextmanager
def _errors() -> Iterator[Interrupts]:
    """Turn what is wrong with the input into one line and an exit code; listen for signals."""
    interrupts = Interrupts()
    try:
        with interrupts:
            yield interrupts
    except KeyboardInterrupt:
        typer.echo("bcd-llm: interrupted", err=True)
        raise typer.Exit(interrupts.exit_code) from None
    except FloatingPointError as error:
        _fail(error, 4)
    except (ValueError, OSError, ImportError) as error:
        _fail(error, INVALID)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        typer.echo(
            "bcd-llm: memory does not suffice; lower --batch-size, --max-length or --budget, use --checkpointing, or "
            "ask bcd-llm plan what fits",
            err=True,
        )
        raise typer.Exit(INVALID) from error


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"bcd-llm: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from error


def main() -> None:
    """Entry point of the ``bcd-llm`` command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown here; read when the first library imports tqdm
    app()


if __name__ == "__main__":
    main()
