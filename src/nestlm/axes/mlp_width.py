"""Axis: how many neurons of the MLP run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nestlm.axes.base import Axis, Cut
from nestlm.nn.config import BlockConfig
from nestlm.spec import MLP_WIDTH


@dataclass(frozen=True)
class MLPWidth(Axis):
    """Unit: one neuron, with its row of gate and up and its column of down."""

    name: ClassVar[str] = MLP_WIDTH

    def units(self, block: BlockConfig) -> int:
        return block.mlp_width

    def cuts(self, block: BlockConfig, *, head_dim: int) -> tuple[Cut, ...]:
        return Cut("mlp.gate.weight", 0, 1), Cut("mlp.up.weight", 0, 1), Cut("mlp.down.weight", 1, 1)

    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, mlp_width=width)

    def observed(self, block: BlockConfig, *, head_dim: int) -> tuple[str, tuple[int, int]]:
        return "mlp.down", (1, 1)
