"""Small models that tests share."""

from typing import Any

import torch

from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.mlp_width import MLPWidth
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder

AXES = (MLPWidth(fractions=(0.25, 0.5, 1.0), multiple_of=2), AttnHeads(fractions=(0.5, 1.0)))


# What families add to a plain decoder.
BIASED = {"qk_norm": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
UNGATED = {
    "norm": "layer_norm_1p",
    "activation": "relu2",
    "gated_mlp": False,
    "rotary_dim": 4,
    "qkv_bias": True,
    "mlp_bias": True,
}
KINDS = {"plain": {}, "biased": BIASED, "ungated": UNGATED}


def decoder_config(
    *, num_kv_groups: int, num_heads: int = 4, mlp_width: int = 24, tie: bool = True, **features: Any
) -> DecoderConfig:
    block = BlockConfig(num_heads=num_heads, num_kv_groups=num_kv_groups, mlp_width=mlp_width)
    return DecoderConfig(
        vocab_size=50,
        hidden_size=16,
        head_dim=8,
        context_length=32,
        blocks=(block,) * 3,
        tie_embeddings=tie,
        **features,
    )


# By name, for the tests that hold every axis to every decoder.
DECODERS = {
    "mha": decoder_config(num_heads=8, num_kv_groups=8, mlp_width=32),
    "gqa": decoder_config(num_heads=8, num_kv_groups=4, mlp_width=32),
    "biased": decoder_config(num_heads=8, num_kv_groups=4, mlp_width=32, **BIASED),
    "ungated": decoder_config(num_heads=8, num_kv_groups=4, mlp_width=32, **UNGATED),
}


def random_decoder(config: DecoderConfig, *, seed: int = 0) -> Decoder:
    """Large random weights, norms and biases, so that every unit matters."""
    decoder = Decoder(config)
    decoder.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(2)
    return decoder
