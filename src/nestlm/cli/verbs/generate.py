"""`nestlm generate`: continue a prompt at a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    prompt: Annotated[str, typer.Option(help="The start of a document.")],
    budget: Annotated[
        str, typer.Option(help="A budget: 0.6, 60%, 8GiB; 0.6+8GiB is two limits that hold together.")
    ] = "1.0",
    compare: Annotated[
        str | None, typer.Option(help="Several budgets, such as 1.0,0.7,0.5, whose continuations stand side by side.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="static or dynamic. Default: the run's own policy.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits before sampling; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The seed of sampling.")] = 0,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read names of special tokens in the prompt as special tokens.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="The device, such as cpu or cuda. Default: the run's own.")] = None,
) -> None:
    """Continue a prompt at a budget, and print tokens as they come. The speed goes to standard error.

    Example: nestlm generate runs/default/surrogate-static-seed0-1a2b3c4d --budget 0.6 --prompt "def main("

    Example: nestlm generate runs/default/surrogate-static-seed0-1a2b3c4d --compare 1.0,0.7,0.5 --prompt "def main("
    """
    from nestlm.spec import Budget

    budgets = [Budget.from_str(each) for each in (compare or budget).split(",")]
    from nestlm.config.commands import load

    model = load(run, device=device)
    from nestlm.cli import output
    from nestlm.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    options = {"router": router, "max_tokens": max_tokens, "sampling": sampling, "special_tokens": special_tokens}
    if compare is not None:
        output.print_comparison(model, prompt, budgets=budgets, **options)
    else:
        output.print_continuation(model, prompt, budget=budgets[0], **options)
