"""The Nemotron family of NVIDIA, in the style of GPT-3 (Nemotron-3 8B, Nemotron-4, Minitron)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from nestlm.model.config_json import read_flag
from nestlm.model.family import Family
from nestlm.model.rope_config import PARTIAL, read_rotary_share, write_rotary


@dataclass(frozen=True, kw_only=True)
class Nemotron(Family):
    """A decoder with LayerNorm1p, rotary embeddings on a part of each head, and an MLP of squared ReLU without a gate.

    Attributes:
        rotary_share: share of a head's entries to which rotary embeddings apply.
        attention_bias: whether the projections of attention add a bias.
        mlp_bias: whether the projections of the MLP add a bias.
    """

    model_type: ClassVar[str] = "nemotron"
    architecture: ClassVar[str] = "NemotronForCausalLM"
    activation: ClassVar[Literal["silu", "relu2"]] = "relu2"
    norm_eps_key: ClassVar[str] = "norm_eps"
    default_norm_eps: ClassVar[float] = 1e-5

    rotary_share: float
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    @override
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "rotary_share": read_rotary_share(config, 0.5),
            "attention_bias": read_flag(config, "attention_bias"),
            "mlp_bias": read_flag(config, "mlp_bias"),
        }

    @override
    def make_own_keys(self) -> dict[str, Any]:
        return {
            "rope_parameters": write_rotary(self.rope_theta, self.rope_scaling) | {PARTIAL: self.rotary_share},
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }

    @override
    def decoder_features(self) -> dict[str, Any]:
        return {
            "rotary_dim": int(self.head_dim * self.rotary_share),
            "norm": "layer_norm_1p",
            "qkv_bias": self.attention_bias,
            "output_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "gated_mlp": False,
        }
