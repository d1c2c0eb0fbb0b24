"""Axis: how many neurons of the MLP run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from nestlm.elastic.axes.base import WidthAxis
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import MLP_WIDTH


@dataclass(frozen=True)
class MLPWidth(WidthAxis):
    """Unit: one neuron, with its row of gate (where there is one) and up and its column of down."""

    name: ClassVar[str] = MLP_WIDTH

    @override
    def units(self, block: BlockConfig) -> int:
        return block.mlp_width

    @override
    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, mlp_width=width)

    @override
    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]]:
        return "mlp.down", (1, 1)
