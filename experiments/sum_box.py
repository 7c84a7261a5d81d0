# SPDX-License-Identifier: BSD-3-Clause
"""A sum and a box: GS-s, GS-q, GS-1 and WSS2 by iteration, by column and by second; what GS-1 moves.

    minimise 1/2 x'Qx + c'x   subject to   sum(x) = s,   l <= x <= u

arXiv 2307.01169, section 4. rules_svm has the same rules on SVM duals; here are four other shapes of a box:

    simplex        least squares with x >= 0, sum(x) = 1; few coordinates end above 0
    caps           a portfolio, factors and a diagonal, 0 <= x <= 10 / n, sum(x) = 1; many end at the cap
    box            -1 <= x <= 1, sum(x) = 0, a Wishart matrix, a linear term that pushes half of x to its bounds
    uneven box     the same with widths from 1e-4 to 1: the violating pair may have next to no room

Three questions. How far does a rule come in k iterations, k columns, k seconds? At one and the same point, how much
does each rule's step gain, in the model <g, d> + L1/2 ||d||_1^2 that orders them (GS-1 before GS-q before GS-s,
docs/theory.md) and in f, that orders nothing? And how many coordinates does GS-1 move, as caps grow tighter?
Exact steps are compiled; "model step" is the step of the constant L1, one Python call each, and has no seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import bcd
from bcd import _compiled
from bcd.selection import GS1
from experiments.figures import panels, style, tidy
from experiments.rules_svm import moved
from experiments.tables import markdown

TITLE = "A sum and a box: progress by iteration, column and second; what GS-1 moves"
SEED = 0
N = 1000
ACCURACIES = (1e-2, 1e-4, 1e-6)  # of f - f*, relative to its start
MOST = 50_000  # steps of a run
REPETITIONS = 15  # of a timed run, as far as they fit in BUDGET seconds
BUDGET = 1.5
TRACE_POINTS = 80
TIMED_POINTS = 16  # of these: looks at a run take time, so every point is timed in a run of its own
COMPARED_STEPS = 2000  # points at which the steps are compared
CAPS = (1.05, 1.2, 1.5, 2.0, 4.0, 10.0, 30.0, 100.0)  # times the mean of x
UPDATES = ("line-search", "model")
MOVED_HEAD = ("step", "steps", "moved a step, mean", "in the first tenth", "exactly two", "most")

RULES: dict[str, tuple[str, str | None]] = {
    "GS-1": ("gs1", None),
    "GS-q": ("gsq", None),
    "GS-s": ("gss", None),
    "WSS2": ("wss2", None),
    "GS-1, model step": ("gs1", "model"),
    "GS-q, model step": ("gsq", "model"),
    "GS-s, model step": ("gss", "model"),
}
EXACT = tuple(rule for rule, (_, update) in RULES.items() if update is None)
Array = np.ndarray


def run(quick: bool) -> dict[str, Any]:
    """Every rule on every problem, steps from the same points, and what GS-1 moves."""
    n = 200 if quick else N
    warm_up()
    problems = {name: examined(make(n)) for name, make in PROBLEMS.items()}
    results: dict[str, Any] = {
        "settings": {"n": n, "accuracies": ACCURACIES, "most": MOST, "repetitions": REPETITIONS},
        "problems": problems,
        "caps": [{"cap": cap} | steps_of_gs1(portfolio(n, cap)) for cap in CAPS],
    }
    return results | {"pictures": {"": draw(problems), "moved": draw_moved(results)}}


# -- problems -----------------------------------------------------------------------------------


def simplex(n: int) -> bcd.Problem:
    """1/2 |Ax - b|^2 on the simplex, A of shape (n / 2, n), b near the mean of twenty of its columns."""
    rng = np.random.default_rng([SEED, 0])
    A = rng.standard_normal((n // 2, n)) / np.sqrt(n // 2)
    b = A[:, :20].mean(axis=1) + 0.1 * rng.standard_normal(n // 2) / np.sqrt(n // 2)
    return bcd.Problem(bcd.Quadratic(A.T @ A, -(A.T @ b)), bcd.SumBox(lower=0, total=1))


def portfolio(n: int, cap: float = 10.0) -> bcd.Problem:
    """Ten factors and a diagonal, returns, and at most ``cap`` / n in one place."""
    rng = np.random.default_rng([SEED, 1])
    F = rng.standard_normal((n, 10))
    Q = F @ F.T + np.diag(rng.uniform(0.5, 1.5, n))
    return bcd.Problem(bcd.Quadratic(Q, -rng.random(n)), bcd.SumBox(lower=0, upper=cap / n, total=1))


def _wishart(n: int, width: Callable[[np.random.Generator], Any]) -> bcd.Problem:
    rng = np.random.default_rng([SEED, 2])
    A = rng.standard_normal((n, 2 * n))
    objective = bcd.Quadratic(A @ A.T / (2 * n), rng.standard_normal(n))
    ends = width(rng)
    return bcd.Problem(objective, bcd.SumBox(lower=-ends, upper=ends, total=0))


def box(n: int) -> bcd.Problem:
    """Bounds of -1 and 1."""
    return _wishart(n, lambda rng: np.ones(n))


def uneven_box(n: int) -> bcd.Problem:
    """Bounds of -w and w, w from 1e-4 to 1, evenly spread in the logarithm."""
    return _wishart(n, lambda rng: 10.0 ** rng.uniform(-4, 0, n))


PROBLEMS: dict[str, Callable[[int], bcd.Problem]] = {
    "simplex": simplex,
    "caps": portfolio,
    "box": box,
    "uneven box": uneven_box,
}


# -- runs ---------------------------------------------------------------------------------------


def solve(problem: bcd.Problem, rule: str, **options: Any) -> bcd.Result:
    """One run of a row of RULES from the point closest to 0, to the end of rounding unless told otherwise."""
    name, update = RULES[rule]
    options = {"tol": 0.0, "max_iter": MOST} | options
    return bcd.minimize(problem, name, update, random_state=SEED, **options)


def warm_up() -> None:
    """Compile everything that is timed or followed."""
    for rule in RULES:
        solve(box(20), rule, max_iter=20, trace=True)
    bcd.solve_qp(np.eye(20), total=1, lower=0)


def bounds_of_excess(problem: bcd.Problem) -> tuple[float, float]:
    """F at the start, and f*: the objective of solve_qp, whose certificate must prove ten digits more than is asked."""
    within, Q = problem.constraint, problem.objective
    start = Q.value(problem.feasible.project(np.zeros(problem.n)))
    best = bcd.solve_qp(Q.hessian.matrix, Q.c, total=within.total, lower=within.lower, upper=within.upper, tol=1e-12)
    if not best.gap <= 1e-3 * ACCURACIES[-1] * (start - best.objective):
        raise RuntimeError(f"the reference is not exact enough: gap {best.gap:.1e}, {best.status.value}")
    return start, best.objective


def examined(problem: bcd.Problem) -> dict[str, Any]:
    """All that is asked of one problem."""
    start, minimum = bounds_of_excess(problem)
    rows = {rule: followed(problem, rule, start, minimum) for rule in RULES}
    add_seconds(problem, rows)
    return {
        "n": problem.n,
        "lipschitz": problem.lipschitz,
        "start": start,
        "minimum": minimum,
        "rules": rows,
        "moved": steps_of_gs1(problem),
        "steps": compare_steps(problem, start, minimum),
    }


def followed(problem: bcd.Problem, rule: str, start: float, minimum: float) -> dict[str, Any]:
    """Iterations and columns to every accuracy (None: not reached), and the trace for the picture."""
    enough = minimum + ACCURACIES[-1] * (start - minimum)
    result = solve(problem, rule, trace=True, callback=lambda now: now.objective <= enough)
    iterations = np.array([*result.trace.iteration, result.iterations])  # the callback stops before the last look
    columns = np.array([*result.trace.columns, result.columns])
    excess = (np.array([*result.trace.objective, result.objective]) - minimum) / (start - minimum)
    marks = {}
    for accuracy in ACCURACIES:
        below = np.flatnonzero(excess <= accuracy)
        k = below[0] if len(below) else None
        marks[str(accuracy)] = None if k is None else {"iterations": int(iterations[k]), "columns": int(columns[k])}
    points = np.unique(np.geomspace(1, len(excess), TRACE_POINTS).astype(int)) - 1
    rounded = [float(f"{v:.6g}") for v in np.maximum(excess[points], 0)]
    return {
        "reached": marks,
        "trace": {"iterations": iterations[points], "columns": columns[points], "excess": rounded},
    }


def add_seconds(problem: bcd.Problem, rows: dict[str, Any]) -> None:
    """Time as many steps as the marks and some points of the trace have, without a trace; only what is compiled."""
    entries = []
    for rule in EXACT:
        trace = rows[rule]["trace"]
        shown = np.unique(np.linspace(0, len(trace["excess"]) - 1, TIMED_POINTS).astype(int))
        timed = [{"iterations": int(trace["iterations"][k]), "excess": trace["excess"][k]} for k in shown]
        rows[rule]["timed"] = [entry for entry in timed if entry["iterations"]]
        entries += [(rule, entry) for entry in [*filter(None, rows[rule]["reached"].values()), *rows[rule]["timed"]]]
    for _, entry in entries:
        entry["seconds"] = []
    for _ in range(REPETITIONS):
        for rule, entry in entries:
            if sum(entry["seconds"]) < BUDGET:
                entry["seconds"].append(solve(problem, rule, max_iter=entry["iterations"]).seconds)


def steps_of_gs1(problem: bcd.Problem) -> dict[str, Any]:
    """How many coordinates its steps move, with line search and with the model step (rules_svm.moved)."""
    return {update: moved(problem, update) for update in ("line-search", "model")}


# -- steps from the same point ------------------------------------------------------------------


def compare_steps(problem: bcd.Problem, start: float, minimum: float) -> dict[str, Any]:
    """Along a run of GS-1: what the model steps of GS-q and GS-s gain over GS-1's."""
    gains: dict[str, dict[str, list[float]]] = {kind: {"GS-1": [], "GS-q": [], "GS-s": []} for kind in ("model", "f")}
    Q = problem.objective.hessian.matrix

    class Watched(GS1):
        """GS-1 that looks at what the others would gain here; one Python call a step."""

        def select(self, at: Any, moves: Any, state: None) -> tuple[bcd.Selection, None]:
            for name in ("GS-1", "GS-q", "GS-s"):
                chosen, _ = bcd.RULES[RULES[name][0]].rule.select(at, moves, None)
                model, true = gain(chosen, at.grad, Q, at.lipschitz)
                gains["model"][name].append(model)
                gains["f"][name].append(true)
            return super().select(at, moves, state)

    enough = minimum + ACCURACIES[-1] * (start - minimum)
    bcd.minimize(
        problem, Watched(), "model", tol=0.0, max_iter=COMPARED_STEPS, callback=lambda now: now.objective <= enough
    )
    return {kind: {name: ratios(each["GS-1"], each[name]) for name in ("GS-q", "GS-s")} for kind, each in gains.items()}


