"""The Qwen2 and Qwen2.5 families: Llama with biases in the projections to queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from nestlm.model.config_json import read_flag, read_size
from nestlm.model.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """Llama's decoder with biases in the projections to queries, keys and values."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    knows_windows: ClassVar[bool] = True
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    @override
    def sliding_window(cls, config: Mapping[str, Any]) -> int | None:
        return read_sliding_window(config)

    @classmethod
    @override
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        read_size(config, "num_key_value_heads")  # required: transformers' default is 32 instead of the number of heads
        return super().parse_own_keys({}) | {"qkv_bias": True}

    @override
    def make_own_keys(self) -> dict[str, Any]:
        return {"use_sliding_window": False}


def read_sliding_window(config: Mapping[str, Any]) -> int | None:
    """Read the size of the sliding window of a Qwen config.json, with transformers' defaults; None without a window."""
    if not read_flag(config, "use_sliding_window") or ("sliding_window" in config and config["sliding_window"] is None):
        return None
    kinds = config.get("layer_types")
    if kinds is not None:
        used = "sliding_attention" in kinds
    else:
        used = read_size(config, "num_hidden_layers") > (config.get("max_window_layers", 28) or 0)
    return read_size(config, "sliding_window", default=4096) if used else None
