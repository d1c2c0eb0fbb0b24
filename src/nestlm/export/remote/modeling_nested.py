"""A decoder whose layers differ in width, as `per_layer_config` says. Load it with `trust_remote_code=True`."""

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
    """The family's config, with `per_layer_config` for sizes of layers that differ from the family's."""

    model_type = "nested_llama"

    def validate_architecture(self) -> None:
        """Skip the family's check that the number of heads divides the hidden size: `head_dim` is set on its own."""


class NoMLP(nn.Module):
    """Stand-in for the MLP of a layer that has none. It adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros of the input's shape."""
        return hidden_states.new_zeros(hidden_states.shape)


class NestedLlamaModel(LlamaModel):
    """The family's decoder, with each layer built from its own sizes."""

    config_class = NestedLlamaConfig
    layer_class: type[nn.Module] = LlamaDecoderLayer

    def __init__(self, config: NestedLlamaConfig) -> None:
        sizes = [copy.copy(layer) for layer in config.per_layer_config]
        outer: Any = copy.copy(sizes[0])
        outer.num_hidden_layers = 0  # else the family's constructor would build layers of one size
        super().__init__(outer)
        config._attn_implementation = outer._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(self.build_layer(size, index) for index, size in enumerate(sizes))
        each: Any
        for each in self.layers:
            each.self_attn.config = config  # all layers read the choice of an attention implementation here
        self.post_init()

    def build_layer(self, size: Any, index: int) -> nn.Module:
        """Build layer `index` with the sizes in `size`. An `intermediate_size` of 0: no MLP, and no norm before it."""
        has_mlp = size.intermediate_size > 0
        size.intermediate_size = max(1, size.intermediate_size)
        layer: Any = self.layer_class(size, index)
        if not has_mlp:
            layer.post_attention_layernorm, layer.mlp, layer.mlp_width = nn.Identity(), NoMLP(), 0
        return layer


class NestedLlamaForCausalLM(LlamaForCausalLM):
    """`NestedLlamaModel` with a language modelling head."""

    config_class = NestedLlamaConfig
    model_class = NestedLlamaModel

    def __init__(self, config: NestedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
