"""Exports that decide for each token, used as any model of transformers is used."""

import copy

import pytest
import torch

from exports import FAMILIES, nest, routed, tokens
from nestlm.elastic.surgery import extract
from nestlm.export import hf_folder
from nestlm.export.exported_router import ExportedRouter
from routers import Variant

transformers = pytest.importorskip("transformers")

KINDS = {
    "token": ("llama", Variant("value", "dynamic"), True),
    "prompt": ("qwen3", Variant("surrogate", "dynamic", "prompt"), False),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    name, variant, depth = KINDS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    nested = nest(FAMILIES[name], place / "in", depth=depth)
    router, plan = routed(nested, variant, share=0.85)
    routing = ExportedRouter.from_plan(router, plan, axes=nested.axes, config=nested.decoder.config)
    (place / "out").mkdir()
    hf_folder.write_hf_folder(
        extract(nested.decoder, routing.spec, axes=nested.axes), nested.family, place / "out", routing=routing
    )
    return place / "out"


def opened(folder, **settings):
    transformers.utils.logging.disable_progress_bar()
    settings = {"dtype": torch.float32} | settings
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture
def model(folder):
    return opened(folder)


def differ(logits, wanted):
    return float((logits - wanted).abs().max())


def packed(lengths):
    """Documents in one row, and where each of their tokens stands in its own."""
    documents = [tokens(1, length, seed=seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return documents, torch.cat(documents, dim=1), positions


@torch.no_grad()
def test_documents_that_share_a_row_are_read_as_each_alone(model):
    documents, row, positions = packed([17, 30, 9])
    wanted = torch.cat([model(each).logits for each in documents], dim=1)
    found = model(row, position_ids=positions, use_cache=False).logits
    assert differ(found, wanted) < 1e-4
    assert differ(model(row, use_cache=False).logits, wanted) > 1e-2, "one document of them all"
    model.set_attn_implementation("eager")
    assert differ(model(row, position_ids=positions, use_cache=False).logits, wanted) < 1e-4


@torch.no_grad()
def test_a_mask_that_keeps_documents_apart_does_so_with_a_cache_too(model):
    documents, row, positions = packed([17, 30])
    wanted = torch.cat([model(each).logits for each in documents], dim=1)
    number = torch.tensor([0] * 17 + [1] * 30)
    apart = ((number[:, None] == number) & torch.ones(47, 47, dtype=torch.bool).tril())[None, None]
    cache, found = transformers.DynamicCache(config=model.config), []
    for step in (slice(0, 12), slice(12, 31), *(slice(at, at + 1) for at in range(31, 47))):
        mask = apart[:, :, step, : step.stop]
        found.append(model(row[:, step], attention_mask=mask, position_ids=positions[:, step], past_key_values=cache))
    assert differ(torch.cat([each.logits for each in found], dim=1), wanted) < 1e-4


@torch.no_grad()
def test_eager_attention_gives_its_weights(model):
    x = tokens(2, 20)
    wanted = model(x).logits
    model.set_attn_implementation("eager")
    output = model(x, output_attentions=True, output_hidden_states=True)
    assert differ(output.logits, wanted) < 1e-4
    layers = model.config.num_hidden_layers
    assert len(output.attentions) == layers == len(output.hidden_states) - 1
    for weights in output.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, 20, 20)
        total = weights.sum(-1)
        assert bool(((total - 1).abs().minimum(total.abs()) < 1e-5).all()), "of each head all, or nothing"
    assert any(bool((weights.sum(-1) == 0).any()) for weights in output.attentions), "some heads are not run"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # the name that all 5.x have
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_of_a_pass_that_keeps_everything(model, reentrant):
    _, row, positions = packed([17, 23])
    found = []
    for enabled in (False, True):
        model.train().zero_grad()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.enable_input_require_grads()
        model(row, position_ids=positions, labels=row, use_cache=False).loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(differ(found[1][name], found[0][name]) < 1e-5 for name in found[0])
    assert {f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "self_attn.q_proj")} <= found[0].keys()


@torch.no_grad()
def test_a_cache_with_room_decides_as_one_that_grows(model):
    x, settings = tokens(2, 9), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    wanted = model.generate(x, attention_mask=mask, **settings)
    for _ in range(2):  # the second call finds the cache of the first
        found = model.generate(x, attention_mask=mask, cache_implementation="static", **settings)
        assert torch.equal(found, wanted)
    assert torch.equal(model.generate(x, attention_mask=mask, use_cache=False, **settings), wanted)
    alone = model.generate(x[:1, 4:], attention_mask=mask[:1, 4:], **settings)
    assert torch.equal(alone[:, 5:], wanted[:1, 9:])
    room = transformers.StaticCache(config=model.config, max_cache_len=64)
    assert differ(model(x, past_key_values=room).logits, model(x).logits) < 1e-4


@torch.no_grad()
def test_a_cache_goes_on_from_where_it_was_copied(model):
    x = tokens(1, 40)
    cache = transformers.DynamicCache(config=model.config)
    model(x[:, :25], past_key_values=cache)
    wanted = model(x).logits[:, 25:]
    for _ in range(2):
        assert differ(model(x[:, 25:], past_key_values=copy.deepcopy(cache)).logits, wanted) < 1e-4
    cache.crop(-5)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model(x[:, 20:], past_key_values=cache)


@torch.no_grad()
def test_what_would_hand_on_what_was_spent_is_refused_by_name(model):
    x = tokens(2, 10)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be reordered"):
        cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="repeated"):
        model(tokens(4, 1), past_key_values=cache)
    for asked in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="num_beams=1, no assistant"):
            model.generate(x, max_new_tokens=2, **asked)
    beams = transformers.GenerationConfig(num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="got generation by beam_search"):
        model.generate(x, beams)
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError), match=r"(?i)flash|flex"):
            model.set_attn_implementation(name)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="wanted 'sdpa' or 'eager'"):
        model(x)


class Adapted(torch.nn.Module):
    """A linear map and what was learned beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) * 2


def test_adapters_that_a_prefix_would_pass_by_are_refused(model):
    model.model.layers[0].mlp.up_proj = Adapted(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"Adapted, wanted torch.nn.Linear.*merge adapters"):
        model(tokens(1, 9))


def test_mixed_precision_and_dropout_reach_what_is_routed(folder):
    model = opened(folder, attention_dropout=0.5)
    x = tokens(1, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(x, labels=x).loss
    loss.backward()
    assert loss.isfinite()
    with torch.no_grad():
        assert differ(model(x).logits, model(x).logits) > 1e-3, "dropped otherwise"
        assert differ(model.eval()(x).logits, model(x).logits) == 0
        assert opened(folder, dtype=torch.bfloat16)(x).logits.isfinite().all()


@torch.no_grad()
def test_a_vocabulary_that_grew_is_saved_and_opened_again(model, tmp_path):
    x, size = tokens(1, 20), model.config.vocab_size
    wanted = model(x).logits
    model.resize_token_embeddings(size + 8)
    assert differ(model(inputs_embeds=model.get_input_embeddings()(x)).logits[..., :size], wanted) < 1e-5
    assert model(x, logits_to_keep=1).logits.shape == (1, 1, size + 8)
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert again.get_input_embeddings().weight.shape[0] == size + 8 == again.config.vocab_size
    assert differ(again(x).logits[..., :size], wanted) < 1e-5
