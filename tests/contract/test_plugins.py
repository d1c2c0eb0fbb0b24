"""Every router, sampler, ranking, cost and source keeps its contract; each is found by itself."""

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import AXES, KINDS, decoder_config, random_decoder
from nestlm.cost.memory import Memory
from nestlm.cost.static import Flops
from nestlm.cost.table import PriceList
from nestlm.data.batch import Batch
from nestlm.data.sources.base import PreparedSource, fingerprint_documents
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.ranking.base import order
from nestlm.elastic.sampler.base import MixedSpecs, Sampler, generator, independent
from nestlm.elastic.surgery import extract
from nestlm.errors import BudgetError
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import fixed
from nestlm.spec import SearchSpace, SubnetSpec
from plugins import build, choose, classes, compose, options, targets
from streams import optimise

CONFIG = decoder_config(num_kv_groups=2)
DEPTH = Depth(share=0.5, layers=(0, 2))
PRICED = pytest.mark.parametrize("axes", [AXES, (DEPTH,), (*AXES, DEPTH)], ids=["widths", "depth", "both"])
SPACE = search_space(AXES, CONFIG)
TABLE = Flops(context_length=20).tabulate(SPACE, axes=AXES, config=CONFIG)
MEMORY = Memory(batch_size=2, context_length=20, bytes_per_element=2, cache_bytes_per_element=2)
PRICES = PriceList(TABLE, {"memory": MEMORY.tabulate(SPACE, axes=AXES, config=CONFIG)})


def specs_of(space: SearchSpace) -> list[SubnetSpec]:
    return [*(independent(space, generator(0, step, 0)) for step in range(8)), space.full(), space.smallest()]


SPECS = specs_of(SPACE)


# Where a group's plug-ins live. Protocols and helpers that no config names are told apart by their base module.
PACKAGES = {
    "sampler": "nestlm.elastic.sampler",
    "ranking": "nestlm.elastic.ranking",
    "cost": "nestlm.cost",
    "data": "nestlm.data.sources",
    "teacher": "nestlm.train.objective.distillation",
    "model": "nestlm.model",
}
NO_PLUGINS = {
    "nestlm.cost.knapsack", "nestlm.cost.latency.table_file", "nestlm.cost.table",
    "nestlm.model.checkpoint", "nestlm.model.family", "nestlm.model.parent_files",
}  # fmt: skip


@pytest.mark.parametrize("group", PACKAGES)
def test_every_plugin_has_a_config(group):
    """A class that no config names cannot be used, and no test here would see it."""
    shipped = set()
    for option in options(group):
        shipped |= targets(compose(choose(group, option))[group])
    found = {
        name
        for name in classes(PACKAGES[group])
        if (module := name.rpartition(".")[0]) not in NO_PLUGINS and not module.endswith(".base")
    }
    assert found
    assert found <= shipped


# samplers


def draw(sampler: Sampler, *, seed: int = 0, step: int) -> list[list[SubnetSpec]]:
    """What a step draws, as specs: a mixture gives those of its sequences or tokens."""
    drawn = []
    for item in sampler.draw(SPACE, seed=seed, step=step, batch=(4, 6)):
        columns = item.indices.flatten(1).T.tolist() if isinstance(item, MixedSpecs) else [SPACE.indices(item)]
        if isinstance(item, MixedSpecs):
            assert item.indices.shape[1:] in ((4,), (4, 6))
        drawn.append([SPACE.spec(dict(zip(SPACE.sites, column, strict=True))) for column in columns])
    return drawn


@pytest.mark.parametrize("option", options("sampler"))
def test_sampler_draws_legal_specs_from_seed_and_step_alone(option):
    sampler = build("sampler", option)
    drawn = [draw(sampler, step=step) for step in range(40)]
    other = build("sampler", option)
    again = [draw(other, step=step) for step in reversed(range(40))][::-1]
    assert drawn == again
    assert drawn != [draw(sampler, seed=1, step=step) for step in range(40)]
    assert any(specs != drawn[0] for specs in drawn), "steps differ"
    for specs in drawn:
        assert specs, "a step trains something"
        for spec in chain(*specs):
            SPACE.indices(spec)  # raises for a width that is no choice
        assert [SPACE.full()] not in specs[1:] or specs[0] == [SPACE.full()], "the full model comes first"


