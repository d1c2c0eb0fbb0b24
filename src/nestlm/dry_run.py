"""What a run would do: sizes, search space, and each stage's tokens and FLOPs, without weights or data."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.table import Table

from nestlm.cost.latency import Latency
from nestlm.cost.static import Flops
from nestlm.cost.table import CostTable
from nestlm.report.console import output
from nestlm.sampler.base import Drawn, Mixture
from nestlm.settings import Settings

SAMPLED_STEPS = 64  # draws from which the mean cost of a sampler's step is taken
BACKWARD = 3.0  # a forward and backward pass costs three forward passes


def describe(settings: Settings) -> None:
    """Print parameters, search-space size, and stages with tokens and FLOPs; everything is on the meta device."""
    if not settings.is_priced:  # flops stand in, also for what signals of routers cost
        output.print("latency         (measured by the run; nestlm profile measures now)")
        cost = Flops(settings.data.sequence_length) if isinstance(settings.cost, Latency) else settings.cost
        others = {name: other for name, other in settings.costs.items() if not isinstance(other, Latency)}
        settings = replace(settings, cost=cost, costs=others)
    config, space, axes = settings.model.decoder_config(), settings.space(), settings.axis_list
    flops = Flops(context_length=settings.data.sequence_length).tabulate(space, axes=axes, config=config)
    for name, table in settings.prices().tables.items():
        smallest_cost = table.cost(space.smallest())
        digits = ",.0f" if table.whole >= 1e4 else ".4g"  # counts in full, times in short
        output.print(f"{name:<15} {table.whole:{digits}} {table.unit}  (smallest sub-network {smallest_cost:{digits}})")
    choices = ", ".join(f"{axis} {list(space.choices[sites[0]])}" for axis, sites in space.axes.items())
    output.print(f"search space    {space.size:.3g} sub-networks  ({len(space.sites)} sites: {choices})")
    stages = Table("stage", "steps", "tokens", "FLOPs")
    for column in stages.columns[1:]:
        column.justify = "right"
    tokens_per_step = settings.data.batch_size * settings.data.sequence_length
    for stage, steps, passes in stage_passes(settings):
        tokens = steps * tokens_per_step
        stages.add_row(stage, f"{steps:,}", f"{tokens:,}", f"{tokens * passes * flops.whole:.3g}")
    output.print(stages)


def stage_passes(settings: Settings) -> list[tuple[str, int, float]]:
    """(stage, steps, forward passes of the full model that a token of the stage costs)."""
    space, config, axes = settings.space(), settings.model.decoder_config(), settings.axis_list
    flops, of_tokens = (
        Flops(context_length=settings.data.sequence_length).tabulate(space, axes=axes, config=config, per_token=flag)
        for flag in (False, True)
    )
    shape = (settings.data.batch_size, settings.data.sequence_length)
    drawn = [
        sum(
            share_of(item, flops, of_tokens=of_tokens)
            for item in settings.sampler.draw(flops.space, seed=settings.seed, step=step, batch=shape)
        )
        for step in range(SAMPLED_STEPS)
    ]
    teacher = 1.0 if settings.teacher.needs_teacher else 0.0
    # budgets are drawn evenly between the smallest and the full model
    mean_share = (1.0 + flops.share(flops.space.smallest())) / 2
    pretrain = 0 if settings.model.weights is not None or settings.model.init is None else settings.pretrain.steps
    stages = [
        ("pretrain", pretrain, BACKWARD),
        ("elastic", settings.elastic.steps, BACKWARD * sum(drawn) / len(drawn) + teacher),
        ("joint", settings.joint.steps, BACKWARD * (1 + settings.joint.budgets_per_step * mean_share) + teacher),
    ]
    signal = settings.make_signal(settings.make_router())
    if signal is not None:
        stages.insert(2, ("router", settings.router.steps, signal.forward_passes(mean_share)))
    return stages


def share_of(drawn: Drawn, table: CostTable, *, of_tokens: CostTable) -> float:
    """What was drawn costs, as a share of the whole model; a mixture as the mean over its sequences or tokens.

    Tokens of their own widths have prices of their own, `of_tokens`: K and V run whole.
    """
    if not isinstance(drawn, Mixture):
        return table.share(drawn)
    table = of_tokens if drawn.indices.ndim == 3 else table
    taken = torch.nn.functional.one_hot(drawn.indices.flatten(1), table.space.max_choices)
    return float(table.expected_share(taken.double().mean(1)))
