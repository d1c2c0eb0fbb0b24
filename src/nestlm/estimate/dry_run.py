"""What a run would do: sizes, search space, each stage's tokens, FLOPs and memory, without weights or data."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from nestlm.cost.latency.latency import Latency
from nestlm.cost.static import Flops
from nestlm.distributed.device_layout import Layout, Precision
from nestlm.elastic.axes.base import WidthAxis
from nestlm.estimate.fake_step import PARTS
from nestlm.estimate.memory import predict
from nestlm.pipeline.flops import flops_per_token
from nestlm.pipeline.settings import Settings
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
    for stage, steps in stage_steps(settings).items():
        tokens = steps * tokens_per_step
        stages.add_row(stage, f"{steps:,}", f"{tokens:,}", f"{tokens * flops_per_token(stage, settings):.3g}")
    output.print(stages)
    describe_memory(settings)


def describe_memory(settings: Settings) -> None:
    """Print what each training stage is expected to take on a device of the trainer, and whether the device has it."""
    layout, precision = Layout.of(settings.trainer), Precision.of(settings.trainer)
    if precision is None:
        output.print("memory          (not known for this trainer.precision)")
        return
    settings.data.check_ranks(layout.ranks)
    table = Table("memory a device", *PARTS, "peak")
    for column in table.columns[1:]:
        column.justify = "right"
    highest = 0.0
    for stage, steps in stage_steps(settings).items():
        parts = predict(stage, settings, layout=layout, precision=precision) if steps else {}
        if parts:
            highest = max(highest, sum(parts.values()))
            table.add_row(stage, *(gibibytes(parts[part]) for part in PARTS), gibibytes(sum(parts.values())))
    output.print(table)
    output.print(f"on              {layout}")
    known = layout.device_memory()
    if known is not None:
        fits = "fits" if highest < known else "does not fit: lower data.batch_size, set activation_checkpointing=true"
        output.print(f"device memory   {gibibytes(known)}: {fits}")


def gibibytes(size: float) -> str:
    """With three digits at least."""
    return f"{size / 2**30:.1f} GiB" if size >= 100 * 2**30 else f"{size / 2**30:.3g} GiB"


def stage_steps(settings: Settings) -> dict[str, int]:
    """Steps of the training stages that a run has."""
    pretrained = settings.model.weights is not None or settings.model.init is None
    steps = {"pretrain": 0 if pretrained else settings.pretrain.steps, "elastic": settings.elastic.steps}
    if settings.router.signal is not None:
        steps["router"] = settings.router.steps
    return steps | {"joint": settings.joint.steps}
