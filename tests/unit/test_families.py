"""Every family against transformers on tiny random weights, and errors for unsupported or damaged checkpoints."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import parity
from nestlm.config.compose import build, compose, with_sizes
from nestlm.config.groups import CONF
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.surgery import extract
from nestlm.errors import CheckpointError, ConfigError, ExportError
from nestlm.export.hf_folder import export_hf
from nestlm.model import hub
from nestlm.model.checkpoint import CHECKSUMS, check_sha256sums
from nestlm.model.pretrained import family_from_checkpoint, find_families
from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a tiny Llama checkpoint."""
    path = tmp_path / "weights"
    parity.checkpoint("Llama 3", path)
    return path


def load(folder, **changes):
    return family_from_checkpoint(
        weights=str(folder), **({"context_length": None, "pretraining_tokens": None} | changes)
    )


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_equal_transformers_and_the_round_trip_is_bit_equal(case, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    parity.checkpoint(case, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    family, decoder = parity.imported(folder)
    family.check_weights(dry_run=False)
    difference, spread = parity.largest_difference(decoder, parity.opened(folder))
    assert difference < 1e-5
    assert spread > 0.1, "the comparison means something"
    export_hf(decoder, family, out, shard_size="30KB")
    assert parity.differing(folder, out) == []
    assert (out / "tokenizer.json").is_file()
    assert (out / "generation_config.json").is_file()
    assert parity.largest_difference(decoder, parity.opened(out))[0] < 1e-5


def test_every_family_is_compared():
    assert {kind.model_type for kind, _ in parity.CASES.values()} == set(find_families())


@pytest.mark.parametrize("case", ["Qwen3, biases", "GPT-3 (Nemotron), biases", "Llama 3.1 (scaled positions)"])
def test_gradients_equal_transformers(case, tmp_path):
    parity.checkpoint(case, tmp_path)
    family, decoder = parity.imported(tmp_path)
    theirs = parity.opened(tmp_path)
    tokens_BL = torch.randint(0, parity.VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(0))
    decoder(tokens_BL).logits_BLV.square().mean().backward()
    theirs(tokens_BL).logits.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = dict(decoder.named_parameters())
    for name, own in family.hf_names(decoder).items():
        torch.testing.assert_close(ours[own].grad, grads[name], rtol=1e-3, atol=1e-5)


def test_a_random_start_is_that_of_each_family():
    """Norms start at factor 1 and biases at 0; no parameter keeps uninitialised memory."""
    for name in ("tiny", "gpt3_2b"):
        changes = ["hidden_size=32", "num_layers=2", "num_heads=4", "num_kv_groups=4", "head_dim=8", "mlp_width=48"]
        model = build(compose([f"model={name}", *(f"model.{change}" for change in changes)])).model
        decoder = Decoder(model.decoder_config())
        for parameter in decoder.parameters():
            parameter.data.fill_(torch.nan)
        decoder.init_weights(seed=0)
        assert all(torch.isfinite(parameter).all() for parameter in decoder.parameters())
        hidden = torch.randn(2, 32)
        assert float(decoder.norm(hidden).detach().square().mean()) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_shipped_sizes_say_in_a_config_json_what_they_are(option, tmp_path):
    if option == "pretrained":
        pytest.skip("has no size of its own")
    model = build(compose([f"model={option}"])).model
    (tmp_path / "config.json").write_text(json.dumps(model.make_hf_config()))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(model).parse_hf_config(config.to_dict()) == type(model).parse_hf_config(model.make_hf_config())
    assert config.architectures[0] == model.architecture
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        ours = Decoder(model.decoder_config())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert set(model.hf_names(ours)) == {name for name, _ in theirs.named_parameters()}


def test_old_files_say_the_same_in_other_words(folder):
    """Configs from before transformers 5 have flat theta and scaling, and no head_dim."""
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "type": "linear", "factor": 2.0}):
        new = load(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"], config["head_dim"]
        old = type(new).parse_hf_config(config | {"rope_theta": 500_000.0, "rope_scaling": None})
        assert old == type(new).parse_hf_config(new.make_hf_config())
        scaled = type(new).parse_hf_config(config | {"rope_theta": 500_000.0, "rope_scaling": scaling})
        assert scaled["rope_scaling"].factor == 2.0


def test_a_named_size_that_disagrees_is_refused(folder):
    def check(*changes):
        build(compose([f"model.weights={folder}", *changes])).model.check_weights(dry_run=False)

    config = load(folder).make_hf_config()
    sizes = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_groups": "num_key_value_heads", "head_dim": "head_dim",
        "mlp_width": "intermediate_size", "context_length": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    }  # fmt: skip
    same = [f"model.{ours}={config[theirs]}" for ours, theirs in sizes.items()]
    same += ["model.rope_theta=500000.0", "model.tie_embeddings=false"]
    check(*same)
    for name in ("num_layers", "mlp_width", "vocab_size"):
        with pytest.raises(CheckpointError, match=rf"model\.{name}: .*says {config[sizes[name]]}.*says 8;.*pretrained"):
            check(*same, f"model.{name}=8")
    with pytest.raises(CheckpointError, match="at most the checkpoint's 64"):
        check(*same, "model.context_length=65")
    with pytest.raises(CheckpointError, match=r"model_type is 'llama'.*'nemotron'"):
        check("model=gpt3_2b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "'mixtral'.*wanted one of llama, mistral"),
        ({"num_local_experts": 8}, "num_local_experts is 8.*mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
        ({"model_type": "mistral", "sliding_window": 32}, r"sliding window of 32.*model\.context_length=32"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "window of 8",
        ),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3' in config.json, wanted a whole number from 1 to 1000"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000 in config.json, wanted .* from 1 to 1000"),
        ({"max_position_embeddings": -64}, "max_position_embeddings is -64"),
        ({"intermediate_size": 10**400}, r"intermediate_size is 10{59}\.\.\. in config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None.*a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\].*an object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'.*true or false"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'.*a list"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights, which is not read"),
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "'mscale'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "incomplete"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0.5"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"vocab_size": 300}, "embed_tokens.*has shape"),
    ],
)
def test_what_is_not_computed_is_named(folder, changes, named):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        parity.imported(folder)


