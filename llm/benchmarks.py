# SPDX-License-Identifier: BSD-3-Clause
"""Standard benchmarks of language models, by name: the tasks of lm-eval, the Language Model Evaluation Harness.

lm-eval writes the prompts, and scores what a model answers or which of several continuations it finds likeliest; the
model is the one that is loaded here. Its tasks download their data. Those of a folder of yours, YAML files in the form
of lm-eval, may read files beside them.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llm.evaluate import classifies

__all__ = ["run"]


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int = 4,
    max_length: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks of lm-eval.

    Seeds the global generators of Python, NumPy and torch, as lm-eval does, and works in ``include_path`` meanwhile.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A language model, where it is to run.
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : sequence of str
        Names of tasks, groups or tags, such as ``"arc_easy"``, ``"mmlu"``.
    limit : int, optional
        The first so many examples of every task only.
    shots : int, optional
        Solved examples in front of a question. None: as the task says, or none. Tasks that insist on none get none.
    chat : bool
        Write prompts by the chat template of the tokenizer.
    batch_size : int
        Sequences at a time.
    max_length : int, optional
        Tokens of a sequence at most; longer ones lose their beginning. None: what the model can read.
    include_path : str or Path, optional
        Folder of more tasks. Relative paths of data in these are seen from there.

    Returns
    -------
    dict
        For every task and group its metrics, their standard errors (None where there is none), the number of
        ``"examples"``, the ``"shots"`` and the ``"version"`` of the task.

    Raises
    ------
    ValueError
        If there is no such task or folder, a task cannot read its data, the model is a classifier, or ``chat`` is asked
        of a tokenizer without a template.
    ImportError
        If lm-eval, or a package that a task needs, is missing.
    OSError
        If data cannot be downloaded.
    """
    harness, folder = _harness(), Path.cwd() if include_path is None else Path(include_path).resolve()
    if classifies(model):
        raise ValueError(f"model must be a language model; {type(model).__name__} tells classes alone")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template, which this one lacks")
    if not folder.is_dir():
        raise ValueError(f"include_path must be a folder; found {str(include_path)!r}")
    manager = _manager(tasks, None if include_path is None else folder)
    options = {"limit": limit, "num_fewshot": shots, "apply_chat_template": chat, "log_samples": False}
    unreadable = importlib.import_module("datasets.exceptions").DatasetsError
    with _wrapped(model, tokenizer, batch_size, max_length) as wrapped, chdir(folder):
        try:
            found = harness.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, **options)
        except unreadable as error:
            raise ValueError(f"tasks: data cannot be read: {error} ({error.__cause__})") from error
    return {name: _scores(found, name) for name in found["results"]}


def _harness() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as missing:
        raise ImportError(
            f"benchmarks need the package lm-eval: in a checkout, pip install '.[lm-eval]' ({missing})"
        ) from missing


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """What finds tasks by name, if it finds all of these; the folder comes before the tasks of lm-eval."""
    if not tasks:
        raise ValueError("tasks must name at least one task; found none")
    kind, where = importlib.import_module("lm_eval.tasks").TaskManager, "lm-eval"
    if folder is not None:
        where += f" or in the readable .yaml files of {folder.name}"
        manager = kind(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager  # reading the 14,000 files of lm-eval takes seconds
    manager = kind(include_path=folder and str(folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        near = ", ".join(difflib.get_close_matches(unknown[0], manager.all_tasks)) or "nothing"
        raise ValueError(f"tasks must be names of tasks in {where}; found {', '.join(unknown)} (near to it: {near})")
    return manager


@contextmanager
def _wrapped(model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> Iterator[Any]:
    """The model as lm-eval wants it, in evaluation mode for a while."""
    module = importlib.import_module("lm_eval.models.huggingface")
    log, before = logging.getLogger(module.__name__), model.training
    log.setLevel(logging.ERROR)  # it warns that a model in memory is not one to load
    try:
        made = module.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        log.setLevel(logging.NOTSET)
        if not sys.stderr.isatty():
            for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(made, name, partial(getattr(made, name), disable_tqdm=True))
        yield made
    finally:
        log.setLevel(logging.NOTSET)
        model.train(before)


def _scores(found: Any, name: str) -> dict[str, Any]:
    """Of one task or group; lm-eval's keys are ``metric,filter`` and ``metric_stderr,filter``."""
    scores: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if comma:
            kind = metric.removesuffix("_stderr")
            shown = kind + (f" ({chosen})" if chosen != "none" else "")
            shown += " standard error" if kind != metric else ""
            scores[shown] = None if isinstance(value, str) else float(value)  # "N/A"
    examples = found["results"][name].get("sample_len")
    shots, version = found["n-shot"].get(name), found["versions"].get(name)
    return scores | {"examples": examples, "shots": shots, "version": None if version is None else str(version)}
