"""What a token of a training stage is expected to cost: from sizes, and from what samplers draw."""

from __future__ import annotations

import torch

from nestlm.cost.static import Flops
from nestlm.cost.table import CostTable
from nestlm.elastic.sampler.base import MixedSpecs, Sample
from nestlm.pipeline.settings import Settings, View

SAMPLED_STEPS = 64  # draws from which the mean cost of a sampler's step is taken
BACKWARD = 3.0  # a forward and backward pass costs three forward passes


def forward_passes(stage: str, settings: Settings | View) -> float:
    """Forward passes of the full model that a token of a training stage costs, a teacher's included.

    Budgets are drawn evenly between the smallest and the full model, and a sampler's draws are averaged. Routers'
    networks and what activation checkpointing computes again are not counted.
    """
    if stage == "pretrain":
        return BACKWARD
    if stage == "elastic":
        return elastic_passes(settings)
    if stage == "joint":
        routed = settings.joint.budgets_per_step * mean_share(settings)
        return BACKWARD * (1 + routed) + settings.teacher.extra_passes(runs_full=True)
    signal = settings.make_signal(settings.make_router())
    return 0.0 if signal is None else signal.forward_passes(mean_share(settings))


def flops_per_token(stage: str, settings: Settings | View) -> float:
    """The same in FLOPs."""
    whole = Flops(settings.data.sequence_length).whole(settings.model.decoder_config())
    return forward_passes(stage, settings) * whole


def mean_share(settings: Settings | View) -> float:
    """RowShard of the full model's FLOPs that a routed sub-network takes, when budgets are drawn evenly."""
    flops = flops_table(settings, per_token=False)
    return (1.0 + flops.share(flops.space.smallest())) / 2


def elastic_passes(settings: Settings | View) -> float:
    """The same of a step of elastic training, a mean over what the sampler draws."""
    flops, of_tokens = (flops_table(settings, per_token=flag) for flag in (False, True))
    shape = (settings.data.batch_size, settings.data.sequence_length)
    passes = 0.0
    for step in range(SAMPLED_STEPS):
        drawn = settings.sampler.draw(flops.space, seed=settings.seed, step=step, batch=shape)
        runs_full = any(not isinstance(item, MixedSpecs) and item == flops.space.full() for item in drawn)
        passes += BACKWARD * sum(share_of(item, flops, of_tokens=of_tokens) for item in drawn)
        passes += settings.teacher.extra_passes(runs_full=runs_full)
    return passes / SAMPLED_STEPS


def flops_table(settings: Settings | View, *, per_token: bool) -> CostTable:
    """FLOPs of the choices in rows as they are trained on."""
    flops, config = Flops(settings.data.sequence_length), settings.model.decoder_config()
    return flops.tabulate(settings.space(), axes=settings.axis_list, config=config, per_token=per_token)


def share_of(drawn: Sample, table: CostTable, *, of_tokens: CostTable) -> float:
    """What was drawn costs, as a share of the whole model; a mixture as the mean over its sequences or tokens.

    Tokens of their own widths have prices of their own, `of_tokens`: K and V run whole.
    """
    if not isinstance(drawn, MixedSpecs):
        return table.share(drawn)
    table = of_tokens if drawn.indices.ndim == 3 else table
    taken = torch.nn.functional.one_hot(drawn.indices.flatten(1), table.space.max_choices)
    return float(table.expected_share(taken.double().mean(1)))
