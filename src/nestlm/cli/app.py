"""The `nestlm` command: one module of `cli/verbs` for each verb."""

from __future__ import annotations

import io
import sys
from importlib import import_module

import typer

from nestlm.errors import EXIT_USER_ERROR, NestlmError
from nestlm.utils.resources import resource_error

# In the order of `nestlm --help`. cli/verbs/NAME.py holds a function NAME, whose signature is the command line.
VERBS = (
    "train",
    "report",
    "verify",
    "generate",
    "evaluate",
    "export",
    "prepare",
    "profile",
    "consolidate",
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def nestlm() -> None:
    """Turn a language model into a nested one, and work with nested models."""


for verb in VERBS:
    module = import_module(f"nestlm.cli.verbs.{verb}")
    app.command(**getattr(module, "SETTINGS", {}))(getattr(module, verb))


def main() -> None:
    """Run the command line. Errors that a user can cure are printed in one line, with exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may be unable to show every character
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="nestlm")
    except Exception as error:
        known = error if isinstance(error, NestlmError) else resource_error(error)
        if known is None:
            raise
        typer.echo(f"error: {known}", err=True)
        raise SystemExit(EXIT_USER_ERROR) from None
