"""The Llama family, and what its relatives share with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nestlm.model.config_json import check_value, read_flag
from nestlm.model.family import Family
from nestlm.model.rope_config import PARTIAL, read_rotary_share


@dataclass(frozen=True, kw_only=True)
class Llama(Family):
    """A decoder of RMSNorm, rotary positions, grouped-query attention and an MLP gated by SiLU.

    Attributes:
        qk_norm: whether queries and keys are normalised over a head's entries.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        output_bias: whether attention's projection back does.
        mlp_bias: whether the MLP's projections do.
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
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        check_value({PARTIAL: read_rotary_share(config, 1.0)}, PARTIAL, 1.0)
        attention_bias = read_flag(config, "attention_bias")
        return {
            "qk_norm": False,
            "qkv_bias": attention_bias,
            "output_bias": attention_bias,
            "mlp_bias": read_flag(config, "mlp_bias"),
        }

    def make_own_keys(self) -> dict[str, Any]:
        return {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}

    def features(self) -> dict[str, Any]:
        names = ("qk_norm", "qkv_bias", "output_bias", "mlp_bias")
        return {name: getattr(self, name) for name in names}
