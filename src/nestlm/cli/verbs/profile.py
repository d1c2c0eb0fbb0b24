"""`nestlm profile`: measure a latency table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def profile(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="The model and the cost, as `nestlm train` takes them: model=small.")
    ] = None,
) -> None:
    """Measure how much time each choice takes on this device, for `cost=latency cost.table=FILE`.

    Example: nestlm profile model=small cost.phase=decode cost.batch_size=8 --out latency.json
    """
    from nestlm.config.commands import profile as measure

    measure(overrides or [], out=out)
