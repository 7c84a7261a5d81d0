# SPDX-License-Identifier: BSD-3-Clause
"""``python -m experiments list | run NAME [--quick] | tables | report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import experiments
from experiments import record, report, tables

app = typer.Typer(help="Run the experiments behind the figures and tables.", no_args_is_help=True)


@app.command("list")
def list_experiments() -> None:
    """Name every experiment with its title."""
    for name in experiments.names():
        typer.echo(f"{name:16} {report.title(name)}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="as the list command names it")],
    quick: Annotated[bool, typer.Option(help="smaller sizes, under two minutes; results stay as they are")] = False,
) -> None:
    """Run one experiment and save its numbers and pictures."""
    try:
        module = experiments.module(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        paths = record.record(name, module, quick)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        typer.echo("interrupted; training runs that had finished are kept", err=True)
        raise typer.Exit(130) from None
    for path in paths:
        typer.echo(path)


@app.command("tables")
def rewrite_tables() -> None:
    """Rewrite the tables in README.md and docs from the result files."""
    for path in tables.documents():
        changed = tables.update(path)
        typer.echo(f"{path.name}: {'rewritten' if changed else 'in step'}")


@app.command("report")
def write_report(
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
) -> None:
    """Write every table and picture into one HTML page that needs nothing but itself."""
    report.write(out)
    typer.echo(out)


if __name__ == "__main__":
    app()
