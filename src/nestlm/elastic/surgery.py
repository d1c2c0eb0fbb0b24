"""Sort the units of a nested model and extract stand-alone sub-networks, by the shapes of resized blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from nestlm.distributed.fsdp import copy_full_tensor, full_tensor
from nestlm.elastic.axes.base import Axis
from nestlm.nn.config import NO_BLOCK, BlockConfig, DecoderConfig
from nestlm.nn.decoder import Block, Decoder
from nestlm.spec import Site, SubnetSpec


def block_shapes(block: BlockConfig, *, config: DecoderConfig) -> Mapping[str, torch.Size]:
    """Build a block on the meta device and return the shapes of its parameters by name, such as `mlp.up.weight`.

    Args:
        block: sizes of the block.
        config: the decoder that the block belongs to; its own blocks do not matter.
    """
    return build_shapes(block, config=replace(config, blocks=(NO_BLOCK,)))


@lru_cache(maxsize=4096)
def build_shapes(block: BlockConfig, *, config: DecoderConfig) -> Mapping[str, torch.Size]:
    """Build what `block_shapes` returns, once for all blocks of the same sizes in a decoder of the same features."""
    with torch.device("meta"):
        built = Block(config, block=block, layer=0)
    return {name: parameter.shape for name, parameter in built.named_parameters()}


@dataclass(frozen=True)
class UnitSlice:
    """What one unit of an axis owns of a parameter: unit i owns entries i * rows to (i + 1) * rows - 1 along `dim`."""

    parameter: str
    dim: int
    rows: int


def unit_slices(axis: Axis, block: BlockConfig, *, config: DecoderConfig) -> Iterator[UnitSlice]:
    """Find what one unit owns: the parameters of a block that grow with one unit more, and by how much."""
    units = axis.units(block)
    whole_shapes = block_shapes(axis.resize(block, units), config=config)
    for name, wider in block_shapes(axis.resize(block, units + 1), config=config).items():
        for dim, (more, size) in enumerate(zip(wider, whole_shapes[name], strict=True)):
            if more != size:
                yield UnitSlice(name, dim, more - size)


def slices_by_site(axes: tuple[Axis, ...], config: DecoderConfig) -> Iterator[tuple[Site, UnitSlice, str]]:
    """Yield what a unit of each site owns, with the parameter's full name in the decoder."""
    for axis in axes:
        for layer, block in enumerate(config.blocks):
            for part in unit_slices(axis, block, config=config):
                yield Site(axis.name, layer), part, f"blocks.{layer}.{part.parameter}"


@torch.no_grad()
def sort_units(decoder: Decoder, orders: Mapping[Site, Tensor], *, axes: tuple[Axis, ...]) -> None:
    """Reorder the units of each site in place; the whole model computes the same function.

    Args:
        decoder: the model to sort.
        orders: per site a permutation (units,): which unit comes first, second, ...
        axes: the axes that the sites belong to.

    Raises:
        ValueError: an order that is no permutation of its units.
    """
    parameters = dict(decoder.named_parameters())
    for site, part, name in slices_by_site(axes, decoder.config):
        order = orders[site]
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"{site}: got an order that is no permutation of its {len(order)} units")
        rows = (order[:, None] * part.rows + torch.arange(part.rows)).flatten()
        weight = full_tensor(parameters[name])
        copy_full_tensor(parameters[name], weight.index_select(part.dim, rows.to(weight.device)))


def resized_blocks(config: DecoderConfig, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> list[BlockConfig]:
    """Return the sizes of every block of a sub-network; skipped blocks are empty."""
    blocks = list(config.blocks)
    for axis in axes:
        for layer, block in enumerate(blocks):
            width = spec.get(Site(axis.name, layer))
            if width is not None and not block.is_empty:
                blocks[layer] = axis.resize(block, width)
    return blocks


def kept_layers(config: DecoderConfig, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> list[int]:
    """Return the layers whose blocks are stored in a stand-alone sub-network: those that are not empty."""
    return [layer for layer, block in enumerate(resized_blocks(config, spec, axes=axes)) if not block.is_empty]


def subnet_config(config: DecoderConfig, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> DecoderConfig:
    """Return the sizes of the stand-alone sub-network of a spec."""
    blocks = resized_blocks(config, spec, axes=axes)
    return replace(config, blocks=tuple(block for block in blocks if not block.is_empty))


def extract(decoder: Decoder, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> Decoder:
    """Build the dense stand-alone model that computes what the nested model computes at a spec.

    Each of its parameters is a prefix, along every dimension, of the whole model's parameter of that name: a copy, or
    the same tensor where nothing is cut.
    """
    state = decoder.state_dict()
    small = Decoder.on_meta(subnet_config(decoder.config, spec, axes=axes))
    layers = kept_layers(decoder.config, spec, axes=axes)
    kept = {}
    for name, parameter in small.state_dict().items():
        weight = state[name_in_whole(name, layers)]
        prefix = weight[tuple(slice(size) for size in parameter.shape)]
        kept[name] = weight if prefix.shape == weight.shape else prefix.clone()
    small.load_state_dict(kept, assign=True)
    return small


def name_in_whole(name: str, layers: list[int]) -> str:
    """Translate the name of a parameter of a model that keeps some layers into its name in the whole model."""
    outer, _, rest = name.partition(".")
    if outer != "blocks":
        return name
    place, _, parameter = rest.partition(".")
    return f"blocks.{layers[int(place)]}.{parameter}"
