"""The `nestlm` command: what can be done with a finished run. Training is `python train.py`."""

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


def main() -> None:
    """Entry point: errors that a user can cure are one line and exit code 2."""
    try:
        app()
    except NestlmError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(EXIT_USER_ERROR) from None
