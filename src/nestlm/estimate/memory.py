"""Memory that a training stage is expected to take on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nestlm.distributed.device_layout import Layout, Precision
from nestlm.estimate.fake_step import (
    GRADIENTS,
    HELD,
    PART_OF_BACKWARD,
    PARTS,
    REST,
    STATES,
    TEACHER,
    UPDATE,
    WEIGHTS,
    FakeStep,
)
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.settings import Settings

Parts = Mapping[str, float]
GATHERED_BLOCKS = 2  # the one that runs, and what it arrived in
PREFETCHED_BLOCKS = 1  # going back, the next one as well


def predict(stage: str, settings: Settings, *, layout: Layout, precision: Precision) -> Parts:
    """Bytes of each of the `PARTS` on a device when a stage takes most; empty where it trains nothing.

    Its step runs with one block and with two: what a moment of it takes grows by the same with every block more.

    Args:
        stage: that trains.
        settings: of the run.
        layout: of its devices.
        precision: of its trainer.
    """
    rows, num_blocks = settings.data.batch_size // layout.ranks, settings.model.num_layers
    fake_step = FakeStep(stage, settings, rows, precision, on_cuda=layout.on_cuda)
    if layout.shards is None:
        moments = lengthen(fake_step.moments(1), fake_step.moments(2), num_blocks=num_blocks)
    else:
        one, two = (fake_step.moments(blocks, passes=False) for blocks in (1, 2))
        at_rest = lengthen(one, two, num_blocks=num_blocks)
        gathering = FakeStep(stage, settings, rows, precision, on_cuda=layout.on_cuda, gathered=True)
        passes = lengthen(gathering.moments(1), gathering.moments(2), num_blocks=num_blocks)
        moments = shard(at_rest, passes, settings, shards=layout.shards, precision=precision)
    return max(moments.values(), key=lambda parts: sum(parts.values()), default={})


def lengthen(one: Mapping[str, Parts], two: Mapping[str, Parts], *, num_blocks: int) -> dict[str, Parts]:
    """Moments of a model of so many blocks, from those with one, which is its first and its last, and with two."""
    more = num_blocks - 1
    lengthened = {}
    for name, parts in two.items():
        start = one[name if name in one else name.replace("last", "first")]
        lengthened[name] = {part: (1 - more) * start.get(part, 0.0) + more * parts.get(part, 0.0) for part in PARTS}
    return lengthened


def shard(
    at_rest: Mapping[str, Parts], passes: Mapping[str, Parts], settings: Settings, *, shards: int, precision: Precision
) -> dict[str, Parts]:
    """The same moments on a rank that holds one of the shards of what is there at rest (FSDP2).

    Weights are gathered in the dtype of products, blocks in turn, and what lies around them for the whole step.
    Gradients are reduced in float32; those that wait for later terms of the step lie there whole.

    Args:
        at_rest: weights in their own dtype, gradients and states around an update.
        passes: of a model in the dtype of products.
        settings: of the run.
        shards: S.
        precision: of products.
    """
    if not at_rest:
        return {}
    model = Decoder.on_meta(settings.model.decoder_config())
    size = precision.dtype.itemsize
    block = size * count(model.blocks[0])
    around = size * count(model) - block * len(model.blocks)
    own = {part: held / shards for part, held in at_rest[UPDATE].items()}
    widened = torch.float32.itemsize / size / (1 if any(HELD in name for name in passes) else shards)
    goes_back = any(PART_OF_BACKWARD in name for name in passes)
    gathered = GATHERED_BLOCKS + goes_back * PREFETCHED_BLOCKS if shards > 1 else 0
    moments: dict[str, Parts] = {UPDATE: own}
    for name, parts in passes.items():
        if name != UPDATE:
            moments[name] = {
                WEIGHTS: own[WEIGHTS] + around + gathered * block,
                GRADIENTS: parts[GRADIENTS] * widened,
                STATES: own[STATES],
                TEACHER: own[TEACHER] + (around if parts[TEACHER] else 0.0),
                REST: parts[REST],
            }
    return moments


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
