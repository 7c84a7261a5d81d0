# SPDX-License-Identifier: BSD-3-Clause
"""The training loop: plain PyTorch, and it can be stopped and resumed at every step.

With B_1, ..., B_a the batches of a step and n the number of tokens that are learnt in them together, a step takes the
gradient of ``(1/n) sum over the examples of their losses`` (:mod:`llm.evaluate`), so that how a step is cut into
batches does not matter. Between two steps a run is its weights, its optimizer, the number of steps and torch's
generators. A checkpoint holds these, and a run that is resumed from it goes on bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.data import Batches, Example, collate
from llm.evaluate import Score, evaluate, learnt
from llm.gradients import stored
from llm.interrupt import Interrupts
from llm.losses import losses_of
from llm.optimizer import BlockLLM
from llm.recipe import Recipe
from llm.report import tensors_in
from llm.run_folder import RunFolder

__all__ = ["Show", "Training", "log_evaluation", "train"]

Show = Callable[[dict[str, Any]], None]  # a line of the log


class Training:
    """A run between two steps.

    Parameters
    ----------
    model : Module
        On its device; what :func:`llm.losses.losses_of` can ask.
    optimizer : Optimizer
        Its rates are those of the recipe's schedule at its top.
    batches : Batches
    held : sequence of Example
        What it is evaluated on; may be empty.
    recipe : Recipe
        With the number of steps.
    pad : int
        Token to pad with.

    Attributes
    ----------
    step : int
        Steps done.
    tokens, seconds : int, float
        Read, and spent, in these steps.
    peak : dict of str to int
        Counted bytes: of the weights; of the gradients before an update and of the optimizer's state after it, the
        most in these steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        held: Sequence[Example],
        recipe: Recipe,
        pad: int = 0,
    ) -> None:
        self.model, self.optimizer, self.batches, self.held = model, optimizer, batches, held
        self.recipe, self.pad, self.steps = recipe, pad, recipe.steps or 0
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.peak = {"weights": sum(p.nbytes for p in model.parameters()), "gradients": 0, "optimizer state": 0}
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        model.train()

    @property
    def blockllm(self) -> BlockLLM | None:
        """The optimizer, if it is one that says who is active."""
        return self.optimizer if isinstance(self.optimizer, BlockLLM) else None

    def take_step(self) -> dict[str, Any]:
        """One step.

        Returns
        -------
        dict
            For the log: ``loss``, ``lr``, ``gradient norm`` (before clipping); ``tokens`` and ``seconds`` in all.

        Raises
        ------
        FloatingPointError
            If the loss or a gradient is not finite; weights are as they were.
        """
        start = time.perf_counter()
        rate = self.recipe.rate(self.step)
        for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        first = self.step * self.recipe.accumulate
        window = [self.batches[k] for k in range(first, first + self.recipe.accumulate)]
        loss = self._gradients(window)
        norm = self._update(loss)
        self.step += 1
        self.tokens += sum(len(example.ids) for batch in window for example in batch)
        self.seconds += time.perf_counter() - start
        numbers = {"loss": loss, "lr": rate * self._rates[0], "gradient norm": norm}
        return numbers | {"tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def _gradients(self, window: Sequence[list[Example]]) -> float:
        """The gradient of the loss of a step. Returns the loss."""
        total = learnt(example for batch in window for example in batch)
        device, parts = next(self.model.parameters()).device, []
        for examples in window:
            part = losses_of(self.model, collate(examples, self.pad, device)).sum() / total
            with self._finite():
                part.backward()
            parts.append(part.detach())
        loss = float(torch.stack(parts).sum())
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}")
        return loss

    def _update(self, loss: float) -> float:
        """Clip and update. Returns the norm of the gradient before clipping."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        self._count("gradients", (stored(p.grad) for p in params if p.grad is not None))
        if self.blockllm is not None:
            with self._finite():
                self.blockllm.step(loss=loss)
            norm = self.blockllm.grad_norm or 0.0
        else:
            norm = float(nn.utils.clip_grad_norm_(params, self.recipe.clip or math.inf))
            if not math.isfinite(norm):
                raise self._not_finite(f"the norm of the gradient is {norm}")
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._count("optimizer state", tensors_in(dict(self.optimizer.state)))
        return norm

    def _count(self, part: str, tensors: Iterator[Tensor]) -> None:
        self.peak[part] = max(self.peak[part], sum(tensor.nbytes for tensor in tensors))

    @contextmanager
    def _finite(self) -> Iterator[None]:
        """BlockLLM says by ValueError that a gradient is not finite."""
        try:
            yield
        except ValueError as bad:
            raise self._not_finite(str(bad)) from bad

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(f"step {self.step + 1}: {what}. Lower lr, lengthen warmup, or look at the data")

    def evaluate(self) -> Score:
        """Loss of what is held out."""
        return evaluate(self.model, self.held, batch_size=self.recipe.batch_size, pad=self.pad)

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, folder: RunFolder) -> Path:
        """Write a checkpoint."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.stack(torch.cuda.get_rng_state_all())
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "peak": self.peak}
        tensors = {"optimizer": self.optimizer.state_dict(), "generators": generators}
        return folder.save(self.step, self.model, tensors, state)

    def load(self, folder: RunFolder) -> None:
        """Go on where the last checkpoint was written, if there is one.

        Raises
        ------
        ValueError
            If it cannot be read, or is of another model or method.
        """
        found = folder.load(self.model)
        if found is None:
            return
        tensors, state = found
        self.optimizer.load_state_dict(tensors["optimizer"])
        torch.set_rng_state(tensors["generators"]["cpu"])
        if torch.cuda.is_available() and "cuda" in tensors["generators"]:
            torch.cuda.set_rng_state_all(list(tensors["generators"]["cuda"]))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.peak = state["peak"]


