# SPDX-License-Identifier: BSD-3-Clause
"""What raw results say: the best learning rates, paired differences with intervals, tables and pictures.

Two methods are compared on the same seeds (the same batches in the same order) and the same held-out examples. Of
their difference two 95% t-intervals are given: over the held-out examples (the mean over the seeds of each), and over
the seeds. A difference is called clear if it is outside both. Rates were chosen on the first of the seeds, for every
method alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.figures import panels, style, tidy
from experiments.llm_common import COST, MEMORY, START, TRAIN, Matrix, Runs, Tuned
from experiments.llm_methods import Method
from experiments.tables import markdown

LEVEL = 0.95
MB = 1e6
SHOWN = 6  # of what is missing
DRAWN = 12  # lines in a picture
NAN = float("nan")
NOTES = (
    "Mean over the seeds ± half of its 95% t-interval. Differences: ± the wider half interval of two (over held-out "
    "examples, over seeds), bold outside both. After a rate, ! says that it is the smallest or largest that was tried, "
    "? that some have not run yet. CPU s: a step and a switch, timed on a CPU with two threads, times their number; "
    "steps of AdamW were timed in turn with them, in a process of its own, and all are scaled to their median, so that "
    "times of different hours compare. x AdamW: tokens a CPU second over those of AdamW in turn. "
    "Peak MB: counted on a CPU over all live tensors; on the GPU what PyTorch had allocated at most, the least of "
    "its runs (in some of them the model of an earlier run was still there).\n"
)

Results = dict[str, Any]


# -- measures -----------------------------------------------------------------------------------


class Measure(NamedTuple):
    """How good a model is.

    Attributes
    ----------
    name : str
    sign : int
        1 if less is better, -1 if more is.
    values : callable
        From the result of a run and one of its points to a number for every held-out example; their mean is the
        measure.
    """

    name: str
    sign: int
    values: Callable[[Results, Results], np.ndarray]


def loss_values(run: Results, point: Results) -> np.ndarray:
    """Losses in nats, so weighted that their mean is the loss a token."""
    weights = np.array(run["weights"], dtype=float)
    return np.array(point["losses"]) / weights.mean()


def accuracy_values(run: Results, point: Results) -> np.ndarray:
    """100 where the class is right, else 0."""
    return 100.0 * (_digits(point["predicted"]) == _digits(run["labels"]))


def matthews_values(run: Results, point: Results) -> np.ndarray:
    """Jackknife pseudo-values of 100 times Matthews' correlation: n times that of all less n - 1 times without one."""
    predicted, labels = _digits(point["predicted"]), _digits(run["labels"])
    n = len(labels)
    table = np.zeros((2, 2))
    np.add.at(table, (predicted, labels), 1)
    without = np.array([[_matthews(_less_one(table, p, y)) for y in (0, 1)] for p in (0, 1)])
    return 100.0 * (n * _matthews(table) - (n - 1) * without[predicted, labels])


def _digits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")


def _less_one(table: np.ndarray, row: int, column: int) -> np.ndarray:
    less = table.copy()
    less[row, column] -= 1
    return less


def _matthews(table: np.ndarray) -> float:
    """Of a table of counts by predicted and true class; 0 where one class is never predicted."""
    scale = np.prod(table.sum(0)) * np.prod(table.sum(1))
    return float(np.linalg.det(table) / np.sqrt(scale)) if scale > 0 else 0.0


LOSS = Measure("loss", 1, loss_values)
ACCURACY = Measure("accuracy, %", -1, accuracy_values)
MATTHEWS = Measure("Matthews, %", -1, matthews_values)


def final(measure: Measure, run: Results) -> float:
    """The measure at the end of a run; infinitely bad if it diverged."""
    if run["diverged"]:
        return measure.sign * float("inf")
    return float(measure.values(run, run["points"][-1]).mean())


def criterion(measure: Measure) -> Callable[[Results], float]:
    """What the best learning rate minimises."""
    return lambda run: measure.sign * final(measure, run)


