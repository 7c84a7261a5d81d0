# SPDX-License-Identifier: BSD-3-Clause
"""Rates of greedy and random pairs: where the number of coordinates n does not matter, and where it does.

arXiv 2307.01169, with the conditions of docs/theory.md:

* Q = A A' with A of fixed rank and points only added to a fixed spanning set: mu1 / L1 is the squared ratio of
  smallest width to diameter of the convex hull of the rows of A, so greedy steps do not depend on n; random
  pairs do.
* Q = I has mu1 = 1/n; the linear SVM dual with a box has to move mass in proportion to n C. There n is back,
  unless C scales like 1/n.
* Every GS-1 step contracts f - f* by at least 1 - mu1 / L1, and uniform random pairs contract its mean by
  1 - mu2 / ((n - 1) L2), with steps of the constant L2 or exact ones (as here).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.spatial import ConvexHull
from sklearn.preprocessing import normalize

import bcd
from experiments.figures import panels, style, tidy
from experiments.tables import markdown

TITLE = "Rates: where the number of coordinates matters, and predicted against observed"
SEED = 0
SIZES = (10, 30, 100, 300, 1000, 3000)
RANK = 4
INFORMATIVE = 8  # rows that span; the others are 0
DRAWS = 5
ACCURACY = 1e-6  # of f - f*, relative to its start
SVM_TOL = 1e-4
SVM_SIZES = (30, 100, 300, 1000, 3000)
SVM_FEATURES = 5
STRETCHES = (1.0, 0.7, 0.5, 0.35)  # A's k-th column is multiplied by stretch^k: narrower hulls, slower rates
RATE_ROWS = 12
RATE_STEPS = 2000
RATE_RUNS = 400  # over which the mean of f - f* of random pairs is taken
IDENTITY_SIZES = (10, 30, 100)


def run(quick: bool) -> dict[str, Any]:
    """Iterations against n, and rates."""
    sizes, draws = (SIZES[:4], 2) if quick else (SIZES, DRAWS)
    results: dict[str, Any] = {
        "settings": {"accuracy": ACCURACY, "svm_tol": SVM_TOL, "rank": RANK, "draws": draws},
        "free_of_n": free_of_n(sizes, draws),
        "not_free": not_free(sizes, SVM_SIZES[:3] if quick else SVM_SIZES, draws),
        "rates": rates(1 if quick else 3),
    }
    return results | {"pictures": {"": draw(results)}}


# -- iterations against n -----------------------------------------------------------------------


def spanning_rows(n: int, rng: np.random.Generator) -> np.ndarray:
    """A fixed number of informative rows, the others 0."""
    A = np.zeros((n, RANK))
    A[:INFORMATIVE] = rng.standard_normal((INFORMATIVE, RANK))
    return A


def iid_rows(n: int, rng: np.random.Generator) -> np.ndarray:
    """All rows drawn alike."""
    return rng.standard_normal((n, RANK))


def gram_problem(A: np.ndarray, rng: np.random.Generator) -> tuple[bcd.Problem, float]:
    """1/2 |A'x - w|^2 without its constant, under sum(x) = 0; and its minimum, -|w|^2 / 2."""
    w = rng.standard_normal(A.shape[1])
    return bcd.Problem(bcd.Quadratic(A @ A.T, -A @ w), bcd.SumBox(total=0)), -0.5 * float(w @ w)


def identity_problem(n: int, rng: np.random.Generator) -> tuple[bcd.Problem, float]:
    """1/2 |x|^2 + c'x under sum(x) = 0, and its minimum."""
    c = rng.standard_normal(n)
    return bcd.Problem(bcd.Quadratic(np.eye(n), c), bcd.SumBox(total=0)), -0.5 * float(((c - c.mean()) ** 2).sum())


def iterations(problem: bcd.Problem, minimum: float, rule: str, seed: int = 0) -> int:
    """Steps from x = 0 (where f = 0) until f - f* is ACCURACY times what it was; random: pairs drawn."""
    enough = minimum * (1 - ACCURACY)
    result = bcd.minimize(
        problem, rule, tol=0.0, callback=lambda now: now.objective <= enough, random_state=seed, time_limit=60.0
    )
    if result.objective > enough:
        raise RuntimeError(f"{rule} did not reach the accuracy at n = {problem.n}: {result.status.value}")
    return result.iterations


