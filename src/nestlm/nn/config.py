"""Sizes of a decoder, by block: a stand-alone sub-network is a decoder whose blocks differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from nestlm.errors import ConfigError
from nestlm.nn.rope import RopeScaling, rotary_table


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of one block: H query heads, G KV groups, F neurons.

    A block of 0 heads has no attention, one of 0 neurons has no MLP; the norm before the missing part is missing, too.
    """

    num_heads: int
    num_kv_groups: int
    mlp_width: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one K and V."""
        return self.num_heads // self.num_kv_groups

    @property
    def is_empty(self) -> bool:
        """Whether the block has neither attention nor MLP, so that it returns its input."""
        return self.num_heads == 0 and self.mlp_width == 0


NO_BLOCK = BlockConfig(num_heads=0, num_kv_groups=0, mlp_width=0)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder (V, D, E, the longest context L, its blocks), and what its layers compute.

    Attributes:
        rotary_dim: entries of a head that rotary positions turn; None: all E.
        rope_scaling: how the frequencies of rotary positions are stretched; None: not at all.
        norm: of the residual stream: `rms`, or `layer_norm_1p`, whose stored weight is the factor less 1.
        qk_norm: whether queries and keys are normalised over E before they are turned.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        output_bias: whether attention's projection back does.
        mlp_bias: whether the MLP's projections do.
        activation: of the MLP; `relu2` is the squared ReLU.
        gated_mlp: whether a second projection, the one that is activated, multiplies the first.
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    context_length: int
    blocks: tuple[BlockConfig, ...]
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    norm: Literal["rms", "layer_norm_1p"] = "rms"
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "relu2"] = "silu"
    gated_mlp: bool = True

    def rotary_table(self, positions_L: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, (L, E) each; in float32 unless weights are wider."""
        return rotary_table(
            positions_L,
            dim=self.rotary_dim or self.head_dim,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "context_length": self.context_length,
            "num_layers": len(self.blocks),
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ConfigError(f"model.{name}: got {size}, wanted a positive size")
        for block in self.blocks:
            for name, size in asdict(block).items():
                if size < 0:
                    raise ConfigError(f"model.{name}: got {size}, wanted a size of 0 or more")
            if block.num_heads % block.num_kv_groups if block.num_kv_groups else block.num_heads:
                raise ConfigError(
                    f"model.num_kv_groups: got {block.num_kv_groups}, wanted a divisor of num_heads={block.num_heads}"
                )
        for name, value in (("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps)):
            if value <= 0:
                raise ConfigError(f"model.{name}: got {value}, wanted a positive number")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim: got {self.head_dim}, wanted an even size (rotary embedding)")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ConfigError(
                f"model.rotary_dim: got {self.rotary_dim}, wanted an even size up to head_dim={self.head_dim}"
            )