# -- statistics ---------------------------------------------------------------------------------


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half width of its t-interval; nan of fewer than two values and of infinite ones.

    Examples
    --------
    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean()), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def paired(first: np.ndarray, second: np.ndarray) -> Results:
    """The difference first - second of two tables of values with a row for every seed.

    Parameters
    ----------
    first, second : ndarray, shape (seeds, examples)

    Returns
    -------
    dict
        ``mean``, half widths over the ``examples`` and over the ``seeds`` (nan with one), ``clear``, ``n_seeds``.
    """
    gaps = np.asarray(first) - np.asarray(second)
    mean, examples = interval(gaps.mean(0))
    _, seeds = interval(gaps.mean(1))
    clear = bool(abs(mean) > examples and abs(mean) > seeds)
    return {"mean": mean, "examples": examples, "seeds": seeds, "clear": clear, "n_seeds": len(gaps)}


# -- what is there ------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A method on a data set: its rates, its runs at the best one by seed, its memory, and its CPU seconds.

    ``allocated``: bytes at most on a GPU, the least of all its runs; nan if none was made there.
    """

    tuned: Tuned
    runs: dict[int, Results]
    memory: Results | None
    cost: Results | None
    allocated: float = NAN

    def cpu(self, run: Results, step: int) -> float:
        """CPU seconds of a run's first steps: those of a median step, and what every switch adds."""
        if self.cost is None:
            return float("nan")
        switches = sum(s <= step for s in run.get("selection", {}).get("switches", []))
        return float(self.cost["step"] * step + self.cost["switch"] * switches)


def entries(matrix: Matrix, runs: Runs, data: str) -> dict[str, Entry]:
    """The methods of which there is a training run."""
    found = {}
    for method in matrix.methods + matrix.extras:
        tuned = matrix.tuned(runs, data, method)
        best = min(tuned.tried, key=tuned.tried.__getitem__, default=None)
        if best is None:
            continue
        units = {seed: matrix.unit(TRAIN, data, method, best, seed) for seed in matrix.seeds[data]}
        at_best = {seed: run for seed, unit in units.items() if (run := matrix.result(runs, unit))}
        memory, cost = (matrix.result(runs, matrix.unit(kind, data, method)) for kind in (MEMORY, COST))
        tried = [matrix.result(runs, matrix.unit(TRAIN, data, method, lr)) for lr in tuned.tried]
        allocated = [run["allocated"] for run in (*tried, *at_best.values()) if run and run.get("allocated")]
        found[method] = Entry(tuned, at_best, memory, cost, min(allocated, default=NAN))
    return at_one_speed(found)


def at_one_speed(found: dict[str, Entry]) -> dict[str, Entry]:
    """CPU seconds as if all had been timed at once: AdamW's steps, which each had in turn, are set to their median."""
    costs = {name: entry.cost for name, entry in found.items() if entry.cost}
    usual = float(np.median([cost["adamw"] for cost in costs.values()])) if costs else NAN

    def scaled(cost: Results) -> Results:
        return cost | {key: cost[key] * usual / cost["adamw"] for key in ("step", "switch", "adamw")}

    return found | {name: found[name]._replace(cost=scaled(cost)) for name, cost in costs.items()}


def together(measure: Measure, first: Entry, second: Entry, cpu: bool = False) -> Results | None:
    """Paired difference of two methods over their common seeds: at the end, or when the faster one had ended.

    None if they share no seed, one diverged, or the slower one had not been evaluated by then.
    """
    rows = []
    for seed in first.runs.keys() & second.runs.keys():
        pair = [(entry, entry.runs[seed]) for entry in (first, second)]
        if any(run["diverged"] for _, run in pair):
            return None
        limit = min(entry.cpu(run, run["points"][-1]["step"]) for entry, run in pair) if cpu else None
        values = [at_cpu(measure, entry, run, limit) for entry, run in pair]
        if any(value is None for value in values):
            return None
        rows.append(values)
    return paired(*(np.stack(side) for side in zip(*rows, strict=True))) if rows else None


def at_cpu(measure: Measure, entry: Entry, run: Results, limit: float | None) -> np.ndarray | None:
    """Values after so many CPU seconds, on straight lines between evaluations; None before the first. No limit: last.

    Matthews' correlation is no mean over examples, but its pseudo-values may be mixed all the same.
    """
    points = run["points"]
    if limit is None:
        return measure.values(run, points[-1])
    times = [entry.cpu(run, point["step"]) for point in points]
    later = next((k for k, seconds in enumerate(times) if seconds >= limit), None)
    if later is None or (later == 0 and times[0] > limit):  # nothing is known of the time, or of so early a one
        return None
    if times[later] == limit:
        return measure.values(run, points[later])
    share = (limit - times[later - 1]) / (times[later] - times[later - 1])
    before, after = (measure.values(run, points[k]) for k in (later - 1, later))
    return (1 - share) * before + share * after


