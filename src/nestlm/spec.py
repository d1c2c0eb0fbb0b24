"""The vocabulary of nested models as frozen values, without torch.

- A *site* is one elastic place: an axis (such as the MLP width) in a layer.
- A *choice* is one of the widths that a site can take, in units of its axis (neurons, KV groups; 0 or 1 for depth).
- A *spec* is one choice per site: it names one sub-network.
- A *search space* lists the choices of every site, and so all sub-networks.
- A *budget* is a set of limits on costs (FLOPs, latency, memory, parameters) that a sub-network must keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nestlm.errors import BudgetError

# Places in every block where the decoder asks its policy. An axis is named after the place that it cuts; `DEPTH` is the
# whole block, attention and MLP.
MLP_WIDTH = "mlp_width"
ATTN_HEADS = "attn_heads"
DEPTH = "depth"

# The kinds of cost that a budget can limit, each with the base unit in which it is counted.
KINDS = {
    "latency": "ms",
    "flops": "FLOPs a token",
    "memory": "bytes",
    "params": "parameters",
    "active_params": "parameters",
}
# Units of absolute limits: the kind of cost that each measures, and its factor to that kind's base unit.
UNITS = {
    "us": ("latency", 1e-3),
    "ms": ("latency", 1.0),
    "s": ("latency", 1e3),
    "B": ("memory", 1.0),
    "KB": ("memory", 1e3),
    "MB": ("memory", 1e6),
    "GB": ("memory", 1e9),
    "KiB": ("memory", 2.0**10),
    "MiB": ("memory", 2.0**20),
    "GiB": ("memory", 2.0**30),
}
QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z_%]*)\s*")


@dataclass(frozen=True, order=True)
class Site:
    """One elastic place of the model: an axis in a layer."""

    axis: str
    layer: int

    @property
    def is_block(self) -> bool:
        """Whether the site chooses if its block runs at all, so that choice 0 skips the block's other sites."""
        return self.axis == DEPTH

    def __str__(self) -> str:
        return f"{self.axis}[{self.layer}]"


@dataclass(frozen=True)
class SubnetSpec:
    """One width per site: it names one sub-network.

    Attributes:
        sites: all sites of the search space, in its order.
        widths: the width at each of them, in units of the site's axis (neurons, KV groups; 0 or 1 for depth).
    """

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
        """Return the width at a site, or None for a site that is not elastic and always runs at full width."""
        return self._by_site.get(site)

    def items(self) -> Iterator[tuple[Site, int]]:
        """Iterate over pairs of site and width, in the order of the search space."""
        return zip(self.sites, self.widths, strict=True)

    def widths_by_axis(self) -> dict[str, list[int]]:
        """Return, for each axis, the widths over its layers. Files store a spec in this form."""
        lists: dict[str, list[int]] = {}
        for site, width in self.items():
            lists.setdefault(site.axis, []).append(width)
        return lists


@dataclass(frozen=True)
class SearchSpace:
    """The choices of every site, and so all sub-networks.

    Attributes:
        choices: the widths of each site in ascending order; the last one is the full width.
    """

    choices: Mapping[Site, tuple[int, ...]]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the order that specs, costs and routers share."""
        return tuple(self.choices)

    @cached_property
    def axes(self) -> dict[str, tuple[Site, ...]]:
        """The sites of each axis, by layer."""
        groups: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            groups[site.axis] = (*groups.get(site.axis, ()), site)
        return groups

    @cached_property
    def block_sites(self) -> tuple[Site, ...]:
        """The sites that choose whether their block runs, by layer; other blocks always run."""
        return tuple(site for site in self.sites if site.is_block)

    @cached_property
    def enclosing(self) -> dict[Site, Site]:
        """For each site inside a block that may be skipped: the site that chooses whether that block runs."""
        blocks = {site.layer: site for site in self.block_sites}
        return {site: blocks[site.layer] for site in self.sites if not site.is_block and site.layer in blocks}

    @property
    def size(self) -> int:
        """Number of different sub-networks; widths inside a skipped block do not count."""
        by_layer: dict[int, int] = {}
        for site, widths in self.choices.items():
            if not site.is_block:
                by_layer[site.layer] = by_layer.get(site.layer, 1) * len(widths)
        for site in self.block_sites:
            by_layer[site.layer] = by_layer.get(site.layer, 1) + 1
        return math.prod(by_layer.values())

    @property
    def max_choices(self) -> int:
        """Largest number of choices at any site, K."""
        return max(len(widths) for widths in self.choices.values())

    def runs(self, site: Site, indices: Mapping[Site, int]) -> bool:
        """Return whether a site's choice has an effect, that is, whether its block is not skipped.

        Args:
            site: the site.
            indices: the choice index at every site.
        """
        block = self.enclosing.get(site)
        return block is None or indices[block] != 0

    def spec(self, indices: Mapping[Site, int]) -> SubnetSpec:
        """Build the spec with the given choice index at each site; -1 is the full width.

        Sites of a skipped block take their smallest choice, so that each sub-network has exactly one spec.
        """
        indices = {site: indices[site] if self.runs(site, indices) else 0 for site in self.sites}
        return SubnetSpec(self.sites, tuple(self.choices[site][indices[site]] for site in self.sites))

    def full(self) -> SubnetSpec:
        """Return the spec of the full model."""
        return self.spec(dict.fromkeys(self.sites, -1))

    def smallest(self) -> SubnetSpec:
        """Return the spec with the smallest choice at every site."""
        return self.spec(dict.fromkeys(self.sites, 0))

    def spec_from_axes(self, lists: Mapping[str, list[int]]) -> SubnetSpec:
        """Build a spec from the lists that `SubnetSpec.widths_by_axis` returns.

        Raises:
            ValueError: axes, numbers of layers or widths are not those of this space.
        """
        if set(lists) != set(self.axes):
            raise ValueError(f"got widths of {sorted(lists)}, wanted those of {sorted(self.axes)}")
        widths = {
            site: width for axis, sites in self.axes.items() for site, width in zip(sites, lists[axis], strict=True)
        }
        spec = SubnetSpec(self.sites, tuple(widths[site] for site in self.sites))
        self.indices(spec)
        return spec

    def indices(self, spec: SubnetSpec) -> tuple[int, ...]:
        """Return the choice index at every site. Raises ValueError for a width that is not among the site's choices."""
        return tuple(self.choices[site].index(spec[site]) for site in self.sites)


