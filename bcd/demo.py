# SPDX-License-Identifier: BSD-3-Clause
"""The demo: one real SVM dual, every rule, LIBSVM beside them, and pictures.

The data are scikit-learn's digits, even against odd. With beta_i = y_i alpha_i the dual of a C-SVC is

    minimise 1/2 beta'K beta - y'beta   subject to   sum(beta) = 0,  0 <= y_i beta_i <= C

(docs/theory.md), an instance of what :func:`bcd.minimize` solves.
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bcd
from bcd.pictures import plot_traces

C, GAMMA, TOL = 1.0, 0.05, 1e-3
RULES_SHOWN = [name for name in bcd.RULES if name != "gs"]  # the dual has bounds
COLUMNS = ["rule", "iterations", "columns", "seconds", "objective", "violation", "gap", "against LIBSVM"]


@dataclass(frozen=True)
class Row:
    """One solver's line of the table; ``columns`` is None where the solver does not say."""

    name: str
    iterations: int
    columns: int | None
    seconds: float
    objective: float
    violation: float
    gap: float
    converged: bool

    def cells(self, reference: float) -> list[str]:
        """The line as text; the last cell is the objective less LIBSVM's, negative where lower (better)."""
        return [
            self.name + ("" if self.converged else " (stopped early)"),
            f"{self.iterations:,}",
            "" if self.columns is None else f"{self.columns:,}",
            f"{self.seconds:.4f}",
            f"{self.objective:.6f}",
            f"{self.violation:.1e}",
            f"{self.gap:.1e}",
            f"{self.objective - reference:+.1e}",
        ]


def digits_dual(C: float = C, gamma: float = GAMMA) -> tuple[bcd.Problem, np.ndarray, np.ndarray, np.ndarray]:
    """Build the dual; returns (problem, kernel matrix, shape (n, n), labels, shape (n,), features, shape (n, d))."""
    from sklearn.datasets import load_digits
    from sklearn.metrics.pairwise import rbf_kernel

    X, digit = load_digits(return_X_y=True)
    y = np.where(digit % 2 == 0, 1.0, -1.0)
    K = rbf_kernel(X / 16.0, gamma=gamma)
    box = bcd.SumBox(lower=np.minimum(C * y, 0), upper=np.maximum(C * y, 0), total=0.0)
    return bcd.Problem(bcd.Quadratic(K, -y), box), K, y, X / 16.0


def machines(K: np.ndarray, X: np.ndarray) -> list[tuple[str, Any, np.ndarray]]:
    """(name, estimator, input) of LIBSVM on the kernel matrix, and of LIBSVM and ours on the features."""
    from sklearn.svm import SVC

    import bcd.svm

    return [
        ("LIBSVM", SVC(kernel="precomputed", C=C, tol=TOL), K),
        ("LIBSVM, kernel included", SVC(gamma=GAMMA, C=C, tol=TOL), X),
        ("SVC, kernel included", bcd.svm.SVC(gamma=GAMMA, C=C, tol=TOL), X),
    ]


def solve_with_machine(problem: bcd.Problem, name: str, machine: Any, X: np.ndarray, y: np.ndarray) -> Row:
    """An estimator's second fit (the first may compile), its coefficients judged by :func:`bcd.certify`."""
    machine.fit(X, y)
    start = time.perf_counter()
    machine.fit(X, y)
    if getattr(machine, "status_", None) is bcd.Status.INTERRUPTED:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    beta = np.zeros(len(y))
    beta[machine.support_] = machine.dual_coef_[0]
    proof = bcd.certify(problem, beta)
    columns = round(float(np.sum(machine.n_columns_))) if hasattr(machine, "n_columns_") else None
    return Row(
        *(name, int(np.sum(machine.n_iter_)), columns, seconds, proof.objective),
        *(proof.violation, proof.gap, machine.fit_status_ == 0),
    )


def whole(result: bcd.Result) -> bcd.Result:
    """A result, unless Ctrl-C cut it short: then the demo ends as well."""
    if result.status is bcd.Status.INTERRUPTED:
        raise KeyboardInterrupt
    return result


def solve_with_rule(problem: bcd.Problem, rule: str, time_limit: float) -> Row:
    """One run without a trace, for the time."""
    r = whole(bcd.minimize(problem, rule, tol=TOL, time_limit=time_limit))
    title = bcd.RULES[rule].title
    return Row(title, r.iterations, r.columns, r.seconds, r.objective, r.violation, r.gap, r.status.ok)


