# SPDX-License-Identifier: BSD-3-Clause
"""What the numbers of :mod:`experiments.qp_peers` say: the entries that count, the bars, a picture and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import panels, style, tidy
from experiments.qp_problems import DENSE, FACTOR, FREE, ILL
from experiments.qp_workers import OURS, PEERS
from experiments.tables import markdown

CAP = 60.0  # seconds; a run that takes longer is ended
BARS = {"main": 10.0, "ill_conditioned_worst": 1.0, "ill_conditioned": 2.0, "over_products": 10.0}
MAIN = (DENSE, FACTOR)

Results = dict[str, Any]


# -- what counts --------------------------------------------------------------------------------


def seconds(entry: Results) -> float:
    """Median wall-clock seconds of the rounds; of a contestant that took no part in them, those of its one run."""
    return float(np.median(entry["seconds"])) if entry["seconds"] else float(entry["chosen"]["seconds"])


def reached(entry: Results) -> bool:
    """Whether the residual is as small as it has to be."""
    return bool(entry["ladder"]) and entry["chosen"]["reached"]


def entry_of(entries: Results, solver: str) -> Results | None:
    """The form that counts for a solver: its fastest accurate one, else the fastest of the most accurate, else any.

    The form that was chosen for the rounds stays the fastest, whatever they say.
    """
    mine = [entry for entry in entries.values() if entry["solver"] == solver]
    ran = [entry for entry in mine if entry["ladder"]]
    if not ran:
        return next(iter(mine), None)
    timed, accurate = [entry for entry in ran if entry["seconds"]], [entry for entry in ran if reached(entry)]
    if timed or accurate:
        return min(timed or accurate, key=seconds)
    best = most_accurate([entry["chosen"] for entry in ran])
    return min((entry for entry in ran if entry["chosen"] in best), key=seconds)


def most_accurate(attempts: list[Results]) -> list[Results]:
    """Those whose residual is at most twice the least."""
    least = min(attempt["residual"] for attempt in attempts)
    return [attempt for attempt in attempts if attempt["residual"] <= 2 * least]


def against(run: Results, any_residual: bool = False) -> Results | None:
    """The best peer of a run over ours.

    Parameters
    ----------
    run : dict
        An entry of the results.
    any_residual : bool
        Count peers that did not reach the residual as well. They also count where no peer reached it.

    Returns
    -------
    dict or None
        ``peer``, ``ratio`` of seconds and ``peer_reached``; None if ours or all peers failed.
    """
    ours = run["entries"][OURS]
    ran = [e for peer in PEERS if (e := entry_of(run["entries"], peer)) and e["ladder"]]
    if not ours["ladder"] or not ran:
        return None
    fastest = min(ran if any_residual else [e for e in ran if reached(e)] or ran, key=seconds)
    return {"peer": fastest["solver"], "ratio": seconds(fastest) / seconds(ours), "peer_reached": reached(fastest)}


def geometric_mean(values: list[float]) -> float:
    """Geometric mean; nan of nothing."""
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def ratios(results: Results, families: tuple[str, ...], any_residual: bool = False) -> dict[str, float]:
    """Best peer over ours by run."""
    runs = {name: run for name, run in results["runs"].items() if run["family"] in families}
    return {name: row["ratio"] for name, run in runs.items() if (row := against(run, any_residual))}


def bars(results: Results) -> Results:
    """The numbers that the bars are about."""
    found: Results = {}
    for name, families in (("main", MAIN), ("ill_conditioned", (ILL,)), ("mostly_free", (FREE,))):
        strict, lenient = (list(ratios(results, families, any_residual).values()) for any_residual in (False, True))
        found[name], found[f"{name}_any_residual"] = geometric_mean(strict), geometric_mean(lenient)
        found[f"{name}_worst"] = min(strict, default=float("nan"))
    huge = next((row for row in results["huge"].values() if row["status"] == "ok"), None)
    changes = [c for row in results["again"].values() for c in row["changes"].values() if c["status"] == "ok"]
    return found | {
        "ours_not_reached": [n for n, run in results["runs"].items() if not reached(run["entries"][OURS])],
        "no_peer_reached": [n for n, run in results["runs"].items() if (r := against(run)) and not r["peer_reached"]],
        "over_products": huge["over_products"] if huge else float("nan"),
        "huge_residual": huge["residual"] if huge else float("nan"),
        "added_over_n_k": huge["added"] / huge["n_k_megabytes"] if huge else float("nan"),
        "again_over_fresh": geometric_mean([float(np.median(c["again"]) / np.median(c["fresh"])) for c in changes]),
    }


# -- picture ------------------------------------------------------------------------------------


def draw(results: Results) -> Figure:
    """Seconds against n, ours and the best accurate peer, a panel for every family."""
    families = list(dict.fromkeys(run["family"] for run in results["runs"].values()))
    figure, (row,) = panels(1, max(1, len(families)), 3.6, 3.6)
    for axes, family in zip(row, families, strict=False):
        rows = [g for g in grouped(results) if g[0]["family"] == family]
        n = [runs[0]["n"] for runs in rows]
        ours = [
            geometric_mean([seconds(r["entries"][OURS]) for r in runs if r["entries"][OURS]["ladder"]]) for runs in rows
        ]
        over = [geometric_mean([row["ratio"] for r in runs if (row := against(r))]) for runs in rows]
        axes.plot(n, np.array(ours) * over, marker="o", markersize=4, label="best accurate peer", **style(1))
        axes.plot(n, ours, marker="o", markersize=4, label="ours", **style(0))
        tidy(axes, "variables n", "seconds", family)
        axes.set_xticks(n, [f"{k:,}" for k in n])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)
    return figure


# -- tables -------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: cases, accuracy, huge, again, bars."""
    return {
        "cases": _cases_table(results),
        "accuracy": _accuracy_table(results),
        "huge": _huge_table(results["huge"]),
        "again": _again_table(results["again"]),
        "bars": _bars_table(results["bars"]),
    }


