"""Costs that follow from the sizes alone, counted on blocks that are built on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from nestlm.cost.table import Cost, CostTable, Rows, TokenTable, price_inside_blocks
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import block_shapes, resized_blocks
from nestlm.errors import BudgetError, ConfigError
from nestlm.nn.config import NO_BLOCK, BlockConfig, DecoderConfig
from nestlm.nn.decoder import SERVES_LATER_TOKENS, Decoder
from nestlm.spec import SearchSpace, Site

BlockCost = Callable[[BlockConfig], float]  # the cost of a stand-alone block of these sizes
TOLERANCE = 1e-9  # relative, of sums of prices


@dataclass(frozen=True)
class Params(Cost):
    """Parameters that a stand-alone sub-network stores; a tied embedding counts once."""

    prices_tokens: ClassVar[bool] = False

    @override
    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        refuse_per_token("params", per_token=per_token)
        return size_table(
            "params",
            "parameters",
            outside=outer_parameters(config),
            of_block=lambda block: block_parameters(block, config=config),
            space=space,
            axes=axes,
            config=config,
        )


@dataclass(frozen=True)
class ActiveParams(Cost):
    """Parameters that one token's forward pass reads: of an embedding that is not the head, one row."""

    prices_tokens: ClassVar[bool] = False

    @override
    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        refuse_per_token("active_params", per_token=per_token)
        unread = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.hidden_size
        return size_table(
            "active_params",
            "parameters",
            outside=outer_parameters(config) - unread,
            of_block=lambda block: block_parameters(block, config=config),
            space=space,
            axes=axes,
            config=config,
        )


@dataclass(frozen=True)
class Flops(Cost):
    """Forward FLOPs a token: two for each weight of a matrix product, plus the attention scores.

    Attributes:
        context_length: tokens a row, L; it sets the share of the attention scores.
    """

    prices_tokens: ClassVar[bool] = True
    context_length: int

    @override
    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        static = size_table(
            "flops",
            "FLOPs a token",
            outside=self.outside(config),
            of_block=lambda block: self.of_block(block, config=config),
            space=space,
            axes=axes,
            config=config,
        )
        if not per_token:
            return static
        served_later = price_rows(
            lambda block: 2 * block_parameters(block, config=config, names=SERVES_LATER_TOKENS, matrices=True),
            space=space,
            axes=axes,
            config=config,
        )
        shared = [row[-1] for row in served_later]
        prices = [
            tuple(price - later for price, later in zip(row, later_row, strict=True))
            for row, later_row in zip(static.prices, served_later, strict=True)
        ]
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

    def whole(self, config: DecoderConfig) -> int:
        """Count the FLOPs a token of a whole model."""
        return self.outside(config) + sum(self.of_block(block, config=config) for block in config.blocks)

    def outside(self, config: DecoderConfig) -> int:
        """Count the FLOPs a token of the head, tied or not. Looking up an embedding is no matrix product."""
        return 2 * config.vocab_size * config.hidden_size

    def of_block(self, block: BlockConfig, *, config: DecoderConfig) -> int:
        """Count the FLOPs a token of a block: its matrix products, and attention over a whole row.

        Attention is two products, scores and their weighted sum, without a discount for causality. Norms and biases are
        left out, as in `torch.utils.flop_counter`.
        """
        scores = 2 * 2 * self.context_length * block.num_heads * config.head_dim
        return 2 * block_parameters(block, config=config, matrices=True) + scores


def block_parameters(
    block: BlockConfig, *, config: DecoderConfig, names: tuple[str, ...] | None = None, matrices: bool = False
) -> int:
    """Count the parameters of a block that is built on the meta device.

    Args:
        block: sizes of the block.
        config: the decoder that the block belongs to.
        names: modules whose parameters count, such as `attn.k`; None: all.
        matrices: whether only matrices count, not norms and biases.
    """
    return sum(
        math.prod(shape)
        for name, shape in block_shapes(block, config=config).items()
        if (names is None or name.rpartition(".")[0] in names) and (len(shape) == 2 or not matrices)
    )


def outer_parameters(config: DecoderConfig) -> int:
    """Count the parameters outside the blocks: embedding, final norm, and the head where it is not tied."""
    return sum(each.numel() for each in Decoder.on_meta(replace(config, blocks=(NO_BLOCK,))).parameters())


def refuse_per_token(name: str, *, per_token: bool) -> None:
    """Raise BudgetError where a cost of what is stored is asked to price choices per token."""
    if per_token:
        raise BudgetError(
            f"cost: got {name} for a dynamic router, which stores all weights and the whole cache, so it takes FLOP "
            "and latency budgets only; try cost=flops"
        )


def size_table(
    name: str,
    unit: str,
    *,
    outside: float,
    of_block: BlockCost,
    space: SearchSpace,
    axes: tuple[Axis, ...],
    config: DecoderConfig,
) -> CostTable:
    """Make the cost table of what is counted on the blocks of a stand-alone sub-network.

    Args:
        name: of the cost.
        unit: what one is.
        outside: cost of what no block holds.
        of_block: cost of a block, which is called with the sizes that each choice leaves.
        space: the choices.
        axes: the axes of the space's sites.
        config: sizes of the whole model.

    Raises:
        ConfigError: the prices do not add up to the smallest sub-network's cost, since axes cut the same part.
    """
    whole = outside + sum(of_block(block) for block in config.blocks)
    prices = price_rows(of_block, space=space, axes=axes, config=config)
    table = CostTable(name, unit, space, constant=whole - sum(row[-1] for row in prices), prices=prices, whole=whole)
    smallest = space.smallest()
    counted = outside + sum(of_block(block) for block in resized_blocks(config, smallest, axes=axes))
    if not math.isclose(table.cost(smallest), counted, rel_tol=TOLERANCE):
        raise ConfigError(
            f"axes: {', '.join(axis.name for axis in axes)} together leave a model of {counted:g} {unit}, but their "
            f"prices sum to {table.cost(smallest):g}; wanted axes that each resize a part of the block of its own"
        )
    return table


def price_rows(of_block: BlockCost, *, space: SearchSpace, axes: tuple[Axis, ...], config: DecoderConfig) -> Rows:
    """Price every choice: what the block costs at that width, less what it costs without the site's part.

    Args:
        of_block: cost of a block of given sizes.
        space: the choices.
        axes: the axes of the space's sites.
        config: sizes of the whole model.
    """
    by_name = {axis.name: axis for axis in axes}
    rows: dict[Site, tuple[float, ...]] = {}
    for site, widths in space.choices.items():
        axis, block = by_name[site.axis], config.blocks[site.layer]
        without = of_block(axis.resize(block, 0))
        rows[site] = tuple(of_block(axis.resize(block, width)) - without for width in widths)
    for site, block_site in space.enclosing.items():  # what a block's sites cost is theirs; the block has the rest
        skipped, runs = rows[block_site]
        rows[block_site] = (skipped, runs - rows[site][-1])
    return price_inside_blocks(rows, space)
