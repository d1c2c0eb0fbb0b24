"""The Qwen3 family: Llama with normalised queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from nestlm.model.config_json import read_size
from nestlm.model.llama import Llama
from nestlm.model.qwen2 import read_sliding_window


@dataclass(frozen=True, kw_only=True)
class Qwen3(Llama):
    """Llama's decoder with a norm of queries and one of keys over the entries of a head."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    knows_windows: ClassVar[bool] = True
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    @override
    def sliding_window(cls, config: Mapping[str, Any]) -> int | None:
        return read_sliding_window(config)

    @classmethod
    @override
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("num_key_value_heads", "head_dim"):  # required: transformers' defaults are 32 and 128
            read_size(config, name)
        return super().parse_own_keys(config) | {"qk_norm": True, "mlp_bias": False}

    @override
    def make_own_keys(self) -> dict[str, Any]:
        return {"attention_bias": self.qkv_bias, "use_sliding_window": False}
