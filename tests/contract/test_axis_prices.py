"""Every price of every axis, by every cost that is counted, is what the extracted stand-alone model has."""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from howto import MLP_DROP
from models import AXES, DECODERS, random_decoder
from nestlm.cost.static import size_table
from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.sampler.base import independent
from nestlm.elastic.surgery import extract
from nestlm.errors import ConfigError
from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import fixed
from nestlm.spec import SearchSpace, SubnetSpec
from plugins import build, options

COUNTED = sorted(set(options("cost")) - {"latency"})  # latency is measured: unit/test_latency.py
HEADS = AttnHeads(fractions=(0.5, 1.0))
# Every shipped config of axes, and the axis of docs/howto/add-an-axis.md alone and beside others.
EVERY: dict[str, Callable[[], tuple[Axis, ...]]] = {
    **{option: lambda option=option: tuple(build("axes", option).values()) for option in options("axes")},
    "mlp_drop": lambda: (MLP_DROP,),
    "mlp_drop_heads_depth": lambda: (Depth(share=0.5, layers=(0, 2)), MLP_DROP, HEADS),
}


def compared(space: SearchSpace) -> list[SubnetSpec]:
    """Each choice of each axis with all else whole, the smallest sub-network, and random ones."""
    whole = dict.fromkeys(space.sites, -1)
    last = [sites[-1] for sites in space.axes.values()]
    single = [space.spec(whole | {site: index}) for site in last for index in range(len(space.choices[site]))]
    return [*single, space.smallest(), *(independent(space, Random(seed)) for seed in range(3))]


def counted_flops(decoder: Decoder, length: int) -> float:
    tokens_BL = torch.zeros(1, length, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        decoder(tokens_BL)
    return counter.get_total_flops() / length


def count(name: str, cost, decoder: Decoder) -> float | None:
    """What a stand-alone model really has of a shipped cost; None for a cost that this test does not know."""
    numel = sum(parameter.numel() for parameter in decoder.parameters())
    if name == "params":
        return numel
    if name == "active_params":  # of an embedding that is not the head, a token reads its own row
        return numel if decoder.head is None else numel - decoder.embed.weight[1:].numel()
    if name == "memory":
        cache = KVCache(
            decoder.config, batch_size=cost.batch_size, length=cost.context_length, device=torch.device("meta"),
            dtype=torch.bfloat16,
        )  # fmt: skip
        cached = sum(tensor.numel() for layer in cache.layers for tensor in layer)
        return cost.bytes_per_element * numel + cost.cache_bytes_per_element * cached
    return counted_flops(decoder, cost.context_length) if name == "flops" else None


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("option", EVERY)
def test_the_price_of_every_choice_is_counted_on_the_extracted_model(option, kind):
    axes, decoder = EVERY[option](), random_decoder(DECODERS[kind])
    space = search_space(axes, decoder.config)
    tables = {name: build("cost", name) for name in COUNTED}
    prices = {name: cost.tabulate(space, axes=axes, config=decoder.config) for name, cost in tables.items()}
    for spec in compared(space):
        small = extract(decoder, spec, axes=axes)
        for name, cost in tables.items():
            price = prices[name].cost(spec)
            known = count(name, cost, small)
            assert known is None or price == known, name
            alone = cost.tabulate(SearchSpace({}), axes=(), config=small.config)
            assert math.isclose(price, alone.whole, rel_tol=1e-9), f"{name}: the small model is priced alike as a whole"


@torch.no_grad()
def test_the_axis_of_the_page_runs_as_it_is_extracted():
    """Skipped MLPs take their norm with them; sliced equals extracted, and nothing is left of a norm."""
    decoder = random_decoder(DECODERS["biased"])
    axes = EVERY["mlp_drop_heads_depth"]()
    space, tokens_BL = search_space(axes, decoder.config), torch.arange(40).view(2, 20)
    for spec in compared(space):
        small = extract(decoder, spec, axes=axes)
        torch.testing.assert_close(small(tokens_BL).logits_BLV, decoder(tokens_BL, fixed(spec)).logits_BLV)
        for block, sizes in zip(small.blocks, small.config.blocks, strict=True):
            assert any("mlp_norm" in name for name, _ in block.named_parameters()) == (sizes.mlp_width > 0)


def test_two_axes_of_one_place_are_refused():
    with pytest.raises(ConfigError, match="got 2 axes that cut mlp_width, wanted one"):
        search_space((*AXES, MLP_DROP), DECODERS["gqa"])


def test_prices_that_do_not_add_up_are_refused():
    """A cost of two parts together is no sum over sites."""
    config = DECODERS["gqa"]
    space = search_space(AXES, config)

    def of_block(block: BlockConfig) -> float:
        return float(block.num_heads * block.mlp_width)

    with pytest.raises(ConfigError, match=r"mlp_width, attn_heads together leave .* but their prices sum to"):
        size_table("area", "units", outside=1.0, of_block=of_block, space=space, axes=AXES, config=config)
