"""Exports to transformers: families with layers of their own widths, and routers that decide in the modelling file."""

import ast
import json
import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import parity
from exports import FAMILIES, LENGTH, continued, nest, routed, tokens
from howto import MLP_DROP
from models import AXES, random_decoder
from nestlm.data.special_tokens import SpecialTokens
from nestlm.data.tokenizer import load_tokenizer, train_tokenizer
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.surgery import extract
from nestlm.errors import ExportError
from nestlm.export import exporter, hf_folder, remote
from nestlm.export.exported_router import ExportedRouter
from nestlm.export.hf_folder import export_hf
from nestlm.export.model_card import CardFacts
from nestlm.model.pretrained import find_families
from nestlm.nn.config import BlockConfig
from nestlm.nn.policy import fixed
from nestlm.spec import Site
from routers import Variant

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def generated(model, prompt, *, count):
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def test_every_family_is_exported():
    assert set(FAMILIES) == set(find_families())


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_different_widths_open_and_generate_with_a_cache(name, tmp_path):
    nested = nest(FAMILIES[name], tmp_path / "in", depth=True)
    spec = nested.uneven()
    small = extract(nested.decoder, spec, axes=nested.axes)
    assert len(set(small.config.blocks)) == 2 == len(small.config.blocks), "one block is skipped"
    export_hf(small, nested.family, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"]["1"]["intermediate_size"] == small.config.blocks[1].mlp_width
    model = opened(tmp_path / "out")
    x = tokens(2, 40)
    with torch.no_grad():
        wanted = nested.decoder(x, fixed(spec)).logits_BLV
        difference = float((model(x).logits - wanted).abs().max())
        model.set_attn_implementation("eager")
        eager = float((model(x).logits - wanted).abs().max())
    assert difference < 1e-5
    assert 0 < eager < 1e-4, "computed otherwise, in every layer"
    assert torch.equal(generated(model, x[:1, :9], count=8), continued(nested.decoder, fixed(spec), x[:1, :9], count=8))
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert float((opened(tmp_path / "again")(x).logits - wanted).abs().max()) < 1e-4


@dataclass(frozen=True)
class AttnDrop(Axis):
    """Skips a block's attention with its norm, as the page's axis skips the MLP."""

    name: ClassVar[str] = "attn_heads"

    def units(self, block):
        return block.num_kv_groups

    def resize(self, block, width):
        return replace(block, num_heads=width * block.heads_per_group, num_kv_groups=width)

    def sites(self, config):
        return {Site(self.name, layer): (0, block.num_kv_groups) for layer, block in enumerate(config.blocks)}


@pytest.mark.parametrize("dropped", ["some MLPs", "all MLPs", "some attention"])
@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_dropped_parts_open_and_generate_with_a_cache(name, dropped, tmp_path):
    """MLPs take no weights at all, the axis being that of docs/howto/add-an-axis.md; attention a head of zeros."""
    nested = nest(FAMILIES[name], tmp_path / "in")
    nested = replace(nested, axes=(AttnDrop() if dropped == "some attention" else MLP_DROP,))
    space = nested.space
    spec = space.smallest() if dropped == "all MLPs" else space.spec({site: site.layer % 2 for site in space.sites})
    small = extract(nested.decoder, spec, axes=nested.axes)
    export_hf(small, nested.family, tmp_path / "out")
    model, x = opened(tmp_path / "out"), tokens(2, 40)
    with torch.no_grad():
        difference = (model(x).logits - nested.decoder(x, fixed(spec)).logits_BLV).abs().max()
    assert float(difference) < 1e-5
    assert torch.equal(generated(model, x[:1, :9], count=8), continued(nested.decoder, fixed(spec), x[:1, :9], count=8))
    stored, price = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert stored > price if dropped == "some attention" else stored == price


def test_tokens_that_drop_an_mlp_do_so_in_the_modelling_file(tmp_path):
    nested = nest(FAMILIES["llama"], tmp_path / "in")
    nested = replace(nested, axes=(MLP_DROP, AXES[1]))
    router, plan = routed(nested, Variant("value", "dynamic", "token"), share=0.85)
    routing = ExportedRouter.from_plan(router, plan, axes=nested.axes, config=nested.decoder.config)
    assert any(site["axis"] == "mlp_width" and site["widths"][0] == 0 for site in routing.config["sites"])
    small = extract(nested.decoder, routing.spec, axes=nested.axes)
    (tmp_path / "out").mkdir()
    hf_folder.write_hf_folder(small, nested.family, tmp_path / "out", routing=routing)
    x = tokens(1, LENGTH)
    with torch.no_grad():
        wanted = nested.decoder(x, router.policy(plan)).logits_BLV
        assert float((opened(tmp_path / "out")(x).logits - wanted).abs().max()) < 1e-4


ROUTED = {
    "llama": ("value", "token", True),
    "mistral": ("surrogate", "prompt", False),
    "qwen2": ("gumbel", "token", False),
    "qwen3": ("surrogate", "token", True),
    "nemotron": ("value", "prompt", True),
}


@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_a_router_decides_in_the_modelling_file_as_it_does_here(name, tmp_path):
    option, granularity, depth = ROUTED[name]
    nested = nest(FAMILIES[name], tmp_path / "in", depth=depth)
    router, plan = routed(nested, Variant(option, "dynamic", granularity), share=0.85)
    policy, routing = (
        router.policy(plan),
        ExportedRouter.from_plan(router, plan, axes=nested.axes, config=nested.decoder.config),
    )
    (tmp_path / "out").mkdir()
    small = extract(nested.decoder, routing.spec, axes=nested.axes)
    hf_folder.write_hf_folder(small, nested.family, tmp_path / "out", routing=routing)
    model = opened(tmp_path / "out")
    x = tokens(1, 50)
    wanted = nested.decoder(x, policy).logits_BLV
    assert float((wanted - nested.decoder(x).logits_BLV).abs().max()) > 1e-2, "decisions matter"
    assert float((model(x).logits - wanted).abs().max()) < 1e-5
    cache = model(x[:, :20], use_cache=True).past_key_values  # then several tokens at once, and one by one
    steps = [slice(20, 30), *(slice(at, at + 1) for at in range(30, 50))]
    later = torch.cat([model(x[:, step], past_key_values=cache).logits for step in steps], dim=1)
    assert float((later - wanted[:, 20:]).abs().max()) < 1e-4
    assert torch.equal(generated(model, x[:, :10], count=12), continued(nested.decoder, policy, x[:, :10], count=12))
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(x[:, :10], num_beams=2, max_new_tokens=2)


@torch.no_grad()
def test_rows_of_a_padded_batch_decide_as_they_do_alone(tmp_path):
    nested = nest(FAMILIES["llama"], tmp_path / "in")
    router, plan = routed(nested, Variant("value", "dynamic"), share=0.85)
    routing = ExportedRouter.from_plan(router, plan, axes=nested.axes, config=nested.decoder.config)
    (tmp_path / "out").mkdir()
    hf_folder.write_hf_folder(
        extract(nested.decoder, routing.spec, axes=nested.axes), nested.family, tmp_path / "out", routing=routing
    )
    model = opened(tmp_path / "out")
    short, long = tokens(1, 18), tokens(1, 30, seed=1)
    padded = torch.cat((torch.cat((tokens(1, 12, seed=2), short), dim=1), long))
    mask = torch.ones_like(padded)
    mask[0, :12] = 0
    together = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    assert float((together[:1, 12:] - model(short).logits).abs().max()) < 1e-4
    assert float((together[1:] - model(long).logits).abs().max()) < 1e-4


def test_heads_that_do_not_divide_the_hidden_size_open_as_well(tmp_path):
    """transformers' own Llama refuses them, whatever the width of a head."""
    nested = nest("Llama 2", tmp_path / "in")
    three = (BlockConfig(num_heads=3, num_kv_groups=3, mlp_width=28),) * 2
    family = replace(nested.family, num_layers=2)
    decoder = random_decoder(replace(family.decoder_config(), blocks=three))
    export_hf(decoder, family, tmp_path / "out")
    assert parity.largest_difference(decoder, opened(tmp_path / "out"))[0] < 1e-5
    plain = random_decoder(replace(decoder.config, blocks=(BlockConfig(2, 2, 28),) * 2))
    export_hf(plain, family, tmp_path / "plain")
    assert type(opened(tmp_path / "plain")).__name__ == "LlamaForCausalLM"


def test_what_travels_with_an_export_needs_nothing_of_ours():
    for path in Path(remote.__path__[0]).glob("modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not [name for name in names if name.startswith("nestlm")]


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path):
    nested = nest("Llama 2", tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot write .*File too large.*nothing is left"):
            export_hf(nested.decoder, nested.family, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_router_of_another_kind_is_refused_by_name():
    with pytest.raises(ExportError, match=r"knows no torch.*Identity; wanted a static router, or router=surrogate"):
        ExportedRouter.from_plan(torch.nn.Identity(), None, axes=(), config=None)


def test_an_empty_folder_may_be_there_and_a_full_one_may_not(tmp_path):
    nested = nest("Llama 2", tmp_path / "in")
    (tmp_path / "out").mkdir()
    export_hf(nested.decoder, nested.family, tmp_path / "out")
    with pytest.raises(ExportError, match="is there already"):
        export_hf(nested.decoder, nested.family, tmp_path / "out")


FACTS = CardFacts("0.6", {"flops": ("6 FLOPs", 0.6)}, "knapsack", "owner/parent", "f" * 8, None, {"the parent": 3.0})


def of_weights(case: str, folder: Path) -> exporter.ExportSource:
    """A checkpoint of its own, as a run holds it."""
    parity.checkpoint(case, folder)
    family, decoder = parity.imported(folder)
    tokenizer, special = folder / "tokenizer.json", SpecialTokens(0, (0,))
    return exporter.ExportSource(
        decoder.eval(), family, family.read_parent_files(), AXES, tokenizer, special, tokens(2, 40)
    )


@pytest.mark.parametrize("case", ["Llama 2, bfloat16", "Qwen2.5 (tied, YaRN)", "GPT-3 (Nemotron), biases"])
def test_what_lies_beside_a_parent_goes_along(case, tmp_path):
    nested = of_weights(case, tmp_path / "in")
    space = search_space(AXES, nested.decoder.config)
    spec = space.spec({site: (site.layer + 1) % len(row) for site, row in space.choices.items()})
    check = exporter.export_model(
        nested, exporter.ExportChoice(spec), tmp_path / "out", form="hf", precision=None, facts=FACTS
    )
    assert check.difference < (0.5 if "bfloat16" in case else 1e-5)
    assert check.parameters < check.full_parameters
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.dtype == (torch.bfloat16 if "bfloat16" in case else torch.float32)
    assert model.generation_config.temperature == 0.7, "the parent's"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert "base_model: owner/parent" in (tmp_path / "out/README.md").read_text()


def test_another_tokenizer_than_the_parents_replaces_its_files(tmp_path):
    nested = of_weights("Llama 2", tmp_path / "in")
    (tmp_path / "in/special_tokens_map.json").write_text("{}")
    own = tmp_path / "tokenizer.json"
    train_tokenizer(["another text " * 9], vocab_size=257 + 8).save(str(own))
    spec = search_space(AXES, nested.decoder.config).full()
    nested = replace(nested, tokenizer=own)
    exporter.export_model(
        nested, exporter.ExportChoice(spec), tmp_path / "out", form="hf", precision="f16", facts=FACTS
    )
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("another").input_ids == [0, *load_tokenizer(own).encode("another").ids]
    assert not (tmp_path / "out/special_tokens_map.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
