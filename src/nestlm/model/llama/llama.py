"""The Llama family: sizes, and the map of its Hugging Face weight names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nestlm.errors import CheckpointError
from nestlm.model.family import Family
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder

# our module: theirs
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OUTER_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Llama(Family):
    """A decoder of RMSNorm, rotary positions, grouped-query attention and a gated MLP."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    mlp_width: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool

    def decoder_config(self) -> DecoderConfig:
        block = BlockConfig(self.num_heads, self.num_kv_groups, self.mlp_width)
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            context_length=self.context_length,
            blocks=(block,) * max(0, self.num_layers),
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            tie_embeddings=self.tie_embeddings,
        )

    def check_config(self, config: dict[str, Any]) -> None:
        for name, known in (("model_type", "llama"), ("hidden_act", "silu")):
            if config.get(name, known) != known:
                raise CheckpointError(f"model.weights: {name} is {config[name]!r} in config.json, wanted {known!r}")
        longest = config.get("max_position_embeddings", self.context_length)
        if longest < self.context_length:
            raise CheckpointError(
                f"model.context_length: got {self.context_length}, wanted at most the checkpoint's {longest}"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise CheckpointError(f"model.weights: scales rotary positions ({rope}), which is not supported")
        theirs = {
            "vocab_size": config.get("vocab_size"),
            "hidden_size": config.get("hidden_size"),
            "num_layers": config.get("num_hidden_layers"),
            "num_heads": config.get("num_attention_heads"),
            "num_kv_groups": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "mlp_width": config.get("intermediate_size"),
            "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
            "norm_eps": config.get("rms_norm_eps"),
            "tie_embeddings": config.get("tie_word_embeddings"),
        }
        for name, value in theirs.items():
            ours = getattr(self, name)
            if value is not None and value != ours:
                raise CheckpointError(
                    f"model.{name}: config.json of model.weights says {value}, the chosen size says {ours}"
                )

    def load_weights(self, decoder: Decoder) -> None:
        assert self.weights is not None, "there is nothing to load"
        folder = Path(self.weights)
        ours_of = hf_names(decoder)
        shards = shard_files(folder)
        if not shards:
            raise CheckpointError(f"model.weights: {folder} holds no model.safetensors and no index of several")
        parameters = dict(decoder.named_parameters())
        missing = set(ours_of)
        for shard in shards:
            try:
                with safe_open(shard, framework="pt") as tensors:
                    for theirs in tensors.keys():  # noqa: SIM118 (not a dict)
                        if theirs not in ours_of:
                            if theirs == "lm_head.weight" and self.tie_embeddings:
                                continue
                            raise CheckpointError(f"model.weights: {shard.name} has {theirs}, which this family lacks")
                        fill(parameters[ours_of[theirs]], tensors.get_tensor(theirs), name=theirs)
                        missing.discard(theirs)
            except (SafetensorError, FileNotFoundError) as error:
                raise CheckpointError(
                    f"model.weights: {shard} is absent or damaged ({error}); fetch it again"
                ) from error
        if missing:
            raise CheckpointError(f"model.weights: {folder} lacks {sorted(missing)[0]} and {len(missing) - 1} more")


def shard_files(folder: Path) -> list[Path]:
    """The files that the checkpoint's index names, or its one file; other files of the folder are not ours to read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("model.safetensors"))


def hf_names(decoder: Decoder) -> dict[str, str]:
    """Hugging Face name of every parameter: theirs to ours."""
    names = {}
    for ours in dict(decoder.named_parameters()):
        if ours.startswith("blocks."):
            _, layer, module = ours.removesuffix(".weight").split(".", 2)
            names[f"model.layers.{layer}.{BLOCK_NAMES[module]}.weight"] = ours
        else:
            names[f"{OUTER_NAMES[ours.removesuffix('.weight')]}.weight"] = ours
    return names


@torch.no_grad()
def fill(parameter: torch.Tensor, value: torch.Tensor, *, name: str) -> None:
    """Copy a tensor in. Raises CheckpointError when shapes differ."""
    if parameter.shape != value.shape:
        raise CheckpointError(f"model.weights: {name} has shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}")
    parameter.copy_(value)
