"""Axis: how many neurons of the MLP run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nestlm.elastic.axes.base import Cut, WidthAxis
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import MLP_WIDTH


@dataclass(frozen=True)
class MLPWidth(WidthAxis):
    """Unit: one neuron, with its row of gate (where there is one) and up and its column of down."""

    name: ClassVar[str] = MLP_WIDTH

    def units(self, block: BlockConfig) -> int:
        return block.mlp_width

    def cuts(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[Cut, ...]:
        projections = ("gate", "up") if config.gated_mlp else ("up",)
        kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
        projected = [Cut(f"mlp.{name}.{kind}", 0, 1) for name in projections for kind in kinds]
        return (*projected, Cut("mlp.down.weight", 1, 1))

    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, mlp_width=width)

    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]]:
        return "mlp.down", (1, 1)
