# SPDX-License-Identifier: BSD-3-Clause
"""Training runs in pieces: units in processes of their own, raw results a line each, and which unit is next.

A unit is one training run, one pass that measures memory, or the evaluation of the model before training. Its result
is appended at once to results/NAME_runs.jsonl with the settings that it depends on, so that a benchmark may be ended at
any time and goes on where it stopped; a unit whose settings have changed since is run again. ``python -m experiments
run NAME`` runs units, the most valuable first, and makes tables and pictures of what is there.

Environment: LLM_MINUTES ends it before a unit that would take longer (0: only tables and pictures);
LLM_ONLY="gsm8k;LoRA" keeps to units whose names contain one of the words. OMP_NUM_THREADS is handed on as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from experiments import FOLDER, RESULTS, record

TRAIN, MEMORY, START = "train", "memory", "start"
PACKAGES = ("torch", "transformers", "peft", "galore-torch", "apollo-torch", "badam", "tokenizers")
ERROR_LINES = 3  # of a unit that failed, kept
SLACK = 1.15  # a unit may take so many times as long as the longest one of its kind so far

Results = dict[str, Any]


class Unit(NamedTuple):
    """What runs at a time.

    Attributes
    ----------
    kind : {"train", "memory", "start"}
    data : str
    method : str
        "" for the model before training.
    lr : float
    seed : int
        Of the order of the data and of everything that a method draws.
    steps : int
    """

    kind: str
    data: str
    method: str = ""
    lr: float = 0.0
    seed: int = 0
    steps: int = 0

    @property
    def name(self) -> str:
        """For the log, for LLM_ONLY and for lists of what is missing."""
        what = f", lr {self.lr:g}, seed {self.seed}" if self.kind == TRAIN else ""
        return f"{self.kind} {self.data} {self.method}{what}".strip()


# -- raw results --------------------------------------------------------------------------------


class Runs:
    """The raw results of a benchmark.

    Parameters
    ----------
    path : Path
        A file with a JSON object on every line: ``unit``, ``settings``, ``made`` (when, where, how long) and
        ``result`` or ``error``. Lines that a killed process left unfinished are passed over.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[Results] = []
        self._of: dict[Unit, list[Results]] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                self._take(json.loads(line))

    def _take(self, line: Results) -> None:
        self.lines.append(line)
        if "result" in line:
            self._of.setdefault(Unit(**line["unit"]), []).append(line)

    def append(self, line: Results) -> None:
        """Keep a line, in memory and on disk."""
        self._take(plain(line))
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(json.dumps(line).encode() + b"\n")

    def line(self, unit: Unit, settings: Results) -> Results | None:
        """The last good line of a unit under these settings."""
        settings = plain(settings)
        return next((line for line in reversed(self._of.get(unit, [])) if line["settings"] == settings), None)

    def seconds(self, unit: Unit) -> float | None:
        """The longest time that a unit of the same kind, data, method and number of steps took; else of any method."""
        took: dict[str, list[float]] = {}
        for other, lines in self._of.items():
            if (other.kind, other.data, other.steps) == (unit.kind, unit.data, unit.steps):
                took.setdefault(other.method, []).extend(line["made"]["seconds"] for line in lines)
        mine = took.get(unit.method) or [value for values in took.values() for value in values]
        return max(mine, default=None)


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def raw_file(name: str) -> Path:
    """Where the raw results of an experiment lie."""
    return RESULTS / f"{name}_runs.jsonl"


