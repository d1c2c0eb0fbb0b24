"""`nestlm consolidate`: whole weights from the shards of a training checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlm.utils.resources import check_writable


def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder step=N.ckpt that several ranks wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
) -> None:
    """Join the shards of a training checkpoint into model.safetensors, and router.safetensors if a router was trained.

    Finished stages need no such step: they leave whole weights.

    Example: nestlm consolidate cache/elastic-1a2b3c4d5e6f7a8b/checkpoints/step=00001000.ckpt --out weights
    """
    check_writable(out, setting="--out")
    from nestlm.distributed.sharded_checkpoint import consolidate as join

    for path in join(checkpoint, out):
        typer.echo(f"written: {path}")
