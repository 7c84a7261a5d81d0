# SPDX-License-Identifier: BSD-3-Clause
"""The ``bcd`` command.

Exit codes: 0 the tolerances are met; 2 the command line, the file or the problem is not valid;
3 stopped before the tolerance with the best point so far (a limit, or no further progress in this
precision); 4 the objective is unbounded or became NaN; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import bcd
from bcd import svm_cli

app = typer.Typer(
    help="Block coordinate descent under a summation constraint and bounds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(svm_cli.app, name="svm")
EXIT = {bcd.Status.CONVERGED: 0, bcd.Status.INTERRUPTED: 130, bcd.Status.UNBOUNDED: 4, bcd.Status.NOT_FINITE: 4}
STOPPED_EARLY, INVALID = 3, 2
FIELDS = {"Q", "F", "D", "c", "lower", "upper", "total", "groups", "x0"}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bcd (blockdescent) {bcd.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Block coordinate descent under a summation constraint and bounds."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for index.html and its pictures.")] = Path("demo"),
) -> None:
    """Solve a real SVM dual with every rule beside LIBSVM; write pictures."""
    from bcd.demo import run_demo

    console = Console(width=None if sys.stdout.isatty() else 120)
    with _errors():
        _check_folder(out)
        code = run_demo(out, console)
    raise typer.Exit(code)


@app.command()
def rules() -> None:
    """Print the table of selection rules."""
    table = Table(box=None, pad_edge=False)
    for name in ("--rule", "name", "chooses", "cost of choosing", "note"):
        table.add_column(name, no_wrap=True)
    for key, row in bcd.RULES.items():
        table.add_row(key, row.title, row.choice, row.cost, row.note)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@app.command()
def solve(
    file: Annotated[
        Path,
        typer.Argument(
            help="npz with Q (n, n), or F (n, r) and optionally D (n,) for Q = F F' + diag(D); optionally c, lower, "
            "upper (n,) or scalars, total (scalar or lo, hi), groups (n,) with total (m,) or (m, 2), x0 (n,)."
        ),
    ],
    rule: Annotated[
        str | None,
        typer.Option(help="Selection rule of bcd.minimize, see `bcd rules`. Default: none, bcd.solve_qp is quicker."),
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="With a rule: pair, pair-l2, model, line-search, backtracking or block.")
    ] = None,
    tol: Annotated[
        float,
        typer.Option(help="Violation to reach, in units of the gradient; without a rule of its largest entry if > 1."),
    ] = 1e-6,
    tol_gap: Annotated[float | None, typer.Option(help="Besides, the proven bound on f - f* to reach.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="Steps at most.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="With a rule that draws; default: 0.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, x included, as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write x, the multipliers and the certificate to this npz.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With a rule: write a picture of violation and gap to this file.")
    ] = None,
) -> None:
    """Minimise 1/2 x'Qx + c'x subject to sum(x) = total and lower <= x <= upper."""
    with _errors():
        problem, x0 = load_problem(file)
        _check_targets(out, plot, sources=(file,))
        _check_picture(plot)
        limits: dict[str, Any] = {"tol": tol, "tol_gap": tol_gap, "max_iter": max_iter, "time_limit": time_limit}
        with _progress() as callback, np.errstate(over="ignore", invalid="ignore"):  # the status says what overflowed
            if rule is None:
                for name, value in (("--update", update), ("--seed", seed), ("--plot", plot)):
                    if value is not None:
                        raise ValueError(f"{name} needs a rule, such as --rule gs1; without one bcd.solve_qp works")
                result = _solve_qp(problem, x0=x0, callback=callback, **limits)
            else:
                run: dict[str, Any] = {"callback": callback, "random_state": seed, "trace": plot is not None}
                result = bcd.minimize(problem, rule, update, x0, **limits, **run)
        if out is not None:
            save_result(out, result)
        if plot is not None:
            result.plot(plot)
    print(json.dumps(_json_safe(result.as_dict())) if as_json else result)
    raise typer.Exit(EXIT.get(result.status, STOPPED_EARLY))


def _solve_qp(problem: bcd.Problem, **options: Any) -> bcd.Result:
    """bcd.solve_qp on a problem with a quadratic."""
    f: Any = problem.objective
    box = problem.constraint
    sums = {"total": box.total, "groups": box.groups}
    return bcd.solve_qp(f.hessian, f.c, lower=box.lower, upper=box.upper, **sums, **options)


def load_problem(file: Path) -> tuple[bcd.Problem, np.ndarray | None]:
    """Read a problem from an npz file; pickled content is refused.

    Raises
    ------
    ValueError
        Saying what in the file is missing, unknown or malformed.
    """
    data = _read_npz(file)
    unknown = set(data) - FIELDS
    if unknown:
        raise ValueError(f"{file}: unknown arrays {sorted(unknown)}; known are {sorted(FIELDS)}")
    if ("Q" in data) == ("F" in data):
        raise ValueError(f"{file}: needs either Q or F; found {sorted(data)}")
    if "D" in data and "F" not in data:
        raise ValueError(f"{file}: D goes with F; found D with Q")
    Q = data["Q"] if "Q" in data else bcd.LowRank(data["F"], data.get("D", 0.0))
    box = bcd.SumBox(data.get("lower"), data.get("upper"), _total(data), data.get("groups"))
    return bcd.Problem(bcd.Quadratic(Q, data.get("c", 0.0)), box), data.get("x0")


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file}: {'is a folder; needs a file' if file.is_dir() else 'no such file'}")
    with file.open("rb") as handle:
        try:
            with zipfile.ZipFile(handle):
                pass
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as stored:
                data = {name: stored[name] for name in stored.files}
        except Exception as broken:  # zipfile, its decompressors and NumPy's headers raise almost anything
            why = " ".join(str(broken).split())[:200] or type(broken).__name__
            raise ValueError(f"{file}: must be an npz archive of plain arrays, as np.savez writes ({why})") from broken
    for name, array in data.items():
        if not isinstance(array, np.ndarray):  # what is no array in the archive comes as its bytes
            raise ValueError(f"{file}: must be an npz archive of plain arrays; found {name!r}, which is none")
    return data


def _total(data: dict[str, np.ndarray]) -> Any:
    """The total as SumBox takes it: shape () a number, (2,) a range; with groups (m,) or (m, 2)."""
    total = data.get("total")
    if total is None:
        return None
    per_group = "groups" in data
    if total.ndim == int(per_group):
        return total.tolist()
    if total.ndim == int(per_group) + 1 and total.shape[-1] == 2:
        return [tuple(row) for row in total.tolist()] if per_group else tuple(total.tolist())
    raise ValueError(
        f"total must be a number or (lo, hi){' for each group' if per_group else ''}; found shape {total.shape}"
    )


def save_result(file: Path, result: bcd.Result) -> None:
    """Write x, multipliers and certificate as an npz without pickles."""
    fields: dict[str, Any] = {name: np.asarray(value) for name, value in result.as_dict().items()}
    try:
        with file.open("wb") as handle:
            np.savez(handle, **fields)
    except OSError as error:  # a full disk does not say which file
        raise OSError(f"{file}: {error.strerror or error}") from error


def _check_targets(*targets: Path | None, sources: tuple[Path, ...] = ()) -> None:
    """Refuse before the work what could not be written after it, or would be written over a source."""
    for target in targets:
        if target is None:
            continue
        if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
            raise ValueError(f"{target}: is read and would be overwritten; give another name to write to")
        folder = target.absolute().parent
        if target.is_dir() or not folder.is_dir():
            raise ValueError(f"{target}: must be a file in a folder that exists")
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise ValueError(f"{target}: must be a file that can be written; there is no permission")


def _check_folder(folder: Path) -> None:
    """Make a folder for results, before the work, or say why that cannot be."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder, or a name that is free")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: must be a folder that can be written; there is no permission")


def _check_picture(target: Path | None) -> None:
    """Refuse before the work a kind of picture that matplotlib does not write."""
    if target is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if target.suffix and target.suffix[1:].lower() not in kinds:
        raise ValueError(f"{target}: a picture must end in one of {', '.join(sorted(kinds))}")


def _json_safe(value: Any) -> Any:
    """JSON has no infinity: it becomes null."""
    if isinstance(value, dict):
        return {name: _json_safe(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_json_safe(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextmanager
def _progress() -> Iterator[Callable[[bcd.Progress], None] | None]:
    """A line that follows the run, when somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    last = time.monotonic()
    with Console(stderr=True).status("compiling or starting") as line:

        def show(p: bcd.Progress) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                line.update(
                    f"step {p.iteration:,}  objective {p.objective:.8g}  violation {p.violation:.2e}  {p.seconds:.0f} s"
                )

        yield show


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what is wrong with the input into one sentence and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"bcd: {error}", err=True)
        raise typer.Exit(INVALID) from error
    except KeyboardInterrupt:
        typer.echo("bcd: interrupted", err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point of the ``bcd`` command."""
    app()
