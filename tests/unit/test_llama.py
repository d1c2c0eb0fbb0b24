"""Our decoder against the reference library's, on tiny random weights."""

import json

import pytest
import torch

from nestlm.errors import CheckpointError
from nestlm.model.llama.llama import Llama
from nestlm.nn.decoder import Decoder

transformers = pytest.importorskip("transformers")


def reference(groups: int, *, tie: bool = True, theta: float = 10_000.0):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": theta, "rope_type": "default"}, tie_word_embeddings=tie,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ours(folder, groups: int, *, tie: bool = True, theta: float = 10_000.0, **changes) -> Llama:
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_groups": groups, "head_dim": 8,
        "mlp_width": 56, "context_length": 64, "rope_theta": theta, "norm_eps": 1e-5, "tie_embeddings": tie,
    }  # fmt: skip
    return Llama(weights=str(folder), init=None, pretraining_tokens=None, **(sizes | changes))


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"], ids=["one-file", "sharded"])
def test_logits_equal_transformers(tmp_path, groups, tie, shard):
    theirs = reference(groups, tie=tie, theta=50_000.0)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = ours(tmp_path, groups, tie=tie, theta=50_000.0)
    decoder = Decoder(model.decoder_config())
    model.load_weights(decoder)
    tokens_BL = torch.randint(0, 96, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = decoder(tokens_BL).logits_BLV - theirs(tokens_BL).logits
    assert difference.abs().max() < 1e-5
    assert theirs(tokens_BL).logits.std() > 0.1, "the comparison means something"


def test_gradients_equal_transformers(tmp_path):
    theirs = reference(2)
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path, 2)
    decoder = Decoder(model.decoder_config())
    model.load_weights(decoder)
    tokens_BL = torch.randint(0, 96, (3, 64), generator=torch.Generator().manual_seed(0))
    decoder(tokens_BL).logits_BLV.square().mean().backward()
    theirs(tokens_BL).logits.square().mean().backward()
    block, layer = decoder.blocks[1], theirs.model.layers[1]
    pairs = [
        (block.attn.k, layer.self_attn.k_proj),
        (block.mlp.gate, layer.mlp.gate_proj),
        (block.attn_norm, layer.input_layernorm),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    theirs = reference(2)
    theirs.save_pretrained(tmp_path)
    decoder = Decoder(ours(tmp_path, 2).decoder_config())

    def load(**changes):
        model = ours(tmp_path, 2, **changes)
        model.check_weights(dry_run=False)
        model.load_weights(Decoder(model.decoder_config()))

    with pytest.raises(CheckpointError, match=r"model\.mlp_width: config\.json .* says 56.* says 64"):
        load(mlp_width=64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}})
    )
    with pytest.raises(CheckpointError, match="rotary"):
        load()
    for name, value in (("model_type", "gemma"), ("hidden_act", "gelu"), ("max_position_embeddings", 32)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=f"{value}"):
            load()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 96}))
    with pytest.raises(CheckpointError, match=r"has shape .*56.*, wanted .*64"):
        load(mlp_width=64)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3"):
        load(num_layers=4)
    with pytest.raises(CheckpointError, match="which this family lacks"):
        load(num_layers=2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        load()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 96}))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load()
    assert decoder.config.vocab_size == 96