def grouped(results: Results) -> list[list[Results]]:
    """The runs of every case, one a seed."""
    groups: dict[tuple[str, int], list[Results]] = {}
    for run in results["runs"].values():
        groups.setdefault((run["family"], run["n"]), []).append(run)
    return list(groups.values())


def _cases_table(results: Results) -> str:
    head = [
        "case",
        "n",
        "free",
        "ours, s",
        *PEERS,
        "best peer",
        "best peer / ours",
        "least of the seeds",
        "any residual",
    ]
    rows = []
    for runs in grouped(results):
        free = f"{100 * np.mean([run['free'] for run in runs]):.0f}%"
        times = [_cell(runs, solver) for solver in (OURS, *PEERS)]
        strict = [row for run in runs if (row := against(run))]
        lenient = [row["ratio"] for run in runs if (row := against(run, any_residual=True))]
        ratio = [row["ratio"] for row in strict]
        mark = "" if all(row["peer_reached"] for row in strict) else "*"
        peer = Counter(row["peer"] for row in strict).most_common(1)[0][0] if strict else "-"
        least = f"{min(ratio, default=float('nan')):.1f}"
        last = [f"{geometric_mean(ratio):.1f}{mark}", least, f"{geometric_mean(lenient):.1f}"]
        rows.append([runs[0]["family"], f"{runs[0]['n']:,}", free, *times, peer, *last])
    return markdown(head, rows)


def _cell(runs: list[Results], solver: str) -> str:
    """Geometric mean of the seconds over the seeds; * not accurate enough, () extrapolated, > ended."""
    entries = [e for run in runs if (e := entry_of(run["entries"], solver))]
    ran = [e for e in entries if e["ladder"]]
    if ran:
        return f"{geometric_mean([seconds(e) for e in ran]):.3g}" + "*" * (not all(reached(e) for e in ran))
    states = {e["status"] for e in entries}
    if "over" in states:
        return f"> {CAP:.0f}"
    return f"(> {CAP:.0f})" if states & {"too slow", "slow form"} else "failed"


