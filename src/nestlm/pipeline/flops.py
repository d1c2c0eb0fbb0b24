"""FLOPs of sub-networks in the rows of a training stage, and of what samplers draw."""

from __future__ import annotations

import torch

from nestlm.cost.static import Flops
from nestlm.cost.table import CostTable
from nestlm.data.datamodule import DataSettings
from nestlm.elastic.sampler.base import MixedSpecs, Sample, Sampler
from nestlm.pipeline.settings import SpaceSettings
from nestlm.train.objective.distillation import DistillationLoss

SAMPLED_STEPS = 64  # steps of a sampler over which costs are averaged
BACKWARD = 3.0  # forward passes that a forward and backward pass costs


def flops_table(settings: SpaceSettings, sequence_length: int, *, per_token: bool) -> CostTable:
    """Price the choices of a search space in FLOPs, in rows of `sequence_length` tokens.

    Args:
        settings: say the model and its axes.
        sequence_length: tokens a row.
        per_token: whether each token makes a choice of its own.
    """
    config = settings.model.decoder_config()
    return Flops(sequence_length).tabulate(
        settings.space(), axes=settings.axis_list, config=config, per_token=per_token
    )


def mean_share(settings: SpaceSettings, sequence_length: int) -> float:
    """Return the mean share of the full model's FLOPs that a routed sub-network takes, when budgets are drawn evenly.

    They are drawn between the share of the smallest sub-network and 1.
    """
    flops = flops_table(settings, sequence_length, per_token=False)
    return (1.0 + flops.share(flops.space.smallest())) / 2


def sampled_passes(
    settings: SpaceSettings, sampler: Sampler, distillation: DistillationLoss, *, data: DataSettings, seed: int
) -> float:
    """Return the forward passes of the full model that a token of elastic training costs, a mean over steps.

    Args:
        settings: say the model and its axes.
        sampler: draws the sub-networks of a step.
        distillation: knows the passes of the teacher.
        data: knows the shape of a batch.
        seed: seed of the draws.
    """
    flops, of_tokens = (flops_table(settings, data.sequence_length, per_token=flag) for flag in (False, True))
    passes = 0.0
    for step in range(SAMPLED_STEPS):
        drawn = sampler.draw(flops.space, seed=seed, step=step, batch=(data.batch_size, data.sequence_length))
        runs_full = any(not isinstance(item, MixedSpecs) and item == flops.space.full() for item in drawn)
        passes += BACKWARD * sum(sample_share(item, flops, of_tokens=of_tokens) for item in drawn)
        passes += distillation.extra_passes(runs_full=runs_full)
    return passes / SAMPLED_STEPS


def sample_share(sample: Sample, table: CostTable, *, of_tokens: CostTable) -> float:
    """Return the cost of a sample as a share of the whole model's; of mixed specs the mean over sequences or tokens.

    Args:
        sample: a sub-network, or mixed specs.
        table: prices of choices that a whole row makes.
        of_tokens: prices of choices that each token makes: K and V run whole.
    """
    if not isinstance(sample, MixedSpecs):
        return table.share(sample)
    table = of_tokens if sample.indices.ndim == 3 else table
    taken = torch.nn.functional.one_hot(sample.indices.flatten(1), table.space.max_choices)
    return float(table.expected_share(taken.double().mean(1)))