def free_of_n(sizes: tuple[int, ...], draws: int) -> dict[str, Any]:
    """Iterations of GS-1 and of random pairs for both families; one list of draws for each n."""
    out: dict[str, Any] = {"n": sizes}
    for family, rows in (("fixed span", spanning_rows), ("iid rows", iid_rows)):
        out[family] = {"gs1": [], "random": []}
        for n in sizes:
            counts: dict[str, list[int]] = {"gs1": [], "random": []}
            for seed in range(draws):
                problem, minimum = gram_problem(rows(n, np.random.default_rng(SEED + seed)), _later(seed))
                for rule, seen in counts.items():
                    seen.append(iterations(problem, minimum, rule, seed))
            for rule, seen in counts.items():
                out[family][rule].append(seen)
    return out


def _later(seed: int) -> np.random.Generator:
    """A stream for what must not depend on n: the same w for every size."""
    return np.random.default_rng([SEED + seed, 1])


def svm_dual(n: int, C: float, seed: int) -> bcd.Problem:
    """Linear SVM dual on two overlapping classes; rows of length 1, so that L1 does not grow with n."""
    rng = np.random.default_rng(SEED + seed)
    y = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    X = normalize(rng.standard_normal((n, SVM_FEATURES)) + 0.5 * y[:, None])
    box = bcd.SumBox(np.where(y > 0, 0.0, -C), np.where(y > 0, C, 0.0), total=0)
    return bcd.Problem(bcd.Quadratic(X @ X.T, -y), box)


def not_free(sizes: tuple[int, ...], svm_sizes: tuple[int, ...], draws: int) -> dict[str, Any]:
    """GS-1 iterations for Q = I, and for the SVM dual with C = 1 and with C = 10/n (to SVM_TOL)."""
    identity = [
        [iterations(*identity_problem(n, np.random.default_rng(SEED + s)), "gs1") for s in range(draws)] for n in sizes
    ]
    out: dict[str, Any] = {"Q = I": {"n": sizes, "gs1": identity}}
    for name, scale in (("SVM, C = 1", lambda n: 1.0), ("SVM, C = 10/n", lambda n: 10.0 / n)):
        counts = [
            [bcd.minimize(svm_dual(n, scale(n), s), "gs1", tol=SVM_TOL).iterations for s in range(draws)]
            for n in svm_sizes
        ]
        out[name] = {"n": svm_sizes, "gs1": counts}
    return out


# -- rates --------------------------------------------------------------------------------------


def width_over_diameter(A: np.ndarray) -> float:
    """Smallest width over diameter of the convex hull of the rows.

    The width in direction u is the support function of the differences of rows, so its minimum is the
    distance from the origin to the nearest facet of their hull.
    """
    differences = (A[:, None] - A[None]).reshape(-1, A.shape[1])
    hull = ConvexHull(differences)
    return float(-hull.equations[:, -1].max() / np.linalg.norm(differences, axis=1).max())


def constants(problem: bcd.Problem) -> tuple[float, float]:
    """mu2 on the directions that sum to 0 (smallest eigenvalue that is not 0), and L2."""
    Q = problem.objective.hessian.matrix
    P = np.eye(len(Q)) - 1 / len(Q)
    spectrum = np.linalg.eigvalsh(P @ Q @ P)
    return float(spectrum[spectrum > 1e-10 * spectrum[-1]].min()), 2 * problem.lipschitz


def excesses(problem: bcd.Problem, minimum: float) -> np.ndarray:
    """F - f* of GS-1 with its model step: at the start and after every step, at most RATE_STEPS of them."""
    seen: list[float] = []

    def look(now: bcd.Progress) -> bool:
        seen.append(now.objective - minimum)
        return seen[-1] < 1e-10 * seen[0]

    bcd.minimize(problem, "gs1", "model", tol=0.0, max_iter=RATE_STEPS, callback=look)
    return np.array(seen)


def rate_row(name: str, problem: bcd.Problem, minimum: float, predicted: float) -> dict[str, Any]:
    """1 - factor a step: predicted, and observed in the worst GS-1 step, in their mean, and for random pairs."""
    greedy = excesses(problem, minimum)
    factors = greedy[1:] / greedy[:-1]
    mu2, L2 = constants(problem)
    random = mu2 / ((problem.n - 1) * L2)
    return {
        "name": name,
        "n": problem.n,
        "gs1": {
            "predicted": predicted,
            "worst": float(1 - factors.max()),
            "mean": float(1 - np.exp(np.log(factors).mean())),
            "steps": len(factors),
        },
        "random": {"predicted": random, "mean": random_rate(problem, minimum, random)},
    }


