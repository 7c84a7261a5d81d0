# SPDX-License-Identifier: BSD-3-Clause
"""Pairs under a sum without bounds: random, cyclic, greedy, GSL and what approximates it, n from 100 to 10,000.

    minimise 1/2 x'Qx + c'x   subject to   sum(x) = 0

arXiv 2307.01169, sections 2 and 3; w_i = sqrt(Q_ii) weighs the coordinates. What chooses the pair (i rises, j falls),
every pair then moved to its minimum:

    random, cyclic      without the gradient
    GS                  argmin g, argmax g: steepest descent in the 1-norm
    GSL                 the largest (g_j - g_i) / (w_i + w_j), by Dinkelbach's iteration: the same in the weighted norm
    ratio               the ends of (g - mean g) / w
    best of both        GS or ratio, whichever has the larger (g_j - g_i) / (w_i + w_j)
    one end             GS's j, and the best i for it
    best pair           the largest (g_j - g_i)^2 / (Q_ii + Q_jj - 2 Q_ij): what an exact step gains; O(n^2)

Two least-squares problems are followed step by step, one with columns of like and one with columns of unlike
lengths. Four families then grow from n = 100 to 10,000. In two of them Q = A A', and new rows of A crowd at the centre
of the convex hull of the first twelve: mu1 / L1 does not change (docs/theory.md), and with it the guarantee of GS;
that of random pairs, 1 - mu2 / ((n - 1) L2), does. One of them takes the steps of these guarantees, of the constant L2
(GSL of its own constants), the other exact ones. In the other two Q is the correlation of neighbours, of full rank,
where mu1 shrinks like 1/n. The seconds are of compiled loops; where the table has none, the rule takes one Python call
a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numba import njit
from scipy.linalg import toeplitz

import bcd
from bcd import _compiled
from bcd.selection import GSL
from experiments.figures import panels, style, tidy
from experiments.paper_rates import gram_problem, width_over_diameter
from experiments.tables import markdown
from experiments.timing import interleaved

TITLE = "Pairs under a sum: random, cyclic, greedy, GSL and its approximations"
SEED = 0
N = 1000  # of the problems that are followed step by step
ACCURACIES = (1e-2, 1e-4, 1e-6)  # of f - f*, relative to its start
SIZES = (100, 300, 1000, 3000, 10_000)
DRAWS = 3
WORK = 4e9  # steps times coordinates of a run, at most: some seconds of compiled steps
REPETITIONS = 9  # of a timed run, as far as they fit in BUDGET seconds
BUDGET = 1.5
TRACE_POINTS = 80
RANK = 4
INFORMATIVE = 12  # rows that span the hull
CROWD = 0.01  # of the way from the centre of the hull: where the other rows are put
CORRELATION = 0.5
COST_SIZES = (100, 1000, 10_000, 100_000)
ENUMERATED_UP_TO = 10_000  # coordinates; all pairs of more take minutes

Array = np.ndarray


def run(quick: bool) -> dict[str, Any]:
    """Runs followed, approximations compared, sizes, and what a selection costs."""
    n, sizes, draws = (200, SIZES[:3], 1) if quick else (N, SIZES, DRAWS)
    results: dict[str, Any] = {
        "settings": {"accuracies": ACCURACIES, "work": WORK, "draws": draws},
        "curves": curves(n),
        "gsl": compare_choices(*least_squares(n, True, SEED)),
        "dimension": {name: dimension(name, sizes, draws) for name in FAMILIES},
        "cost": costs(COST_SIZES[:3] if quick else COST_SIZES, 3 if quick else 9),
    }
    return results | {"pictures": {"": draw(results), "dimension": draw_dimension(results["dimension"])}}


# -- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A rule for problems without bounds, from a function of the point that returns a pair."""

    choose: Callable[[Any], tuple[int, int]]

    def init(self, moves: Any, seed: int) -> None:
        """No state."""

    def select(self, at: Any, moves: Any, state: None) -> tuple[bcd.Selection, None]:
        """The pair; the step is left to the update."""
        return bcd.Selection(np.array(self.choose(at))), state


