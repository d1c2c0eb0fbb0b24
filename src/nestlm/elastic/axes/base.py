"""What an elasticity axis has to say; everything else (slices, sorting, extraction, prices) follows from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nestlm.errors import ConfigError
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import SearchSpace, Site


@dataclass(frozen=True)
class Cut:
    """A parameter of the block that an axis cuts: `rows` entries along `dim` belong to one unit.

    `serves_later_tokens` is True where later tokens read what it computes (K and V): one choice a token cannot cut it.
    """

    parameter: str
    dim: int
    rows: int
    serves_later_tokens: bool = False


class Axis(ABC):
    """One elasticity axis: the unit that a choice counts, and where there are choices."""

    name: ClassVar[str]

    @abstractmethod
    def units(self, block: BlockConfig) -> int:
        """Number of units in a block."""

    @abstractmethod
    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        """The choices at every site, by layer.

        Raises:
            ConfigError: the settings name no choices in blocks of these sizes.
        """


@dataclass(frozen=True)
class WidthAxis(Axis):
    """An axis that leaves a prefix of a block's units.

    Attributes:
        fractions: the choices as shares of all units, ascending, ending in 1.0.
        multiple_of: widths other than the full one are rounded to a multiple of this.
    """

    mixes_tokens: ClassVar[bool] = False  # True where the units own a share of the attention scores
    fractions: tuple[float, ...]
    multiple_of: int = 1

    def sites(self, config: DecoderConfig) -> Mapping[Site, tuple[int, ...]]:
        return {Site(self.name, layer): self.choices(block) for layer, block in enumerate(config.blocks)}

    @abstractmethod
    def cuts(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[Cut, ...]:
        """The parameters that a choice cuts, biases included where the decoder has them."""

    @abstractmethod
    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        """The sizes of the block with `width` units left."""

    @abstractmethod
    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]]:
        """Module of the block whose input shows the units at work, and the shape (parts, entries) of one unit.

        One that is called as a module: `attn.o` or `mlp.down`. Maps into a site run together, as products.

        Importance is the L2 norm over entries, summed over parts and tokens.
        """

    def choices(self, block: BlockConfig) -> tuple[int, ...]:
        """Widths to choose from in a block; fractions that round to the same width are one choice.

        Raises:
            ConfigError: fractions are not ascending shares ending in 1.0, or one gives no unit.
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
            if not widths or width > widths[-1]:  # fractions whose widths meet are one choice
                widths.append(width)
        return tuple(widths)


def search_space(axes: tuple[Axis, ...], config: DecoderConfig) -> SearchSpace:
    """All sites of a model, axis by axis."""
    if not axes:
        raise ConfigError("axes: got none, wanted at least one elasticity axis, such as axes=mlp_heads")
    return SearchSpace({site: widths for axis in axes for site, widths in axis.sites(config).items()})


def width_axes(axes: tuple[Axis, ...]) -> tuple[WidthAxis, ...]:
    """Those that cut units out of blocks."""
    return tuple(axis for axis in axes if isinstance(axis, WidthAxis))
