"""Axis: which blocks run at all (our choice; Flextron does not cut this axis)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor
from typing_extensions import override

from nestlm.elastic.axes.base import Axis
from nestlm.errors import ConfigError
from nestlm.nn.config import NO_BLOCK, BlockConfig, DecoderConfig
from nestlm.spec import DEPTH, Site


@dataclass(frozen=True)
class Depth(Axis):
    """Unit: a whole block, attention and MLP, which is skipped (0) or runs (1).

    `share` sets how many blocks can be skipped. So the size of the search space and its prices are known before
    training, while the ranking decides later which blocks they are.

    Attributes:
        share: share of the blocks that can be skipped, above 0 and below 1.
        layers: indices of the blocks that can be skipped, ascending. None before the ranking: then the last blocks
            except the very last one are used, which have the same price.
    """

    name: ClassVar[str] = DEPTH
    share: float
    layers: tuple[int, ...] | None = None

    @override
    def units(self, block: BlockConfig) -> int:
        return 1

    @override
    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return block if width else NO_BLOCK

    @override
    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        layers = self.least_important([0.0] * len(config.blocks)) if self.layers is None else self.layers
        return {Site(DEPTH, layer): (0, 1) for layer in layers}

    @override
    def ranked(self, scores: Mapping[Site, Tensor], *, num_layers: int) -> Self:
        importance = [float(scores.get(Site(DEPTH, layer), 0.0)) for layer in range(num_layers)]
        return replace(self, layers=self.least_important(importance))

    @override
    def at_layers(self, layers: Sequence[int]) -> Self:
        return replace(self, layers=tuple(layers))

    def least_important(self, importance: list[float]) -> tuple[int, ...]:
        """Return the layers that may be skipped, given the importance of every layer.

        Of equally important layers, later ones come first, except the very last layer: no later block could compensate
        for it.

        Raises:
            ConfigError: the share rounds to no block or to all blocks.
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