# -- summaries ----------------------------------------------------------------------------------


def summary(matrix: Matrix, runs: Runs, methods: Mapping[str, Method], measures: Mapping[str, Measure]) -> Results:
    """Everything that tables and pictures are made of."""
    data = {name: of_data(matrix, runs, methods, name, measures[name]) for name in matrix.data}
    return {
        "data": {name: found for name, found in data.items() if found["methods"]},
        "missing": [unit.name for unit in matrix.missing(runs)],
        "not_installed": sorted({name for name, method in methods.items() if not method.installed}),
        "machines": machines(runs),
    }


def machines(runs: Runs) -> list[Results]:
    """Where the good lines were made: processor, threads, versions, dates, commits, hours."""
    found: dict[Any, Results] = {}
    for line in (line for line in runs.lines if "result" in line):
        made = line["made"]
        new = {name: made.get(name) for name in ("gpu", "cpu", "threads", "versions")}
        key = made.get("gpu") or (made["cpu"], made["threads"])
        here = found.setdefault(key, new | {"dates": [], "commits": [], "hours": 0.0})
        here["dates"] = sorted({*here["dates"], made["date"][:10]})
        here["commits"] = sorted({*here["commits"], str(made["commit"])})
        here["hours"] = round(here["hours"] + made["seconds"] / 3600, 2)
    return list(found.values())


def of_data(matrix: Matrix, runs: Runs, methods: Mapping[str, Method], data: str, measure: Measure) -> Results:
    """One data set."""
    found = entries(matrix, runs, data)
    start = matrix.result(runs, matrix.unit(START, data)._replace(steps=0))
    rows = {
        name: row(measure, entry) | {"ours": methods[name].ours, "extra": name in matrix.extras}
        for name, entry in found.items()
    }
    ours = [name for name in found if methods[name].ours]
    peers = [name for name in found if not methods[name].ours]
    pairs = {
        name: {
            peer: {
                "steps": together(measure, found[name], found[peer]),
                "cpu": together(measure, found[name], found[peer], cpu=True),
            }
            for peer in peers
        }
        for name in ours
    }
    return {
        "measure": measure.name,
        "sign": measure.sign,
        "steps": matrix.steps[data],
        "start": float(measure.values(start, start["points"][0]).mean()) if start else float("nan"),
        "methods": rows,
        "pairs": pairs,
        "equal_memory": {peer: within(measure, found, ours, peer) for peer in peers},
    }


def row(measure: Measure, entry: Entry) -> Results:
    """One method."""
    ends = [final(measure, run) for run in entry.runs.values()]
    mean, half = interval(ends)
    sound = [run for run in entry.runs.values() if not run["diverged"]]
    seconds = [entry.cpu(run, run["points"][-1]["step"]) for run in sound]
    first = next(iter(entry.runs.values()))
    memory = (entry.memory or {}) | {"allocated": entry.allocated}
    steps = first["points"][-1]["step"] if first["points"] else 0
    return {
        "tried": {f"{lr:g}": measure.sign * value for lr, value in entry.tuned.tried.items()},
        "lr": min(entry.tuned.tried, key=entry.tuned.tried.__getitem__),
        "tuned": entry.tuned.best is not None,
        "edge": entry.tuned.edge,
        "ends": ends,
        "mean": mean,
        "half": half,
        "cpu_seconds": float(np.median(seconds)) if seconds else float("nan"),
        "tokens_per_cpu_second": entry.cost["tokens"] * steps / np.median(seconds) if seconds and entry.cost else NAN,
        "speed": entry.cost["adamw"] * steps / np.median(seconds) if seconds and entry.cost else NAN,
        "curve": curve(measure, entry),
        "share": first.get("selection", {}).get("share"),
        "memory": {name: memory.get(name, NAN) for name in ("peak", "natural", "state", "weights", "allocated")},
    }


