"""The Mistral family: Llama without biases, in rows that do not reach its sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nestlm.model.family import needed
from nestlm.model.llama.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
    """Llama's decoder and Llama's names."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    def read_own(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        needed(config, "num_key_value_heads")  # absent, it would mean 8 here
        return super().read_own({})

    def write_own(self) -> dict[str, Any]:
        return {"sliding_window": None}
