"""The Qwen3 family: Llama with queries and keys that are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nestlm.model.config_json import read_size
from nestlm.model.llama import Llama
from nestlm.model.qwen2 import switched_window


@dataclass(frozen=True, kw_only=True)
class Qwen3(Llama):
    """Llama's decoder and Llama's names, and two norms over a head's entries a block."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    knows_windows: ClassVar[bool] = True
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    def window(cls, config: Mapping[str, Any]) -> int | None:
        return switched_window(config)

    @classmethod
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("num_key_value_heads", "head_dim"):  # absent, they would mean 32 and 128 here
            read_size(config, name)
        return super().parse_own_keys(config) | {"qk_norm": True, "mlp_bias": False}

    def make_own_keys(self) -> dict[str, Any]:
        return {"attention_bias": self.qkv_bias, "use_sliding_window": False}
