# SPDX-License-Identifier: BSD-3-Clause
"""The selection rules against each other on SVM duals.

    minimise 1/2 b'Kb - y'b   subject to   sum(b) = 0,   0 <= b_i <= C where y_i = 1,  -C <= b_i <= 0 where y_i = -1

with an RBF kernel, b_i = y_i alpha_i, K dense. Every rule runs to two violations on the same problem:
iterations, columns of K, seconds, and the objective against scikit-learn's SVC. For GS-1 besides: how many
coordinates a step moves. All runs are compiled but "GS-1, model step" and "GS-1 block" (one Python call a step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

import bcd
from bcd.selection import GS1
from bcd.updates import UPDATES
from experiments import data
from experiments.figures import panels, style, tidy
from experiments.tables import markdown

TITLE = "Selection rules on SVM duals: iterations, columns, seconds"
SEED = 0
TOLERANCES = (1e-3, 1e-6)
TIME_LIMIT = 60.0  # seconds a run
REPETITIONS = 15  # of a run, as far as they fit in BUDGET seconds, but 3 if one takes less than SHORT seconds
BUDGET = 1.5
SHORT = 5.0
TRACED = ("GS-1", "GS-1 block", "WSS2", "GS-s", "random")  # the lines of the picture
TRACE_POINTS = 80

RULES: dict[str, tuple[str, str | None]] = {
    "GS-1": ("gs1", None),
    "GS-1, model step": ("gs1", "model"),
    "GS-1 block": ("block", None),
    "WSS2": ("wss2", None),
    "GS-s": ("gss", None),
    "GS-q": ("gsq", None),
    "GSL": ("gsl", None),
    "random": ("random", None),
    "permutation": ("permutation", None),
    "cyclic": ("cyclic", None),
}


class Setting(NamedTuple):
    """A data set with its parameters and what turns its raw (X, y) into features and labels of +1 and -1."""

    data: str
    C: float
    gamma: float
    prepare: Callable[[Any, np.ndarray], tuple[Any, np.ndarray]] = lambda X, y: (X, y)


def _even(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return X / 16, np.where(y % 2 == 0, 1.0, -1.0)


SETTINGS = {
    "heart": Setting("heart_scale", 1.0, 1 / 13),
    "german": Setting("german_scale", 1.0, 1 / 24),
    "digits, even": Setting("digits", 1.0, 0.05, _even),
    "svmguide1": Setting("svmguide1_scale", 2.0, 2.0),
}


def run(quick: bool) -> dict[str, Any]:
    """Every rule on every data set (quick: the two smallest)."""
    warm_up()
    chosen = dict(list(SETTINGS.items())[: 2 if quick else None])
    problems, traces = {}, {}
    for name, setting in chosen.items():
        problem, y = dual(setting)
        problems[name] = {
            "settings": {"data": setting.data, "C": setting.C, "gamma": setting.gamma},
            "n": problem.n,
            "lipschitz": problem.lipschitz,
            "svc": reference(problem, y, setting.C),
            "rules": compare(problem, 5.0 if quick else TIME_LIMIT),
            "moved": {update: moved(problem, update) for update in ("line-search", "model")},
        }
        traces[name] = {rule: thinned(problem, rule) for rule in TRACED}
    summarise(problems)
    settings = {"tolerances": TOLERANCES, "time_limit": TIME_LIMIT, "repetitions": REPETITIONS}
    return {"settings": settings, "problems": problems, "traces": traces, "pictures": {"": draw(traces)}}


# -- runs ---------------------------------------------------------------------------------------


def dual(setting: Setting) -> tuple[bcd.Problem, np.ndarray]:
    """The SVM dual and its labels."""
    X, y = setting.prepare(*data.load(setting.data))
    K = rbf_kernel(X, gamma=setting.gamma)
    box = bcd.SumBox(np.where(y > 0, 0.0, -setting.C), np.where(y > 0, setting.C, 0.0), total=0)
    return bcd.Problem(bcd.Quadratic((K + K.T) / 2, -y), box), y


def warm_up() -> None:
    """Compile everything that will be timed."""
    rng = np.random.default_rng(SEED)
    A = rng.standard_normal((40, 5))
    problem = bcd.Problem(bcd.Quadratic(A @ A.T + np.eye(40), rng.standard_normal(40)), bcd.SumBox(0, 1, total=3))
    for rule in RULES:
        solve(problem, rule, 1e-6, 5.0)


def solve(problem: bcd.Problem, rule: str, tol: float, time_limit: float, trace: bool = False) -> bcd.Result:
    """One run of a row of RULES."""
    name, update = RULES[rule]
    return bcd.minimize(problem, name, update, tol=tol, time_limit=time_limit, random_state=SEED, trace=trace)


def compare(problem: bcd.Problem, time_limit: float) -> dict[str, dict[str, Any]]:
    """Every rule to every tolerance; the rules take turns in the repetitions of short runs."""
    rows: dict[str, dict[str, Any]] = {rule: {} for rule in RULES}
    for repetition in range(REPETITIONS):
        for rule, row in rows.items():
            for tol in TOLERANCES:
                seen = row.get(str(tol))
                if repetition == 0:
                    result = solve(problem, rule, tol, time_limit)
                    row[str(tol)] = described(result)
                elif seen and _again(seen["seconds"]):
                    seen["seconds"].append(solve(problem, rule, tol, time_limit).seconds)
                if not row[str(tol)]["reached"]:
                    break
    return rows


def _again(seconds: list[float]) -> bool:
    return sum(seconds) < BUDGET or (len(seconds) < 3 and seconds[0] < SHORT)


def described(result: bcd.Result) -> dict[str, Any]:
    """What the tables need of a run."""
    kept = ("iterations", "columns", "objective", "violation", "gap")
    entry = {"reached": result.status.ok, "status": result.status.name.lower()}
    return entry | {name: getattr(result, name) for name in kept} | {"seconds": [result.seconds]}


def reference(problem: bcd.Problem, y: np.ndarray, C: float) -> dict[str, Any]:
    """The objective that scikit-learn's SVC (LIBSVM) reaches on the same kernel."""
    svc = SVC(C=C, kernel="precomputed", tol=min(TOLERANCES), cache_size=500)
    svc.fit(problem.objective.hessian.matrix, y)
    beta = np.zeros(problem.n)
    beta[svc.support_] = svc.dual_coef_[0]
    bounded = int((np.abs(beta) == C).sum())
    return {
        "objective": problem.objective.value(beta),
        "violation": bcd.certify(problem, beta).violation,
        "iterations": int(svc.n_iter_[0]),
        "support_vectors": len(svc.support_),
        "at_bound": bounded,
    }


