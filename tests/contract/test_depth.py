"""Depth: which blocks may be skipped, what skipping costs and saves, and routers that skip."""

from dataclasses import replace
from itertools import pairwise, product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from models import AXES, decoder_config, random_decoder
from nestlm.cost.knapsack import cheapest_loss, use_up
from nestlm.cost.static import Flops
from nestlm.cost.table import Bound, CostTable, PriceList, TokenTable
from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.sampler.base import independent
from nestlm.errors import ConfigError
from nestlm.eval.policy_scores import mean_width, spent_shares
from nestlm.nn.decoder import Decoder
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import Decision, Policy, Width, constant, fixed, mixed
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.plan import FixedPointPrices, Plan, fix_sites
from nestlm.router.static.search import random_spec
from nestlm.spec import Budget, SearchSpace, Site
from plugins import build
from routers import DYNAMICS, EVERY, Variant, batches, choices

CONFIG = decoder_config(num_kv_groups=2)
DEPTH = Depth(share=0.5, layers=(0, 2))
BOTH = (*AXES, DEPTH)
SPACE = search_space(BOTH, CONFIG)
LENGTH = 24
SITES = {axis: [site for site in SPACE.sites if site.axis == axis] for axis in SPACE.axes}


def flops(space: SearchSpace = SPACE, axes=BOTH, *, per_token: bool = False) -> CostTable:
    return Flops(context_length=LENGTH).tabulate(space, axes=axes, config=CONFIG, per_token=per_token)


# which blocks


@torch.no_grad()
def test_influence_is_one_less_the_mean_cosine(tokens_BL):
    """By hand, from hidden states, over two batches of different lengths."""
    decoder = random_decoder(CONFIG)
    batches = [Batch(tokens_BL, tokens_BL, None), Batch(tokens_BL[:1, :7], tokens_BL[:1, :7], None)]
    scores = build("ranking", "activation").scores(decoder, axes=BOTH, batches=batches, seed=0)
    cosines: list[list[float]] = [[] for _ in CONFIG.blocks]
    for batch in batches:
        states = []
        for block in decoder.blocks:
            block.register_forward_pre_hook(lambda module, inputs, states=states: states.append(inputs[0]))
        decoder.norm.register_forward_pre_hook(lambda module, inputs, states=states: states.append(inputs[0]))
        decoder(batch.tokens_BL)
        for layer in range(len(CONFIG.blocks)):
            for before, after in zip(states[layer].flatten(0, 1), states[layer + 1].flatten(0, 1), strict=True):
                cosines[layer].append(float(before @ after / before.norm() / after.norm()))
    for layer, found in enumerate(cosines):
        assert float(scores[Site("depth", layer)]) == pytest.approx(1 - sum(found) / len(found), rel=1e-4)
    assert len({float(scores[Site("depth", layer)]) for layer in range(3)}) == 3


def named(importance: list[float], share: float) -> tuple[int, ...]:
    scores = {Site("depth", layer): torch.tensor([score]) for layer, score in enumerate(importance)}
    axis = Depth(share=share).ranked(scores, num_layers=len(importance))
    return tuple(site.layer for site in search_space((axis,), replace(CONFIG, blocks=CONFIG.blocks[:1] * 4)).sites)


def test_the_least_important_blocks_may_be_skipped():
    assert named([0.3, 0.1, 0.9, 0.2], 0.25) == (1,)
    assert named([0.3, 0.1, 0.9, 0.2], 0.5) == (1, 3)
    assert named([0.0, 0.5, 0.9, 0.2], 0.75) == (0, 1, 3)
    assert named([0.0, 0.0, 0.0, 0.0], 0.5) == (1, 2), "of equal ones the last but the very last"


def test_before_the_ranking_the_last_blocks_but_the_very_last_stand_in():
    assert [site.layer for site in search_space((Depth(share=0.3),), CONFIG).sites] == [1]
    assert [site.layer for site in search_space((Depth(share=0.6),), CONFIG).sites] == [0, 1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0, 1.5, -0.5])
