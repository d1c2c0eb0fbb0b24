"""Stand-ins for attention and MLPs that a sub-network leaves out, for formats whose layers must have both."""

from __future__ import annotations

from dataclasses import replace

import torch

from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder

NEURONS = 32  # of a stand-in MLP: a block of q8_0, and a size for which kernels of all backends exist


def fill_missing_parts(decoder: Decoder, *, mlp: bool) -> Decoder:
    """Give every block the attention that it lacks, and with `mlp` the MLP, in the smallest size and full of zeros.

    The model computes the same, since a part whose weights are 0 adds nothing to the residual stream.

    Args:
        decoder: a stand-alone sub-network.
        mlp: whether MLPs are filled in as well: `NEURONS` wide. Attention gets one head.

    Returns:
        The decoder itself where nothing is missing; else one that shares its tensors.
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
