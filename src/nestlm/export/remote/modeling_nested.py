"""A decoder whose layers have widths of their own, named by `per_layer_config`. Opens with `trust_remote_code=True`."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)


@strict
class NestedLlamaConfig(LlamaConfig):
    """The family's config; `per_layer_config` says in which sizes layers differ from it."""

    model_type = "nested_llama"

    def validate_architecture(self) -> None:
        """Heads have a width of their own, `head_dim`: their number need not divide that of the hidden state."""


class NestedLlamaModel(LlamaModel):
    """The family's decoder with layers built from their own sizes."""

    config_class = NestedLlamaConfig
    layer_class: type[nn.Module] = LlamaDecoderLayer

    def __init__(self, config: NestedLlamaConfig) -> None:
        sizes = [copy.copy(layer) for layer in config.per_layer_config]
        outer: Any = copy.copy(sizes[0])
        outer.num_hidden_layers = 0  # the family would build its layers in one size
        super().__init__(outer)
        config._attn_implementation = outer._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(self.layer_class(size, index) for index, size in enumerate(sizes))
        each: Any
        for each in self.layers:
            each.self_attn.config = config  # one place that says how attention is computed
        self.post_init()


class NestedLlamaForCausalLM(LlamaForCausalLM):
    """With a head for the next token."""

    config_class = NestedLlamaConfig
    model_class = NestedLlamaModel

    def __init__(self, config: NestedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
