"""`nestlm evaluate`: loss and task scores of budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlm.errors import ConfigError
from nestlm.utils.resources import check_writable

OWN_TEXT = "the run's own"


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Another text, as `nestlm train` takes it: data=text data.path=FOLDER."),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Budgets, such as 1.0,0.6,0.5. Default: the run's own.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of the EleutherAI evaluation harness, such as arc_easy,hellaswag.")
    ] = "",
    task_files: Annotated[
        Path | None, typer.Option(help="A folder of tasks in YAML files, which replace the harness's own.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Examples for each task: piqa=5,mmlu=0. Default: the paper's.")] = "",
    limit: Annotated[int | None, typer.Option(help="Ask only the first questions of each task, this many.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions scored at once. Default: data.eval_batch_size.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="static or dynamic. Default: the run's own policy.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Scores are written to OUT.csv and OUT.md. Default: RUN/evaluation.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="The device, such as cpu or cuda. Default: the run's own.")] = None,
) -> None:
    """Score budgets on the run's held-out text or on another text, and on tasks: one row for each budget.

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d --budgets 1.0,0.6,0.5

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d --tasks arc_easy,hellaswag,mmlu

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d data=text data.path=FOLDER
    """
    from nestlm.spec import Budget

    asked = [Budget.from_str(each) for each in budgets.split(",")] if budgets is not None else None
    num_shots = parse_shots(shots)
    out = out or run / "evaluation"
    check_writable(out.parent, setting="--out")
    from nestlm.config.commands import load
    from nestlm.config.compose import data_settings
    from nestlm.config.error_messages import plain_errors

    with plain_errors():
        model = load(run, device=device)
        data = data_settings(overrides, run=run) if overrides else None
        rows = model.evaluate(
            asked,
            router=router,
            data=data,
            tasks=[name for name in tasks.split(",") if name],
            task_files=task_files,
            shots=num_shots,
            limit=limit,
            batch_size=batch_size,
        )
    from nestlm.cli.output import print_scores

    print_scores(rows, out=out, title=f"{run.name}: held-out text of {' '.join(overrides or [OWN_TEXT])}")


def parse_shots(text: str) -> dict[str, int]:
    """Parse `piqa=5,mmlu=0` to a number of examples by task. Raises ConfigError for any other form."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if not number.isdigit():
            raise ConfigError(f"--shots: got {part!r}, wanted TASK=NUMBER, such as piqa=5")
        found[name] = int(number)
    return found
