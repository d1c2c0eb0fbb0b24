"""Costs that follow from the sizes alone: what is stored, read and computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestlm.cost.table import CostTable, Rows, TokenTable, beside_depth
from nestlm.elastic.axes.base import Axis, WidthAxis, width_axes
from nestlm.errors import BudgetError
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.spec import DEPTH, SearchSpace


@dataclass(frozen=True)
class Params:
    """Parameters that a stand-alone sub-network stores; a tied embedding counts once."""

    prices_tokens: ClassVar[bool] = False

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice; sums equal the parameter count of the extracted model."""
        refuse_per_token("params", per_token=per_token)
        return parameter_table("params", "parameters", unread=0, space=space, axes=axes, config=config)


@dataclass(frozen=True)
class ActiveParams:
    """Parameters that one token's forward pass reads: of an embedding that is no head, one row."""

    prices_tokens: ClassVar[bool] = False

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice; sums equal the extracted model's parameters, less the rows that are not looked up."""
        refuse_per_token("active_params", per_token=per_token)
        unread = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.hidden_size
        return parameter_table("active_params", "parameters", unread=unread, space=space, axes=axes, config=config)


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs a token: two for each weight of a matrix product, plus the attention scores.

    Attributes:
        context_length: tokens a row, L; it sets the share of the attention scores.
    """

    prices_tokens: ClassVar[bool] = True
    context_length: int

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice; sums equal what `torch.utils.flop_counter` counts on the extracted model."""
        static = self.static_table(space, axes=axes, config=config)
        if not per_token:
            return static
        later = self.served_later(space, axes=axes, config=config)
        # what later tokens need stays whole: K and V
        shared = [row[-1] for row in later]
        prices = []
        for row, cut in zip(static.prices, later, strict=True):
            prices.append(tuple(price - saved for price, saved in zip(row, cut, strict=True)))
        return TokenTable(
            static.name,
            static.unit,
            space,
            constant=static.constant + sum(shared),
            prices=tuple(prices),
            whole=static.whole,
            shared=tuple(shared),
            fixed=static.prices,
            # the two matrices of a router's network; a budget's features are multiplied once for all tokens
            router=tuple((2 * (config.hidden_size + len(widths)), 0) for widths in space.choices.values()),
        )

    def served_later(self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig) -> Rows:
        """What of each price serves later tokens."""
        shapes = parameter_shapes(config)

        def later(axis: WidthAxis, layer: int, width: int) -> float:
            return 2 * cut_parameters(axis, layer, width, shapes=shapes, config=config, later=True, matrices=True)

        def of_block(layer: int) -> float:
            return 2 * sum(math.prod(shapes[f"blocks.{layer}.attn.{name}.weight"]) for name in ("k", "v"))

        return price_rows(later, of_block, space=space, axes=axes)

    def static_table(self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig) -> CostTable:
        """The prices where all tokens take the same choice."""
        shapes = parameter_shapes(config)

        def price(axis: WidthAxis, layer: int, width: int) -> float:
            products = 2 * cut_parameters(axis, layer, width, shapes=shapes, config=config, matrices=True)
            resized = axis.resize(config.blocks[layer], width)
            return products + self.attention_scores(resized, config=config) * axis.mixes_tokens

        def of_block(layer: int) -> float:
            products = 2 * block_parameters(layer, shapes=shapes, matrices=True)
            return products + self.attention_scores(config.blocks[layer], config=config)

        return size_table("flops", "FLOPs a token", self.whole(config), price, of_block, space=space, axes=axes)

    def whole(self, config: DecoderConfig) -> int:
        """FLOPs of the full model."""
        # Norms and the look-up of an embedding are no matrix products; the head is one, also where it is tied.
        shapes = parameter_shapes(config)
        weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
        if config.tie_embeddings:
            weights += config.vocab_size * config.hidden_size
        return 2 * weights + sum(self.attention_scores(block, config=config) for block in config.blocks)

    def attention_scores(self, block: BlockConfig, *, config: DecoderConfig) -> int:
        """Scores and their weighted sum: two products over the whole row, without a discount for causality."""
        return 2 * 2 * self.context_length * block.num_heads * config.head_dim


def parameter_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """Shapes of all parameters of a decoder, without allocating any."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}


def block_parameters(layer: int, *, shapes: dict[str, torch.Size], matrices: bool = False) -> int:
    """Parameters of a whole block; with `matrices`, of its matrices only."""
    own = (shape for name, shape in shapes.items() if name.startswith(f"blocks.{layer}."))
    return sum(math.prod(shape) for shape in own if len(shape) == 2 or not matrices)


def cut_parameters(
    axis: WidthAxis,
    layer: int,
    width: int,
    *,
    shapes: dict[str, torch.Size],
    config: DecoderConfig,
    later: bool = False,
    matrices: bool = False,
) -> int:
    """Parameters that `width` units of a site own.

    With `later`, only those that serve later tokens; with `matrices`, no biases.
    """
    total = 0
    for cut in axis.cuts(config.blocks[layer], config=config):
        shape = shapes[f"blocks.{layer}.{cut.parameter}"]
        if (cut.serves_later_tokens or not later) and (len(shape) == 2 or not matrices):
            total += math.prod(shape) // shape[cut.dim] * cut.rows * width
    return total


def refuse_per_token(name: str, *, per_token: bool) -> None:
    """Raise BudgetError where a cost of what is stored is asked to price a choice per token."""
    if per_token:
        raise BudgetError(
            f"cost: got {name} for a dynamic router, which stores all weights and the whole cache, so it takes FLOP "
            "and latency budgets only; try cost=flops"
        )


def parameter_table(
    name: str, unit: str, *, unread: int, space: SearchSpace, axes: tuple[Axis, ...], config: DecoderConfig
) -> CostTable:
    """A table that counts parameters, all but `unread` of them."""
    shapes = parameter_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values()) - unread

    def price(axis: WidthAxis, layer: int, width: int) -> float:
        return cut_parameters(axis, layer, width, shapes=shapes, config=config)

    def of_block(layer: int) -> float:
        return block_parameters(layer, shapes=shapes)

    return size_table(name, unit, total, price, of_block, space=space, axes=axes)


Price = Callable[[WidthAxis, int, int], float]  # of (axis, layer, width)
BlockPrice = Callable[[int], float]  # of a layer's whole block


def size_table(
    name: str,
    unit: str,
    total: float,
    price: Price,
    of_block: BlockPrice,
    *,
    space: SearchSpace,
    axes: tuple[Axis, ...],
) -> CostTable:
    """A table from the cost of the whole model, of widths and of blocks; the constant is the rest."""
    prices = price_rows(price, of_block, space=space, axes=axes)
    constant = total - sum(row[-1] for row in prices)
    return CostTable(name, unit, space, constant=constant, prices=prices, whole=total)


def price_rows(price: Price, of_block: BlockPrice, *, space: SearchSpace, axes: tuple[Axis, ...]) -> Rows:
    """The prices of a space's choices. A block that may be skipped costs what no width site of it says, and these."""
    by_name = {axis.name: axis for axis in width_axes(axes)}
    rows = {
        site: tuple(price(by_name[site.axis], site.layer, width) for width in widths)
        for site, widths in space.choices.items()
        if site.axis in by_name
    }
    for depth in space.axes.get(DEPTH, ()):
        inside = sum(rows[site][-1] for site, block in space.depth_sites.items() if block == depth)
        rows[depth] = (0, of_block(depth.layer) - inside)
    return beside_depth(rows, space)
