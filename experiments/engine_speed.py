# SPDX-License-Identifier: BSD-3-Clause
"""How fast the engine is against simple yardsticks.

* Selection: the GS-1 step (``bcd.steepest_l1``) at n = 10^6 against one ``numpy.argpartition`` of the same
  gradient, and against the same walk on ends that were sorted; and how its time grows with n.
* Pair loop: a WSS2 step of the compiled loop at n = 1000 against the floor, one fused pass over the arrays
  that a step has to read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from matplotlib.figure import Figure
from numba import njit, types
from numba.extending import intrinsic

import bcd
from bcd import _compiled
from experiments.figures import panels, style, tidy
from experiments.tables import markdown
from experiments.timing import best_ratio, interleaved, ratio

TITLE = "Selection against argpartition and sorting; the pair loop against its floor"
SEED = 0
N = 1_000_000
MOVED = (2, 72, 350, 700, 1000, 5000)  # coordinates that a GS-1 step moves
BAR_MOVED = 1000  # the bars hold up to here
GROWTH_N = (10**4, 10**4.5, 10**5, 10**5.5, 10**6, 10**6.5, 10**7)
GROWTH_MOVED = 100
LARGE_N = 10**5  # from here on fixed costs no longer flatten the slope
REPETITIONS = 11
PAIR_N = 1000
PAIR_ROUNDS = 101
PAIR_TOL = 1e-13
PAIR_STEPS = 2000  # in one measurement: about a millisecond, so that few are interrupted
BARS = {"argpartition": 1.5, "sorting": 5.0, "slope": 1.1}

Rooms = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(quick: bool) -> dict[str, Any]:
    """Measure selection, growth and the pair loop."""
    repetitions = 5 if quick else REPETITIONS
    growth = growth_section(GROWTH_N[:5] if quick else GROWTH_N, repetitions)
    return {
        "settings": {"moved": MOVED, "repetitions": repetitions, "bars": BARS},
        "selection": selection_section(N // 10 if quick else N, repetitions),
        "growth": growth,
        "pair_loop": pair_loop_floor(21 if quick else PAIR_ROUNDS),
        "pictures": {"": draw_growth(growth)},
    }


# -- selection ----------------------------------------------------------------------------------


def instance(n: int) -> Rooms:
    """Gradient, rise and fall: normal gradients, uniform rooms, 30% of them used up at either end."""
    rng = np.random.default_rng(SEED)
    grad, rise, fall, where = rng.standard_normal(n), rng.random(n), rng.random(n), rng.random(n)
    rise[where < 0.3] = 0
    fall[where > 0.7] = 0
    return grad, rise, fall


def lipschitz_that_moves(k: int, rooms: Rooms) -> float:
    """The constant for which the number of moved coordinates is nearest to k, by bisection."""
    low, high, best = -8.0, 4.0, (np.inf, 0.0)
    for _ in range(30):
        middle = 0.5 * (low + high)
        moved = len(bcd.steepest_l1(*rooms, 10**middle).index)
        best = min(best, (abs(moved - k), middle))
        low, high = (middle, high) if moved > k else (low, middle)
    return 10 ** best[1]


def sorted_twice(grad: np.ndarray, rise: np.ndarray, fall: np.ndarray, lipschitz: float) -> bcd.Selection:
    """The GS-1 step with both ends sorted: what has room is picked first, then ordered by its gradient."""
    up, down = np.flatnonzero(rise > 0), np.flatnonzero(fall > 0)
    return _walk(grad, rise, fall, up[np.argsort(grad[up])], down[np.argsort(-grad[down])], lipschitz)


def sorted_once(grad: np.ndarray, rise: np.ndarray, fall: np.ndarray, lipschitz: float) -> bcd.Selection:
    """The same from one sort of the whole gradient, read from either side."""
    order = np.argsort(grad)
    return _walk(grad, rise, fall, order[rise[order] > 0], order[::-1][fall[order[::-1]] > 0], lipschitz)


def _walk(
    grad: np.ndarray, rise: np.ndarray, fall: np.ndarray, up: np.ndarray, down: np.ndarray, lipschitz: float
) -> bcd.Selection:
    ends = np.empty((2, len(grad)), np.int64)
    ends[0, : len(up)], ends[1, : len(down)] = up, down
    length = np.array([[len(up)], [len(down)]])
    start, whole = np.array([0, len(grad)]), np.ones((2, 1), np.bool_)
    index, step, _, _, _ = _compiled.walk(grad, rise, fall, ends, start, length, whole, False, lipschitz)
    return bcd.Selection(index, step)


def contestants(rooms: Rooms, lipschitz: float) -> dict[str, Callable[[], Any]]:
    """What is timed, after a check that the three ways to the GS-1 step agree."""
    ours = bcd.steepest_l1(*rooms, lipschitz)
    for other in (sorted_once, sorted_twice):
        theirs = other(*rooms, lipschitz)
        if not (np.array_equal(ours.index, theirs.index) and np.array_equal(ours.step, theirs.step)):
            raise RuntimeError(f"steepest_l1 and {other.__name__} disagree at n = {len(rooms[0])}")
    return {
        "steepest_l1": lambda: bcd.steepest_l1(*rooms, lipschitz),
        "argpartition": lambda: np.argpartition(rooms[0], len(ours.index)),
        "one sort": lambda: sorted_once(*rooms, lipschitz),
        "two sorts": lambda: sorted_twice(*rooms, lipschitz),
    }


def selection_row(rooms: Rooms, k: int, repetitions: int) -> dict[str, Any]:
    """Times at about k moved coordinates, and what they say about the bars."""
    lipschitz = lipschitz_that_moves(k, rooms)
    times = interleaved(contestants(rooms, lipschitz), repetitions, at_least=0.01)
    ours = times["steepest_l1"]
    return {
        "n": len(rooms[0]),
        "moved": len(bcd.steepest_l1(*rooms, lipschitz).index),
        "lipschitz": lipschitz,
        "argpartition_times": ratio(ours, times["argpartition"]),
        "argpartition_times_best": best_ratio(ours, times["argpartition"]),
        "one_sort_over_ours": ratio(times["one sort"], ours),
        "two_sorts_over_ours": ratio(times["two sorts"], ours),
        "seconds": times,
    }


def selection_section(n: int, repetitions: int) -> dict[str, Any]:
    """One row for each number of moved coordinates; the bars count up to BAR_MOVED of them."""
    rooms = instance(n)
    rows = [selection_row(rooms, k, repetitions) for k in MOVED]
    within = [row for row in rows if row["moved"] <= 1.05 * BAR_MOVED]
    return {
        "rows": rows,
        "worst_argpartition_times": max(row["argpartition_times"] for row in within),
        "worst_argpartition_times_best": max(row["argpartition_times_best"] for row in within),
        "worst_one_sort_over_ours": min(row["one_sort_over_ours"] for row in within),
        "worst_two_sorts_over_ours": min(row["two_sorts_over_ours"] for row in within),
    }


def growth_section(sizes: tuple[float, ...], repetitions: int) -> dict[str, Any]:
    """Times against n at about GROWTH_MOVED moved coordinates, and the slope on logarithmic axes."""
    rows = [selection_row(instance(round(n)), GROWTH_MOVED, repetitions) for n in sizes]
    large = [row for row in rows if row["n"] >= LARGE_N]
    return {"rows": rows, "slope": slopes(rows), "slope_of_large_n": slopes(large)}


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least-squares slope of log(median time) against log(n), by contestant."""
    n = np.log([row["n"] for row in rows])
    times = {work: np.log([np.median(row["seconds"][work]) for row in rows]) for work in rows[0]["seconds"]}
    return {work: float(np.polyfit(n, t, 1)[0]) for work, t in times.items()}


