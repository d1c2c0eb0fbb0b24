"""`nestlm export`: a budget's model, for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlm.utils.resources import check_writable


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    budget: Annotated[str, typer.Option(help="A budget: 0.6, 60%, 8GiB; 0.6+8GiB is two limits that hold together.")],
    out: Annotated[Path, typer.Option(help="The folder to write, which must not exist.")],
    form: Annotated[
        str, typer.Option("--format", help="hf: a folder for transformers. gguf: a file for llama.cpp.")
    ] = "hf",
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Export the best sub-network whose layers all have the same widths.")
    ] = False,
    router: Annotated[
        str | None,
        typer.Option(help="static: one sub-network. dynamic: each token chooses its own. Default: the run's policy."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, f16 or bf16, and q8_0 with gguf. Default: the parent model's, or f32 without one."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="OWNER/NAME of a private repository on the Hugging Face hub.")
    ] = None,
) -> None:
    """Write a budget's model as files that need no nestlm, and check that they compute what the nested model does.

    Example: nestlm export runs/default/surrogate-static-seed0-1a2b3c4d --budget 0.6 --out small
    """
    from nestlm.spec import Budget

    asked = Budget.from_str(budget)
    check_writable(out.parent, setting="--out")
    from nestlm.config.commands import load
    from nestlm.utils.console import output

    check = load(run, device="cpu").export(
        out,
        budget=asked,
        form=form,
        uniform=uniform,
        router=router,
        precision=dtype,
        push_to=push_to_hub,
    )
    for line in [f"written: {out}", *check.lines()]:
        output.print(line, markup=False, highlight=False)