def test_a_window_that_rows_do_not_reach_is_no_obstacle(folder):
    edit(folder, model_type="mistral", sliding_window=32)
    with pytest.raises(CheckpointError, match="context_length=32"):
        load(folder)
    assert load(folder, context_length=32).context_length == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
        {"model_type": "qwen2", "sliding_window": 8},
        {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
        {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 3},
    ],
)
def test_a_window_that_no_layer_uses_is_ignored_as_transformers_does(tmp_path, changes):
    parity.checkpoint("Qwen2" if "model_type" in changes else "Llama 3", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    for key in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"):
        config.pop(key, None)
    (tmp_path / "in/config.json").write_text(json.dumps(config | changes))
    family, decoder = parity.imported(tmp_path / "in")
    assert parity.largest_difference(decoder, parity.opened(tmp_path / "in"))[0] < 1e-5
    export_hf(decoder, family, tmp_path / "out")
    model, prompt = parity.opened(tmp_path / "out"), torch.arange(20)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with_cache, without = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without), "transformers' cache has no window either"


def test_tensors_that_do_not_fit_are_named(folder):
    from safetensors.torch import load_file, save_file

    family = load(folder)
    decoder = Decoder(family.decoder_config())
    shard = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("proj.weight"))

    def refused(match, **changed):
        save_file(tensors | {key.replace("__", "."): value for key, value in changed.items()}, shard)
        with pytest.raises(CheckpointError, match=match):
            family.load_weights(decoder)

    refused(r"has extra\.weight, which this family or size lacks", extra__weight=torch.zeros(2))
    refused("has shape", **{name: tensors[name][:-1].contiguous()})
    refused(r"holds I8, wanted F32, F16, BF16, F64", **{name: tensors[name].to(torch.int8)})
    refused("not finite", **{name: tensors[name] * torch.inf})
    other = load_file(sorted(folder.glob("*.safetensors"))[0])
    twice, value = next(iter(other.items()))
    refused("is in .* and in", **{twice: value})
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | inv_freq, shard)
    family.load_weights(decoder)  # what old checkpoints hold besides
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        family.load_weights(decoder)


def test_reading_in_threads_is_bit_equal_and_leaves_their_number_alone(folder):
    family, before = load(folder), torch.get_num_threads()
    read, seen = [], []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            decoder = Decoder.empty(family.decoder_config())
            family.load_weights(decoder)
            read.append(decoder.state_dict())
            with ThreadPoolExecutor(1) as pool:  # of threads to come, too
                seen.append((torch.get_num_threads(), pool.submit(torch.get_num_threads).result()))
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, 1), (3, 3)]
    assert all(torch.equal(value, read[1][name]) for name, value in read[0].items())


