"""The Llama family, the base of the families that transformers derives from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from nestlm.model.config_json import check_supported_value, read_flag
from nestlm.model.family import Family
from nestlm.model.rope_config import PARTIAL, read_rotary_share


@dataclass(frozen=True, kw_only=True)
class Llama(Family):
    """A decoder with RMSNorm, rotary embeddings, grouped-query attention and a SwiGLU MLP.

    Attributes:
        qk_norm: whether queries and keys are normalised over the entries of a head.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        output_bias: whether the output projection of attention adds a bias.
        mlp_bias: whether the projections of the MLP add a bias.
    """

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    activation: ClassVar[Literal["silu", "relu2"]] = "silu"
    norm_eps_key: ClassVar[str] = "rms_norm_eps"
    default_norm_eps: ClassVar[float] = 1e-6
    heads_divide_hidden_size: ClassVar[bool] = True

    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @classmethod
    @override
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        check_supported_value({PARTIAL: read_rotary_share(config, 1.0)}, PARTIAL, 1.0)
        attention_bias = read_flag(config, "attention_bias")
        return {
            "qk_norm": False,
            "qkv_bias": attention_bias,
            "output_bias": attention_bias,
            "mlp_bias": read_flag(config, "mlp_bias"),
        }

    @override
    def make_own_keys(self) -> dict[str, Any]:
        return {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}

    @override
    def decoder_features(self) -> dict[str, Any]:
        names = ("qk_norm", "qkv_bias", "output_bias", "mlp_bias")
        return {name: getattr(self, name) for name in names}