def curve(measure: Measure, entry: Entry) -> list[list[float]]:
    """Step, mean CPU seconds and mean measure of the runs at every evaluation that all of them have."""
    runs = list(entry.runs.values())
    lines = []
    for k in range(min(len(run["points"]) for run in runs)):
        points = [run["points"][k] for run in runs]
        values = [measure.values(run, point).mean() for run, point in zip(runs, points, strict=True)]
        seconds = [entry.cpu(run, point["step"]) for run, point in zip(runs, points, strict=True)]
        lines.append([points[0]["step"], float(np.mean(seconds)), float(np.mean(values))])
    return lines


def within(measure: Measure, found: dict[str, Entry], ours: list[str], peer: str) -> Results | None:
    """The best of ours that needs no more memory than a peer, and the difference to it."""
    limit = found[peer].memory
    fit = [n for n in ours if limit and (m := found[n].memory) and m["peak"] <= limit["peak"] and found[n].runs]
    if not fit:
        return None
    best = min(fit, key=lambda name: measure.sign * np.mean([final(measure, r) for r in found[name].runs.values()]))
    return {"ours": best, "difference": together(measure, found[best], found[peer])}


# -- tables -------------------------------------------------------------------------------------


def methods_table(data: Results, digits: int = 3) -> str:
    """A row for every method, the best one first."""
    head = ["method", "lr", "seeds", data["measure"], "CPU s", "tokens / CPU s", "x AdamW", "peak MB", "state MB"]
    head.append("peak MB, GPU")
    rows = sorted(data["methods"].items(), key=lambda item: data["sign"] * item[1]["mean"])
    return markdown(head, [_methods_row(name, entry, digits) for name, entry in rows])


def _methods_row(name: str, entry: Results, digits: int) -> list[str]:
    half = "" if np.isnan(entry["half"]) else f" ± {entry['half']:.{digits}f}"
    mark = "" if entry["tuned"] else "?"
    return [
        name,
        f"{entry['lr']:g}{mark}{'!' * entry['edge']}",
        str(len(entry["ends"])),
        f"{entry['mean']:.{digits}f}{half}",
        number(entry["cpu_seconds"], 0),
        number(entry["tokens_per_cpu_second"], 0),
        number(entry["speed"], 2),
        number(entry["memory"]["peak"] / MB, 0),
        number(entry["memory"]["state"] / MB, 1),
        number(entry["memory"]["allocated"] / MB, 0),
    ]


def number(value: float | None, digits: int) -> str:
    """A number, or - where there is none."""
    return "-" if value is None or np.isnan(value) else f"{value:,.{digits}f}"


def pairs_table(data: Results, when: str = "steps", digits: int = 3) -> str:
    """Ours less each peer at equal steps or equal CPU seconds; where some have several seeds, those alone."""
    seeds = {
        (name, peer): found["steps"]["n_seeds"]
        for name, pairs in data["pairs"].items()
        for peer, found in pairs.items()
        if found["steps"]
    }
    least = min(2, max(seeds.values(), default=1))
    peers = [
        peer for peer in data["equal_memory"] if any(seeds.get((name, peer), 0) >= least for name in data["pairs"])
    ]
    rows = [
        [name, *(difference(pairs[peer][when], digits) for peer in peers)]
        for name, pairs in data["pairs"].items()
        if any(seeds.get((name, peer), 0) >= least for peer in peers)
    ]
    return markdown([f"{data['measure']}, less that of", *peers], rows)


def difference(found: Results | None, digits: int = 3) -> str:
    """A difference and its wider half width; in bold if it is clear."""
    if found is None:
        return "-"
    half = max((h for h in (found["examples"], found["seeds"]) if not np.isnan(h)), default=float("nan"))
    text = f"{found['mean']:+.{digits}f} ± {half:.{digits}f}"
    if found["n_seeds"] == 1:
        return text + " (1 seed)"
    return f"**{text}**" if found["clear"] else text