def test_a_share_that_leaves_nothing_to_choose_is_refused(share):
    with pytest.raises(ConfigError, match=rf"axes.depth.share: got {share:g} of 3 blocks, wanted a share"):
        search_space((Depth(share=share),), CONFIG)


def test_rankings_without_text_name_blocks_too():
    decoder = random_decoder(CONFIG)
    found = {}
    for option in ("none", "magnitude", "random"):
        ranking = build("ranking", option)
        for seed in range(8):
            scores = ranking.scores(decoder, axes=BOTH, batches=[], seed=seed)
            found.setdefault(option, set()).add(Depth(share=0.3).ranked(scores, num_layers=3).layers)
    assert found == {"none": {(1,)}, "magnitude": {(1,)}, "random": {(0,), (1,), (2,)}}


# specs


def test_a_sub_network_has_one_spec():
    """Sites of a skipped block take their smallest choice, so equal networks are equal specs."""
    skipping = dict.fromkeys(SPACE.sites, -1) | {Site("depth", 0): 0}
    spec = SPACE.spec(skipping)
    assert spec == SPACE.spec(skipping | {Site("mlp_width", 0): 1, Site("attn_heads", 0): 0})
    assert (spec[Site("mlp_width", 0)], spec[Site("attn_heads", 0)]) == (6, 1)
    assert (spec[Site("mlp_width", 1)], spec[Site("attn_heads", 2)]) == (24, 2)
    assert all(SPACE.spec(dict(zip(SPACE.sites, SPACE.indices(each), strict=True))) == each for each in EVERY_SPEC)
    assert len(EVERY_SPEC) == SPACE.size == 6 * 7 * 7


EVERY_SPEC = {
    SPACE.spec(dict(zip(SPACE.sites, indices, strict=True)))
    for indices in product(*(range(len(widths)) for widths in SPACE.choices.values()))
}


# budgets


loss_rows = st.lists(st.tuples(*[st.floats(0.0, 10.0, allow_subnormal=False)] * 3), min_size=8, max_size=8)


@settings(max_examples=25, deadline=None)
@given(losses=loss_rows, share=st.floats(0.3, 1.0), memory=st.floats(0.3, 1.0))
def test_the_knapsack_equals_brute_force(losses, share, memory):
    """Exactly: what a skipped block saves is spent elsewhere, and its widths' losses do not count."""
    table, stored = flops(), build("cost", "params").tabulate(SPACE, axes=BOTH, config=CONFIG)
    fitting = [spec for spec in EVERY_SPEC if table.share(spec) <= share and stored.share(spec) <= memory]
    if not fitting:
        return
    prices = PriceList(table, {"params": stored})
    found = cheapest_loss(losses, prices=prices, budget=Budget.parse([share, f"{memory}params"]))
    assert found in fitting
    rows = {
        site: [loss - min(row[: len(SPACE.choices[site])]) for loss in row]
        for site, row in zip(SPACE.sites, losses, strict=True)
    }

    def loss(spec) -> float:
        indices = dict(zip(SPACE.sites, SPACE.indices(spec), strict=True))
        return sum(rows[site][index] for site, index in indices.items() if SPACE.runs(site, indices))

    if SPACE.full() not in fitting:
        assert loss(found) <= min(map(loss, fitting)) + 1e-9


def test_searches_use_their_budget_up():
    """No site that runs can grow, in random specs and where what a router leaves is used up."""
    prices = PriceList(flops(), {})
    for share in (0.4, 0.55, 0.8):  # at 0.55 a block may run, but not whole
        for seed in range(20):
            random = Random(seed)
            # blocks run last: what was gained by then in those that are skipped would be too dear
            losses = [[-index * random.random() for index in range(len(widths))] for widths in SPACE.choices.values()]
            losses[SPACE.sites.index(Site("depth", 0))] = losses[SPACE.sites.index(Site("depth", 2))] = [0.0, 9.0]
            bounds = prices.bounds(Budget.from_share(share))
            for spec in (
                random_spec(prices, Budget.from_share(share), random),
                use_up(SPACE.smallest(), losses, space=SPACE, bounds=bounds),
            ):
                assert prices.main.share(spec) <= share
                indices = dict(zip(SPACE.sites, SPACE.indices(spec), strict=True))
                wider = [
                    SPACE.spec(indices | {site: index + 1})
                    for site, index in indices.items()
                    if index + 1 < len(SPACE.choices[site]) and SPACE.runs(site, indices)
                ]
                assert all(prices.main.share(each) > share for each in wider)


