"""Measure claim 1: the decoder, forward and backward, compared with transformers' and litgpt's on the same weights.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dense_decoder.py

litgpt takes part where `benchmarks/peers/litgpt.sh` has put it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bench import Row, main
from nestlm.nn.decoder import Decoder
from shapes import Shape, forward_backward
from turns import Way, flops, ratio, take_turns

PEERS = Path(__file__).with_name("peers") / "packages"


def cross_entropy(logits_BLV: Tensor, shape: Shape) -> Tensor:
    """Return the loss that all libraries are timed with."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), shape.batch.targets_BL.flatten())


def as_llama(decoder: Decoder, shape: Shape) -> nn.Module:
    """Return the decoder as a transformers model with PyTorch's attention."""
    config, block = shape.config, shape.config.blocks[0]
    made = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=block.mlp_width,
        num_hidden_layers=len(config.blocks), num_attention_heads=block.num_heads,
        num_key_value_heads=block.num_kv_groups, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.context_length, attn_implementation="sdpa", use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(made).to(shape.device, shape.dtype)
    names = {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": decoder.embed.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = head_of(decoder)
    for layer, block_module in enumerate(decoder.blocks):
        for mine, theirs in names.items():
            state[f"model.layers.{layer}.{theirs}.weight"] = block_module.get_submodule(mine).weight
    model.load_state_dict(state)
    return model


def as_litgpt(decoder: Decoder, shape: Shape) -> nn.Module:
    """Return the decoder as a litgpt model."""
    import litgpt
    from litgpt.model import GPT

    made = litgpt.Config(**shape.litgpt_sizes())
    model = GPT(made).to(shape.device, shape.dtype)
    state = {"transformer.wte.weight": decoder.embed.weight, "transformer.ln_f.weight": decoder.norm.weight}
    state["lm_head.weight"] = head_of(decoder)
    names = {
        "norm_1": "attn_norm", "norm_2": "mlp_norm", "attn.proj": "attn.o", "mlp.fc_1": "mlp.gate",
        "mlp.fc_2": "mlp.up", "mlp.proj": "mlp.down",
    }  # fmt: skip
    for layer, block_module in enumerate(decoder.blocks):
        for theirs, mine in names.items():
            state[f"transformer.h.{layer}.{theirs}.weight"] = block_module.get_submodule(mine).weight
        attn = block_module.attn
        state[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat((attn.q.weight, attn.k.weight, attn.v.weight))
    model.load_state_dict(state, strict=False)
    return model


def head_of(decoder: Decoder) -> Tensor:
    """Return the weights of an output head that is not tied to the embedding."""
    assert decoder.head is not None, "heads are not tied here"
    return decoder.head.weight


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield a row for each library."""
    decoder, tokens_BL = shape.decoder(), shape.batch.tokens_BL
    models = {"transformers": as_llama(decoder, shape)}
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
        models["litgpt"] = as_litgpt(decoder, shape)
    outputs = {
        "nestlm": lambda: decoder(tokens_BL).logits_BLV,
        **{name: (lambda model=model: logits(model(tokens_BL))) for name, model in models.items()},
    }
    with torch.no_grad():
        wanted = outputs["nestlm"]()
        for output in outputs.values():
            torch.testing.assert_close(output(), wanted, rtol=1e-2, atol=1e-3 if shape.dtype == torch.float32 else 0.1)
    models["nestlm"] = decoder
    ways: dict[str, Way] = {
        name: forward_backward(models[name], lambda output=output: cross_entropy(output(), shape))
        for name, output in outputs.items()
    }
    seconds, work = take_turns(ways, repeats=repeats), flops(ways["nestlm"])
    for name in outputs:
        if name != "nestlm":
            same = flops(ways[name]) / work
            yield Row(
                f"1. our decoder, forward and backward, over {name}'s", shape.name,
                ratio(seconds["nestlm"], seconds[name]), 1.0, f"{same:.2f} times our FLOPs",
            )  # fmt: skip


def logits(output: object) -> Tensor:
    """Return the logits of either library's output."""
    return output if isinstance(output, Tensor) else output.logits


if __name__ == "__main__":
    main(rows)
