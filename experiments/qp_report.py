# SPDX-License-Identifier: BSD-3-Clause
"""What the numbers of :mod:`experiments.qp_peers` say: the entries that count, the bars, a picture and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import panels, style, tidy
from experiments.qp_judge import REACHED, TOL
from experiments.qp_problems import DENSE, FACTOR, FREE, ILL
from experiments.qp_workers import GREEDY, HUGE_TOL, OURS, PEERS
from experiments.tables import markdown

CAP = 30.0  # seconds; a run that takes longer is ended
BARS = {"main": 10.0, "ill_conditioned_worst": 1.0, "ill_conditioned": 2.0, "over_products": 10.0}
MAIN = (DENSE, FACTOR)

Results = dict[str, Any]
Clock = Callable[[Results], float]


# -- what counts --------------------------------------------------------------------------------


def seconds(entry: Results) -> float:
    """Median wall-clock seconds of the rounds; of a contestant that took no part in them, those of its one run."""
    return float(np.median(entry["seconds"])) if entry["seconds"] else float(entry["chosen"]["seconds"])


def first_seconds(entry: Results) -> float:
    """The same of the first call of every round."""
    return float(np.median(entry["first"])) if entry["first"] else float(entry["chosen"]["seconds"])


def without_build(entry: Results) -> float:
    """Seconds less those that qpsolvers measured before it started the solver."""
    return max(seconds(entry) - entry["chosen"].get("build", 0.0), 1e-6)


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


def best_peer(run: Results, any_residual: bool = False, clock: Clock = seconds) -> Results | None:
    """The entry of the fastest peer of those that reached the residual; None if none did.

    Parameters
    ----------
    run : dict
        An entry of the results.
    any_residual : bool
        Count peers that did not reach the residual as well.
    clock : callable
        From an entry to its seconds.
    """
    ran = [e for peer in PEERS if (e := entry_of(run["entries"], peer)) and e["ladder"]]
    return min((e for e in ran if any_residual or reached(e)), key=clock, default=None)


def against(run: Results, any_residual: bool = False, clock: Clock = seconds) -> Results | None:
    """The best peer of a run over ours.

    Where no peer reached the residual, all of them count.

    Returns
    -------
    dict or None
        ``peer``, ``ratio`` of seconds and ``peer_reached``. The ratio is 0 where ours failed or did not reach the
        residual. None if ours did and all peers failed.
    """
    ours = run["entries"][OURS]
    peer = best_peer(run, any_residual, clock) or best_peer(run, True, clock)
    if peer is None:
        return None if reached(ours) else {"peer": "-", "ratio": 0.0, "peer_reached": False}
    ratio = clock(peer) / clock(ours) if reached(ours) else 0.0
    return {"peer": peer["solver"], "ratio": ratio, "peer_reached": reached(peer)}


def geometric_mean(values: list[float]) -> float:
    """Geometric mean, 0 if any value is; nan of nothing."""
    if not values:
        return float("nan")
    return float(np.exp(np.mean(np.log(values)))) if min(values) > 0 else 0.0


def ratios(
    results: Results,
    families: tuple[str, ...],
    any_residual: bool = False,
    clock: Clock = seconds,
    section: str = "runs",
) -> list[float]:
    """Best peer over ours, a value for every run of the families."""
    runs = [run for run in results[section].values() if run["family"] in families]
    return [row["ratio"] for run in runs if (row := against(run, any_residual, clock))]


def greedy_ratio(run: Results) -> float | None:
    """Plain greedy pairs over ours: 0 if ours did not reach the residual, None if they did not."""
    ours, greedy = run["entries"][OURS], run["entries"].get(GREEDY)
    if not reached(ours):
        return 0.0
    return seconds(greedy) / seconds(ours) if greedy and reached(greedy) else None


def bars(results: Results) -> Results:
    """The numbers that the bars are about."""
    found: Results = {}
    for name, families in (("main", MAIN), ("ill_conditioned", (ILL,)), ("mostly_free", (FREE,))):
        strict = ratios(results, families)
        found[name], found[f"{name}_worst"] = geometric_mean(strict), min(strict, default=float("nan"))
        found[f"{name}_any_residual"] = geometric_mean(ratios(results, families, any_residual=True))
        found[f"{name}_first"] = geometric_mean(ratios(results, families, clock=first_seconds))
        found[f"{name}_without_build"] = geometric_mean(ratios(results, families, clock=without_build))
        held_out = ratios(results, families, section="held_out")
        found[f"{name}_held_out"] = geometric_mean(held_out)
        found[f"{name}_held_out_worst"] = min(held_out, default=float("nan"))
    runs = results["runs"] | results["held_out"]
    greedy = [ratio for run in runs.values() if (ratio := greedy_ratio(run)) is not None]
    return (
        found
        | _huge_bars(results["huge"])
        | {
            "ours_not_reached": [name for name, run in runs.items() if not reached(run["entries"][OURS])],
            "no_peer_reached": [name for name, run in runs.items() if best_peer(run) is None],
            "greedy_over_ours": min(greedy, default=float("nan")),
            "again_over_fresh": geometric_mean(
                [_again_ratio(c) for row in results["again"].values() for c in row["changes"].values()]
            ),
        }
    )


def _huge_bars(rows: Results) -> Results:
    """Seconds over products (inf if it failed or is not accurate), residual, memory."""
    row = next(iter(rows.values()), {"status": "not run"})
    if row["status"] != "ok":
        return {"over_products": np.inf, "huge_residual": np.inf, "added_over_n_k": np.inf}
    accurate = row["residual"] <= REACHED / TOL * HUGE_TOL
    return {
        "over_products": row["over_products"] if accurate else np.inf,
        "huge_residual": row["residual"],
        "added_over_n_k": row["added"] / row["n_k_megabytes"],
    }


def _again_ratio(change: Results) -> float:
    """Seconds from the last point over those of a fresh solve; inf if it failed or is not accurate."""
    if change["status"] != "ok" or change["residual"] > REACHED:
        return float("inf")
    return float(np.median(change["again"]) / np.median(change["fresh"]))


# -- picture ------------------------------------------------------------------------------------


def draw(results: Results) -> Figure:
    """Seconds against n, ours and the best accurate peer, a panel for every family; nothing where none is accurate."""
    families = list(dict.fromkeys(run["family"] for run in results["runs"].values()))
    figure, (row,) = panels(1, max(1, len(families)), 3.6, 3.6)
    for axes, family in zip(row, families, strict=False):
        rows = [g for g in grouped(results) if g[0]["family"] == family]
        n = [runs[0]["n"] for runs in rows]
        ours = [_mean_seconds([e for run in runs if reached(e := run["entries"][OURS])]) for runs in rows]
        peer = [_mean_seconds([e for run in runs if (e := best_peer(run))]) for runs in rows]
        axes.plot(n, peer, marker="o", markersize=4, label="best accurate peer", **style(1))
        axes.plot(n, ours, marker="o", markersize=4, label="ours", **style(0))
        tidy(axes, "variables n", "seconds", family)
        axes.set_xticks(n, [f"{k:,}" for k in n])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)
    return figure


def _mean_seconds(entries: list[Results]) -> float:
    return geometric_mean([seconds(entry) for entry in entries])


# -- tables -------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: cases, ours, accuracy, build, huge, again, bars."""
    return {
        "cases": _cases_table(results),
        "ours": _ours_table(results),
        "accuracy": _accuracy_table(results),
        "build": _build_table(results),
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
    head = ["case", "n", "free", "ours, s", *PEERS, "best peer", "best peer / ours"]
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
        last = [
            f"{geometric_mean(ratio):.1f}{mark}",
            least,
            _held_out(results, runs[0]),
            f"{geometric_mean(lenient):.1f}",
        ]
        rows.append([runs[0]["family"], f"{runs[0]['n']:,}", free, *times, peer, *last])
    return markdown([*head, "least of the seeds", "held-out seed", "any residual"], rows)


def _held_out(results: Results, of: Results) -> str:
    """Best peer over ours with the held-out seed of a case."""
    runs = [run for run in results["held_out"].values() if (run["family"], run["n"]) == (of["family"], of["n"])]
    rows = [row for run in runs if (row := against(run))]
    return ", ".join(f"{row['ratio']:.1f}" + "*" * (not row["peer_reached"]) for row in rows) or "-"


def _ours_table(results: Results) -> str:
    """Beside warm calls the very first one, and plain greedy pairs, where they took part."""
    head = [
        "case, n",
        "ours, s",
        "the very first call, s",
        "iterations",
        "greedy pairs, s",
        "iterations",
        "greedy / ours",
    ]
    rows = []
    for runs in grouped(results):
        ours = [e for run in runs if (e := run["entries"][OURS])["ladder"]]
        greedy = [e for run in runs if (e := run["entries"].get(GREEDY)) and e["ladder"]]
        first = f"{geometric_mean([e['ladder'][0]['seconds'] for e in ours]):.3g}"
        mean = f"{geometric_mean([ratio for run in runs if (ratio := greedy_ratio(run)) is not None]):.2f}"
        pairs = [_cell(runs, GREEDY), _iterations(greedy), mean] if greedy else [_cell(runs, GREEDY), "-", "-"]
        rows.append([f"{runs[0]['family']}, {runs[0]['n']:,}", _cell(runs, OURS), first, _iterations(ours), *pairs])
    return markdown(head, rows)


def _iterations(entries: list[Results]) -> str:
    return f"{geometric_mean([float(e['chosen']['iterations']) for e in entries]):,.0f}"


def _cell(runs: list[Results], solver: str) -> str:
    """Geometric mean of the seconds over the seeds; * not accurate enough, () extrapolated, > ended."""
    entries = [e for run in runs if (e := entry_of(run["entries"], solver))]
    ran = [e for e in entries if e["ladder"]]
    if ran:
        return f"{_mean_seconds(ran):.3g}" + "*" * (not all(reached(e) for e in ran))
    states = {e["status"] for e in entries}
    if "over" in states:
        return f"> {CAP:.0f}"
    if "too slow" in states:
        return f"(> {CAP:.0f})"
    return "failed" if states else "-"


def _accuracy_table(results: Results) -> str:
    """The worst seed of all, the held-out one included."""
    head = ["case, n: setting, residual, infeasible by", "largest gradient", "ours: residual, gap", *PEERS]
    rows = []
    for runs in grouped(results):
        case = (runs[0]["family"], runs[0]["n"])
        runs = [*runs, *(run for run in results["held_out"].values() if (run["family"], run["n"]) == case)]
        ours = [run["entries"][OURS] for run in runs]
        cells = [_measures([e for run in runs if (e := entry_of(run["entries"], peer))]) for peer in PEERS]
        rows.append([f"{case[0]}, {case[1]:,}", _largest(ours, "gradient"), _own(ours), *cells])
    return markdown(head, rows)


def _largest(entries: list[Results], what: str) -> str:
    values = [entry["chosen"][what] for entry in entries if entry["ladder"]]
    return f"{max(values):.2g}" if values else "-"


def _own(entries: list[Results]) -> str:
    """The worst of ours: what failed, else residual and gap."""
    failed = [entry["status"] for entry in entries if not entry["ladder"]]
    if failed:
        return failed[0]
    worst, gap = (max(entry["chosen"][what] for entry in entries) for what in ("residual", "gap"))
    return f"{worst:.0e}{'*' * (not all(map(reached, entries)))}, {gap:.0e}"


def _measures(entries: list[Results]) -> str:
    """The worst of a peer: form, setting and residual of one seed, and the largest infeasibility."""
    ran = [entry for entry in entries if entry["ladder"]]
    if not ran:
        return "-"
    worst = max(ran, key=lambda entry: entry["chosen"]["residual"])
    chosen, mark = worst["chosen"], "" if reached(worst) else "*"
    setting = "" if np.isnan(chosen["eps"]) else f" {chosen['eps']:.0e}"
    infeasibility = max(entry["chosen"]["infeasibility"] for entry in ran)
    return f"{worst['form']}{setting}: {chosen['residual']:.0e}{mark}, {infeasibility:.0e}"


def _build_table(results: Results) -> str:
    """What part of a peer's time passes before qpsolvers starts it: conversions, and the setup of some."""
    rows = []
    for runs in grouped(results):
        entries = [[e for run in runs if (e := entry_of(run["entries"], p)) and e["ladder"]] for p in PEERS]
        parts = [[e["chosen"]["build"] / e["chosen"]["seconds"] for e in mine] for mine in entries]
        cells = [f"{100 * float(np.median(part)):.0f}%" if part else "-" for part in parts]
        rows.append([f"{runs[0]['family']}, {runs[0]['n']:,}", *cells])
    return markdown(["case, n", *PEERS], rows)


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
        (f"least, {main}", found["main_worst"], ""),
        *_variants(found, "main", main),
        (f"least, best peer / ours, {ill}", found["ill_conditioned_worst"], f">= {BARS['ill_conditioned_worst']:g}"),
        (f"geometric mean, {ill}", found["ill_conditioned"], f">= {BARS['ill_conditioned']:g}"),
        *_variants(found, "ill_conditioned", ill),
        ("geometric mean, most free", found["mostly_free"], ""),
        ("least, most free", found["mostly_free_worst"], ""),
        *_variants(found, "mostly_free", "most free"),
        ("least, plain greedy pairs / ours, dense families", found["greedy_over_ours"], "no small fraction of 1"),
        ("10^6 variables: seconds over those of 100 products", found["over_products"], f"<= {BARS['over_products']:g}"),
        ("10^6 variables: residual", found["huge_residual"], f"<= {HUGE_TOL:g}"),
        ("10^6 variables: memory added / n k doubles", found["added_over_n_k"], "O(1)"),
        ("solving again from the last point / fresh, geometric mean", found["again_over_fresh"], "a fraction"),
        ("runs in which ours did not reach the residual", float(len(found["ours_not_reached"])), "0"),
        ("runs in which no peer reached it (marked *)", float(len(found["no_peer_reached"])), ""),
    ]
    return markdown(["", "measured", "bar"], [[name, f"{value:.3g}", bar] for name, value, bar in lines])


def _variants(found: Results, name: str, families: str) -> list[tuple[str, float, str]]:
    """The same ratio counted otherwise."""
    ways = {
        "held_out": "geometric mean, held-out seed",
        "held_out_worst": "least, held-out seed",
        "any_residual": "geometric mean, peers that did not reach the residual count as well",
        "first": "geometric mean, first call of every turn",
        "without_build": "geometric mean, peers' times without what passes before they start",
    }
    return [(f"{families}: {text}", found[f"{name}_{way}"], "") for way, text in ways.items()]