def _accuracy_table(results: Results) -> str:
    head = ["case, n: setting, residual, infeasible by", "ours: residual, gap", *PEERS]
    rows = []
    for runs in grouped(results):
        entries = runs[0]["entries"]
        ours = entries[OURS]
        own = f"{ours['chosen']['residual']:.0e}, {ours['chosen']['gap']:.0e}" if ours["ladder"] else ours["status"]
        cells = [_measures(entry_of(entries, peer)) for peer in PEERS]
        rows.append([f"{runs[0]['family']}, {runs[0]['n']:,}", own, *cells])
    return markdown(head, rows)


def _measures(entry: Results | None) -> str:
    if entry is None or not entry["ladder"]:
        return "-"
    chosen, mark = entry["chosen"], "" if reached(entry) else "*"
    setting = "" if np.isnan(chosen["eps"]) else f" {chosen['eps']:.0e}"
    return f"{entry['form']}{setting}: {chosen['residual']:.0e}{mark}, {chosen['infeasibility']:.0e}"


def _huge_table(rows: Results) -> str:
    head = ["n", "factors", "free", "solve, s", "100 products, s", "ratio", "residual", "added, MB", "n k doubles, MB"]
    return markdown(
        head,
        [
            [f"{row['n']:,}", str(row["k"]), f"{100 * row['free']:.0f}%"]
            + [f"{np.median(row[key]):.3g}" for key in ("seconds", "products")]
            + [f"{row['over_products']:.2f}", f"{row['residual']:.0e}"]
            + [f"{row[key]:,.0f}" for key in ("added", "n_k_megabytes")]
            for row in rows.values()
            if row["status"] == "ok"
        ],
    )


def _again_table(rows: Results) -> str:
    head = [
        "case, n",
        "what changed",
        "from the last point, ms",
        "matrix ready, no point, ms",
        "fresh, ms",
        "last / fresh",
    ]
    median: Callable[[list[float]], float] = lambda values: 1e3 * float(np.median(values))  # noqa: E731
    return markdown(
        [*head, "residual"],
        [
            [f"{row['family']}, {row['n']:,}", name]
            + [f"{median(c[key]):.3g}" for key in ("again", "ready", "fresh")]
            + [f"{median(c['again']) / median(c['fresh']):.2f}", f"{c['residual']:.0e}"]
            for row in rows.values()
            for name, c in row["changes"].items()
            if c["status"] == "ok"
        ],
    )


def _bars_table(found: Results) -> str:
    ill, main = "condition 1e6", "condition 400 and 50 factors"
    lines = [
        (f"geometric mean, best peer / ours, {main}", found["main"], f">= {BARS['main']:g}"),
        ("the same if peers that did not reach the residual count as well", found["main_any_residual"], ""),
        (f"least of these, {main}", found["main_worst"], ""),
        (f"least, best peer / ours, {ill}", found["ill_conditioned_worst"], f">= {BARS['ill_conditioned_worst']:g}"),
        (f"geometric mean, {ill}", found["ill_conditioned"], f">= {BARS['ill_conditioned']:g}"),
        ("the same, any residual", found["ill_conditioned_any_residual"], ""),
        ("geometric mean, most free", found["mostly_free"], ""),
        ("least, most free", found["mostly_free_worst"], ""),
        ("10^6 variables: seconds over those of 100 products", found["over_products"], f"<= {BARS['over_products']:g}"),
        ("10^6 variables: residual", found["huge_residual"], "<= 1e-06"),
        ("10^6 variables: memory added / n k doubles", found["added_over_n_k"], "O(1)"),
        ("solving again from the last point / fresh, geometric mean", found["again_over_fresh"], "a fraction"),
        ("runs in which ours did not reach the residual", float(len(found["ours_not_reached"])), "0"),
        ("runs in which no peer reached it (marked *)", float(len(found["no_peer_reached"])), ""),
    ]
    return markdown(["", "measured", "bar"], [[name, f"{value:.3g}", bar] for name, value, bar in lines])