def memory_table(data: Results, digits: int = 3) -> str:
    """For every peer whose peak memory was counted the best of ours within it."""
    head = ["peer", "its peak MB", "best of ours within it", "its peak MB", f"{data['measure']}, ours less the peer's"]
    rows = []
    for peer, found in data["equal_memory"].items():
        peak = number(data["methods"][peer]["memory"]["peak"] / MB, 0)
        if peak == "-":
            continue
        if found is None:
            rows.append([peer, peak, "none", "-", "-"])
            continue
        own = number(data["methods"][found["ours"]]["memory"]["peak"] / MB, 0)
        rows.append([peer, peak, found["ours"], own, difference(found["difference"], digits)])
    return markdown(head, rows)


def grid_table(data: Results, digits: int = 3) -> str:
    """What every learning rate gave on the first seed; the best in bold."""
    rows = []
    for name, entry in data["methods"].items():
        cells = [
            f"**{lr}: {value:.{digits}f}**" if float(lr) == entry["lr"] else f"{lr}: {value:.{digits}f}"
            for lr, value in entry["tried"].items()
        ]
        rows.append([name, "; ".join(cells), "yes" if entry["edge"] else ""])
    return markdown(["method", f"learning rate: {data['measure']}", "at the edge"], rows)


def missing_text(results: Results) -> str:
    """What has not run yet, and what could not."""
    found = results["missing"]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    text = f"Missing: {'; '.join(found[:SHOWN])}{more}.\n" if found else "Nothing is missing.\n"
    absent = results["not_installed"]
    return text + (f"Not installed: {', '.join(absent)}.\n" if absent else "")


def machines_text(results: Results) -> str:
    """Where the runs were made."""
    parts = [
        f"{m['gpu'] or m['cpu'] + ', OMP_NUM_THREADS ' + m['threads']}, PyTorch {m['versions'].get('torch')}, "
        f"transformers {m['versions'].get('transformers')}, {', '.join(m['dates'])}, {m['hours']:.1f} h"
        for m in results["machines"]
    ]
    return "*" + "; ".join(parts) + "*\n"


def tables_of(results: Results, digits: int = 3) -> dict[str, str]:
    """All of these tables by name."""
    found = {"missing": missing_text(results), "runs": machines_text(results), "notes": NOTES}
    for name, data in results["data"].items():
        found |= {
            name: methods_table(data, digits),
            f"{name}_steps": pairs_table(data, "steps", digits),
            f"{name}_cpu": pairs_table(data, "cpu", digits),
            f"{name}_memory": memory_table(data, digits),
            f"{name}_grid": grid_table(data, digits),
        }
    return found


# -- pictures -----------------------------------------------------------------------------------


def draw(data: Results, title: str, lines: Mapping[str, float] | None = None) -> Figure:
    """The measure against steps, CPU seconds (where any were measured) and peak memory, there with numbers for names.

    What is an extra is left out where there would be more than :data:`DRAWN` lines.

    Parameters
    ----------
    data : dict
        Of a data set.
    title : str
    lines : mapping of str to float, optional
        Levels to draw across.
    """
    methods = data["methods"]
    if len(methods) > DRAWN:
        methods = {name: entry for name, entry in methods.items() if not entry["extra"]}
    lines_of = {name: np.array(entry["curve"]).reshape(-1, 3) for name, entry in methods.items()}
    timed = any(np.isfinite(found[:, 1]).any() for found in lines_of.values())
    figure, (every,) = panels(1, 2 + timed, 4.6, 4.4)
    steps, *cpu, memory = every
    for k, (name, entry) in enumerate(methods.items()):
        for axes, column in zip((steps, *cpu), (0, 1), strict=False):
            axes.plot(lines_of[name][:, column], lines_of[name][:, 2], label=f"{k + 1} {name}", marker=".", **style(k))
        peak = entry["memory"]["peak"] / MB
        if not np.isnan(peak):
            memory.plot([peak], [entry["mean"]], marker="o", color=style(k)["color"], linestyle="none")
            memory.annotate(str(k + 1), (peak, entry["mean"]), (4, 3), textcoords="offset points", fontsize=8)
    for name, level in (lines or {}).items():
        _level(steps, name, level)
    for axes, label in zip(every, ("step", *["CPU seconds"] * timed, "peak memory, MB"), strict=True):
        tidy(axes, label, data["measure"], title if axes is steps else "", "linear")
    if methods:
        figure.legend(*steps.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _level(axes: Axes, name: str, level: float) -> None:
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        name, (0.99, level), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right"
    )
