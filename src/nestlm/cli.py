"""The `nestlm` command: what is done before and after a run. Training is `python train.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlm.errors import EXIT_USER_ERROR, NestlmError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def nestlm() -> None:
    """Work with nested language models that `python train.py` made."""


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The run's folder.")]) -> None:
    """Print a run's results; draw its pictures and write its report.md again.

    Example: nestlm report runs/default/surrogate-static-seed0-1a2b3c4d
    """
    from nestlm.report.render import render

    render(run)


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As for train.py, such as model=small.")] = None,
) -> None:
    """Measure how long each choice takes on this device, for `cost=latency cost.table=FILE`.

    Example: nestlm profile model=small cost.phase=decode cost.batch_size=8 --out latency.json
    """
    from nestlm.compose import profile as measure

    measure(overrides or [], out=out)


def main() -> None:
    """Entry point: errors that a user can cure are one line and exit code 2."""
    try:
        app()
    except NestlmError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(EXIT_USER_ERROR) from None
