"""A decoder whose layers have widths of their own, named by `per_layer_config`. Opens with `trust_remote_code=True`."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
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


class NoMLP(nn.Module):
    """The MLP of a layer that has none: it adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros of the input's shape."""
        return hidden_states.new_zeros(hidden_states.shape)


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
        self.layers = nn.ModuleList(self.build_layer(size, index) for index, size in enumerate(sizes))
        each: Any
        for each in self.layers:
            each.self_attn.config = config  # one place that says how attention is computed
        self.post_init()

    def build_layer(self, size: Any, index: int) -> nn.Module:
        """Build a layer of its own sizes; an `intermediate_size` of 0 means neither MLP nor the norm before it."""
        has_mlp = size.intermediate_size > 0
        size.intermediate_size = max(1, size.intermediate_size)
        layer: Any = self.layer_class(size, index)
        if not has_mlp:
            layer.post_attention_layernorm, layer.mlp, layer.mlp_width = nn.Identity(), NoMLP(), 0
        return layer


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