def random_rate(problem: bcd.Problem, minimum: float, predicted: float) -> float:
    """1 - factor a step of the mean of f - f* over several runs, long enough for the guarantee to halve it."""
    steps = int(np.ceil(np.log(2) / predicted))
    runs = [bcd.minimize(problem, "random", tol=0.0, max_iter=steps, random_state=seed) for seed in range(RATE_RUNS)]
    left = max(np.mean([run.objective - minimum for run in runs]) / -minimum, np.finfo(float).eps)
    return float(1 - left ** (1 / steps))


def rates(draws: int) -> list[dict[str, Any]]:
    """Hulls from round to narrow, and Q = I."""
    rows = []
    for stretch in STRETCHES:
        for seed in range(draws):
            rng = np.random.default_rng([SEED, seed])
            A = rng.standard_normal((RATE_ROWS, RANK)) * stretch ** np.arange(RANK)
            rows.append(rate_row(f"stretch {stretch}", *gram_problem(A, rng), width_over_diameter(A) ** 2))
    for n in IDENTITY_SIZES:
        rows.append(rate_row("Q = I", *identity_problem(n, np.random.default_rng(SEED)), 2 / n))
    return rows


# -- picture ------------------------------------------------------------------------------------


def draw(results: dict[str, Any]) -> Figure:
    """Iterations against n where it does not matter and where it does; observed against predicted rates."""
    figure, ((left, middle, right),) = panels(1, 3, 4.3, 3.9)
    free = results["free_of_n"]
    lines = [("fixed span", "gs1"), ("fixed span", "random"), ("iid rows", "gs1"), ("iid rows", "random")]
    for k, (family, rule) in enumerate(lines):
        label = f"{family}, {'GS-1' if rule == 'gs1' else 'random pairs'}"
        left.plot(free["n"], _medians(free[family][rule]), marker="o", markersize=4, label=label, **style(k))
    tidy(left, "coordinates n", "iterations (median)", "Fixed rank: greedy steps are free of n")
    for k, (name, entry) in enumerate(results["not_free"].items()):
        middle.plot(entry["n"], _medians(entry["gs1"]), marker="o", markersize=4, label=name, **style(k))
    tidy(middle, "coordinates n", "", "GS-1 where n is back, unless C scales like 1/n")
    draw_rates(right, results["rates"])
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def _medians(counts: list[list[int]]) -> list[float]:
    return [float(np.median(one)) for one in counts]


def draw_rates(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Decrease a step, observed against guaranteed; nothing may lie below the diagonal."""
    series = [("gs1", "worst", "GS-1, worst step", "v"), ("gs1", "mean", "GS-1, mean", "o")]
    for k, (rule, which, label, marker) in enumerate([*series, ("random", "mean", "random pairs, mean", "s")]):
        points = [[row[rule]["predicted"], row[rule][which]] for row in rows]
        colour = style(k)["color"]
        axes.plot(
            *np.transpose(points), marker, color=colour, markersize=5, alpha=0.8, label=label, markerfacecolor="none"
        )
    ends = np.array([min(row["random"]["predicted"] for row in rows), max(row["gs1"]["predicted"] for row in rows)])
    axes.plot(ends, ends, color="#999999", linewidth=1.0)
    tidy(axes, "guaranteed decrease a step, 1 - factor", "observed", "Observed rate against its guarantee")


# -- tables -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Iterations against n, in two tables, and rates."""
    free, rows = results["free_of_n"], []
    for family in ("fixed span", "iid rows"):
        for rule, name in (("gs1", "GS-1"), ("random", "random pairs")):
            rows.append([f"{family}, {name}", *_cells(free[family][rule])])
    back = [[name, *_cells(_aligned(entry, free["n"]))] for name, entry in results["not_free"].items()]
    head = [f"n = {n:,}" for n in free["n"]]
    return {
        "free_of_n": markdown(["iterations (median)", *head], rows),
        "not_free": markdown(["GS-1 iterations (median)", *head], back),
        "rates": _rates_table(results["rates"]),
    }


def _aligned(entry: dict[str, Any], sizes: list[int]) -> list[list[int] | None]:
    return [entry["gs1"][entry["n"].index(n)] if n in entry["n"] else None for n in sizes]


def _cells(counts: list[list[int] | None]) -> list[str]:
    return [f"{np.median(one):,.0f}" if one else "-" for one in counts]


def _rates_table(rows: list[dict[str, Any]]) -> str:
    head = ["problem", "n", "GS-1: guaranteed", "worst step", "mean", "random: guaranteed", "mean"]
    cells = [
        [row["name"], f"{row['n']}", *(f"{row['gs1'][k]:.2g}" for k in ("predicted", "worst", "mean"))]
        + [f"{row['random'][k]:.2g}" for k in ("predicted", "mean")]
        for row in rows
    ]
    return markdown(head, cells)
