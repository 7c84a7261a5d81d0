# SPDX-License-Identifier: BSD-3-Clause
"""``bcd.solve_qp`` against eight QP solvers at equal achieved accuracy.

Every solver runs in a process of its own with two threads, one run at a time (:mod:`experiments.qp_workers`), and is
judged by one float64 function (:mod:`experiments.qp_judge`). Ours gets tol = 1e-8. A peer gets, for each form of the
problem that it takes, the loosest of its settings whose judged residual reaches 1e-8 as well; the time at that
setting counts. (Looser ones are not looked for where a run takes more than 5 s and LEFT_BEHIND times as long as
another peer.) Where none does, the setting with its best residual counts, and the peer is marked: it does not count
as fast. The form that was fastest stands for the peer. Where ours does not reach it, its ratio is 0.

After that the solvers take turns: a turn is one call that is not timed and then the same number of timed calls for
everyone, and the medians over the rounds are compared (those of the first calls too). Peers that were LEFT_BEHIND
times slower than the best one are not run again, nor on the other seeds, nor are forms there that were SLOWER times
slower than the best form of their solver. A run that takes longer than CAP seconds is ended, and a solver whose runs
on a problem took that long together is not tried further on it. At a new size all forms are tried again, but for
those where what they took at the next smaller size, times the growth of the size to the power 3 (to the power 1 for
the sparse form of a factor model), is more than CAP.

Besides: the held-out seed, by the same function after all others; plain greedy pairs on the dense families; 10^6
variables against products with F; and solving again after a change (:func:`qp_problems.next_day`).

Environment: QP_PEERS_CASES="1e6;huge" runs the parts whose names contain a word, and saves nothing but the partial
file; QP_PEERS_RESUME=1 takes finished parts from the partial file of an interrupted run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import record
from experiments.qp_judge import SNAPS, TOL, judge
from experiments.qp_problems import AGAIN, CASES, FACTOR, HELD_OUT, HUGE, SEEDS, Case, Problem, next_day
from experiments.qp_report import BARS, CAP, bars, draw, entry_of, most_accurate, reached, seconds, tables
from experiments.qp_workers import EPS, GREEDY, HUGE_TOL, OURS, PEERS, THREADS, Worker, forms, ladder, write
from experiments.svm_peers import touch_memory, two_cores

TITLE = "Quadratic programs with a sum and bounds: solve_qp against eight QP solvers"
SEED = SEEDS[0]
ROUNDS = 3
SHORT, SHORT_ROUNDS = 1.0, 9  # seconds of a round, and the rounds there are then
AT_LEAST, AT_MOST = 0.05, 0.2  # seconds that the shortest measurement should last, and the longest at most
WARM = 2.0  # seconds; for longer calls caches do not matter, and they are not made once more before the clock starts
LEFT_BEHIND = 3.0
SLOWER = 2.0  # times; a form that is so much slower than another one of its solver is not tried on the other seeds
START = 4  # on the ladder where nothing is known: 1e-7
NEWS = 2.0  # seconds; a longer run is a line of its own in the log
STALLED = 5.0  # seconds; settings of slower runs are not refined where that does not decide anything
GRACE = 5.0  # seconds above CAP before a process is ended: some solvers end by themselves at CAP
PATIENCE = 600.0  # seconds for imports, compilation and conversions, before the clock
TOUCHED = 6 * 2**30  # bytes touched before anyone is timed
SLOW_FORM, TOO_SLOW, BEHIND = "slow form", "too slow", "left behind"  # why something was not tried
PACKAGES = {
    "qpsolvers": "qpsolvers",
    "clarabel": "clarabel",
    "piqp": "piqp",
    "proxqp": "proxsuite",
    "osqp": "osqp",
    "daqp": "daqp",
    "highs": "highspy",
    "quadprog": "quadprog",
    "scs": "scs",
}

Results = dict[str, Any]


def run(quick: bool) -> Results:
    """Every case and seed, 10^6 variables, solving again, the held-out seed; quick: small cases, one round."""
    words = [word for word in os.environ.get("QP_PEERS_CASES", "").split(";") if word]
    with contextlib.ExitStack() as stack:
        stack.enter_context(two_cores())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, 1 if quick else ROUNDS, partial_file(quick or bool(words)))
        stack.callback(bench.close)
        touch_memory(TOUCHED // 6 if quick else TOUCHED)
        for name, section, work in parts(bench, quick):
            if not words or any(word in name for word in words):
                bench.part(section, name, work)
    results = bench.results | {"settings": settings(bench.rounds)}
    results["bars"] = bars(results)
    if words and not quick:
        print(*(f"\n{name}\n\n{text}" for name, text in tables(results).items()), sep="\n")
        raise SystemExit(f"a part of the cases: no result was saved but {bench.partial.name} in the temporary folder")
    return results | {"pictures": {"": draw(results)}}


def parts(bench: Bench, quick: bool) -> list[tuple[str, str, Callable[[], Results]]]:
    """Name, section and work of everything there is to do, small sizes first."""
    cases = [case for case in CASES if not quick or case.n == smallest(case.family)]
    seeds = SEEDS[:1] if quick else SEEDS
    found: list[tuple[str, str, Callable[[], Results]]] = [
        (run_name(case, seed), "runs", lambda c=case, s=seed: bench.compare(c, s)) for case in cases for seed in seeds
    ]
    huge = HUGE._replace(n=HUGE.n // 20) if quick else HUGE
    again = AGAIN[:1] if quick else AGAIN
    found += [(f"huge, {huge.name}", "huge", lambda: huge_row(bench, huge))]
    found += [(f"again, {case.name}", "again", lambda c=case: again_row(bench, c)) for case in again]
    return found + [
        (run_name(case, HELD_OUT), "held_out", lambda c=case: bench.compare(c, HELD_OUT))
        for case in (cases[:1] if quick else cases)
    ]


def smallest(family: str) -> int:
    """The least size of a family."""
    return min(case.n for case in CASES if case.family == family)


def run_name(case: Case, seed: int) -> str:
    """As a result file calls a case with a seed."""
    return f"{case.name}, seed {seed}"


def settings(rounds: int) -> Results:
    """What the numbers were taken with."""
    versions = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(package)
    return {
        "tol": TOL,
        "huge_tol": HUGE_TOL,
        "ladder": EPS,
        "snaps": SNAPS,
        "threads": THREADS,
        "rounds": [rounds, SHORT_ROUNDS if rounds > 1 else 1],
        "cap_seconds": CAP,
        "left_behind": LEFT_BEHIND,
        "held_out_seed": HELD_OUT,
        "slower_form": SLOWER,
        "bars": BARS,
        "peers": versions,
    }


def partial_file(part: bool) -> Path:
    """Where finished parts are kept while others run."""
    folder = Path(tempfile.gettempdir()) / "blockdescent-experiments"
    folder.mkdir(exist_ok=True)
    return folder / f"qp_peers{'.part' * part}.partial.json"


# -- runs ---------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """A problem, and the file in which the processes find it."""

    name: str
    case: Case
    seed: int
    problem: Problem
    path: str


class Bench:
    """The processes of the solvers and the results so far."""

    def __init__(self, folder: Path, rounds: int, partial: Path):
        self.folder, self.rounds, self.partial = folder, rounds, partial
        self.workers = {solver: Worker(solver) for solver in (OURS, GREEDY, *PEERS)}
        self.results: Results = {"runs": {}, "huge": {}, "again": {}, "held_out": {}}
        if os.environ.get("QP_PEERS_RESUME") and partial.exists():
            self.results |= json.loads(partial.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            worker.close()

    def part(self, section: str, name: str, work: Callable[[], Results]) -> None:
        """Do a part of the benchmark, unless it is there from an interrupted run, and keep what it gives."""
        if name not in self.results[section]:
            self.results[section][name] = work()
            self.partial.write_text(record.to_json(self.results), encoding="utf-8")

    def instance(self, case: Case, seed: int) -> Instance:
        """Make a problem and write it for the processes; the one before is no longer needed."""
        for old in self.folder.glob("*.pickle"):
            old.unlink()
        problem = case.make(case.n, seed)
        path = write(problem, self.folder / f"{case.family}-{case.n}-{seed}.pickle")
        return Instance(run_name(case, seed), case, seed, problem, path)

    def compare(self, case: Case, seed: int) -> Results:
        """Ours and every peer on a problem: settings first, then the timing in turns."""
        instance = self.instance(case, seed)
        entries = {OURS: self.entry(instance, OURS, "", (np.nan,), 0, np.inf)}
        if case.family != FACTOR and entries[OURS]["ladder"]:
            tol = TOL * max(1.0, entries[OURS]["chosen"]["gradient"])
            entries[GREEDY] = self.tried(instance, GREEDY, "", (tol,), entries)
        for solver in PEERS:
            for form in forms(solver, case.family == FACTOR):
                entries[f"{solver}, {form}"] = self.tried(instance, solver, form, ladder(solver), entries)
        self.turns(instance, entries)
        for name, entry in entries.items():
            print(f"{instance.name:42} {name:26} {shown(entry)}", flush=True)
        free = entries[OURS]["chosen"]["free"] if entries[OURS]["ladder"] else np.nan
        return {"family": case.family, "n": case.n, "seed": seed, "free": free, "entries": entries}

    def tried(self, instance: Instance, solver: str, form: str, rungs: tuple[float, ...], entries: Results) -> Results:
        """A solver in a form, unless what is known says that it is not worth it."""
        known, known_n = self.known(instance.case)
        earlier = known.get(f"{solver}, {form}" if form else solver, untried(solver, form))
        reason = why_not(earlier, known, known_n, instance.case)
        if reason:
            return untried(solver, form) | {"status": reason}
        peers = [e for e in entries.values() if e["solver"] in PEERS and reached(e)]
        best = min(map(seconds, peers), default=np.inf)
        return self.entry(instance, solver, form, rungs, earlier["rung"], max(STALLED, LEFT_BEHIND * best))

    def entry(
        self, instance: Instance, solver: str, form: str, rungs: tuple[float, ...], start: int, slow: float
    ) -> Results:
        """Climb the ladder until the residual is small enough, and come down while it still is.

        Runs of more than ``slow`` seconds have no part in the rounds anyway: from them it does not come down.
        """
        entry = untried(solver, form)
        rung = min(start, len(rungs) - 1)
        if self.attempt(instance, entry, rungs[rung]):
            while (
                rung > 0 and entry["ladder"][-1]["seconds"] <= slow and self.attempt(instance, entry, rungs[rung - 1])
            ):
                rung -= 1
        else:
            while rung + 1 < len(rungs) and not hopeless(entry) and not self.attempt(instance, entry, rungs[rung + 1]):
                rung += 1
        if not entry["ladder"]:
            return entry
        chosen = settled(entry["ladder"])
        rung = next((k for k, eps in enumerate(rungs) if eps == chosen["eps"]), 0)
        kept = ("eps", "seconds", "residual", "infeasibility", "reached")
        short = [{key: attempt[key] for key in kept} for attempt in entry["ladder"]]
        return entry | {"status": "ok", "rung": rung, "chosen": chosen, "ladder": short}

    def attempt(self, instance: Instance, entry: Results, eps: float) -> bool:
        """One run at one setting, judged; whether it is accurate enough."""
        answer = self.fit(instance, entry, eps, 1, warm=False)
        entry["status"] = status_of(answer)
        if entry["status"] != "ok":
            return False
        verdict = judge(instance.problem, answer.pop("x"))
        entry["ladder"].append({"eps": eps} | answer | asdict(verdict) | {"reached": verdict.reached})
        if answer["seconds"] > NEWS:
            took = f"{answer['seconds']:.1f} s, residual {verdict.residual:.1e}"
            print(f"{instance.name:42} {entry['solver']}, {entry['form']}, eps {eps:.0e}: {took}", flush=True)
        return verdict.reached

    def fit(self, instance: Instance, entry: Results, eps: float, calls: int, warm: bool) -> Results:
        """One measurement: ``calls`` calls, after one more if ``warm``."""
        worker, place = self.workers[entry["solver"]], {"path": instance.path, "form": entry["form"]}
        answer = worker.ask("prepare", PATIENCE, **place)
        if status_of(answer) != "ok":
            return answer
        return worker.ask("fit", CAP + GRACE, **place, eps=eps, cap=CAP, calls=calls, warm=warm)

    def known(self, case: Case) -> tuple[Results, int]:
        """The entries of the same case with another seed, else of the next smaller size, and their n."""
        family = [run for run in self.results["runs"].values() if run["family"] == case.family and run["n"] <= case.n]
        n = max((run["n"] for run in family), default=0)
        return next((run["entries"] for run in family if run["n"] == n), {}), n

    def turns(self, instance: Instance, entries: Results) -> None:
        """Time ours and the peers that are not left behind, one after another, round by round."""
        field = contenders(entries)
        once = sum(e["chosen"]["seconds"] for e in field)
        rounds = SHORT_ROUNDS if self.rounds > 1 and once < SHORT else self.rounds
        calls = calls_each(field)
        for turn in range(rounds):
            shift = turn % len(field) if field else 0
            for entry in field[shift:] + field[:shift]:
                warm = entry["chosen"]["seconds"] <= WARM
                answer = self.fit(instance, entry, entry["chosen"]["eps"], calls, warm)
                if status_of(answer) == "ok":
                    entry["seconds"].append(answer["seconds"])
                    entry["first"].append(answer["first"])


def status_of(answer: Results) -> str:
    """ok, over, or what went wrong."""
    return "over" if answer.get("over") else answer.get("error", "ok")


def untried(solver: str, form: str) -> Results:
    """An entry without runs."""
    return {"solver": solver, "form": form, "status": "ok", "ladder": [], "seconds": [], "first": [], "rung": START}


def settled(attempts: list[Results]) -> Results:
    """The attempt that counts: the loosest accurate one, else the loosest of those about as accurate as the best."""
    accurate = [attempt for attempt in attempts if attempt["reached"]] or most_accurate(attempts)
    return max(accurate, key=lambda attempt: attempt["eps"])


def spent(entry: Results) -> float:
    """Seconds of all its runs on a problem while its setting is sought."""
    return sum(attempt["seconds"] for attempt in entry["ladder"])


def hopeless(entry: Results) -> bool:
    """Whether to stop tightening: a run failed, or they took as long as they may, or slow runs gain nothing."""
    if entry["status"] != "ok" or spent(entry) > 0.9 * CAP:
        return True
    done = [attempt["residual"] for attempt in entry["ladder"]]
    return len(done) > 2 and entry["ladder"][-1]["seconds"] > STALLED and min(done[-2:]) > 0.5 * min(done[:-2])


def why_not(entry: Results, known: Results, known_n: int, case: Case) -> str:
    """Why a form is not tried, from its entry in a known run and from the others there; "" if it is.

    Parameters
    ----------
    entry : dict
        Of the same solver in the same form.
    known : dict
        All entries of that run.
    known_n : int
        Its size: that of the case if it is the case with another seed.
    case : Case
    """
    if entry["status"] in (TOO_SLOW, "over"):
        return TOO_SLOW
    if not entry["ladder"]:
        return ""
    if known_n < case.n:
        power = 1 if entry["form"].startswith("factor") else 3
        return TOO_SLOW if seconds(entry) * (case.n / known_n) ** power > CAP else ""
    best_form = entry_of(known, entry["solver"])
    if best_form is not entry and reached(best_form) and not (reached(entry) and close(entry, best_form, SLOWER)):
        return SLOW_FORM
    return "" if entry["seconds"] else BEHIND


def close(entry: Results, best: Results, times: float) -> bool:
    """Whether an entry takes at most so many times as long as another one."""
    return seconds(entry) <= times * seconds(best)


def contenders(entries: Results) -> list[Results]:
    """Ours, and greedy pairs and the best form of every peer where they are not left behind by the best peer."""
    mine = [entries[OURS]] if entries[OURS]["ladder"] else []
    others = [e for solver in (GREEDY, *PEERS) if (e := entry_of(entries, solver)) and e["ladder"]]
    peers = [e for e in others if e["solver"] != GREEDY]
    accurate = [e for e in peers if reached(e)] or peers
    best = min(map(seconds, accurate), default=np.inf)
    return mine + [e for e in others if seconds(e) <= LEFT_BEHIND * best]


def calls_each(field: list[Results]) -> int:
    """Calls in a measurement, as many for everyone: caches and clocks treat all alike."""
    times = [max(e["chosen"]["seconds"], 1e-6) for e in field] or [AT_MOST]
    return max(1, min(int(AT_LEAST / min(times)), int(AT_MOST / max(times))))


def shown(entry: Results) -> str:
    """A line of progress."""
    if not entry["ladder"]:
        return entry["status"]
    chosen = entry["chosen"]
    mark = "" if chosen["reached"] else " NOT reached"
    return (
        f"{seconds(entry):9.5f} s, {len(entry['seconds'])} rounds; eps {chosen['eps']:.0e}, "
        f"residual {chosen['residual']:.1e}, infeasible by {chosen['infeasibility']:.1e}, {chosen['said']}{mark}"
    )


# -- 10^6 variables, solving again ---------------------------------------------------------------


def huge_row(bench: Bench, case: Case) -> Results:
    """Ours in a fresh process: seconds against products with F, megabytes against n k doubles."""
    instance = bench.instance(case, SEED)
    with contextlib.closing(Worker(OURS)) as worker:
        answer = worker.ask("huge", PATIENCE, path=instance.path, rounds=max(bench.rounds, 2))
    if status_of(answer) != "ok":
        return {"n": case.n, "status": status_of(answer)}
    verdict = judge(instance.problem, answer.pop("x"))
    n, k = instance.problem.P.F.shape
    row = {"n": n, "k": k, "status": "ok", "tol": HUGE_TOL, "n_k_megabytes": 8 * n * k / 2**20}
    row |= (
        answer
        | asdict(verdict)
        | {"over_products": float(np.median(answer["seconds"]) / np.median(answer["products"]))}
    )
    print(f"{case.name}: {row}", flush=True)
    return row


def again_row(bench: Bench, case: Case) -> Results:
    """Ours after each change of a problem: from the last point, and from nothing."""
    instance = bench.instance(case, SEED)
    changes: Results = {}
    for name, problem in next_day(instance.problem, SEED).items():
        path = write(problem, bench.folder / "changed.pickle")
        rounds = 1 if bench.rounds == 1 else SHORT_ROUNDS
        answer = bench.workers[OURS].ask("again", PATIENCE, path=instance.path, new_path=path, rounds=rounds)
        changes[name] = {"status": status_of(answer)}
        if changes[name]["status"] == "ok":
            changes[name] |= asdict(judge(problem, answer.pop("x"))) | answer
            times = ", ".join(f"{key} {np.median(answer[key]):.5f} s" for key in ("again", "fresh", "ready"))
            print(f"{case.name}, {name}: {times}, residual {changes[name]['residual']:.1e}", flush=True)
    return {"family": case.family, "n": case.n, "changes": changes}
