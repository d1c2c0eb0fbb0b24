"""Axis: which blocks run at all (our choice; Flextron does not cut this axis)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from nestlm.elastic.axes.base import Axis
from nestlm.errors import ConfigError
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import DEPTH, Site


@dataclass(frozen=True)
class Depth(Axis):
    """Unit: a whole block, attention and MLP, which is skipped (0) or runs (1).

    How many blocks may be skipped follows from the config, so that the search space has a size and prices before
    anything is trained: blocks cost alike. Which ones they are, the ranking says.

    Attributes:
        share: of the blocks, that may be skipped.
        layers: of these blocks, ascending; None before the ranking, where the last ones but the very last stand in.
    """

    name: ClassVar[str] = DEPTH
    share: float
    layers: tuple[int, ...] | None = None

    def units(self, block: BlockConfig) -> int:
        del block
        return 1

    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        layers = self.least_important([0.0] * len(config.blocks)) if self.layers is None else self.layers
        return {Site(DEPTH, layer): (0, 1) for layer in layers}

    def least_important(self, importance: list[float]) -> tuple[int, ...]:
        """The layers that may be skipped. Of equal ones the last but the very last, whose output nothing mends.

        Raises:
            ConfigError: the share is none, or leaves no block, or no block that always runs.
        """
        blocks = len(importance)
        count = math.floor(self.share * blocks + 0.5)
        if not 0 < self.share < 1 or not 0 < count < blocks:
            raise ConfigError(
                f"axes.depth.share: got {self.share:g} of {blocks} blocks, wanted a share that rounds to at least one "
                "block and leaves at least one that always runs; try axes.depth.share=0.5"
            )
        late_first = [*range(blocks - 2, -1, -1), blocks - 1]
        return tuple(sorted(sorted(late_first, key=lambda layer: importance[layer])[:count]))


def with_layers(axes: tuple[Axis, ...], scores: Mapping[Site, Tensor], *, num_layers: int) -> tuple[Axis, ...]:
    """The axes, of which depth names the blocks that a ranking finds least important. One without a score is at 0."""

    def named(axis: Axis) -> Axis:
        if not isinstance(axis, Depth):
            return axis
        importance = [float(scores.get(Site(DEPTH, layer), 0.0)) for layer in range(num_layers)]
        return replace(axis, layers=axis.least_important(importance))

    return tuple(named(axis) for axis in axes)