def draw_growth(growth: dict[str, Any]) -> Figure:
    """Milliseconds against n."""
    figure, ((axes,),) = panels(1, 1, 5.6, 4.2)
    n = [row["n"] for row in growth["rows"]]
    labels = {
        "two sorts": "GS-1, both ends sorted",
        "one sort": "GS-1, one sort of the gradient",
        "argpartition": "numpy.argpartition",
        "steepest_l1": "GS-1, steepest_l1",
    }
    for k, (work, label) in enumerate(labels.items()):
        ms = [1e3 * np.median(row["seconds"][work]) for row in growth["rows"]]
        axes.plot(n, ms, marker="o", markersize=4, label=f"{label} (slope {growth['slope'][work]:.2f})", **style(3 - k))
    tidy(axes, "coordinates n", "milliseconds", f"One selection that moves about {GROWTH_MOVED} coordinates")
    axes.legend(frameon=False, fontsize=9)
    return figure


# -- pair loop ----------------------------------------------------------------------------------


def _reducible(name: str) -> Any:
    """Maximum or minimum whose order LLVM may change, so that the reduction vectorises."""

    @intrinsic
    def op(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            ty = ir.DoubleType()
            fn = builder.module.declare_intrinsic(name, [ty], ir.FunctionType(ty, [ty, ty]))
            return builder.call(fn, args, fastmath=("nnan", "nsz"))

        return types.float64(types.float64, types.float64), codegen

    return op


_least, _most = _reducible("llvm.minnum"), _reducible("llvm.maxnum")


def floor_kernel(fastmath: Any) -> Callable[..., float]:
    """The floor of a step: move the gradient by two rows, its minimum, and the largest gain, in one pass.

    It reads and writes what a WSS2 step must and does the same arithmetic, but finds no positions, and it
    ranks partners for the old pair: a step cannot do with less, and needs a second pass because the
    second coordinate depends on the first.
    """

    @njit(error_model="numpy", fastmath=fastmath)
    def one(grad, row_i, row_j, t, up, low, g_i, d_i, diagonal):
        gain, least = 0.0, np.inf
        for k in range(grad.shape[0]):
            v = grad[k] + t * (row_i[k] - row_j[k])
            grad[k] = v
            least = _least(least, v + up[k])
            gap = _most(v + low[k] - g_i, 0.0)
            gain = _most(gain, gap * gap / _most(d_i + diagonal[k] - 2.0 * row_i[k], 1e-300))
        return gain + least

    @njit(error_model="numpy", fastmath=fastmath)
    def floor(Q, grad, t, up, low, diagonal, rising, falling):
        total = 0.0
        for r in range(len(rising)):
            i, j = rising[r], falling[r]
            total += one(grad, Q[i], Q[j], t, up, low, -2.0, diagonal[i], diagonal)
        return total

    return floor


# three ways to compile the same pass; the fastest on this CPU counts
FLOORS = ({"nnan", "nsz", "reassoc", "contract", "arcp"}, {"contract"}, False)

Dual = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def wishart_qp(n: int) -> Dual:
    """Well-conditioned sum + box QP: (Q, c, x0, lower, upper)."""
    rng = np.random.default_rng(SEED)
    A = rng.standard_normal((n, 2 * n))
    Q = A @ A.T / n
    return (Q + Q.T) / 2, -0.01 * rng.random(n), np.full(n, 1 / n), np.zeros(n), np.full(n, 5 / n)


def rbf_dual(n: int) -> Dual:
    """SVM dual with an RBF kernel, C = 1, on a made-up problem in five dimensions."""
    rng = np.random.default_rng(SEED + 1)
    X = rng.standard_normal((n, 5))
    y = np.where(np.sin(2 * X[:, 0]) + X[:, 1] ** 2 - 1 + 0.3 * rng.standard_normal(n) > 0, 1.0, -1.0)
    Q = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1) / 5)
    return (Q + Q.T) / 2, -y, np.zeros(n), np.where(y > 0, 0.0, -1.0), np.where(y > 0, 1.0, 0.0)


