"""Predict the peak memory of a device while a stage trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nestlm.distributed.device_layout import ComputePrecision, DeviceLayout
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
from nestlm.nn.config import DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.stages.training import TrainingStage

Parts = Mapping[str, float]
GATHERED_BLOCKS = 2  # the block that runs, and the buffer that it was gathered into
PREFETCHED_BLOCKS = 1  # in backward passes, the next block as well


def predict(
    stage: TrainingStage[Any], *, activation_checkpointing: bool, layout: DeviceLayout, precision: ComputePrecision
) -> Parts:
    """Predict the peak memory of a device while a stage trains.

    The step of the stage is tracked with one block and with two: every further block adds the same to each moment.

    Args:
        stage: the stage that trains.
        activation_checkpointing: whether backward passes recompute the blocks.
        layout: layout of the stage's devices.
        precision: precision of its trainer.

    Returns:
        Bytes of each of the `PARTS`; empty where the stage trains nothing.
    """
    rows, num_blocks = stage.data.batch_size // layout.ranks, stage.model.num_layers
    fake_step = FakeStep(stage, rows, precision, activation_checkpointing, on_cuda=layout.on_cuda)
    if layout.shards is None:
        moments = lengthen(fake_step.moments(1), fake_step.moments(2), num_blocks=num_blocks)
    else:
        one, two = (fake_step.moments(blocks, passes=False) for blocks in (1, 2))
        at_rest = lengthen(one, two, num_blocks=num_blocks)
        gathering = replace(fake_step, gathered=True)
        passes = lengthen(gathering.moments(1), gathering.moments(2), num_blocks=num_blocks)
        moments = shard(at_rest, passes, stage.model.decoder_config(), shards=layout.shards, precision=precision)
    return max(moments.values(), key=lambda parts: sum(parts.values()), default={})


def lengthen(one: Mapping[str, Parts], two: Mapping[str, Parts], *, num_blocks: int) -> dict[str, Parts]:
    """Extrapolate moments to a model of `num_blocks` blocks.

    Args:
        one: moments of a model whose only block is its first and its last.
        two: moments of a model of two blocks.
        num_blocks: blocks of the model.
    """
    more = num_blocks - 1
    lengthened = {}
    for name, parts in two.items():
        start = one[name if name in one else name.replace("last", "first")]
        lengthened[name] = {part: (1 - more) * start.get(part, 0.0) + more * parts.get(part, 0.0) for part in PARTS}
    return lengthened


def shard(
    at_rest: Mapping[str, Parts],
    passes: Mapping[str, Parts],
    config: DecoderConfig,
    *,
    shards: int,
    precision: ComputePrecision,
) -> dict[str, Parts]:
    """Convert moments to those of a rank that holds one of several shards of weights, gradients and states (FSDP2).

    Weights are gathered in the dtype of products: blocks in turn, and all other weights for the whole step. Gradients
    are reduced in float32; those that wait for later terms of the step are held whole.

    Args:
        at_rest: moments of an update, with weights in their own dtype.
        passes: moments of a model in the dtype of products.
        config: sizes of the model.
        shards: number of shards, S.
        precision: precision of products.
    """
    if not at_rest:
        return {}
    model = Decoder.on_meta(config)
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
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
