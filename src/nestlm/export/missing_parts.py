"""Add attention and MLPs of zeros to blocks without them, for formats in which each layer must have both."""

from __future__ import annotations

from dataclasses import replace

import torch

from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder

NEURONS = 32  # width of an added MLP: one block of q8_0, and a size that kernels of all backends support


def fill_missing_parts(decoder: Decoder, *, mlp: bool) -> Decoder:
    """Add attention to every block without it, and with `mlp` also an MLP, in the smallest size and with weights of 0.

    The model computes the same, since a part whose weights are 0 adds nothing to the residual stream.

    Args:
        decoder: a stand-alone sub-network.
        mlp: also add missing MLPs, `NEURONS` wide. Added attention has one head.

    Returns:
        The decoder itself if nothing is missing; else a new decoder that shares its tensors.
    """

    def filled(block: BlockConfig) -> BlockConfig:
        if block.num_heads == 0:
            block = replace(block, num_heads=1, num_kv_groups=1)
        return replace(block, mlp_width=NEURONS) if mlp and block.mlp_width == 0 else block

    blocks = tuple(filled(block) for block in decoder.config.blocks)
    if blocks == decoder.config.blocks:
        return decoder
    whole, state = Decoder.on_meta(replace(decoder.config, blocks=blocks)), decoder.state_dict()
    dtype, device = decoder.embed.weight.dtype, decoder.embed.weight.device
    zeros = {
        name: torch.zeros(weight.shape, dtype=dtype, device=device)
        for name, weight in whole.state_dict().items()
        if name not in state
    }
    whole.load_state_dict(state | zeros, assign=True)
    return whole.train(decoder.training)