def gain(chosen: bcd.Selection, grad: Array, Q: Array, lipschitz: float) -> tuple[float, float]:
    """How far a step lowers the model of the constant L1, and f."""
    index, d = chosen.index, chosen.step
    slope = float(grad[index] @ d)
    curved = _compiled.block_curvature(Q, index, d)
    return -(slope + 0.5 * lipschitz * float(np.abs(d).sum()) ** 2), -(slope + 0.5 * float(curved))


def ratios(base: list[float], other: list[float]) -> dict[str, Any]:
    """Quantiles of other / base over the points, and the shares above 1 and below a hundredth."""
    r = np.array(other) / np.array(base)
    return {
        "points": len(r),
        "quantiles": np.quantile(r, np.linspace(0, 1, 41)),
        "above": float(np.mean(r > 1 + 1e-9)),
        "trivial": float(np.mean(r < 0.01)),
    }


# -- pictures -----------------------------------------------------------------------------------


def draw(problems: dict[str, Any]) -> Figure:
    """F - f* against iterations, columns and seconds (exact steps), and against iterations (model steps)."""
    figure, rows = panels(len(problems), 4, 3.7, 2.8)
    heads = ("iterations", "columns", "seconds", "iterations, model steps")
    for row, (name, entry) in zip(rows, problems.items(), strict=True):
        for axes, head in zip(row, heads, strict=True):
            for rule, one in entry["rules"].items():
                if (rule in EXACT) == (head != heads[-1]):
                    x, y = curve(one, head.partition(",")[0])
                    shown = (x > 0) & (y > 0)
                    k = EXACT.index(rule.partition(",")[0])
                    axes.plot(x[shown], y[shown], label=EXACT[k], **style(k))
            tidy(axes, head, "(f - f*) / (f(start) - f*)" if head == heads[0] else "")
            axes.set_ylim(0.7 * ACCURACIES[-1], 1.5)
        row[0].set_title(f"{name}, n = {entry['n']:,}", fontsize=10, loc="left", fontweight="bold")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(EXACT), frameon=False)
    return figure