def moved(problem: bcd.Problem, update: str) -> dict[str, Any]:
    """How many coordinates each GS-1 step moves, over a run to the smallest tolerance."""
    counts: list[int] = []

    class Counted(GS1):
        """GS-1 that notes the size of every step; not one of the compiled rules, so it goes step by step."""

        def select(self, at: Any, moves: Any, state: None) -> tuple[bcd.Selection, None]:
            chosen, state = super().select(at, moves, state)
            counts.append(len(chosen.index))
            return chosen, state

    result = bcd.minimize(problem, Counted(), UPDATES[update], tol=min(TOLERANCES), time_limit=TIME_LIMIT)
    sizes, steps = np.unique(counts, return_counts=True)
    return {
        "iterations": result.iterations,
        "mean": float(np.mean(counts)),
        "share_of_two": float(np.mean(np.array(counts) == 2)),
        "largest": int(sizes[-1]),
        "mean_of_first_tenth": float(np.mean(counts[: max(1, len(counts) // 10)])),
        "sizes": sizes,
        "steps": steps,
    }


def summarise(problems: dict[str, Any]) -> None:
    """Add how far every objective is above the best one seen, and every rule's counts over those of WSS2."""
    for entry in problems.values():
        runs = [run for row in entry["rules"].values() for run in row.values()]
        best = min([run["objective"] for run in runs] + [entry["svc"]["objective"]])
        for one in [*runs, entry["svc"]]:
            one["relative_excess"] = (one["objective"] - best) / abs(best)
        entry["over_wss2"] = {
            rule: {tol: _over(run, entry["rules"]["WSS2"][tol]) for tol, run in row.items() if run["reached"]}
            for rule, row in entry["rules"].items()
            if rule != "WSS2"
        }


def _over(run: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    counts = {name: run[name] / base[name] for name in ("iterations", "columns")}
    return counts | {"seconds": float(np.median(run["seconds"]) / np.median(base["seconds"]))}


# -- picture ------------------------------------------------------------------------------------


def thinned(problem: bcd.Problem, rule: str) -> dict[str, list[float]]:
    """About TRACE_POINTS looks at a run, evenly spaced in the logarithm; the violation is the smallest so far."""
    trace = solve(problem, rule, min(TOLERANCES), 20.0, trace=True).trace
    points = np.unique(np.geomspace(1, len(trace), TRACE_POINTS).astype(int)) - 1
    best = np.minimum.accumulate(trace.violation)
    columns = {"iteration": trace.iteration, "columns": trace.columns, "seconds": trace.seconds, "violation": best}
    return {name: [float(f"{v:.6g}") for v in np.asarray(values)[points]] for name, values in columns.items()}


def draw(traces: dict[str, Any]) -> Figure:
    """Violation against iterations, columns and seconds, one row a data set."""
    against = {"iteration": "iterations", "columns": "columns of the kernel matrix", "seconds": "seconds"}
    figure, rows = panels(len(traces), len(against), 4.0, 2.7)
    for row, (name, lines) in zip(rows, traces.items(), strict=True):
        for axes, (axis, label) in zip(row, against.items(), strict=True):
            for k, (rule, trace) in enumerate(lines.items()):
                x, y = np.array(trace[axis]), np.array(trace["violation"])
                shown = (x > 0) & (y < 0.99 * y[0])  # before, some coordinate of every rule waits at its start
                axes.plot(x[shown], y[shown], label=rule, **style(k))
            tidy(axes, label, "smallest violation so far" if axis == "iteration" else "")
            axes.set_ylim(bottom=0.7 * min(TOLERANCES))
        row[0].set_title(name, fontsize=10, loc="left", fontweight="bold")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(TRACED), frameon=False)
    return figure


# -- tables -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """One table a data set ("heart", "german", ...), "moved" and "over_wss2"."""
    problems = results["problems"]
    each = {SETTINGS[name].data.removesuffix("_scale"): _rules_table(entry) for name, entry in problems.items()}
    return each | {"moved": _moved_table(problems), "over_wss2": _over_table(problems), "svc": _svc_table(problems)}


def _rules_table(entry: dict[str, Any]) -> str:
    head = ["rule"]
    for tol in TOLERANCES:
        head += [f"iterations to {tol:.0e}", "columns", "ms", "objective above best (relative)", "gap"]
    return markdown(
        head,
        [
            [rule] + [cell for tol in TOLERANCES for cell in _cells(row.get(str(tol)))]
            for rule, row in entry["rules"].items()
        ],
    )


_WHY = {"time_limit": "not reached", "stagnated": "gave up"}


def _cells(run: dict[str, Any] | None) -> list[str]:
    if run is None or not run["reached"]:
        why = _WHY.get(run["status"], run["status"]) if run else ""
        return ["-"] * 5 if run is None else [why, f"{run['columns']:,}", *_measures(run)]
    return [f"{run['iterations']:,}", f"{run['columns']:,}", *_measures(run)]


def _measures(run: dict[str, Any]) -> list[str]:
    return [f"{1e3 * np.median(run['seconds']):,.3g}", f"{run['relative_excess']:.0e}", f"{run['gap']:.0e}"]


def _moved_table(problems: dict[str, Any]) -> str:
    head = ["problem", "n", "step", "steps", "moved a step, mean", "in the first tenth", "exactly two", "most"]
    rows = []
    for name, entry in problems.items():
        for update, m in entry["moved"].items():
            numbers = [f"{m['mean']:.2f}", f"{m['mean_of_first_tenth']:.2f}", f"{m['share_of_two']:.0%}"]
            rows.append([name, f"{entry['n']:,}", update, f"{m['iterations']:,}", *numbers, f"{m['largest']:,}"])
    return markdown(head, rows)


def _over_table(problems: dict[str, Any]) -> str:
    """GS-1 and the others over WSS2 at the smallest tolerance: iterations, columns, seconds."""
    head = ["rule, over WSS2 (iterations / columns / seconds)", *problems]
    rules = [rule for rule in RULES if rule != "WSS2"]
    return markdown(head, [[rule] + [_ratios(e["over_wss2"][rule]) for e in problems.values()] for rule in rules])


def _ratios(row: dict[str, Any]) -> str:
    run = row.get(str(min(TOLERANCES)))
    return " / ".join(f"{run[k]:,.3g}" for k in ("iterations", "columns", "seconds")) if run else "not reached"


def _svc_table(problems: dict[str, Any]) -> str:
    head = ["problem", "n", "support vectors", "at the bound", "SVC: objective", "GS-1: objective", "above best"]
    rows = []
    for name, entry in problems.items():
        svc, ours = entry["svc"], entry["rules"]["GS-1"][str(min(TOLERANCES))]
        counts = [f"{entry['n']:,}", f"{svc['support_vectors']:,}", f"{svc['at_bound']:,}"]
        values = [f"{svc['objective']:.8f}", f"{ours['objective']:.8f}"]
        rows.append([name, *counts, *values, f"{svc['relative_excess']:.0e} / {ours['relative_excess']:.0e}"])
    return markdown(head, rows)
