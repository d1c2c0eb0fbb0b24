"""Small models that tests share."""

import torch

from nestlm.axes.attn_heads import AttnHeads
from nestlm.axes.mlp_width import MLPWidth
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder

AXES = (MLPWidth(fractions=(0.25, 0.5, 1.0), multiple_of=2), AttnHeads(fractions=(0.5, 1.0)))


def decoder_config(*, num_kv_groups: int, num_heads: int = 4, mlp_width: int = 24, tie: bool = True) -> DecoderConfig:
    block = BlockConfig(num_heads=num_heads, num_kv_groups=num_kv_groups, mlp_width=mlp_width)
    return DecoderConfig(
        vocab_size=50, hidden_size=16, head_dim=8, context_length=32, blocks=(block,) * 3, tie_embeddings=tie
    )


def random_decoder(config: DecoderConfig, *, seed: int = 0) -> Decoder:
    """Large random weights and norms, so that every unit matters."""
    decoder = Decoder(config)
    decoder.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(2)
    return decoder