def curve(row: dict[str, Any], against: str) -> tuple[Array, Array]:
    """Where a line goes; seconds are the shortest of their repetitions."""
    if against == "seconds":
        x, y = [min(one["seconds"]) for one in row["timed"]], [one["excess"] for one in row["timed"]]
    else:
        x, y = row["trace"][against], row["trace"]["excess"]
    return np.array(x), np.array(y)


def draw_moved(results: dict[str, Any]) -> Figure:
    """How many coordinates GS-1 moves, by problem and by cap; and gains of GS-q and GS-s over GS-1's."""
    figure, ((left, right), (mean, two)) = panels(2, 2, 5.2, 3.9)
    for k, (name, entry) in enumerate(results["problems"].items()):
        m = entry["moved"]["line-search"]
        share = np.cumsum(m["steps"][::-1])[::-1] / np.sum(m["steps"])
        left.plot(m["sizes"], share, marker="o", markersize=3, label=name, **style(k))
        for which, one in entry["steps"]["f"].items():
            line = style(k) | {"linestyle": "-" if which == "GS-q" else ":"}
            right.plot(one["quantiles"], np.linspace(0, 1, len(one["quantiles"])), label=f"{name}, {which}", **line)
    tidy(left, "coordinates k", "share of steps that move k or more", "GS-1 with line search")
    tidy(right, "decrease of f over that of GS-1's step", "share of points below", "Model steps from the same point")
    right.set(yscale="linear", xlim=(1e-4, 10))
    caps = [row["cap"] for row in results["caps"]]
    for axes, key in ((mean, "mean"), (two, "share_of_two")):
        for k, update in enumerate(UPDATES):
            shown = [row[update][key] for row in results["caps"]]
            axes.plot(caps, shown, marker="o", markersize=4, label=update, **style(k))
    tidy(mean, "cap over the mean of x", "coordinates moved a step, mean", "Portfolio: what GS-1 moves")
    tidy(two, "cap over the mean of x", "share of steps that move exactly two", "Portfolio: exactly two")
    two.set(yscale="linear", ylim=(0, 1))
    ticks = (1, 2, 3, 5, 10, 20, 50, 100)
    for axes in (left, mean, two):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    mean.set_yticks(ticks[1:6], [str(tick) for tick in ticks[1:6]])
    for axes in (left, right, mean, two):
        axes.legend(frameon=False, fontsize=8.5)
    return figure


