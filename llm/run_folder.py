# SPDX-License-Identifier: BSD-3-Clause
"""The folder of a run: its settings, its log, its last checkpoint, its result.

::

    run.json             settings (:class:`llm.recipe.Recipe`)
    data.sha256          of the content of the data files
    training_log.jsonl   a line for every step, evaluation and choice of what is active
    checkpoint-STEP/     model.safetensors, optimizer.pt (read with weights_only=True), state.json
    model/               the result, a model folder as transformers has them
    summary.json         what the run came to
    loss.png, active.png
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm.recipe import Recipe

__all__ = ["RunFolder", "check_writable"]


class RunFolder:
    """One run on disk.

    Parameters
    ----------
    path : str or Path
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log_file = self.path / "training_log.jsonl"
        self.model = self.path / "model"

    # -- settings ----------------------------------------------------------------------------------

    def check_new(self) -> None:
        """Raise ValueError if there is something in it, or if nothing can be written into it."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path}: must be a new or empty folder; to go on with the run in it use --resume")
        check_writable(self.path)

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and write the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "data.sha256").write_text(_digest(recipe), encoding="utf-8")
        (self.path / "run.json").write_text(recipe.as_json(), encoding="utf-8")

    def recipe(self) -> Recipe:
        """The settings of the run that is here.

        Raises
        ------
        ValueError
            If there is none, or if its data are no longer the same.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise ValueError(f"{self.path}: holds no run (it lacks run.json)")
        recipe = Recipe.from_json(file)
        if (self.path / "data.sha256").read_text(encoding="utf-8") != _digest(recipe):
            raise ValueError(f"{self.path}: the data are not those of the run: {recipe.data} has changed")
        return recipe

    # -- log ---------------------------------------------------------------------------------------

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append a line."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of the log, or those of one kind; one that a crash has cut short is left out."""
        found = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines() if self.log_file.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in found if event in (None, line["event"])]

    def rewind(self, step: int) -> None:
        """Drop what was logged after a step; in step 0 nothing happens but an evaluation."""
        lines = [line for line in self.lines() if line["step"] <= step and (step or line["event"] == "evaluation")]
        temporary = self.log_file.with_suffix(".new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.log_file)

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint beside the last one, then remove that: at every moment one of them is whole.

        Parameters
        ----------
        step : int
        model : Module
        optimizer : mapping
            Tensors and plain values that ``torch.load(weights_only=True)`` takes.
        state : mapping
            Values for JSON.
        """
        from safetensors.torch import save_model

        target = self.path / f"checkpoint-{step}"
        if not target.exists():
            temporary = self.path / "checkpoint.new"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_model(model, str(temporary / "model.safetensors"))
            torch.save(dict(optimizer), temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            temporary.rename(target)
        self.remove_checkpoints(but=target)
        return target

    def checkpoint(self) -> Path | None:
        """The last checkpoint."""
        return max(self._checkpoints(), key=_step_of, default=None)

    def load(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Put the last checkpoint's weights into a model.

        Returns
        -------
        optimizer, state : dict
            As they were saved; None if there is no checkpoint.
        """
        from safetensors.torch import load_model

        checkpoint = self.checkpoint()
        if checkpoint is None:
            return None
        try:
            load_model(model, checkpoint / "model.safetensors")
            optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        except Exception as broken:  # each of the three formats has errors of its own
            raise ValueError(f"{checkpoint}: cannot be read, or is of another model ({broken})") from broken
        return optimizer, state

    def remove_checkpoints(self, but: Path | None = None) -> None:
        """Remove all checkpoints but one."""
        for checkpoint in self._checkpoints():
            if checkpoint != but:
                shutil.rmtree(checkpoint)

    def _checkpoints(self) -> list[Path]:
        found = self.path.glob("checkpoint-*")
        return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdigit()]

    # -- result ------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any] | None:
        """What the run came to, if it has ended."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Say what the run came to."""
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Raise ValueError if a folder is neither there nor can be made, or if nothing can be written into it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{folder}: must be a folder; {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: must be a folder to write into; there is no permission to write into {there}")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _digest(recipe: Recipe) -> str:
    """Of the content of all data files."""
    files = [name for name in (recipe.data, recipe.eval_data) if name is not None]
    digests = []
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        digests.append(hashlib.sha256(Path(name).read_bytes()).hexdigest())
    return " ".join(digests)
