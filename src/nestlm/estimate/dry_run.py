"""A dry run: print sizes, search space, and tokens, FLOPs and memory of each stage, without weights or data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from nestlm.cost.latency.latency import Latency
from nestlm.cost.static import Flops
from nestlm.distributed.device_layout import ComputePrecision, DeviceLayout
from nestlm.elastic.axes.base import WidthAxis
from nestlm.estimate.fake_step import PARTS
from nestlm.estimate.memory import predict
from nestlm.pipeline.order import STAGES
from nestlm.pipeline.settings import Settings
from nestlm.pipeline.stages.training import TrainingStage
from nestlm.utils.console import output


def describe(settings: Settings) -> None:
    """Print parameters, search-space size, and stages with tokens, FLOPs and memory; no weights have storage."""
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
    for axis in settings.axis_list:
        if not isinstance(axis, WidthAxis):
            continue
        fewest = min(len(space.choices[site]) for site in space.axes[axis.name])
        if fewest < len(axis.fractions):
            output.print(f"                {len(axis.fractions)} fractions of {axis.name} round to {fewest} widths")
    stages = Table("stage", "steps", "tokens", "FLOPs")
    for column in stages.columns[1:]:
        column.justify = "right"
    tokens_per_step = settings.data.batch_size * settings.data.sequence_length
    for stage in training_stages(settings):
        tokens = stage.num_steps * tokens_per_step
        stages.add_row(stage.name, f"{stage.num_steps:,}", f"{tokens:,}", f"{tokens * stage.flops_per_token():.3g}")
    output.print(stages)
    describe_memory(settings)


def describe_memory(settings: Settings) -> None:
    """Print the predicted peak memory of each training stage, and whether this machine's device has it."""
    layout, precision = DeviceLayout.from_trainer(settings.trainer), ComputePrecision.from_trainer(settings.trainer)
    if precision is None:
        output.print("memory          (not known for this trainer.precision)")
        return
    settings.data.check_ranks(layout.ranks)
    table = Table("memory a device", *PARTS, "peak")
    for column in table.columns[1:]:
        column.justify = "right"
    highest = 0.0
    for stage in training_stages(settings):
        if not stage.num_steps:
            continue
        parts = predict(
            stage, activation_checkpointing=settings.activation_checkpointing, layout=layout, precision=precision
        )
        highest = max(highest, sum(parts.values()))
        table.add_row(stage.name, *(gibibytes(parts[part]) for part in PARTS), gibibytes(sum(parts.values())))
    output.print(table)
    output.print(f"on              {layout}")
    known = layout.device_memory()
    if known is not None:
        fits = "fits" if highest < known else "does not fit: lower data.batch_size, set activation_checkpointing=true"
        output.print(f"device memory   {gibibytes(known)}: {fits}")


def gibibytes(size: float) -> str:
    """Format a number of bytes in GiB, with at least three digits."""
    return f"{size / 2**30:.1f} GiB" if size >= 100 * 2**30 else f"{size / 2**30:.3g} GiB"


def training_stages(settings: Settings) -> list[TrainingStage[Any]]:
    """Return the stages of a run that train something, in order."""
    stages = [kind.of(settings) for kind in STAGES if issubclass(kind, TrainingStage)]
    return [stage for stage in stages if stage.learns]
