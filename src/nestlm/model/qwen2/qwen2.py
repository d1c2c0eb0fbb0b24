"""The Qwen2 and Qwen2.5 families: Llama with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nestlm.model.family import needed
from nestlm.model.llama.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """Llama's decoder and Llama's names, and three biases a block."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    def read_own(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        needed(config, "num_key_value_heads")  # absent, it would mean 32 here
        return super().read_own({}) | {"qkv_bias": True}

    def write_own(self) -> dict[str, Any]:
        return {"use_sliding_window": False}