def pairs_taken(problem: Dual, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that the loop moves, in its order, from one call a step."""
    Q, c, x0, lower, upper = problem
    grad, x, diagonal = Q @ x0 + c, x0.copy(), Q.diagonal().copy()
    rising, falling = np.empty(steps, np.int64), np.empty(steps, np.int64)
    for r in range(steps):
        old = x.copy()
        _compiled.pair_loop(Q, grad, x, lower, upper, diagonal, PAIR_TOL, 1)
        rising[r], falling[r] = np.argmax(x - old), np.argmin(x - old)
    return rising, falling


def pair_loop_row(problem: Dual, rounds: int, floors: list[Callable[..., float]]) -> dict[str, Any]:
    """Seconds a step of the loop, and of the floor in two orders of rows.

    "replay" reads the rows that the run reads, in its order; "spread" walks all rows (harder on caches).
    """
    Q, c, x0, lower, upper = problem
    first, diagonal, n = Q @ x0 + c, Q.diagonal().copy(), len(c)
    grad, x = first.copy(), x0.copy()
    solution = _compiled.pair_loop(Q, grad, x, lower, upper, diagonal, PAIR_TOL, 10**6)
    taken = min(PAIR_STEPS, solution[0])
    up, low = np.where(x < upper, 0.0, np.inf), np.where(x > lower, 0.0, -np.inf)
    count = np.arange(taken)
    orders = {"replay": pairs_taken(problem, taken), "spread": (count * 7919 % n, count * 104729 % n)}

    def loop() -> None:
        grad[:], x[:] = first, x0
        _compiled.pair_loop(Q, grad, x, lower, upper, diagonal, PAIR_TOL, taken)

    works: dict[str, Callable[[], Any]] = {"loop": loop}
    for order, ends in orders.items():
        for k, floor in enumerate(floors):
            works[f"{order} {k}"] = lambda f=floor, e=ends: f(Q, first.copy(), 1e-9, up, low, diagonal, *e)
    times = {work: (np.array(t) / taken).tolist() for work, t in interleaved(works, rounds).items()}
    return {"steps": solution[0], "violation": solution[1], "seconds_a_step": times, **_against_floor(times, orders)}


def _against_floor(times: dict[str, list[float]], orders: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a step, and the ratio to the floor that compiled best, by order of rows."""
    summary: dict[str, Any] = {"loop_us": 1e6 * float(np.median(times["loop"]))}
    for order in orders:
        floor = min((times[f"{order} {k}"] for k in range(len(FLOORS))), key=min)
        summary[f"{order}_us"] = 1e6 * float(np.median(floor))
        summary[f"over_{order}"] = ratio(times["loop"], floor)
        summary[f"over_{order}_best"] = best_ratio(times["loop"], floor)
    return summary


def pair_loop_floor(rounds: int) -> dict[str, Any]:
    """The compiled WSS2 loop against the floor on two problems."""
    if not hasattr(_compiled, "pair_loop"):
        return {}
    floors = [floor_kernel(fastmath) for fastmath in FLOORS]
    problems = {"Wishart QP": wishart_qp(PAIR_N), "SVM dual, RBF": rbf_dual(PAIR_N)}
    return {name: pair_loop_row(problem, rounds, floors) for name, problem in problems.items()}


# -- tables -------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown of the three sections."""
    return {
        "selection": _selection_table(results["selection"]["rows"]),
        "growth": _selection_table(results["growth"]["rows"]),
        "pair_loop": _pair_table(results["pair_loop"]),
    }


def _selection_table(rows: list[dict[str, Any]]) -> str:
    head = ["n", "moved", "GS-1, ms", "argpartition, ms", "one sort, ms", "two sorts, ms", "GS-1 / argpartition"]
    works = ("steepest_l1", "argpartition", "one sort", "two sorts")
    return markdown(
        [*head, "one sort / GS-1", "two sorts / GS-1"],
        [
            [f"{row['n']:,}", f"{row['moved']:,}"]
            + [f"{1e3 * np.median(row['seconds'][work]):.3g}" for work in works]
            + [f"{row['argpartition_times']:.2f}"]
            + [f"{row[key]:.1f}" for key in ("one_sort_over_ours", "two_sorts_over_ours")]
            for row in rows
        ],
    )


def _pair_table(problems: dict[str, Any]) -> str:
    keys = ("loop_us", "replay_us", "spread_us", "over_replay", "over_spread", "over_replay_best", "over_spread_best")
    head = [
        "problem",
        "steps",
        "step, us",
        "floor (same rows), us",
        "floor (all rows), us",
        "ratio",
        "ratio (all rows)",
    ]
    return markdown(
        [*head, "ratio of best", "ratio of best (all rows)"],
        [[name, f"{row['steps']:,}"] + [f"{row[key]:.2f}" for key in keys] for name, row in problems.items()],
    )
