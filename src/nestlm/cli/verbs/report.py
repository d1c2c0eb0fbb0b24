"""`nestlm report`: results of runs, as tables and pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nestlm.utils.resources import check_writable


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold folders of runs.")],
    by: Annotated[
        list[str] | None, typer.Option(help="A setting, such as router.name: one row for each value. May be repeated.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="The column of results.csv to compare, or `time`, measured end to end.")
    ] = "val_loss",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to. Default: report/ in the folder that holds all runs.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Compare runs of different texts or of uncommitted code, too, and mark them."),
    ] = False,
) -> None:
    """Compare runs in one table: rows by settings, columns by budget, mean and standard deviation over seeds.

    The table is written as Markdown, CSV, LaTeX and one HTML page. For the folder of a single run, its results are
    printed, and its report.md and pictures are written again.

    Example: nestlm report runs/ablation --by router.name --by router.policy

    Example: nestlm report runs/default/surrogate-static-seed0-1a2b3c4d
    """
    from nestlm.report.comparison import compare
    from nestlm.report.comparison_files import write_comparison
    from nestlm.report.record import PROVENANCE
    from nestlm.report.render import render
    from nestlm.report.runs import find_runs

    if len(runs) == 1 and (runs[0] / PROVENANCE).is_file():
        check_writable(runs[0], setting="RUN")
        render(runs[0])
        return
    shared = Path(os.path.commonpath([run.absolute() for run in runs]))
    folder = out or shared / "report"
    check_writable(folder, setting="--out")
    comparison = compare(find_runs(runs), keys=by or (), metric=metric, force=force)
    write_comparison(comparison, folder=folder, title=shared.name)
