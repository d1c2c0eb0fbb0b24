"""Cost: what a stand-alone sub-network holds in memory while it generates."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from nestlm.cost.static import block_parameters, cut_parameters, parameter_shapes, refuse_per_token, size_table
from nestlm.cost.table import CostTable
from nestlm.elastic.axes.base import Axis, WidthAxis
from nestlm.errors import ConfigError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import SearchSpace


@dataclass(frozen=True)
class Memory:
    """Weights and KV cache; activations and what a runtime reserves are left out.

    Attributes:
        batch_size: sequences that are generated at once.
        context_length: tokens that the cache holds for each.
        bytes_per_element: of a weight; 2 for bfloat16, 0.5 for four bits.
        cache_bytes_per_element: of K and V.
    """

    prices_tokens: ClassVar[bool] = False
    batch_size: int
    context_length: int
    bytes_per_element: float
    cache_bytes_per_element: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ConfigError(f"cost.{field.name}: got {value}, wanted a positive number")

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice; sums equal the bytes of the extracted model's parameters and of its K and V."""
        refuse_per_token("memory", per_token=per_token)
        shapes = parameter_shapes(config)
        bytes_per_row = self.batch_size * self.context_length * self.cache_bytes_per_element
        rows = [2 * block.num_kv_groups * config.head_dim for block in config.blocks]
        weights = sum(math.prod(shape) for shape in shapes.values())

        def price(axis: WidthAxis, layer: int, width: int) -> float:
            elements = cut_parameters(axis, layer, width, shapes=shapes, config=config)
            cuts = axis.cuts(config.blocks[layer], config=config)
            cached = sum(
                cut.rows * width for cut in cuts if cut.serves_later_tokens and cut.parameter.endswith("weight")
            )
            return self.bytes_per_element * elements + bytes_per_row * cached

        def of_block(layer: int) -> float:
            return self.bytes_per_element * block_parameters(layer, shapes=shapes) + bytes_per_row * rows[layer]

        total = self.bytes_per_element * weights + bytes_per_row * sum(rows)
        return size_table("memory", "bytes", total, price, of_block, space=space, axes=axes)
