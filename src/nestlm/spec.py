"""Sites, sub-network specs, search spaces and budgets: frozen values, free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nestlm.errors import BudgetError

MLP_WIDTH = "mlp_width"
ATTN_HEADS = "attn_heads"


@dataclass(frozen=True, order=True)
class Site:
    """One elastic place: an axis in a layer."""

    axis: str
    layer: int

    def __str__(self) -> str:
        return f"{self.axis}[{self.layer}]"


@dataclass(frozen=True)
class SubnetSpec:
    """One width per site, in units of the site's axis (neurons, KV groups): it names one sub-network."""

    sites: tuple[Site, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.sites) == len(self.widths), "one width per site"

    @cached_property
    def _by_site(self) -> dict[Site, int]:
        return dict(zip(self.sites, self.widths, strict=True))

    def __getitem__(self, site: Site) -> int:
        return self._by_site[site]

    def get(self, site: Site) -> int | None:
        """Width at a site, or None where the site is not elastic (it then runs whole)."""
        return self._by_site.get(site)

    def items(self) -> Iterator[tuple[Site, int]]:
        """Pairs of site and width, in the order of the space."""
        return zip(self.sites, self.widths, strict=True)

    def by_axis(self) -> dict[str, list[int]]:
        """Widths as lists over layers, one an axis: the form in which a spec is stored."""
        lists: dict[str, list[int]] = {}
        for site, width in self.items():
            lists.setdefault(site.axis, []).append(width)
        return lists


@dataclass(frozen=True)
class SearchSpace:
    """The choices at every site: ascending widths, the last one the full width."""

    choices: Mapping[Site, tuple[int, ...]]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the one order that specs, costs and routers share."""
        return tuple(self.choices)

    @cached_property
    def axes(self) -> dict[str, tuple[Site, ...]]:
        """The sites of each axis, by layer."""
        groups: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            groups[site.axis] = (*groups.get(site.axis, ()), site)
        return groups

    @property
    def size(self) -> int:
        """Number of sub-networks."""
        return math.prod(len(widths) for widths in self.choices.values())

    @property
    def max_choices(self) -> int:
        """K of the site with the most choices."""
        return max(len(widths) for widths in self.choices.values())

    def spec(self, indices: Mapping[Site, int]) -> SubnetSpec:
        """The spec that takes, at each site, the choice of that index (-1 is the full width)."""
        return SubnetSpec(self.sites, tuple(self.choices[site][indices[site]] for site in self.sites))

    def full(self) -> SubnetSpec:
        """The whole model."""
        return self.spec(dict.fromkeys(self.sites, -1))

    def smallest(self) -> SubnetSpec:
        """The narrowest choice everywhere."""
        return self.spec(dict.fromkeys(self.sites, 0))

    def indices(self, spec: SubnetSpec) -> tuple[int, ...]:
        """Choice index per site. Raises ValueError when a width is none of the site's choices."""
        return tuple(self.choices[site].index(spec[site]) for site in self.sites)


@dataclass(frozen=True)
class Budget:
    """What a deployment allows, as a share of the full model's cost."""

    share: float

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """Read a budget as written in a config.

        Raises:
            BudgetError: not a number, not positive, or above the full model.
        """
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = math.nan
        if isinstance(value, bool) or not math.isfinite(share):
            raise BudgetError(f"budget: got {value!r}, wanted a share of the full model's cost, such as 0.6")
        if not 0.0 < share <= 1.0:
            raise BudgetError(
                f"budget: got {value!r}, wanted a share above 0 and at most 1.0, the full model; try budget=0.6"
            )
        return cls(share)

    @classmethod
    def parse_all(cls, value: Any) -> tuple[Budget, ...]:
        """Read one budget or a list of them; without repeats, the largest first."""
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise BudgetError("budget: got an empty list, wanted at least one share, such as budget=[0.8,0.6]")
        return tuple(sorted({cls.parse(item) for item in values}, key=lambda budget: -budget.share))

    def __str__(self) -> str:
        return f"{self.share:g}"
