# SPDX-License-Identifier: BSD-3-Clause
"""The SVM estimators against scikit-learn (LIBSVM), scikit-learn-intelex and LIBSVM's own binding.

Every solver runs in a process of its own with two threads, one run at a time. Each gets the data in every form it
takes (float64 and float32; sparse data as CSR and as dense arrays) and is judged by its best converged form. The
solvers take turns: round r runs each once. After the first round the forms that did not converge, or took more than
LEFT_BEHIND times as long as the best one of the same solver, drop out. One float64 function
(:mod:`experiments.svm_judge`) recomputes objective, violation and feasibility from the coefficients; a model that is
not within the tolerance does not count as fast. The violation is judged on the numbers that a solver was given (for
float32 input: the rounded ones); objectives are compared on the float64 data.

The floor beside a time is n x n_sv kernel entries once, at the rate measured here of a dense float32 product of
depth d and one exponential an entry (none for the linear kernel), also for sparse data.

Environment: SVM_PEERS_CASES="german,usps" runs the cases whose names contain a word, and saves nothing but the
partial file; SVM_PEERS_RESUME=1 takes finished parts from the partial file of an interrupted run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from experiments import record
from experiments.svm_cases import CASES, Case, exact_in_float32, forms, load, rounded
from experiments.svm_judge import THREADS, TOL, in_tiles, judge
from experiments.svm_report import (
    AT_DEFAULT_CACHE,
    BARS,
    CACHE,
    CAP,
    DEFAULT_CACHE,
    LIBSVM,
    MEMORY,
    SCALED,
    bars,
    best,
    draw,
    seconds,
    tables,
)
from experiments.svm_workers import SOLVERS, Worker

TITLE = "SVM estimators against LIBSVM, scikit-learn and scikit-learn-intelex"
SEED = 0
ROUNDS = 3
SHORT, SHORT_ROUNDS = 2.0, 9  # seconds of a first round, and the rounds it then gets
ONCE = {CACHE: 60.0, DEFAULT_CACHE: 10.0}  # seconds; a run that takes longer is not repeated
PATIENCE = 900.0  # seconds for imports, compilation and loading, before the clock
LEFT_BEHIND = 1.5
TOUCHED = 6 * 2**30  # bytes touched before anyone is timed
QUICK = ("german", "svmguide1")
SIZES, QUICK_SIZES = (2000, 4000, 8000, 16_000, 32_000), (500, 1000, 2000)
ALLOWANCE = 300  # MB beside the data and the cache
PACKAGES = ("scikit-learn", "scikit-learn-intelex", "libsvm-official")

Results = dict[str, Any]


class Contestant(NamedTuple):
    """A solver with a form of the data and a cache."""

    solver: str
    form: str
    cache: int = CACHE

    @property
    def name(self) -> str:
        """As a result file calls it."""
        return f"{self.solver}, {self.form}" + (f", {self.cache} MB" if self.cache != CACHE else "")


def run(quick: bool) -> Results:
    """Every case, then scaling and memory; quick: the four small cases, one round."""
    words = [word for word in os.environ.get("SVM_PEERS_CASES", "").split(",") if word] or (QUICK if quick else [])
    chosen = {name: case for name, case in CASES.items() if not words or any(word in name for word in words)}
    bench = Bench(rounds=1 if quick else ROUNDS, partial=partial_file(quick or bool(words)))
    with two_cores(), contextlib.closing(bench):
        touch_memory(TOUCHED // 6 if quick else TOUCHED)
        for name, case in chosen.items():
            bench.part("cases", name, lambda n=name, c=case: bench.compare(n, c))
        if quick or not words:
            scaling(bench, QUICK_SIZES if quick else SIZES)
        if not words:
            for name in MEMORY:
                for cache in (DEFAULT_CACHE, CACHE):
                    bench.part("memory", f"{name}, {cache} MB", lambda n=name, c=cache: memory(bench, n, c))
    results = bench.results | {"settings": settings(bench.rounds), "bars": bars(bench.results)}
    if words and not quick:
        print(*(f"\n{name}\n\n{text}" for name, text in tables(results).items()), sep="\n")
        raise SystemExit(f"a part of the cases: no result was saved but {bench.partial.name} in the temporary folder")
    return results | {"pictures": {"": draw(results)}}


def settings(rounds: int) -> Results:
    """What the numbers were taken with."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "tol": TOL,
        "threads": THREADS,
        "cache_mb": [CACHE, DEFAULT_CACHE],
        "rounds": rounds,
        "once_seconds": list(ONCE.values()),
        "cap_seconds": CAP,
        "bars": BARS,
        "peers": versions,
    }


