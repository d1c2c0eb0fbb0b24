"""What a run would do: sizes, search space, and each stage's tokens and FLOPs, without weights or data."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from nestlm.cost.latency import Latency
from nestlm.cost.static import Flops
from nestlm.passes import flops_per_token
from nestlm.report.console import output
from nestlm.settings import Settings


def describe(settings: Settings) -> None:
    """Print parameters, search-space size, and stages with tokens and FLOPs; everything is on the meta device."""
    if not settings.is_priced:  # flops stand in, also for what signals of routers cost
        output.print("latency         (measured by the run; nestlm profile measures now)")
        cost = Flops(settings.data.sequence_length) if isinstance(settings.cost, Latency) else settings.cost
        others = {name: other for name, other in settings.costs.items() if not isinstance(other, Latency)}
        settings = replace(settings, cost=cost, costs=others)
    space = settings.space()
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
    for stage, steps in stage_steps(settings).items():
        tokens = steps * tokens_per_step
        stages.add_row(stage, f"{steps:,}", f"{tokens:,}", f"{tokens * flops_per_token(stage, settings):.3g}")
    output.print(stages)


def stage_steps(settings: Settings) -> dict[str, int]:
    """Steps of the training stages that a run has."""
    pretrained = settings.model.weights is not None or settings.model.init is None
    steps = {"pretrain": 0 if pretrained else settings.pretrain.steps, "elastic": settings.elastic.steps}
    if settings.router.signal is not None:
        steps["router"] = settings.router.steps
    return steps | {"joint": settings.joint.steps}