# -- the loop ----------------------------------------------------------------------------------------


def train(
    training: Training,
    folder: RunFolder,
    interrupts: Interrupts,
    *,
    time_limit: float | None = None,
    show: Show = lambda line: None,
) -> str:
    """Train to the last step, or until time or a signal ends it; log, evaluate and write checkpoints on the way.

    Parameters
    ----------
    training : Training
    folder : RunFolder
    interrupts : Interrupts
        Entered.
    time_limit : float, optional
        Seconds from now, looked at between steps.
    show : callable
        Called with the line of every step and evaluation.

    Returns
    -------
    str
        "finished", "time limit" or "interrupted"; whatever it is, the run can be saved.

    Raises
    ------
    KeyboardInterrupt
        On a second signal while a step is not complete; the run must not be saved then.
    FloatingPointError
        If the loss or a gradient is not finite.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    try:
        ended = _steps(training, folder, interrupts, deadline, show)
        log_evaluation(training, folder, show)
    except KeyboardInterrupt:
        if interrupts.torn:
            raise
        return "interrupted"
    return ended


def _steps(training: Training, folder: RunFolder, interrupts: Interrupts, deadline: float, show: Show) -> str:
    """Until the last step or the deadline; a signal raises KeyboardInterrupt between two steps."""
    every = training.recipe.eval_every
    while interrupts.number is None:
        if training.step == 0 or (every and training.step % every == 0):
            log_evaluation(training, folder, show)
        if training.step >= training.steps:
            return "finished"
        if time.monotonic() >= deadline:
            return "time limit"
        with interrupts.whole():
            _take_step(training, folder, show)
    raise KeyboardInterrupt


def _take_step(training: Training, folder: RunFolder, show: Show) -> None:
    """A step, its lines in the log, and a checkpoint if it is time."""
    blockllm = training.blockllm
    before = len(blockllm.history) if blockllm is not None and training.step else 0  # some choose before all steps
    line = training.take_step()
    if blockllm is not None:
        for switch in blockllm.history[before:]:
            active = {name: n for name, n in zip(blockllm.blocks.names, switch["entries"], strict=True) if n}
            folder.log("switch", switch["step"], reason=switch["reason"], active=active)
    folder.log("step", training.step, **line)
    show({"event": "step", "step": training.step, **line})
    every = training.recipe.save_every
    if every and training.step % every == 0 and training.step < training.steps:
        training.save(folder)


def log_evaluation(training: Training, folder: RunFolder, show: Show) -> None:
    """Evaluate, unless that is done at this step, or there is nothing to evaluate on."""
    done = any(line["step"] == training.step for line in folder.lines("evaluation"))
    if training.held and not done:
        score = training.evaluate()
        line = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
        folder.log("evaluation", training.step, **line)
        show({"event": "evaluation", "step": training.step, **line})