def partial_file(part: bool) -> Path:
    """Where finished cases are kept while others run."""
    folder = Path(tempfile.gettempdir()) / "blockdescent-experiments"
    folder.mkdir(exist_ok=True)
    return folder / f"svm_peers{'.part' * part}.partial.json"


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """Keep this process and those it starts on THREADS cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:THREADS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def touch_memory(size: int) -> None:
    """Fill memory once and give it back: on a virtual machine the first touch of a page is slow."""
    np.ones(size, np.uint8)


# -- runs ---------------------------------------------------------------------------------------


class Bench:
    """The processes of the solvers and the results so far."""

    def __init__(self, rounds: int, partial: Path):
        self.rounds, self.partial = rounds, partial
        self.workers = {solver: Worker(solver) for solver in SOLVERS}
        self.rates: dict[tuple[int, bool], float] = {}
        self.models: dict[str, Any] = {}
        self.results: Results = {"cases": {}, "scaling": {}, "memory": {}}
        if os.environ.get("SVM_PEERS_RESUME") and partial.exists():
            self.results |= json.loads(partial.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            worker.close()

    def part(self, section: str, name: str, work: Any) -> None:
        """Do a part of the benchmark, unless it is there from an interrupted run, and keep what it gives."""
        if name not in self.results[section]:
            self.results[section][name] = work()
            self.partial.write_text(record.to_json(self.results), encoding="utf-8")

    def contestants(self, case: Case, X: Any) -> list[Contestant]:
        """Everyone who can take part: LIBSVM in the form it is quickest in, the others in every form."""
        able = [s for s, w in self.workers.items() if w.ask("supports", PATIENCE, task=case.task).get("supported")]
        usual = "CSR f64" if sp.issparse(X) else "dense f64"
        return [Contestant(s, form) for s in able for form in ([usual] if s in LIBSVM else forms(X))]

    def compare(self, name: str, case: Case) -> Results:
        """All contestants on a case, and those at the default cache."""
        X, y = load(case)
        field = self.contestants(case, X)
        entries = self.race(name, case, X, y, field)
        again = [e for s in AT_DEFAULT_CACHE if (e := best(entries, s)) and e["status"] == "ok"]
        entries |= self.race(name, case, X, y, [Contestant(e["solver"], e["form"], DEFAULT_CACHE) for e in again])
        return self.described(case, X, entries)

    def race(self, name: str, case: Case, X: Any, y: np.ndarray, field: list[Contestant]) -> Results:
        """Time the contestants in turns and judge their models."""
        entries: Results = {}
        self.models = {}
        for c in field:
            entries[c.name] = {**c._asdict(), "seconds": [], "cpu": [], "status": "ok"}
            answer = self.workers[c.solver].ask("warm", PATIENCE, case=case, form=c.form)
            entries[c.name]["status"] = status_of(answer)
        running = [c for c in field if entries[c.name]["status"] == "ok"]
        rounds, turn = self.rounds, 0
        while running and turn < rounds:
            for c in running[turn % len(running) :] + running[: turn % len(running)]:
                self.measure(name, case, c, entries[c.name])
            if turn == 0:
                total = sum(entries[c.name]["seconds"][0] for c in running if entries[c.name]["seconds"])
                rounds = SHORT_ROUNDS if rounds > 1 and total < SHORT else rounds
                self.judge_all(case, X, y, entries)
                running = [c for c in running if worth_repeating(entries, entries[c.name])]
            turn += 1
        if turn > 1:
            self.judge_all(case, X, y, entries)
        for n, entry in entries.items():
            print(f"{name:32} {n:32} {shown(entry)}", flush=True)
        return entries

    def measure(self, name: str, case: Case, contestant: Contestant, entry: Results) -> None:
        """One run."""
        solver, form, cache = contestant
        worker = self.workers[solver]
        if worker.process is None:  # its last run was ended
            worker.ask("warm", PATIENCE, case=case, form=form)
        answer = worker.ask("fit", CAP, case=case, form=form, cache=cache)
        entry["status"] = status_of(answer)
        if entry["status"] == "ok":
            entry["seconds"].append(answer["seconds"])
            entry["cpu"].append(answer["cpu"])
            self.models[contestant.name] = answer["machines"]
        if entry["status"] != "ok" or answer["seconds"] > 1.0:
            took = f"{answer['seconds']:.2f} s" if entry["status"] == "ok" else entry["status"]
            print(f"{name:32} {contestant.name:32} run {len(entry['seconds'])}: {took}", flush=True)

    def judge_all(self, case: Case, X: Any, y: np.ndarray, entries: Results) -> None:
        """Verdicts on the models at hand, which are dropped then.

        Convergence is judged on the numbers a solver was given; objectives are compared on the float64 data, on
        which every model is a feasible point of the same problem.
        """
        models, self.models = self.models, {}
        common = judge(X, y, case, models)
        singles = {} if exact_in_float32(X) else {n: m for n, m in models.items() if entries[n]["form"].endswith("f32")}
        given = common | (judge(rounded(X), y, case, singles) if singles else {})
        for n, verdict in given.items():
            same = {"objective": common[n].objective, "violation_on_float64": common[n].violation}
            entries[n] |= asdict(verdict) | {"converged": verdict.converged} | same
        judged = [entry for entry in entries.values() if "objective" in entry]
        least = min((entry["objective"] for entry in judged if entry["feasible"]), default=np.nan)
        for entry in judged:
            entry["relative_excess"] = (entry["objective"] - least) / max(abs(least), 1e-300)

    def described(self, case: Case, X: Any, entries: Results) -> Results:
        """What a result file says of a case."""
        n, d = X.shape
        n_sv = next((b["n_sv"] for solver in SOLVERS if (b := best(entries, solver)) and "n_sv" in b), 0)
        key = (d, case.gamma is None)
        if key not in self.rates:
            self.rates[key] = entries_a_second(*key)
        return {
            "data": case.data,
            "task": case.task,
            "parameters": case.parameters,
            "n": n,
            "d": d,
            "filled": X.nnz / (n * d) if sp.issparse(X) else 1.0,
            "sparse": bool(sp.issparse(X)),
            "n_sv": n_sv,
            "floor_rate": self.rates[key],
            "floor_seconds": n * n_sv / self.rates[key],
            "contestants": entries,
        }


def status_of(answer: Results) -> str:
    """ok, over, or what went wrong."""
    return "over" if answer.get("over") else answer.get("error", "ok")


def shown(entry: Results) -> str:
    """A line of progress."""
    if not entry["seconds"]:
        return entry["status"]
    mark = "converged" if entry.get("converged") else "NOT converged"
    counts = f"{entry['n_sv']} support vectors, violation {entry['violation']:.2e}, {mark}"
    return f"{seconds(entry):9.4f} s, {np.median(entry['cpu']):9.4f} CPU s, {len(entry['seconds'])} runs; {counts}"


def worth_repeating(entries: Results, entry: Results) -> bool:
    """Whether a contestant runs again after the first round."""
    if entry["status"] != "ok" or entry["seconds"][0] > ONCE[entry["cache"]]:
        return False
    leader = best({n: e for n, e in entries.items() if e["cache"] == entry["cache"]}, entry["solver"], entry["cache"])
    if not entry["converged"] and leader["converged"]:
        return False
    return entry["seconds"][0] <= LEFT_BEHIND * seconds(leader)


def entries_a_second(d: int, linear: bool) -> float:
    """Kernel entries a second: a float32 product of depth d, and an exponential; the best of several tiles."""
    rng = np.random.default_rng(SEED)
    A = rng.random((4096, d), dtype=np.float32)
    repeats, fastest = 4, 0.0
    for rows, columns in ((128, 1024), (256, 1024), (256, 2048), (512, 4096)):
        Z = -A[:columns].T.copy() / d

        def tile(start: int, stop: int, Z: np.ndarray = Z) -> None:
            K = np.ones((stop - start, Z.shape[1]), np.float32)
            for _ in range(repeats):
                np.matmul(A[start:stop], Z, out=K)
                if not linear:
                    np.exp(K, out=K)

        for _ in range(3):
            began = time.perf_counter()
            in_tiles(tile, len(A), rows)
            fastest = max(fastest, repeats * len(A) * columns / (time.perf_counter() - began))
    return fastest


# -- scaling and memory -------------------------------------------------------------------------


def scaling(bench: Bench, sizes: tuple[int, ...]) -> None:
    """Ours on growing random subsets, in the form that was best on all rows (CSR f32 where that is not known)."""
    whole = bench.results["cases"].get(SCALED)
    winner = best(whole["contestants"], "ours") if whole else None
    form = winner["form"] if winner else "CSR f32"
    for n in sizes:
        bench.part("scaling", f"{n}", lambda n=n: scaling_row(bench, n, form))


def scaling_row(bench: Bench, n: int, form: str) -> Results:
    """One size."""
    case = CASES[SCALED]._replace(rows=n)
    X, y = load(case)
    return next(iter(bench.race(f"scaling n={n}", case, X, y, [Contestant("ours", form)]).values())) | {"n": n}


def memory(bench: Bench, name: str, cache: int) -> Results:
    """Peak megabytes of one training run of ours in a fresh process, beyond what was resident before it."""
    whole = bench.results["cases"].get(name)
    winner = best(whole["contestants"], "ours") if whole else None
    form = winner["form"] if winner else "CSR f64"
    worker = Worker("ours")
    with contextlib.closing(worker):
        answer = worker.ask("memory", PATIENCE, case=CASES[name], form=form, cache=cache)
    row = {"form": form, "cache": cache, "status": status_of(answer)}
    if row["status"] == "ok":
        added = answer["peak"] - answer["baseline"]
        limit = answer["data"] + cache + ALLOWANCE
        row |= answer | {"added": added, "limit": limit, "within": added <= limit}
    print(f"memory {name}, {cache} MB: {row}", flush=True)
    return row
