# SPDX-License-Identifier: BSD-3-Clause
"""What the numbers of :mod:`experiments.svm_peers` say: the entries that count, the bars, a picture and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import panels, style, tidy
from experiments.svm_workers import SOLVERS
from experiments.tables import markdown

CACHE, DEFAULT_CACHE = 2000, 200  # MB
CAP = 300.0  # seconds; a run that takes longer is ended
PEERS = ("scikit-learn", "intelex", "libsvm-official")
LIBSVM = ("scikit-learn", "libsvm-official")
AT_DEFAULT_CACHE = ("ours", *LIBSVM)
LARGE = 30_000  # rows
SCALED = "a9a C=32 g=2^-7"
MEMORY = ("a9a C=32 g=2^-7", "w8a C=10 g=0.5")
BARS = {"geometric_mean": 2.0, "libsvm_large": 5.0, "worst": 0.8, "others": 2.0, "floor": 3.0}

Results = dict[str, Any]


def seconds(entry: Results) -> float:
    """Median wall-clock seconds."""
    return float(np.median(entry["seconds"]))


def best(entries: Results, solver: str, cache: int = CACHE, any_model: bool = False) -> Results | None:
    """The entry that counts for a solver: its fastest converged form, else its fastest, else one that was ended.

    With ``any_model`` it is its fastest form, converged or not.
    """
    mine = [e for e in entries.values() if e["solver"] == solver and e["cache"] == cache]
    ran = [e for e in mine if e["seconds"] and "converged" in e]
    counted = [] if any_model else [e for e in ran if e["converged"]]
    return min(counted or ran, key=seconds) if ran else next(iter(mine), None)


def against(case: Results, peers: tuple[str, ...], any_model: bool = False) -> Results | None:
    """The best of some peers on a case over ours.

    Parameters
    ----------
    case : dict
        An entry of the results.
    peers : tuple of str
    any_model : bool
        Count peers that did not converge as well. They also count where no peer converged.

    Returns
    -------
    dict or None
        ``peer``, ``ratio`` of seconds, ``at_least`` (the peer was ended after CAP seconds) and
        ``peer_converged``; None if ours or all peers failed.
    """
    ours = best(case["contestants"], "ours")
    if not ours or not ours["seconds"]:
        return None
    entries = [e for peer in peers if (e := best(case["contestants"], peer, any_model=any_model))]
    ran = [e for e in entries if e["seconds"]]
    counted = ran if any_model else [e for e in ran if e["converged"]] or ran
    if counted:
        fastest = min(counted, key=seconds)
        row = {"peer": fastest["solver"], "ratio": seconds(fastest) / seconds(ours), "at_least": False}
        return row | {"peer_converged": fastest["converged"]}
    ended = [e for e in entries if e["status"] == "over"]
    if not ended:
        return None
    return {"peer": ended[0]["solver"], "ratio": CAP / seconds(ours), "at_least": True, "peer_converged": False}


def geometric_mean(values: list[float]) -> float:
    """Geometric mean; nan of nothing."""
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def bars(results: Results) -> Results:
    """The numbers that the bars are about."""
    cases = results["cases"]
    main = {n: c for n, c in cases.items() if c["task"] == "classify"}
    others = {n: c for n, c in cases.items() if c["task"] != "classify"}
    ratios = {n: row["ratio"] for n, c in cases.items() if (row := against(c, PEERS))}
    large = {n: c for n, c in main.items() if c["n"] >= LARGE}
    libsvm = {n: row["ratio"] for n, c in large.items() if (row := against(c, LIBSVM, any_model=True))}
    over_floor = {
        n: seconds(ours) / c["floor_seconds"]
        for n, c in cases.items()
        if (ours := best(c["contestants"], "ours")) and ours["seconds"] and c["floor_seconds"]
    }
    failed = [n for n, c in cases.items() if not (best(c["contestants"], "ours") or {}).get("converged")]
    in_main = [ratios[n] for n in main if n in ratios]
    lenient = {n: row["ratio"] for n, c in cases.items() if (row := against(c, PEERS, any_model=True))}
    return {
        "ratios": ratios,
        "geometric_mean": geometric_mean(in_main),
        "worst": min(in_main, default=float("nan")),
        "libsvm_large_ratios": libsvm,
        "libsvm_large": geometric_mean(list(libsvm.values())),
        "others": geometric_mean([ratios[n] for n in others if n in ratios]),
        "any_model_ratios": lenient,
        "any_model": geometric_mean([lenient[n] for n in main if n in lenient]),
        "over_floor": over_floor,
        "ours_not_converged": failed,
        "exponents": exponents(results["scaling"]),
    }


def exponents(rows: Results) -> Results:
    """Least-squares slopes against log(n): of the seconds, and of n x n_sv."""
    kept = [row for row in rows.values() if row["seconds"]]
    if len(kept) < 2:
        return {}
    n = np.log([row["n"] for row in kept])
    works = {"seconds": [seconds(row) for row in kept], "n_times_n_sv": [row["n"] * row["n_sv"] for row in kept]}
    return {name: float(np.polyfit(n, np.log(values), 1)[0]) for name, values in works.items()}


# -- picture ------------------------------------------------------------------------------------


def draw(results: Results) -> Figure:
    """Best peer over ours by case, and the growth with n."""
    figure, ((left, right),) = panels(1, 2, 6.2, 5.6)
    ratios = results["bars"]["ratios"]
    names = list(ratios)[::-1]
    left.barh(range(len(names)), [ratios[n] for n in names], color=style(0)["color"], height=0.6)
    for value, dashes in ((1.0, "-"), (BARS["geometric_mean"], ":")):
        left.axvline(value, color="black", linewidth=0.8, linestyle=dashes)
    tidy(left, "seconds of the best converged peer / ours", "", "Above 1: ours is faster")
    left.set_yscale("linear")
    left.set_yticks(range(len(names)), names, fontsize=8)
    rows = [row for row in results["scaling"].values() if row["seconds"]]
    if rows:
        n = [row["n"] for row in rows]
        work = np.array([row["n"] * row["n_sv"] for row in rows], dtype=float)
        slope = exponents(results["scaling"])
        power = "slope {:.2f}"
        ours = [seconds(row) for row in rows]
        right.plot(n, ours, marker="o", label="ours, " + power.format(slope.get("seconds", np.nan)), **style(0))
        label = "n x n_sv through the last, " + power.format(slope.get("n_times_n_sv", np.nan))
        right.plot(n, work * ours[-1] / work[-1], label=label, **style(1))
        right.legend(frameon=False, fontsize=9)
    tidy(right, "rows n", "seconds", f"Random subsets of {SCALED}")
    right.set_xticks([row["n"] for row in rows], [f"{row['n']:,}" for row in rows])
    right.minorticks_off()
    return figure


# -- tables -------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, str]:
    """Markdown by name: cases, default_cache, others, scaling, memory, accuracy, bars."""
    cases = results["cases"]
    main = {n: c for n, c in cases.items() if c["task"] == "classify"}
    others = {n: c for n, c in cases.items() if c["task"] != "classify"}
    return {
        "cases": _cases_table(main),
        "others": _cases_table(others),
        "default_cache": _default_table(cases),
        "scaling": _scaling_table(results),
        "memory": _memory_table(results["memory"]),
        "accuracy": _accuracy_table(cases),
        "bars": _bars_table(results["bars"]),
    }


def _cell(entry: Results | None, form: bool = True) -> str:
    """Seconds of what counts for a solver, and in which form; * not converged."""
    if entry is None:
        return "-"
    if not entry["seconds"]:
        return f"> {CAP:.0f}" if entry["status"] == "over" else "failed"
    mark = "" if entry.get("converged") else "*"
    return f"{seconds(entry):.3g}{mark}" + (f" ({entry['form']})" if form else "")


def _ratio(row: Results | None) -> str:
    if row is None:
        return "-"
    mark = "" if row["peer_converged"] or row["at_least"] else "*"
    return ("> " if row["at_least"] else "") + f"{row['ratio']:.2f}{mark}"


def _cases_table(cases: Results) -> str:
    head = ["case", "n x d", "n_sv", "ours, s", "CPU s", "floor, s", "ours / floor", *PEERS, "best peer / ours"]
    rows = []
    for name, case in cases.items():
        ours = best(case["contestants"], "ours")
        timed = ours is not None and bool(ours["seconds"])
        size = [f"{case['n']:,} x {case['d']:,}", f"{case['n_sv']:,}"]
        cpu = f"{np.median(ours['cpu']):.3g}" if timed else "-"
        times = f"{seconds(ours) / case['floor_seconds']:.1f}" if timed and case["floor_seconds"] else "-"
        peers = [_cell(best(case["contestants"], peer), peer == "intelex") for peer in PEERS]
        floor = f"{case['floor_seconds']:.2g}"
        rows.append([name, *size, _cell(ours), cpu, floor, times, *peers, _ratio(against(case, PEERS))])
    return markdown(head, rows)


def _default_table(cases: Results) -> str:
    head = ["case"] + [f"{s}, {cache} MB" for s in AT_DEFAULT_CACHE for cache in (CACHE, DEFAULT_CACHE)]
    rows = []
    for name, case in cases.items():
        cells = []
        for solver in AT_DEFAULT_CACHE:
            large, small = (best(case["contestants"], solver, cache) for cache in (CACHE, DEFAULT_CACHE))
            ended = large is not None and large["status"] == "over"  # then it was not tried with less
            cells += [_cell(large, False), _cell(large if ended else small, False)]
        rows.append([name, *cells])
    return markdown(head, rows)


def _scaling_table(results: Results) -> str:
    rows = [
        [f"{row['n']:,}", f"{row['n_sv']:,}", f"{row['n'] * row['n_sv']:.3g}", _cell(row)]
        for row in results["scaling"].values()
        if row["seconds"]
    ]
    slope = results["bars"]["exponents"]
    last = [["exponent of n", "", f"{slope['n_times_n_sv']:.2f}", f"{slope['seconds']:.2f}"]] if slope else []
    return markdown(["n", "n_sv", "n x n_sv", "ours, s"], rows + last)


def _memory_table(rows: Results) -> str:
    head = ["case, cache_size", "form", "data, MB", "added at the peak, MB", "allowed, MB", "within"]
    return markdown(
        head,
        [
            [name, row["form"]]
            + [f"{row[k]:,.0f}" for k in ("data", "added", "limit")]
            + ["yes" if row["within"] else "no"]
            for name, row in rows.items()
            if row["status"] == "ok"
        ],
    )


def _accuracy_table(cases: Results) -> str:
    head = ["case, objective above the best (relative) / violation", "at C", *SOLVERS]
    rows = []
    for name, case in cases.items():
        found = {s: best(case["contestants"], s) for s in SOLVERS}
        at_bound = next((f"{e['n_bound']:,}" for e in found.values() if e and "n_bound" in e), "-")
        rows.append([name, at_bound, *(_measures(found[s]) for s in SOLVERS)])
    return markdown(head, rows)


def _measures(entry: Results | None) -> str:
    if entry is None or "violation" not in entry:
        return "-"
    mark = "" if entry["converged"] else ("*" if entry["feasible"] else "* (infeasible)")
    return f"{entry['relative_excess']:.0e} / {entry['violation']:.1e}{mark}"


def _bars_table(found: Results) -> str:
    floor = max((found["over_floor"][n] for n in MEMORY if n in found["over_floor"]), default=float("nan"))
    lines = [
        ("geometric mean, best peer / ours", found["geometric_mean"], f">= {BARS['geometric_mean']}"),
        ("worst case, best peer / ours", found["worst"], f">= {BARS['worst']}"),
        ("the same mean if peers that did not converge count as well", found["any_model"], ""),
        (f"geometric mean, LIBSVM / ours, n >= {LARGE:,}", found["libsvm_large"], f">= {BARS['libsvm_large']}"),
        ("geometric mean, regression, one-class, 10 classes", found["others"], f">= {BARS['others']}"),
        (f"ours / floor, worst of {' and '.join(MEMORY)}", floor, f"<= {BARS['floor']} (aim)"),
        ("exponent of seconds against n", found["exponents"].get("seconds", float("nan")), ""),
        ("exponent of n x n_sv", found["exponents"].get("n_times_n_sv", float("nan")), ">= that of seconds"),
        ("cases in which ours did not converge", float(len(found["ours_not_converged"])), "0"),
    ]
    return markdown(["", "measured", "bar"], [[name, f"{value:.3g}", bar] for name, value, bar in lines])