@njit
def gs_ends(g: Array) -> tuple[int, int]:
    """Argmin and argmax."""
    i = j = 0
    for k in range(g.shape[0]):
        if g[k] < g[i]:
            i = k
        if g[k] > g[j]:
            j = k
    return i, j


@njit
def ratio_ends(g: Array, w: Array) -> tuple[int, int]:
    """Argmin and argmax of (g - mean g) / w."""
    mean = g.mean()
    i = j = 0
    low = high = (g[0] - mean) / w[0]
    for k in range(g.shape[0]):
        value = (g[k] - mean) / w[k]
        if value < low:
            low, i = value, k
        if value > high:
            high, j = value, k
    return i, j


@njit
def score(g: Array, w: Array, i: int, j: int) -> float:
    """What GSL maximises."""
    return (g[j] - g[i]) / (w[i] + w[j])


@njit
def best_of_both(g: Array, w: Array) -> tuple[int, int]:
    """The pair of GS or of ratio, whichever has the larger score."""
    i, j = gs_ends(g)
    a, b = ratio_ends(g, w)
    return (i, j) if score(g, w, i, j) >= score(g, w, a, b) else (a, b)


@njit
def one_end(g: Array, w: Array) -> tuple[int, int]:
    """Argmax g, and its partner with the largest score."""
    best, j = 0, gs_ends(g)[1]
    for i in range(g.shape[0]):
        if score(g, w, i, j) > score(g, w, best, j):
            best = i
    return best, j


@njit
def enumerated(g: Array, w: Array) -> tuple[int, int]:
    """The pair with the largest score, from all of them."""
    best, a, b = -1.0, 0, 0
    for i in range(g.shape[0]):
        for j in range(g.shape[0]):
            if g[j] > g[i] and score(g, w, i, j) > best:
                best, a, b = score(g, w, i, j), i, j
    return a, b


@njit(error_model="numpy")
def best_pair(g: Array, Q: Array) -> tuple[int, int]:
    """The pair whose exact step lowers the quadratic most, from all of them."""
    best, a, b = -1.0, 0, 0
    for i in range(g.shape[0]):
        for j in range(i):
            gain = (g[j] - g[i]) ** 2 / max(Q[i, i] + Q[j, j] - 2 * Q[i, j], 1e-300)
            if gain > best:
                best = gain
                a, b = (i, j) if g[i] < g[j] else (j, i)
    return a, b


APPROXIMATIONS: dict[str, Callable[[Array, Array], tuple[int, int]]] = {
    "GS": lambda g, w: gs_ends(g),
    "ratio": ratio_ends,
    "best of both": best_of_both,
    "one end": one_end,
}


def _weighted(choose: Callable[[Array, Array], tuple[int, int]], at: Any) -> tuple[int, int]:
    return choose(at.grad, at.weight)


RULES: dict[str, Any] = {
    "random": "random",
    "cyclic": "cyclic",
    "GS": "gs",
    "GSL": "gsl",
    **{name: Choice(partial(_weighted, choose)) for name, choose in APPROXIMATIONS.items() if name != "GS"},
    "best pair": Choice(lambda at: best_pair(at.grad, at.problem.objective.hessian.matrix)),
}
CONSTANT = {"random": "pair-l2", "cyclic": "pair-l2", "GS": "model", "GSL": "model"}  # updates with constant steps
EXACT = {rule: None for rule in RULES if rule not in ("best pair", "one end")}


# -- problems -----------------------------------------------------------------------------------