# tokens


def counted(decoder: Decoder, policy: Policy, tokens_BL: torch.Tensor) -> int:
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        decoder(tokens_BL, policy)
    return counter.get_total_flops()


def drawn_tokens(seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(len(w), (1, LENGTH), generator=source) for w in SPACE.choices.values()])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_what_tokens_spend_is_what_runs(seed):
    """To the FLOP where all sites decide: keys and values of all tokens, the rest of those that run the block."""
    decoder, table = random_decoder(CONFIG), flops(per_token=True)
    tokens_BL = torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    policy = mixed(SPACE, drawn_tokens(seed))
    share = float(spent_shares(decoder(tokens_BL, policy).decisions, table, batch_size=1))
    assert share * table.whole * LENGTH == pytest.approx(counted(decoder, policy, tokens_BL), rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "deciding", [axes for n in range(8) if (axes := [a for i, a in enumerate(SITES) if n >> i & 1])], ids="-".join
)
def test_what_tokens_spend_is_never_priced_too_low(deciding):
    """Where some axes decide and the others run alike, also at widths in between and in skipped blocks."""
    decoder, table = random_decoder(CONFIG), flops(per_token=True)
    assert isinstance(table, TokenTable)
    tokens_BL = torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        alike = independent(SPACE, Random(seed))
        decisions = {
            site: Decision(Width.per_row(SPACE.choices[site], index) if site.axis in deciding else Width(alike[site]))
            for site, index in zip(SPACE.sites, drawn_tokens(seed), strict=True)
        }
        share = float(spent_shares(decoder(tokens_BL, constant(decisions)).decisions, table, batch_size=1))
        assert share * table.whole * LENGTH >= counted(decoder, constant(decisions), tokens_BL) * (1 - 1e-12)
        if not set(deciding):
            assert share == pytest.approx(flops().share(alike))