def scratch_runs(name: str) -> Runs:
    """An empty file for a quick run, in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / "blockdescent-experiments"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_runs.quick.jsonl"
    path.unlink(missing_ok=True)
    return Runs(path)


# -- which units there are ----------------------------------------------------------------------


class Tuned(NamedTuple):
    """What is known of the learning rates of a method.

    Attributes
    ----------
    tried : dict of float to float
        The criterion (less is better) by learning rate, on the first seed.
    missing : list of float
    best : float or None
        None until nothing is missing.
    edge : bool
        Whether the best one is the smallest or the largest that was tried.
    """

    tried: dict[float, float]
    missing: list[float]
    best: float | None
    edge: bool


@dataclass(frozen=True)
class Matrix:
    """Methods x learning rates on one seed, then more seeds at the best rate, on several data sets.

    Attributes
    ----------
    name : str
        Of the experiment, whose module has ``work(unit)``.
    data : tuple of str
        The most important first.
    methods, extras : tuple of str
        Who has to be there, and who is added as time allows.
    grid : callable
        From a data set and a method to its learning rates, ascending. If the best of several is the first or the
        last of them, one more beyond it is tried.
    seeds : mapping of str to tuple of int
        By data set; rates are chosen on the first.
    steps : mapping of str to int
    settings : callable
        From a unit to everything else that its result depends on.
    criterion : mapping of str to callable
        By data set: from the result of a training run to the number that the best rate minimises.
    memory : bool
        Whether memory is measured.
    expected : mapping of str to float
        Seconds of a training run where nothing is known yet, by data set.
    """

    name: str
    data: tuple[str, ...]
    methods: tuple[str, ...]
    extras: tuple[str, ...]
    grid: Callable[[str, str], tuple[float, ...]]
    seeds: Mapping[str, tuple[int, ...]]
    steps: Mapping[str, int]
    settings: Callable[[Unit], Results]
    criterion: Mapping[str, Callable[[Results], float]]
    memory: bool
    expected: Mapping[str, float]

    def unit(self, kind: str, data: str, method: str = "", lr: float = 0.0, seed: int | None = None) -> Unit:
        """A unit of this matrix; without a seed: of the first one."""
        return Unit(kind, data, method, lr, self.seeds[data][0] if seed is None else seed, self.steps[data])

    def result(self, runs: Runs, unit: Unit) -> Results | None:
        """The result of a unit if it is there."""
        line = runs.line(unit, self.settings(unit))
        return line["result"] if line else None

    def tuned(self, runs: Runs, data: str, method: str) -> Tuned:
        """Where the search for the learning rate stands."""
        rates = list(self.grid(data, method))
        tried = self._tried(runs, data, method, rates)
        if len(rates) > 1 and len(tried) == len(rates):
            beyond = _beyond(rates, min(tried, key=tried.__getitem__))
            rates = sorted({*rates, *beyond})
            tried = self._tried(runs, data, method, rates)
        missing = [lr for lr in rates if lr not in tried]
        best = None if missing else min(tried, key=tried.__getitem__)
        return Tuned(tried, missing, best, len(rates) > 1 and best in (rates[0], rates[-1]))

    def _tried(self, runs: Runs, data: str, method: str, rates: list[float]) -> dict[float, float]:
        found = {lr: self.result(runs, self.unit(TRAIN, data, method, lr)) for lr in rates}
        return {lr: self.criterion[data](result) for lr, result in found.items() if result is not None}

    def missing(self, runs: Runs) -> list[Unit]:
        """What is known to be missing, in the order in which it should be run."""
        every = (
            unit for part in (self.methods, self.extras) for data in self.data for unit in self._of(data, part, runs)
        )
        return [unit for unit in dict.fromkeys(every) if self.result(runs, unit) is None]

    def _of(self, data: str, methods: tuple[str, ...], runs: Runs) -> Iterator[Unit]:
        """Middle rates first, then the others, memory, and more seeds where the best rate is known."""
        yield self.unit(START, data)._replace(steps=0)
        grids = {method: self.grid(data, method) for method in methods}
        for turn in range(max(map(len, grids.values()), default=0)):
            for method, grid in grids.items():
                order = sorted(grid, key=lambda lr, grid=grid: abs(grid.index(lr) - len(grid) // 2))
                yield from (self.unit(TRAIN, data, method, lr) for lr in order[turn : turn + 1])
        if self.memory:
            yield from (self.unit(MEMORY, data, method) for method in methods)
        tuned = {method: self.tuned(runs, data, method) for method in methods}
        for method, state in tuned.items():
            yield from (self.unit(TRAIN, data, method, lr) for lr in state.missing)
        for seed in self.seeds[data][1:]:
            for method, state in tuned.items():
                if state.best is not None:
                    yield self.unit(TRAIN, data, method, state.best, seed)


def _beyond(rates: list[float], best: float) -> list[float]:
    """The next rate beyond the end at which the best one lies, two digits of it; none inside."""
    if best == rates[0]:
        return [float(f"{rates[0] ** 2 / rates[1]:.1e}")]
    return [float(f"{rates[-1] ** 2 / rates[-2]:.1e}")] if best == rates[-1] else []


# -- running them -------------------------------------------------------------------------------


def run_missing(matrix: Matrix, runs: Runs, minutes: float | None = None, only: tuple[str, ...] = ()) -> None:
    """Run what is missing until nothing is, or until the next unit would not fit in the time that is left.

    Parameters
    ----------
    matrix : Matrix
    runs : Runs
        Every result is appended at once.
    minutes : float, optional
        Of wall-clock time; None: no limit.
    only : tuple of str
        Words of which a unit's name contains one; empty: all units.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    tried: set[Unit] = set()
    while unit := _next(matrix, runs, deadline - time.monotonic(), only, tried):
        tried.add(unit)
        print(f"{matrix.name}: {unit.name}", flush=True)
        line = {"unit": unit._asdict(), "settings": matrix.settings(unit)} | in_a_process(matrix.name, unit)
        runs.append(line)
        print(f"{matrix.name}: {line.get('error', 'done')}, {line['made']['seconds']:.0f} s", flush=True)