@pytest.mark.parametrize("option", options("sampler"))
def test_sampler_reaches_every_choice(option):
    sampler = build("sampler", option)
    seen = {pair for step in range(200) for spec in chain(*draw(sampler, step=step)) for pair in spec.items()}
    assert seen == {(site, width) for site, widths in SPACE.choices.items() for width in widths}


@pytest.mark.parametrize("option", ["sequence", "token"])
def test_a_rows_draw_does_not_depend_on_the_batch(option):
    """So that ranks which hold other rows agree on all of them."""
    sampler = replace(build("sampler", option), p_smallest=0.125)
    (small,), (large,) = (sampler.draw(SPACE, seed=0, step=3, batch=(rows, 6)) for rows in (2, 8))
    assert torch.equal(small.indices, large.indices[:, :2])
    drawn = [sampler.draw(SPACE, seed=0, step=step, batch=(8, 6))[0].indices for step in range(60)]
    rows = torch.cat(drawn, dim=1).view(len(SPACE.sites), 60 * 8, -1)
    widest = torch.tensor([len(widths) - 1 for widths in SPACE.choices.values()])[:, None, None]
    for index, share in ((widest, 0.25), (0, 0.125)):
        assert float((rows == index).all(2).all(0).float().mean()) == pytest.approx(share, abs=0.06)


# costs


@pytest.mark.parametrize("option", sorted(set(options("cost")) - {"latency"}))  # it needs a table: unit/test_latency.py
def test_cost_is_additive_and_prices_distributions_alike(option):
    table = build("cost", option).tabulate(SPACE, axes=AXES, config=CONFIG)
    assert table.name == option, "a budget names it as the config does"
    assert table.unit
    assert table.cost(SPACE.full()) == table.whole
    assert table.share(SPACE.full()) == 1.0
    for spec in SPECS:
        one_hot = torch.nn.functional.one_hot(torch.tensor(SPACE.indices(spec)), SPACE.max_choices).double()
        assert float(table.expected_share(one_hot)) == pytest.approx(table.share(spec), rel=1e-9)
        assert 0 < table.share(spec) <= 1.0
    for row in table.prices:
        assert np.all(np.diff(row) > 0), "wider is dearer"


@PRICED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_sizes_are_those_of_the_extracted_model(tie, kind, axes):
    config = decoder_config(num_kv_groups=2, tie=tie, **KINDS[kind])
    decoder, space = random_decoder(config), search_space(axes, config)
    stored, active = (
        build("cost", name).tabulate(space, axes=axes, config=config) for name in ("params", "active_params")
    )
    for spec in specs_of(space):
        small = extract(decoder, spec, axes=axes)
        numel = sum(parameter.numel() for parameter in small.parameters())
        assert stored.cost(spec) == numel
        # of an embedding that is no head, a token reads its own row
        assert active.cost(spec) == numel - (0 if tie else small.embed.weight[1:].numel())


@PRICED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weights", "cache"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_memory_is_that_of_the_extracted_model_and_its_cache(weights, cache, kind, axes):
    config = decoder_config(num_kv_groups=2, **KINDS[kind])
    space = search_space(axes, config)
    cost = Memory(
        batch_size=3, context_length=20, bytes_per_element=weights.itemsize, cache_bytes_per_element=cache.itemsize
    )
    table = cost.tabulate(space, axes=axes, config=config)
    decoder = random_decoder(config)
    for spec in specs_of(space):
        small = extract(decoder, spec, axes=axes).to(weights)
        held = sum(parameter.nbytes for parameter in small.parameters())
        kept = KVCache(small.config, batch_size=3, length=20, device=torch.device("cpu"), dtype=cache)
        assert table.cost(spec) == held + sum(tensor.nbytes for layer in kept.layers for tensor in layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 4])