@torch.no_grad()
def test_sub_networks_and_sequences_are_priced_exactly():
    decoder, table, of_tokens = random_decoder(CONFIG), flops(), flops(per_token=True)
    tokens_BL = torch.randint(50, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    specs = [independent(SPACE, Random(seed)) for seed in range(4)]
    indices = torch.tensor([SPACE.indices(spec) for spec in specs]).T
    stray = indices.clone()  # widths that were drawn for blocks that are skipped
    for column, spec in enumerate(specs):
        taken = dict(zip(SPACE.sites, SPACE.indices(spec), strict=True))
        stray[[not SPACE.runs(site, taken) for site in SPACE.sites], column] = 1
    assert not torch.equal(stray, indices)
    for drawn in (indices, stray):
        shares = spent_shares(decoder(tokens_BL, mixed(SPACE, drawn)).decisions, table, batch_size=4)
        assert shares.tolist() == pytest.approx([table.share(spec) for spec in specs])
    for spec in specs:
        for each in (table, of_tokens):
            shares = spent_shares(decoder(tokens_BL, fixed(spec)).decisions, each, batch_size=4)
            assert shares.tolist() == pytest.approx([table.share(spec)] * 4)


def test_widths_of_tokens_that_skip_count_as_none():
    block = Decision(Width.per_row((0, 1), torch.tensor([[0, 1, 1, 0]])))
    assert mean_width(Decision(Width(8)).restrict_to(block, num_units=8), whole=8) == 4.0
    chosen = Decision(Width.per_row((2, 8), torch.tensor([[1, 1, 0, 0]])))
    assert mean_width(chosen.restrict_to(block, num_units=8), whole=8) == (8 + 2) / 4
    assert chosen.restrict_to(Decision(Width(0)), num_units=8) == Decision(Width(0))
    assert chosen.restrict_to(Decision(Width(1)), num_units=8) is chosen


# routers

LOW = 0.4
STATIC, TOKENS = PriceList(flops(), {}), PriceList(flops(per_token=True), {}, per_token=True)


@torch.no_grad()
@EVERY
def test_every_router_skips_blocks_within_its_budget(variant: Variant):
    """Down to a budget that no widths reach, on text that it was not calibrated on."""
    calibration = CalibrationData(random_decoder(CONFIG), batches(0))
    router = variant.router(static=STATIC, tokens=TOKENS)
    router.prepare(calibration)
    table = router.prices.main
    narrowest = SPACE.spec(dict.fromkeys(SPACE.sites, 0) | dict.fromkeys(SITES["depth"], 1))
    assert flops().share(narrowest) > LOW, "no widths reach it"
    for share in (LOW, 0.8):
        if share == LOW and variant.granularity == "prompt":
            continue  # the prompt runs whole
        answer = router.find(Budget.from_share(share), calibration=calibration)
        for batch in batches(5):
            decisions = calibration.decoder(batch.tokens_BL, answer.policy).decisions
            assert float(spent_shares(decisions, table, batch_size=4).max()) <= share
        if answer.spec is not None:
            assert flops().share(answer.spec) <= share
            assert answer.spec in EVERY_SPEC


def test_nothing_decides_in_a_block_that_all_tokens_skip():
    """So that what its widths would have cost is left for others."""
    limit = FixedPointPrices.from_bound(Bound(TOKENS.main, 0.8), device=torch.device("cpu"))
    plan = Plan(1.0, (limit,), multiplier=1.0)
    source = torch.Generator().manual_seed(0)
    scores = {
        row: 10 * torch.randn(2, LENGTH, len(widths), generator=source)
        for row, widths in enumerate(SPACE.choices.values())
    }
    rows = {site: row for row, site in enumerate(SPACE.sites)}
    assert not fix_sites(plan, scores, gain_threshold=1.0).fixed, "tokens differ in what they gain"
    scores[rows[Site("depth", 2)]] = torch.tensor([5.0, 0.0]).expand(2, LENGTH, 2)
    inside = (Site("depth", 2), Site("mlp_width", 2), Site("attn_heads", 2))
    assert fix_sites(plan, scores, gain_threshold=1.0).fixed == {rows[site]: 0 for site in inside}


@torch.no_grad()
@DYNAMICS
def test_tokens_that_skip_depend_on_no_later_ones_and_on_no_cache(variant: Variant, deciding, monkeypatch):
    """Equal choices in float64, whole, changed after a position, and token by token, where every site decides."""
    monkeypatch.setattr("nestlm.router.dynamic.plan.fix_sites", lambda plan, scores, *, gain_threshold: plan)
    calibration = CalibrationData(random_decoder(CONFIG).double(), batches(0))
    router = variant.router(static=STATIC, tokens=TOKENS).double()
    policy = router.find(Budget.from_share(0.8), calibration=calibration).policy
    tokens_BL = batches(3)[0].tokens_BL
    whole = calibration.decoder(tokens_BL, policy)
    depth = [index for site, index in choices(whole).items() if site.startswith("depth")]
    assert any(index.unique().numel() > 1 for index in depth), "some tokens skip a block"
    changed_BL = tokens_BL.clone()
    changed_BL[:, 10:] = (changed_BL[:, 10:] + 7) % 50
    changed = calibration.decoder(changed_BL, policy)
    torch.testing.assert_close(whole.logits_BLV[:, :10], changed.logits_BLV[:, :10])
    assert not torch.allclose(whole.logits_BLV[:, 10:], changed.logits_BLV[:, 10:])
    cache = KVCache(CONFIG, batch_size=4, length=LENGTH, device=torch.device("cpu"), dtype=torch.float64)
    for start, end in pairwise([0, 7, *range(8, LENGTH + 1)]):
        piece = calibration.decoder(tokens_BL[:, start:end], policy, cache=cache)
        torch.testing.assert_close(piece.logits_BLV, whole.logits_BLV[:, start:end], rtol=0, atol=1e-4)
        assert all(torch.equal(index, choices(whole)[site][:, start:end]) for site, index in choices(piece).items())
