# SPDX-License-Identifier: BSD-3-Clause
"""Training runs in pieces: units in processes of their own, raw results a line each, and which unit is next.

A unit is one training run, a few steps whose CPU seconds are measured, one pass that measures memory, or the
evaluation of the model before training. CPU seconds and memory are always measured on a CPU; on which device a
training run is made (LLM_DEVICE, the CPU unless it is set) is noted and no part of what it is. A unit's result is
appended at once to results/NAME_runs.jsonl with the settings that it depends on, so that a benchmark may be ended at
any time and goes on where it stopped; a unit whose settings have changed since is run again. ``python -m experiments
run NAME`` runs units, the most valuable first, and makes tables and pictures of what is there.

Environment: LLM_MINUTES ends it before a unit that would take longer (0: only tables and pictures);
LLM_ONLY="gsm8k;LoRA" keeps to units whose names contain one of the words; LLM_WORKERS=8 runs so many units at a time,
those on a CPU excepted. OMP_NUM_THREADS is handed on as it is.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from experiments import RESULTS, record

TRAIN, MEMORY, START, COST = "train", "memory", "start", "cost"
CPU = "cpu"
PACKAGES = ("torch", "transformers", "peft", "galore-torch", "apollo-torch", "badam", "tokenizers")
ERROR_LINES = 3  # of a unit that failed, kept
SLACK = 1.15  # a unit may take so many times as long as the longest one of its kind so far

Results = dict[str, Any]


class Unit(NamedTuple):
    """What runs at a time.

    Attributes
    ----------
    kind : {"train", "memory", "start", "cost"}
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

    @property
    def device(self) -> str:
        """Where it is to run."""
        return os.environ.get("LLM_DEVICE", CPU) if self.kind in (TRAIN, START) else CPU


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
        """The longest time that a unit of the same kind, data, method and number of steps took; else of any method.

        What ran on a CPU says nothing about a GPU, and the other way round.
        """
        took: dict[str, list[float]] = {}
        for other, lines in self._of.items():
            if (other.kind, other.data, other.steps) == (unit.kind, unit.data, unit.steps):
                alike = [line["made"]["seconds"] for line in lines if ("gpu" in line["made"]) == (unit.device != CPU)]
                took.setdefault(other.method, []).extend(alike)
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
        Whether memory and the CPU seconds of a step are measured.
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
            yield from (self.unit(kind, data, method) for kind in (COST, MEMORY) for method in methods)
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


def run_missing(
    matrix: Matrix, runs: Runs, minutes: float | None = None, only: tuple[str, ...] = (), workers: int = 1
) -> None:
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
    workers : int
        Units at a time; one that is timed on the CPU runs alone.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    tried: set[Unit] = set()
    running: dict[Future[Results], Unit] = {}
    pool = processes(workers)
    try:
        while True:
            unit = _next(matrix, runs, deadline - time.monotonic(), only, tried)
            if unit and (not running or (len(running) < workers and not _alone(unit, running.values()))):
                tried.add(unit)
                print(f"{matrix.name}: {unit.name}", flush=True)
                running[pool.submit(carry, matrix.name, unit)] = unit
                continue
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                line = {"unit": unit._asdict(), "settings": matrix.settings(unit)} | outcome(future)
                runs.append(line)
                print(f"{matrix.name}: {unit.name}: {line.get('error', 'done')}", flush=True)
                if isinstance(future.exception(), BrokenProcessPool) and not running:
                    pool = processes(workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()


def processes(workers: int) -> ProcessPoolExecutor:
    """Fresh processes, one for every unit where they run one after the other."""
    context, tasks = multiprocessing.get_context("spawn"), 1 if workers == 1 else None
    return ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=tasks, initializer=end_with_parent)


def end_with_parent() -> None:
    """In a worker: leave as soon as the process that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()

    def wait_for_its_end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_its_end, daemon=True).start()


def _alone(unit: Unit, running: Iterable[Unit]) -> bool:
    return any(u.device == CPU for u in (unit, *running))


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
    """The raw results after running what is missing and there is time for; quick: training, in a file of its own."""
    runs = scratch_runs(matrix.name) if quick else Runs(raw_file(matrix.name))
    with sigterm_as_exit():
        run_missing(matrix, runs, *((None, (TRAIN,)) if quick else from_environment()))
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


def from_environment() -> tuple[float | None, tuple[str, ...], int]:
    """LLM_MINUTES, LLM_ONLY and LLM_WORKERS.

    Raises
    ------
    ValueError
        If LLM_MINUTES or LLM_WORKERS is no number.
    """
    text, workers = os.environ.get("LLM_MINUTES", ""), os.environ.get("LLM_WORKERS", "1")
    try:
        minutes = float(text) if text else None
    except ValueError:
        raise ValueError(f"LLM_MINUTES must be a number of minutes, such as 60; found {text!r}") from None
    if not workers.isdecimal() or workers == "0":
        raise ValueError(f"LLM_WORKERS must be a number of processes, such as 8; found {workers!r}")
    return minutes, tuple(word for word in os.environ.get("LLM_ONLY", "").split(";") if word), int(workers)


def carry(module: str, unit: Unit) -> Results:
    """Run a unit, in the process of a worker. Returns ``result``, ``where`` it was made, and ``seconds``."""
    began = time.perf_counter()
    result = import_module(f"experiments.{module}").work(unit)
    return {"result": result, "where": where(unit.device), "seconds": round(time.perf_counter() - began, 1)}


def outcome(future: Future[Results]) -> Results:
    """``made``, and ``result`` or ``error``, of a unit that has ended."""
    error = future.exception()
    if error is not None:
        lines = "".join(traceback.format_exception(error)).strip().splitlines()[-ERROR_LINES:]
        return {"made": made() | {"seconds": 0.0}, "error": " | ".join(lines)}
    found = future.result()
    return {"made": made() | found["where"] | {"seconds": found["seconds"]}, "result": found["result"]}


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


def where(device: str) -> Results:
    """The name of a CUDA device and what its library is; nothing for the CPU."""
    if device == CPU:
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