def _next(matrix: Matrix, runs: Runs, left: float, only: tuple[str, ...], tried: set[Unit]) -> Unit | None:
    """The first unit that is missing, was not tried just now, and fits."""
    for unit in matrix.missing(runs):
        named = not only or any(word in unit.name for word in only)
        if named and unit not in tried and SLACK * (runs.seconds(unit) or _expected(matrix, unit)) <= left:
            return unit
    return None


def _expected(matrix: Matrix, unit: Unit) -> float:
    """Seconds of a unit of which nothing is known."""
    return matrix.expected[unit.data] * (1.0 if unit.kind == TRAIN else 0.5)


def collect(matrix: Matrix, quick: bool) -> Runs:
    """The raw results after running what is missing and there is time for; quick: all of it, in a file of its own."""
    runs = scratch_runs(matrix.name) if quick else Runs(raw_file(matrix.name))
    with sigterm_as_exit():
        run_missing(matrix, runs, *((None, ()) if quick else from_environment()))
    return runs


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM an exception, so that the process of a unit does not outlive this one."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def from_environment() -> tuple[float | None, tuple[str, ...]]:
    """LLM_MINUTES and LLM_ONLY.

    Raises
    ------
    ValueError
        If LLM_MINUTES is no number.
    """
    text = os.environ.get("LLM_MINUTES", "")
    try:
        minutes = float(text) if text else None
    except ValueError:
        raise ValueError(f"LLM_MINUTES must be a number of minutes, such as 60; found {text!r}") from None
    return minutes, tuple(word for word in os.environ.get("LLM_ONLY", "").split(";") if word)


def in_a_process(module: str, unit: Unit) -> Results:
    """Run a unit in a fresh process.

    Returns
    -------
    dict
        ``made``, and ``result`` or ``error``.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "result.json", Path(folder) / "errors"
        command = [sys.executable, "-m", "experiments.llm_common", module, json.dumps(unit._asdict()), str(out)]
        with errors.open("wb") as stream, subprocess.Popen(command, cwd=FOLDER.parent, stderr=stream) as process:
            try:
                process.wait()
            except BaseException:
                process.kill()
                raise
        entry = {"made": made() | {"seconds": round(time.perf_counter() - began, 1)}}
        if out.exists():
            return entry | {"result": json.loads(out.read_text(encoding="utf-8"))}
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-ERROR_LINES:]
        return entry | {"error": " | ".join(last) or f"exit status {process.returncode}"}


def made() -> Results:
    """When, at which commit, on which machine, with which versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": record.git_commit(),
        "cpu": record.cpu_model(),
        "threads": os.environ.get("OMP_NUM_THREADS", f"all {os.cpu_count()}"),
        "load": record.load_average(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main(module: str, unit: str, out: str) -> None:
    """What the process of a unit does."""
    result = import_module(f"experiments.{module}").work(Unit(**json.loads(unit)))
    part = Path(out + ".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
