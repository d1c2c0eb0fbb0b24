"""Base classes of elasticity axes, and the search space that axes span."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor
from typing_extensions import override

from nestlm.errors import ConfigError
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import SearchSpace, Site


class Axis(ABC):
    """One elasticity axis: what a unit is, where widths can be chosen, and what is left of a block at a width.

    `resize` is the only description of what an axis cuts. Sorting, extraction and prices build the resized block on the
    meta device and compare its parameters with those of the whole block (`nestlm.elastic.surgery`).

    Attributes:
        name: the part of a block that the axis cuts, by a name of `nestlm.spec`; policies get it in their `site`.
    """

    name: ClassVar[str]

    @abstractmethod
    def units(self, block: BlockConfig) -> int:
        """Count the units of a whole block. A width is a number of units, and the first units are kept."""

    @abstractmethod
    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        """Return the sizes of the block with `width` units, which may be 0 or more than the block has.

        Args:
            block: sizes of a block.
            width: number of units; 0 removes the whole part, its norm included.
        """

    @abstractmethod
    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        """Return the widths to choose from at every site, ascending, the last one with all units.

        Raises:
            ConfigError: the axis' settings are invalid for blocks of these sizes.
        """

    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]] | None:
        """Name the module of a block whose input shows how active each unit is.

        Rankings hook the module, so it must be one that is called, such as `attn.o` or `mlp.down`; projections that
        share an input are multiplied together, and their modules are not called.

        Returns:
            The module, and the shape (parts, entries) of one unit in its input: a unit's importance is the L2 norm over
            entries, summed over parts and tokens. None: the unit is the block itself, ranked by its influence on the
            residual stream.
        """
        del block, config
        return None

    def ranked(self, scores: Mapping[Site, Tensor], *, num_layers: int) -> Self:
        """Choose the sites of the axis by importance, and return the new axis.

        The default returns `self`. `Depth` overrides it: the least important blocks become those that can be skipped.

        Args:
            scores: importance of each unit, (units,) by site.
            num_layers: number of blocks.
        """
        del scores, num_layers
        return self

    def at_layers(self, layers: Sequence[int]) -> Self:
        """Return the axis with its sites in layers that `ranked` chose earlier; the default returns `self`."""
        del layers
        return self


@dataclass(frozen=True)
class WidthAxis(Axis):
    """An axis whose widths are fractions of a block's units, the same fractions in every block.

    Attributes:
        fractions: ascending, above 0, the last one 1.0.
        multiple_of: widths other than the full one are rounded to a multiple of this.
    """

    fractions: tuple[float, ...]
    multiple_of: int = 1

    @override
    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        return {Site(self.name, layer): self.choices(block) for layer, block in enumerate(config.blocks)}

    def choices(self, block: BlockConfig) -> tuple[int, ...]:
        """Return the widths to choose from in a block; fractions that round to the same width are one choice.

        Raises:
            ConfigError: the fractions are not ascending, do not lie above 0, do not end in 1.0, or round to 0 units.
        """
        where, units = f"axes.{self.name}", self.units(block)
        if self.multiple_of <= 0:
            raise ConfigError(f"{where}.multiple_of: got {self.multiple_of}, wanted a positive number of units")
        shares = list(self.fractions)
        if not shares or shares != sorted(shares) or shares[0] <= 0 or shares[-1] != 1.0:
            raise ConfigError(f"{where}.fractions: got {shares}, wanted ascending shares above 0 that end in 1.0")
        widths: list[int] = []
        for share in shares:
            width = units if share == 1.0 else math.floor(share * units / self.multiple_of + 0.5) * self.multiple_of
            if width == 0:
                raise ConfigError(
                    f"{where}.fractions: {share:g} of {units} units rounds to 0 (multiple_of={self.multiple_of}); "
                    "raise the fraction or lower multiple_of"
                )
            width = min(width, units)
            if not widths or width > widths[-1]:
                widths.append(width)
        return tuple(widths)


def search_space(axes: tuple[Axis, ...], config: DecoderConfig) -> SearchSpace:
    """Collect the sites of all axes, axis by axis.

    Raises:
        ConfigError: no axis, two axes at one place, or an axis with nothing to choose.
    """
    if not axes:
        raise ConfigError("axes: got none, wanted at least one elasticity axis, such as axes=mlp_heads")
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"axes: got {names.count(name)} axes that cut {name}, wanted one; leave the others out")
    return SearchSpace({site: widths for axis in axes for site, widths in axis.sites(config).items()})
