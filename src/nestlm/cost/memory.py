"""Cost: the memory that a stand-alone sub-network holds while it generates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from typing_extensions import override

from nestlm.cost.static import block_parameters, outer_parameters, refuse_per_token, size_table
from nestlm.cost.table import Cost, CostTable
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import block_shapes
from nestlm.errors import ConfigError
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import SERVES_LATER_TOKENS
from nestlm.spec import SearchSpace


@dataclass(frozen=True)
class Memory(Cost):
    """Bytes of weights and KV cache; activations and what a runtime reserves are left out.

    Attributes:
        batch_size: sequences that are generated at once.
        context_length: tokens of each that the cache holds.
        bytes_per_element: of a weight; 2 for bfloat16, 0.5 for four bits.
        cache_bytes_per_element: of a key or a value.
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

    @override
    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        refuse_per_token("memory", per_token=per_token)
        return size_table(
            "memory",
            "bytes",
            outside=self.bytes_per_element * outer_parameters(config),
            of_block=lambda block: self.of_block(block, config=config),
            space=space,
            axes=axes,
            config=config,
        )

    def of_block(self, block: BlockConfig, *, config: DecoderConfig) -> float:
        """Count the bytes of a block's weights, and of the keys and values that its projections give the cache."""
        shapes = block_shapes(block, config=config)
        cached = sum(shape[0] for name in SERVES_LATER_TOKENS if (shape := shapes.get(f"{name}.weight")) is not None)
        tokens = self.batch_size * self.context_length
        weights = self.bytes_per_element * block_parameters(block, config=config)
        return weights + tokens * self.cache_bytes_per_element * cached
