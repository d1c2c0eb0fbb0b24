"""`nestlm train`: what `python train.py` does in a checkout."""

from __future__ import annotations

from typing import Annotated

import typer

# Every flag is Hydra's, --help included.
SETTINGS = {"add_help_option": False, "context_settings": {"ignore_unknown_options": True}}


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="GROUP=NAME and FIELD=VALUE, and flags of Hydra, such as --multirun.")
    ] = None,
) -> None:
    """Turn a language model into a nested one. `nestlm train --help` lists groups and fields.

    Example: nestlm train model=tiny router=surrogate budget=[0.8,0.6]

    Example: nestlm train --multirun router=uniform,surrogate seed=0,1
    """
    from nestlm.config.commands import train as run

    run(overrides or [])
