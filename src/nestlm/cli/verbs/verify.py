"""`nestlm verify`: does a run give the same results again?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_DIFFERENT = 1


def verify(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Where text and weights are now: data.path=FOLDER, model.weights=FOLDER."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder where the second run works, which is kept. Default: a temporary folder."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="By how much numbers may differ, for instance on another machine.")
    ] = 0.0,
) -> None:
    """Run a finished run again, with its config, latency table and number of threads, and compare the results.

    Nothing is taken from the cache. Exit code 0: results.csv and specs/ are the same bytes. Exit code 1: they differ.
    Exit code 2: the run cannot be repeated.

    Example: nestlm verify runs/default/surrogate-static-seed0-1a2b3c4d

    Example: nestlm verify runs/default/surrogate-static-seed0-1a2b3c4d data.path=/data/moved
    """
    from nestlm.config.commands import verify as is_same

    if not is_same(run, out=out, tolerance=tolerance, overrides=overrides or ()):
        raise typer.Exit(EXIT_DIFFERENT)