@dataclass(frozen=True)
class Limit:
    """An upper limit on one kind of cost.

    Attributes:
        amount: a share of the full model's cost, or an absolute number.
        unit: None for a share of the cost that the run counts, else a kind of cost or a unit of `UNITS`.
    """

    amount: float
    unit: str | None

    @classmethod
    def parse(cls, value: Any) -> Limit:
        """Parse `0.6`, `60%`, `0.6memory`, `3.4e9params` or `12ms`.

        Raises:
            BudgetError: the text has another form, the unit is unknown, the amount is not positive or a share above 1.
        """
        found = QUANTITY.fullmatch(f"{value!r}" if isinstance(value, int | float) else str(value))
        if found is None or isinstance(value, bool) or not math.isfinite(amount := float(found.group(1))):
            raise BudgetError(f"budget: got {value!r}, wanted a share such as 0.6, or a number and a unit such as 4GiB")
        unit = found.group(2) or None
        if unit is not None and unit not in {"%", *KINDS, *UNITS}:
            raise BudgetError(
                f"budget: got {value!r} with the unit {unit!r}, wanted one of %, {', '.join((*KINDS, *UNITS))}; "
                "try budget=0.6, a share of the run's cost"
            )
        amount, unit = (amount / 100, None) if unit == "%" else (amount, unit)
        if amount <= 0 or (unit is None and amount > 1):
            raise BudgetError(
                f"budget: got {value!r}, wanted a share above 0 and at most 1.0, the full model, or a positive number "
                "with a unit; try budget=0.6"
            )
        return cls(amount, unit)

    @property
    def kind(self) -> str | None:
        """The kind of cost that is limited; None for the cost that the run counts."""
        return UNITS[self.unit][0] if self.unit in UNITS else self.unit

    @property
    def is_share(self) -> bool:
        """Whether the amount is a share of the full model's cost; False for an absolute number."""
        return self.unit not in UNITS and (self.unit is None or self.amount <= 1.0)

    @property
    def factor(self) -> float:
        """Factor from the limit's unit to the base unit of its kind, such as 1e9 for GB."""
        return UNITS[self.unit][1] if self.unit in UNITS else 1.0

    def __str__(self) -> str:
        return f"{self.amount!r}".removesuffix(".0") + (self.unit or "")


@dataclass(frozen=True)
class Budget:
    """The limits of a deployment; a sub-network must keep all of them."""

    limits: tuple[Limit, ...]

    @classmethod
    def from_share(cls, share: float) -> Budget:
        """Build a budget from a share, such as 0.6, of the full model's cost, of the kind that the run counts."""
        return cls((Limit(float(share), None),))

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """Parse one budget of a config: one limit, or a list of limits that hold together.

        Raises:
            BudgetError: the list is empty, or `Limit.parse` refuses an item.
        """
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise BudgetError("budget: got an empty list, wanted at least one limit, such as budget=[0.8,0.6]")
        return cls(tuple(Limit.parse(item) for item in values))

    @classmethod
    def from_str(cls, text: str) -> Budget:
        """Parse the text that `str(budget)` returns: limits joined by `+`.

        Raises:
            BudgetError: `Limit.parse` refuses a part.
        """
        return cls(tuple(Limit.parse(part) for part in re.split(r"(?<![eE])\+", text)))

    @classmethod
    def parse_all(cls, value: Any) -> tuple[Budget, ...]:
        """Parse one budget or a list of budgets; returns them without repeats, plain shares first, the largest first.

        A list inside the list is one budget of several limits: `[[0.6, "4GiB"], 0.5]`.

        Raises:
            BudgetError: the list is empty, or `Limit.parse` refuses an item.
        """
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise BudgetError("budget: got an empty list, wanted at least one budget, such as budget=[0.8,0.6]")
        budgets = dict.fromkeys(cls.parse(item) for item in values)

        def sort_key(budget: Budget) -> float:
            is_share = len(budget.limits) == 1 and budget.limits[0].unit is None
            return -budget.limits[0].amount if is_share else 0.0

        return tuple(sorted(budgets, key=sort_key))

    def __str__(self) -> str:
        return "+".join(map(str, self.limits))