def least_squares(n: int, unlike: bool, seed: int) -> tuple[bcd.Problem, float]:
    """1/2 |Ax - b|^2, A of shape (2n, n), without its constant, and its minimum under sum(x) = 0.

    ``unlike``: every column of A is multiplied by a normal number, so that the L_i span many orders.
    """
    rng = np.random.default_rng([SEED, seed])
    A = rng.standard_normal((2 * n, n)) / np.sqrt(2 * n)
    b = A @ rng.standard_normal(n) + 0.1 * rng.standard_normal(2 * n)
    if unlike:
        A = A * rng.standard_normal(n)
    Q, c = A.T @ A, -(A.T @ b)
    kkt = np.block([[Q, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    x = np.linalg.solve(kkt, np.append(-c, 0.0))[:n]
    return _under_a_sum(Q, c), float(0.5 * x @ Q @ x + c @ x)


def _under_a_sum(Q: Array, c: Array) -> bcd.Problem:
    return bcd.Problem(bcd.Quadratic(Q, c), bcd.SumBox(total=0))


def hull_rows(n: int, seed: int) -> Array:
    """INFORMATIVE rows that do not depend on n, and others within their hull, CROWD of the way from its centre."""
    first = np.random.default_rng([SEED, seed]).standard_normal((INFORMATIVE, RANK))
    shares = np.random.default_rng([SEED, seed, n]).dirichlet(np.ones(INFORMATIVE), n - INFORMATIVE)
    return np.vstack([first, first.mean(axis=0) + CROWD * (shares @ first - first.mean(axis=0))])


def hull(n: int, seed: int) -> tuple[bcd.Problem, float, float]:
    """The problem, its minimum, and the 1 - factor a step that GS is guaranteed."""
    A = hull_rows(n, seed)
    problem, minimum = gram_problem(A, np.random.default_rng([SEED, seed, 1]))  # the same w for every n
    return problem, minimum, width_over_diameter(A[:INFORMATIVE]) ** 2


def neighbours(unlike: bool, n: int, seed: int) -> tuple[bcd.Problem, float, None]:
    """Q_ij = s_i s_j CORRELATION^|i - j|, s = 1 or normal numbers; the inverse of Q / (s s') has three diagonals."""
    rng = np.random.default_rng([SEED, seed, n])
    s = np.maximum(np.abs(rng.standard_normal(n)), 1e-3) if unlike else np.ones(n)
    c = s * rng.standard_normal(n)
    Q = toeplitz(CORRELATION ** np.arange(n))
    Q *= s
    Q *= s[:, None]
    one, full = _solve_neighbours(1 / s) / s, _solve_neighbours(c / s) / s
    x = full.sum() / one.sum() * one - full
    return _under_a_sum(Q, c), float(0.5 * c @ x), None


def _solve_neighbours(b: Array) -> Array:
    """``toeplitz(CORRELATION ** arange(n))^-1 b``."""
    r, out = CORRELATION, (1 + CORRELATION**2) * b
    out[[0, -1]] = b[[0, -1]]
    out[1:] -= r * b[:-1]
    out[:-1] -= r * b[1:]
    return out / (1 - r * r)


class Family(NamedTuple):
    """Problems (with minimum, and GS's guarantee where it is known) by n and seed, and the update of every rule."""

    make: Callable[[int, int], tuple[bcd.Problem, float, float | None]]
    updates: dict[str, str | None]


FAMILIES: dict[str, Family] = {
    "hull, constant steps": Family(hull, CONSTANT),
    "hull, exact steps": Family(hull, EXACT),
    "neighbours": Family(partial(neighbours, False), EXACT),
    "neighbours, unlike": Family(partial(neighbours, True), EXACT),
}


# -- runs ---------------------------------------------------------------------------------------


def follow(problem: bcd.Problem, minimum: float, rule: Any, update: str | None = None) -> bcd.Result:
    """A traced run from x = 0 (where f = 0) until f - f* is the smallest accuracy times what it was, or a limit."""
    enough = minimum * (1 - ACCURACIES[-1])
    return bcd.minimize(
        *(problem, rule, update), tol=0.0, max_iter=int(WORK / problem.n), random_state=SEED, trace=True,
        callback=lambda now: now.objective <= enough,
    )  # fmt: skip


def reached(result: bcd.Result, minimum: float, accuracy: float) -> int | None:
    """Steps until f - f* was ``accuracy`` times what it was; None: not within the run.

    Counted at the looks of the trace, which lie at most a 32nd of the steps apart.
    """
    trace = result.trace
    steps = [*trace.iteration, result.iterations]
    values = np.array([*trace.objective, result.objective])
    below = np.flatnonzero(values <= minimum * (1 - accuracy))
    return steps[below[0]] if len(below) else None


def curves(n: int) -> dict[str, Any]:
    """Every rule on the two least-squares problems."""
    warm_up()
    return {name: followed(*least_squares(n, unlike, SEED)) for name, unlike in (("like", False), ("unlike", True))}


def followed(problem: bcd.Problem, minimum: float) -> dict[str, Any]:
    """What the picture and the table of one problem need."""
    lengths = np.sqrt(problem.objective.hessian.diagonal)
    rows = {}
    for name, rule in RULES.items():
        result = follow(problem, minimum, rule)
        rows[name] = {
            "reached": {str(accuracy): reached(result, minimum, accuracy) for accuracy in ACCURACIES},
            "iterations": result.iterations,
            "seconds": seconds(problem, rule, result.iterations) if isinstance(rule, str) else None,
            "trace": thinned(result.trace, minimum),
        }
    return {"n": problem.n, "lengths": np.quantile(lengths, [0, 0.5, 1]), "rules": rows}


def seconds(problem: bcd.Problem, rule: str, steps: int) -> float:
    """The shortest of some runs without a trace, as others may use the machine."""
    times: list[float] = []
    while not times or (len(times) < REPETITIONS and sum(times) < BUDGET):
        times.append(bcd.minimize(problem, rule, tol=0.0, max_iter=steps, random_state=SEED).seconds)
    return min(times)


def thinned(trace: bcd.Trace, minimum: float) -> dict[str, list[float]]:
    """About TRACE_POINTS looks, evenly spaced in the logarithm: steps, and (f - f*) / (f(0) - f*)."""
    points = np.unique(np.geomspace(1, len(trace), TRACE_POINTS).astype(int)) - 1
    excess = 1 - np.array(trace.objective)[points] / minimum
    return {
        "iteration": np.array(trace.iteration)[points].tolist(),
        "excess": [float(f"{v:.6g}") for v in np.maximum(excess, 0)],
    }


def warm_up() -> None:
    """Compile everything that runs later."""
    problem, minimum = least_squares(20, True, SEED)
    for rule in RULES.values():
        follow(problem, minimum, rule)


def compare_choices(problem: bcd.Problem, minimum: float) -> dict[str, Any]:
    """At every point of a GSL run: the score of each approximation over GSL's, and Dinkelbach's rounds."""
    rounds: list[int] = []
    scores: dict[str, list[float]] = {name: [] for name in (*APPROXIMATIONS, "all pairs")}

    class Watched(GSL):
        """GSL that looks at what the others would choose; one Python call a step."""

        def select(self, at: Any, moves: Any, state: None) -> tuple[bcd.Selection, None]:
            g, w = at.grad, at.weight
            i, j, _, count = _compiled.dinkelbach_pair(g, moves.rise, moves.fall, moves.labels, moves.groups, w)
            rounds.append(count)
            best = score(g, w, i, j)
            for name, choose in APPROXIMATIONS.items():
                scores[name].append(score(g, w, *choose(g, w)) / best)
            if len(rounds) % 20 == 1:
                scores["all pairs"].append(score(g, w, *enumerated(g, w)) / best)
            return super().select(at, moves, state)

    bcd.minimize(problem, Watched(), "pair", tol=0.0, max_iter=10 * problem.n, callback=lambda now: (
        now.objective <= minimum * (1 - ACCURACIES[-1])
    ))  # fmt: skip
    return {
        "n": problem.n,
        "rounds": {"mean": float(np.mean(rounds)), "most": max(rounds)},
        "approximations": {name: summary(np.array(values)) for name, values in scores.items()},
    }


def summary(shares: Array) -> dict[str, float]:
    """Of scores over the best one."""
    return {
        "points": len(shares),
        "best": float(np.mean(shares >= 1 - 1e-12)),
        "mean": float(shares.mean()),
        "least": float(shares.min()),
        "largest": float(shares.max()),
    }


def dimension(name: str, sizes: tuple[int, ...], draws: int) -> dict[str, Any]:
    """Steps to the smallest accuracy: for every rule one list of draws for each n; None: not reached."""
    make, updates = FAMILIES[name]
    rules: dict[str, list[list[int | None]]] = {rule: [] for rule in updates}
    rates = []
    for n in sizes:
        for counts in rules.values():
            counts.append([])
        for seed in range(draws):
            problem, minimum, rate = make(n, seed)
            rates.append(rate)
            for rule, update in updates.items():
                result = follow(problem, minimum, RULES[rule], update)
                rules[rule][-1].append(reached(result, minimum, ACCURACIES[-1]))
    entry: dict[str, Any] = {"n": sizes, "rules": rules}
    if rates[0] is not None:
        entry["GS, guaranteed"] = [int(np.ceil(np.log(ACCURACIES[-1]) / np.log1p(-rate))) for rate in rates[:draws]]
    return entry


# -- cost of a selection ------------------------------------------------------------------------


def costs(sizes: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    """Microseconds of one choice on normal gradients and weights: the shortest, as others may use the machine."""
    micro: dict[str, list[float | None]] = {}
    for n in sizes:
        for name, times in interleaved(choices(n), repetitions, at_least=2e-3).items():
            micro.setdefault(name, []).append(1e6 * min(times))
    return {"n": sizes, "microseconds": micro}


def choices(n: int) -> dict[str, Callable[[], Any]]:
    """What is timed: compiled functions, called from Python."""
    rng = np.random.default_rng([SEED, n])
    g, w = rng.standard_normal(n), np.maximum(np.abs(rng.standard_normal(n)), 1e-3)
    room, labels = np.full(n, np.inf), np.empty(0, np.int64)
    works: dict[str, Callable[[], Any]] = {
        "GS": lambda: gs_ends(g),
        "ratio": lambda: ratio_ends(g, w),
        "best of both": lambda: best_of_both(g, w),
        "one end": lambda: one_end(g, w),
        "GSL": lambda: _compiled.dinkelbach_pair(g, room, room, labels, 1, w),
    }
    return works | ({"all pairs": lambda: enumerated(g, w)} if n <= ENUMERATED_UP_TO else {})


# -- pictures -----------------------------------------------------------------------------------

ORDER = (*RULES, "all pairs")  # a rule has the same colour in every panel


def draw(results: dict[str, Any]) -> Figure:
    """F - f* against iterations on both problems, and the cost of a selection against n."""
    figure, ((left, middle, right),) = panels(1, 3, 4.6, 4.2)
    for axes, (name, entry) in zip((left, middle), results["curves"].items(), strict=True):
        for rule, row in entry["rules"].items():
            steps, excess = np.array(row["trace"]["iteration"]), np.array(row["trace"]["excess"])
            shown = (steps > 0) & (excess > 0)
            axes.plot(steps[shown], excess[shown], label=rule, **style(ORDER.index(rule)))
        tidy(axes, "iterations", "(f - f*) / (f(0) - f*)", f"Least squares, n = {entry['n']:,}, {name} lengths")
        axes.set_ylim(bottom=0.7 * ACCURACIES[-1])
    for rule, micro in results["cost"]["microseconds"].items():
        n = results["cost"]["n"][: len(micro)]
        right.plot(n, micro, marker="o", markersize=4, label=rule, **style(ORDER.index(rule)))
    tidy(right, "coordinates n", "microseconds", "One selection, compiled")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def draw_dimension(families: dict[str, Any]) -> Figure:
    """Iterations against n."""
    figure, grid = panels(2, 2, 5.2, 3.9)
    for axes, (name, entry) in zip(grid.ravel(), families.items(), strict=True):
        for rule, counts in entry["rules"].items():
            medians = [median(one) or np.nan for one in counts]
            axes.plot(entry["n"], medians, marker="o", markersize=4, label=rule, **style(ORDER.index(rule)))
        if "GS, guaranteed" in entry:
            bound = np.median(entry["GS, guaranteed"])
            axes.axhline(bound, color="#999999", linewidth=1.0, label="GS, guaranteed at most")
        tidy(axes, "coordinates n", "iterations (median)", name)
    lines = grid[0, 1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, frameon=False)
    return figure


def median(counts: list[int | None]) -> int | None:
    """Of the draws; None if most of them did not get there."""
    found = sorted(np.inf if count is None else count for count in counts)
    middle = found[len(found) // 2]
    return None if middle == np.inf else int(middle)


# -- tables -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Iterations by accuracy ("like", "unlike"), "gsl", "cost", and one table a family ("hull_exact_steps", ...)."""
    each = {name: _curve_table(entry) for name, entry in results["curves"].items()}
    grown = {
        name.replace(",", "").replace(" ", "_"): _dimension_table(entry) for name, entry in results["dimension"].items()
    }
    return each | grown | {"gsl": _gsl_table(results["gsl"]), "cost": _cost_table(results["cost"])}


def _count(value: int | None) -> str:
    return "not reached" if value is None else f"{value:,}"


def _curve_table(entry: dict[str, Any]) -> str:
    head = ["rule", *(f"iterations to {accuracy:.0e}" for accuracy in ACCURACIES), "ms", "us a step"]
    rows = []
    for rule, row in entry["rules"].items():
        times = ["-", "-"]
        if row["seconds"] is not None:
            times = [f"{1e3 * row['seconds']:,.3g}", f"{1e6 * row['seconds'] / row['iterations']:.2f}"]
        rows.append([rule, *(_count(row["reached"][str(accuracy)]) for accuracy in ACCURACIES), *times])
    return markdown(head, rows)


def _gsl_table(entry: dict[str, Any]) -> str:
    head = ["choice", "points", "score as large as GSL's", "score over GSL's, mean", "least", "largest"]
    rows = []
    for name, s in entry["approximations"].items():
        rows.append([name, f"{s['points']:,}", f"{s['best']:.1%}", *(f"{s[k]:.3f}" for k in ("mean", "least"))])
        rows[-1].append(f"{s['largest']:.12g}")
    rounds = entry["rounds"]
    return markdown(head, rows) + f"\nDinkelbach's rounds: {rounds['mean']:.2f} on average, {rounds['most']} at most.\n"


def _dimension_table(entry: dict[str, Any]) -> str:
    head = ["iterations (median)", *(f"n = {n:,}" for n in entry["n"])]
    rows = [[rule, *(_count(median(one)) for one in counts)] for rule, counts in entry["rules"].items()]
    if "GS, guaranteed" in entry:
        rows.append(["GS, guaranteed at most", *[f"{np.median(entry['GS, guaranteed']):,.0f}"] * len(entry["n"])])
    return markdown(head, rows)


def _cost_table(entry: dict[str, Any]) -> str:
    head = ["microseconds a selection", *(f"n = {n:,}" for n in entry["n"])]
    rows = [
        [name, *(f"{t:,.3g}" for t in micro), *["-"] * (len(entry["n"]) - len(micro))]
        for name, micro in entry["microseconds"].items()
    ]
    return markdown(head, rows)