def damage(folder: Path, dice: random.Random) -> str:
    """Change one thing in a folder; returns a description of the change."""
    path = dice.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    content = bytearray(path.read_bytes())
    kind = dice.choice(["flip", "cut", "remove", "swap"])
    if kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "remove":
        path.unlink()
    else:
        path, other = dice.sample(sorted(folder.glob("*.safetensors")), 2)
        path.write_bytes(other.read_bytes())
    return f"{kind} {path.name}"


def test_a_hundred_random_damages_are_all_found(folder, tmp_path):
    """The checkpoint has checksums, like nestlm's exports."""
    family, decoder = parity.imported(folder)
    export_hf(decoder, family, tmp_path / "good", shard_size="30KB")
    dice = random.Random(0)
    kinds = set()
    for number in range(100):
        bad = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "good", bad)
        what = damage(bad, dice)
        kinds.add(what.split()[0])
        if what == f"remove {CHECKSUMS}":  # then there is nothing to compare with, and the model is whole
            continue
        with pytest.raises(CheckpointError, match=r"model\.\w+: "):
            parity.imported(bad)
        shutil.rmtree(bad)
    assert kinds == {"flip", "cut", "remove", "swap"}


def test_pretrained_puts_the_sizes_into_the_config(folder):
    """Cache keys then change with the folder, and a run's config.yaml says what was trained."""
    plain = with_sizes(compose(["model=pretrained", f"model.weights={folder}", "model.context_length=48"]))
    assert plain["model"]["_target_"] == "nestlm.model.llama.Llama"
    assert plain["model"]["mlp_width"] == 56
    assert plain["model"]["context_length"] == 48
    assert build(plain).model == load(folder, context_length=48)
    scaled = folder.parent / "scaled"
    parity.checkpoint("Llama 3.1 (scaled positions)", scaled)
    node = with_sizes(compose(["model=pretrained", f"model.weights={scaled}"]))
    assert node["model"]["rope_scaling"]["_target_"] == "nestlm.nn.rope.Llama3Scaling"
    assert build(node).model == load(scaled)


def test_a_feature_that_a_family_has_no_word_for_is_refused():
    with pytest.raises(ConfigError, match=r"model\.qk_norm: got True, but llama has False only"):
        build(compose(["model.qk_norm=true"]))
    with pytest.raises(ConfigError, match=r"model\.output_bias"):
        build(compose(["model.qkv_bias=true"]))


def test_an_export_of_equal_widths_is_of_the_family_and_overwrites_nothing(folder, tmp_path):
    family, _ = parity.imported(folder)
    narrow = BlockConfig(num_heads=2, num_kv_groups=1, mlp_width=28)
    config = family.decoder_config()
    small = Decoder(type(config)(**(vars(config) | {"blocks": (narrow,) * 3})))
    small.init_weights(seed=0)
    export_hf(small, family, tmp_path / "small")
    assert parity.largest_difference(small, parity.opened(tmp_path / "small"))[0] < 1e-5
    with pytest.raises(ExportError, match="is there already"):
        export_hf(small, family, tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "weights"]
    check_sha256sums(tmp_path / "small")


def test_an_export_of_fewer_layers_says_how_many(folder, tmp_path):
    """The export of a model with skipped blocks drops the parent's settings for each layer."""
    edit(folder, layer_types=["full_attention"] * 3)
    family, decoder = parity.imported(folder)
    axes = (Depth(share=0.3, layers=(1,)),)
    small = extract(decoder, search_space(axes, decoder.config).smallest(), axes=axes)
    export_hf(small, family, tmp_path / "small")
    written = json.loads((tmp_path / "small/config.json").read_text())
    assert written["num_hidden_layers"] == 2
    assert "layer_types" not in written
    assert parity.largest_difference(small, parity.opened(tmp_path / "small"))[0] < 1e-5
    check_sha256sums(tmp_path / "small")


def test_a_name_on_a_hub_is_found_in_its_cache(folder, tmp_path, monkeypatch):
    """The hub's library finds a name offline in a cache of its own layout."""
    commit, cached = "a" * 40, tmp_path / "hub/models--someone--model"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.fetch_files.cache_clear()
    family = load("someone/model")
    assert family.weights_folder == cached / "snapshots" / commit
    family.load_weights(Decoder(family.decoder_config()))
    assert load(f"someone/model@{commit}").tokenizer_file == family.tokenizer_file
    with pytest.raises(CheckpointError, match="no folder, and the hub gave no such repository"):
        load("someone/other")
    with pytest.raises(CheckpointError, match="is no folder; wanted"):
        load(tmp_path / "absent")
    hub.fetch_files.cache_clear()