# -- tables -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """One table a problem ("simplex", "caps", "box", "uneven_box"), "moved", "by_cap" and "steps"."""
    problems = results["problems"]
    each = {name.replace(" ", "_"): _problem_table(entry) for name, entry in problems.items()}
    here = [[name, *_moved_cells(entry["moved"], update)] for name, entry in problems.items() for update in UPDATES]
    cap_rows = [[f"{row['cap']:g}", *_moved_cells(row, update)] for row in results["caps"] for update in UPDATES]
    return each | {
        "moved": markdown(["problem", *MOVED_HEAD], here),
        "by_cap": markdown(["cap over the mean of x", *MOVED_HEAD], cap_rows),
        "steps": _steps_table(problems),
    }


def _moved_cells(entry: dict[str, Any], update: str) -> list[str]:
    m = entry[update]
    means = [f"{m[name]:.2f}" for name in ("mean", "mean_of_first_tenth")]
    return [update, f"{m['iterations']:,}", *means, f"{m['share_of_two']:.0%}", f"{m['largest']:,}"]


def _problem_table(entry: dict[str, Any]) -> str:
    head = ["rule"]
    for accuracy in ACCURACIES:
        head += [f"iterations to {accuracy:.0e}", "columns", "ms"]
    return markdown(
        head,
        [
            [rule] + [cell for accuracy in ACCURACIES for cell in _cells(row["reached"][str(accuracy)])]
            for rule, row in entry["rules"].items()
        ],
    )


def _cells(mark: dict[str, Any] | None) -> list[str]:
    if mark is None:
        return ["not reached", "-", "-"]
    ms = f"{1e3 * min(mark['seconds']):,.3g}" if "seconds" in mark else "-"
    return [f"{mark['iterations']:,}", f"{mark['columns']:,}", ms]


def _steps_table(problems: dict[str, Any]) -> str:
    head = ["problem", "gain over GS-1's", "points", "in the model: median", "5%", "least"]
    head += ["in f: median", "5%", "least", "larger than GS-1's", "below a hundredth"]
    rows = []
    for name, entry in problems.items():
        for rule in ("GS-q", "GS-s"):
            cells = [f"{entry['steps']['f'][rule]['points']:,}"]
            for kind in ("model", "f"):
                q = entry["steps"][kind][rule]["quantiles"]
                cells += [f"{q[20]:.3f}", f"{q[2]:.3f}", f"{q[0]:.2g}"]
            true = entry["steps"]["f"][rule]
            rows.append([name, rule, *cells, f"{true['above']:.1%}", f"{true['trivial']:.1%}"])
    return markdown(head, rows)