def test_flops_of_a_choice_per_token_leave_k_and_v_whole(groups, kind):
    config = decoder_config(num_kv_groups=groups, **KINDS[kind])
    space = search_space(AXES, config)
    static, per_token = (
        Flops(context_length=20).tabulate(space, axes=AXES, config=config, per_token=flag) for flag in (False, True)
    )
    assert per_token.cost(space.full()) == per_token.whole == static.whole
    for spec in (space.smallest(), *(independent(space, generator(0, step, 0)) for step in range(4))):
        saved = sum(
            2 * 2 * (groups - width) * config.head_dim * config.hidden_size
            for site, width in spec.items()
            if site.axis == "attn_heads"
        )
        assert per_token.cost(spec) == static.cost(spec) + saved
    for row in per_token.prices:
        assert np.all(np.diff(row) > 0), "wider is dearer"


@pytest.mark.parametrize("option", sorted(set(options("cost")) - {"flops", "latency"}))
def test_what_is_stored_has_no_price_per_token(option):
    with pytest.raises(BudgetError, match=r"stores all weights and the whole cache.*FLOP and latency budgets only"):
        build("cost", option).tabulate(SPACE, axes=AXES, config=CONFIG, per_token=True)


@PRICED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_flops_are_those_that_torch_counts(tie, kind, axes):
    config = decoder_config(num_kv_groups=4, tie=tie, **KINDS[kind])
    space = search_space(axes, config)
    table = Flops(context_length=20).tabulate(space, axes=axes, config=config)
    decoder = random_decoder(config)
    tokens_BL = torch.zeros(2, 20, dtype=torch.long)
    for spec in (space.full(), *specs_of(space)[:4]):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            decoder(tokens_BL, fixed(spec))
        assert table.cost(spec) * tokens_BL.numel() == counter.get_total_flops()


# rankings


@pytest.mark.parametrize("option", options("ranking"))
def test_ranking_scores_every_unit_the_same_each_time(option):
    decoder, tokens_BL = random_decoder(CONFIG), torch.arange(40).view(2, 20)
    batches = [Batch(tokens_BL, tokens_BL, None)]
    ranking = build("ranking", option)
    scores = ranking.scores(decoder, axes=AXES, batches=batches, seed=3)
    again = ranking.scores(decoder, axes=AXES, batches=batches, seed=3)
    assert set(scores) == set(SPACE.sites)
    for site, score in scores.items():
        assert score.shape == (SPACE.choices[site][-1],)
        assert score.dtype == torch.float32
        assert torch.equal(score, again[site])
        assert sorted(order(score).tolist()) == list(range(len(score)))


# sources


@pytest.fixture
def text_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    return tmp_path


@pytest.mark.parametrize("option", options("data"))
def test_source_yields_the_same_named_documents_each_time(option, text_folder):
    source = build("data", option).source
    if isinstance(source, PreparedSource):
        assert source.portions() == source.portions()
        assert all(portion.weight > 0 for portion in source.portions())
        return
    if option in ("hub", "hf_streaming"):
        pytest.importorskip("datasets")
    if option == "litdata":
        pytest.importorskip("litdata", reason="needs the package litdata")
        optimise({"texts": ["one", "two", " ", "three"]}, text_folder)
        shutil.copytree("texts", ".", dirs_exist_ok=True)
    first = list(source.documents())
    assert first == list(source.documents())
    names = [name for name, _ in first]
    assert len(names) == len(set(names)) >= 3
    assert all(text.strip() for _, text in first)
    assert fingerprint_documents(first) == fingerprint_documents(source.documents())
    changed = [first[0]._replace(text=first[0].text + "!"), *first[1:]]
    assert fingerprint_documents(changed) != fingerprint_documents(first)
