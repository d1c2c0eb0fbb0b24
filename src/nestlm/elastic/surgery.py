"""Operations on the weights of a nested model: sort the units of a site, cut out a stand-alone sub-network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nestlm.distributed.fsdp import fill, whole
from nestlm.elastic.axes.base import Axis, Cut, width_axes
from nestlm.nn.config import DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.spec import DEPTH, Site, SubnetSpec


def cuts_by_site(axes: tuple[Axis, ...], config: DecoderConfig) -> Iterator[tuple[Site, Cut, str]]:
    """Every (site, cut, full parameter name) of a model."""
    for axis in width_axes(axes):
        for layer, block in enumerate(config.blocks):
            for cut in axis.cuts(block, config=config):
                yield Site(axis.name, layer), cut, f"blocks.{layer}.{cut.parameter}"


@torch.no_grad()
def sort_units(decoder: Decoder, orders: Mapping[Site, Tensor], *, axes: tuple[Axis, ...]) -> None:
    """Reorder the units of each site in place; the whole model computes the same function.

    Args:
        decoder: the model to sort.
        orders: per site a permutation (units,): which unit comes first, second, ...
        axes: the axes that the sites belong to.
    """
    parameters = dict(decoder.named_parameters())
    for site, cut, name in cuts_by_site(axes, decoder.config):
        order = orders[site]
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"{site}: got an order that is no permutation of its {len(order)} units")
        rows = (order[:, None] * cut.rows + torch.arange(cut.rows)).flatten()
        weight = whole(parameters[name])
        fill(parameters[name], weight.index_select(cut.dim, rows.to(weight.device)))


def subnet_config(config: DecoderConfig, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> DecoderConfig:
    """Sizes of the stand-alone model that a spec names."""
    blocks = list(config.blocks)
    for axis in width_axes(axes):
        for layer in range(len(blocks)):
            width = spec.get(Site(axis.name, layer))
            if width is not None:
                blocks[layer] = axis.resize(blocks[layer], width)
    return replace(config, blocks=tuple(blocks[layer] for layer in kept_layers(config, spec)))


def kept_layers(config: DecoderConfig, spec: SubnetSpec) -> list[int]:
    """The blocks that a spec does not skip."""
    return [layer for layer in range(len(config.blocks)) if spec.get(Site(DEPTH, layer)) != 0]


def extract(decoder: Decoder, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> Decoder:
    """A dense stand-alone model with the same function as the nested model run at that spec."""
    state = decoder.state_dict()
    for site, cut, name in cuts_by_site(axes, decoder.config):
        width = spec.get(site)
        if width is not None:
            state[name] = state[name].narrow(cut.dim, 0, width * cut.rows).clone()
    state = renumbered(state, kept_layers(decoder.config, spec))
    with torch.device("meta"):
        small = Decoder(subnet_config(decoder.config, spec, axes=axes))
    small.load_state_dict(state, assign=True)
    return small


def renumbered(state: Mapping[str, Tensor], kept: list[int]) -> dict[str, Tensor]:
    """The weights of a model with some of its blocks, which close ranks."""
    places = {str(layer): place for place, layer in enumerate(kept)}
    found = {}
    for name, weight in state.items():
        outer, _, rest = name.partition(".")
        layer, _, parameter = rest.partition(".")
        if outer != "blocks":
            found[name] = weight
        elif layer in places:
            found[f"blocks.{places[layer]}.{parameter}"] = weight
    return found
