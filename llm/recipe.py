# SPDX-License-Identifier: BSD-3-Clause
"""What a fine-tuning run is asked to do: everything that its result depends on, as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

__all__ = ["SCHEDULES", "Recipe"]

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a run.

    Attributes
    ----------
    model : str
        As of :func:`llm.hf.load_model`: an id on the hub, a folder, a .gguf file or ``"smollm2"``.
    data : str
        File to learn from (:mod:`llm.rows`).
    method : str
        A key of :data:`llm.methods.METHODS`.
    budget : float, int or str, optional
        What may be active, as of :class:`llm.BlockLLM`; None: the method's own.
    options : mapping
        More options of the method.
    lr : float, optional
        None: the method's own.
    weight_decay : float
    schedule : {"cosine", "linear", "constant"}
        Of the learning rate after warm-up, down to 0 at the last step.
    warmup : int, optional
        Steps in which it rises to ``lr``. None: 3% of all, 100 at most.
    clip : float, optional
        Largest norm of the gradient of what is active; 0: any. None: 1, but 0 with ``in_backward``.
    steps : int, optional
        None: ``epochs`` times through the data.
    epochs : float
    batch_size : int
        Examples of a batch.
    accumulate : int
        Batches of a step.
    max_length : int, optional
        Tokens of an example at most. None: 512, or what the model can read if that is less.
    template : str, optional
        As of :func:`llm.data.load_examples`.
    rename : mapping of str to str
        Words for labels.
    held_out : int
        Examples of the data that are kept for evaluation, a tenth of all at most; 0: none.
    eval_data : str, optional
        File to evaluate on, in place of held-out examples.
    eval_every : int, optional
        Steps between evaluations. None: before and after alone.
    save_every : int
        Steps between checkpoints; 0: only where the run is stopped.
    checkpointing : bool
        Recompute activations in the backward pass: less memory, more time.
    dtype : str, optional
        Of the weights: "float32", "bfloat16", "float16". None: as they were saved.
    device : str
        "auto": the GPU if there is one.
    seed : int
        Below 2^63.
    """

    model: str
    data: str
    method: str = "blockllm"
    budget: float | int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int | None = None
    clip: float | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    max_length: int | None = None
    template: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    held_out: int = 32
    eval_data: str | None = None
    eval_every: int | None = None
    save_every: int = 100
    checkpointing: bool = False
    dtype: str | None = None
    device: str = "auto"
    seed: int = 0

    def checked(self) -> Recipe:
        """These settings if they make sense.

        Raises
        ------
        ValueError
            Otherwise.
        """
        for name in ("steps", "batch_size", "accumulate", "eval_every"):
            self._at_least(name, 1)
        for name in ("warmup", "clip", "held_out", "save_every", "weight_decay", "seed"):
            self._at_least(name, 0)
        self._at_least("max_length", 2)
        if not self.seed < 2**63:
            raise ValueError(f"seed must be at most 2^63 - 1; found {self.seed!r}")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive; found {value!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; found {self.schedule!r}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16; found {self.dtype!r}")
        early = [name for name in ("in_backward", "inactive") if self.options.get(name) not in (None, False, "freeze")]
        if early and self.accumulate > 1:
            raise ValueError(f"accumulate must be 1 with the option {early[0]}; found {self.accumulate}")
        clip = float(not self.options.get("in_backward")) if self.clip is None else self.clip
        return replace(self, clip=clip)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}; found {value!r}")

    def rate(self, step: int) -> float:
        """Factor of the learning rate in step number ``step`` (from 0) of ``steps``, which must be known.

        Examples
        --------
        >>> recipe = Recipe(model="", data="", steps=10, warmup=2, schedule="linear")
        >>> [recipe.rate(step) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
        """
        steps = self.steps or 1
        warmup = min(100, round(0.03 * steps)) if self.warmup is None else self.warmup
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        falls = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return falls[self.schedule]

    def as_json(self) -> str:
        """For a file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, path: Path) -> Recipe:
        """Read what :meth:`as_json` wrote.

        Raises
        ------
        ValueError
            If it is something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{f.name: values[f.name] for f in fields(cls)}).checked()
        except (ValueError, KeyError, TypeError) as bad:
            raise ValueError(f"{path}: must be the settings of a run, as bcd-llm writes them ({bad!r})") from bad
