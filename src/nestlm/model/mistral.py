"""The Mistral family: Llama without biases, for rows no longer than its sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from nestlm.model.config_json import read_size
from nestlm.model.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
    """Llama's decoder without biases, with Llama's names of weights."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"
    knows_windows: ClassVar[bool] = True
    heads_divide_hidden_size: ClassVar[bool] = False

    @classmethod
    @override
    def sliding_window(cls, config: Mapping[str, Any]) -> int | None:
        if "sliding_window" in config and config["sliding_window"] is None:
            return None
        return read_size(config, "sliding_window", default=4096)  # transformers' default; only null switches it off

    @classmethod
    @override
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        read_size(config, "num_key_value_heads")  # required: transformers' default is 8 instead of the number of heads
        return super().parse_own_keys({})

    @override
    def make_own_keys(self) -> dict[str, Any]:
        return {"sliding_window": None}