def run_demo(out: Path, console: Console, time_limit: float = 10.0) -> int:
    """Solve, print the table, write index.html into the folder ``out``; returns 0 if every rule met the tolerance."""
    console.print("Digits of scikit-learn, even against odd: the dual of an RBF SVM.")
    problem, K, y, X = digits_dual()
    with console.status("compiling the loops (the first time only, half a minute or so)"):
        small = bcd.Problem(bcd.Quadratic(np.eye(4)), bcd.SumBox(0, 1, 1))
        for rule in RULES_SHOWN:
            whole(bcd.minimize(small, rule, x0=[1.0, 0.0, 0.0, 0.0], max_iter=3))
    console.print(f"n = {problem.n}, C = {C}, gamma = {GAMMA}, every solver to violation {TOL:g}.\n")
    rows, traces = [], {}
    with console.status("solving") as status:
        for name, machine, inputs in machines(K, X):
            rows.append(solve_with_machine(problem, name, machine, inputs, y))
        for rule in RULES_SHOWN:
            status.update(f"solving with {rule}")
            rows.append(solve_with_rule(problem, rule, time_limit))
            traced = whole(bcd.minimize(problem, rule, tol=TOL, time_limit=time_limit, trace=True))
            if traced.trace is not None:
                traces[bcd.RULES[rule].title] = traced.trace
    console.print(_table(rows))
    console.print(
        "columns: columns of the kernel matrix read, what a solver pays for when the matrix does not fit in memory.\n"
        "gap: a proven bound on objective - optimum.  seconds: compiled loops on the stored matrix.\n"
        "LIBSVM and SVC: objective, violation and gap are recomputed from their coefficients by bcd.certify;\n"
        "kernel included: from the features; the others begin with the kernel matrix.\n"
    )
    page = out / "index.html"
    page.write_text(_page(problem.n, rows, _pictures(out, traces)), encoding="utf-8")
    console.print(f"Pictures: {page}")
    return 0 if all(row.converged for row in rows) else 3


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "rule" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(rows[0].objective))
    return table


def _pictures(out: Path, traces: dict[str, bcd.Trace]) -> list[tuple[Path, str]]:
    """Draw the convergence pictures; returns (file, caption) of each."""
    best = max(f - gap for trace in traces.values() for f, gap in zip(trace.objective, trace.gap, strict=True))
    for trace in traces.values():  # every gap proves a lower bound of the optimum: show the distance to the best
        trace.objective = [value - best for value in trace.objective]
    violation, objective = out / "violation.png", out / "objective.png"
    plot_traces(traces, violation, against=("iteration", "columns", "seconds"), tol=TOL)
    plot_traces(
        traces, objective, "objective", against=("iteration", "columns", "seconds"), label="objective - lower bound"
    )
    return [
        (
            violation,
            "Violation, the stopping test, against work. The grey line is the tolerance.",
        ),
        (objective, "Distance of the objective from the best proven lower bound of the optimum."),
    ]


def _page(n: int, rows: list[Row], pictures: Iterable[tuple[Path, str]]) -> str:
    """One self-contained page, light and dark."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells(rows[0].objective)) + "</tr>"
        for row in rows
    )
    figures = "".join(
        f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for path, text in pictures
    )
    return _HTML.format(n=n, C=C, gamma=GAMMA, tol=TOL, head=head, body=body, figures=figures, version=bcd.__version__)


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>bcd demo: an SVM dual by every rule</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr + tr {{ border-top: 1px solid #8885; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; background: white; border-radius: 4px; }}
figcaption {{ opacity: .8; font-size: .9rem; }}
</style>
<h1>One SVM dual, every selection rule</h1>
<p>scikit-learn's digits, even against odd, {n} rows; RBF kernel, C = {C}, gamma = {gamma}; every solver to a
violation of {tol:g}. <b>columns</b> counts the kernel columns read, <b>gap</b> is a proven bound on
objective &minus; optimum, the last column is the objective less LIBSVM's (negative: lower, better). LIBSVM's
and SVC's figures are recomputed from their coefficients; where the kernel is included, a solver starts from the
features, the others from the matrix.</p>
<div><table><tr>{head}</tr>{body}</table></div>
{figures}
<p>Made by <code>bcd demo</code>, blockdescent {version}. Seconds are of this machine, one run each.</p>
</html>
"""
