"""Cost tables: a constant plus a price for each choice, which price specs and distributions alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.elastic.axes.base import Axis
from nestlm.errors import BudgetError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import Budget, Limit, SearchSpace, Site, SubnetSpec

Rows = tuple[tuple[float, ...], ...]  # of prices: one a choice, one row a site


@dataclass(frozen=True)
class CostTable:
    """Prices in one unit. A spec's cost is the constant plus the price of its choice at every site.

    Attributes:
        name: name of the cost, such as `params`.
        unit: unit of all prices, such as `FLOPs a token`.
        space: the choices that are priced.
        constant: cost that does not depend on choices.
        prices: for each site, one price for each choice, aligned to `space.choices`; wider is never cheaper.
        whole: cost of the whole model, to which shares refer.
    """

    name: str
    unit: str
    space: SearchSpace
    constant: float
    prices: tuple[tuple[float, ...], ...]
    whole: float

    @property
    def cheapest(self) -> float:
        """Cost of the smallest sub-network, in the table's unit."""
        return self.cost(self.space.smallest())

    def cost(self, spec: SubnetSpec) -> float:
        """Return the cost of a spec, in the table's unit."""
        choices = zip(self.prices, self.space.indices(spec), strict=True)
        return self.constant + sum(prices[index] for prices, index in choices)

    def share(self, spec: SubnetSpec) -> float:
        """Return the cost of a spec relative to the whole model's."""
        return self.cost(spec) / self.whole

    @cached_property
    def shares(self) -> Tensor:
        """Prices relative to the cost of the whole model, (sites, max choices); 0 where a site has fewer choices."""
        table = torch.zeros(len(self.space.sites), self.space.max_choices, dtype=torch.float64)
        for row, prices in enumerate(self.prices):
            table[row, : len(prices)] = torch.tensor(prices, dtype=torch.float64) / self.whole
        return table

    def expected_share(self, probabilities: Tensor) -> Tensor:
        """Return the expected cost of distributions over choices, relative to the whole model's, with gradients.

        Args:
            probabilities: (..., sites, max choices); the result is (...).
        """
        shares = self.shares.to(probabilities)
        return self.constant / self.whole + (probabilities * shares).sum((-2, -1))


@dataclass(frozen=True)
class TokenTable(CostTable):
    """Prices of choices that are made for each token; `constant` and `prices` assume that every site decides.

    A site at which all tokens take the same choice needs no decision: its part of the constant, `shared`, falls away,
    and it has the price of a sub-network, `fixed`.

    Attributes:
        shared: for each site, the cost of deciding whatever is chosen: K and V for later tokens, and the router.
        fixed: per site, one price a choice, where all tokens take the same; None where every site decides.
        router: per site, what a router adds to `shared`: for each unit of its network's hidden width, and in any case.
    """

    shared: tuple[float, ...]
    fixed: tuple[tuple[float, ...], ...] | None
    router: tuple[tuple[float, float], ...]

    @property
    @override
    def cheapest(self) -> float:
        if self.fixed is None:
            return self.cost(self.space.smallest())
        sites = zip(self.fixed, self.prices, self.shared, strict=True)
        return self.constant + sum(min(fixed[0] - shared, prices[0]) for fixed, prices, shared in sites)

    @property
    def alike(self) -> CostTable:
        """The table of static prices, for tokens that all take the same choice at every site."""
        assert self.fixed is not None, "some sites can be fixed"
        constant = self.constant - sum(self.shared)
        return CostTable(self.name, self.unit, self.space, constant=constant, prices=self.fixed, whole=self.whole)

    def with_router(self, hidden_width: int) -> TokenTable:
        """Return the table with the cost of a router's network of that hidden width at every site that decides."""
        own = [per_unit * hidden_width + at_all for per_unit, at_all in self.router]
        shared = tuple(before + added for before, added in zip(self.shared, own, strict=True))
        return replace(self, constant=self.constant + sum(own), shared=shared, router=((0.0, 0.0),) * len(own))

    def after_prompt(self, prompt_share: float) -> TokenTable:
        """Return mean prices for sequences whose first tokens, a share of `prompt_share`, run at full width."""
        rest = 1.0 - prompt_share
        constant = rest * self.constant + prompt_share * self.cost(self.space.full())
        prices = tuple(tuple(rest * price for price in row) for row in self.prices)
        return replace(self, constant=constant, prices=prices, fixed=None)


@dataclass(frozen=True)
class Bound:
    """One limit of a budget, as a share of the whole model's cost in one table."""

    table: CostTable
    share: float

    def fits(self, spec: SubnetSpec) -> bool:
        """Return whether a spec costs at most the bound. All code that keeps a budget uses this comparison."""
        return self.table.share(spec) <= self.share


@dataclass(frozen=True)
class PriceList:
    """The cost tables that a budget can limit.

    Attributes:
        main: table of the run's own cost, to which a budget without a name refers.
        others: further tables, by their names.
        per_token: whether the tables price choices per token.
    """

    main: CostTable
    others: Mapping[str, CostTable]
    per_token: bool = False

    def change(self, change: Callable[[CostTable], CostTable]) -> PriceList:
        """Return the list with `change` applied to every table."""
        others = {name: change(table) for name, table in self.others.items()}
        return replace(self, main=change(self.main), others=others)

    @property
    def space(self) -> SearchSpace:
        """The choices that are priced."""
        return self.main.space

    @property
    def tables(self) -> dict[str, CostTable]:
        """All tables by name, the run's own first."""
        return {self.main.name: self.main, **self.others}

    def bounds(self, budget: Budget) -> tuple[Bound, ...]:
        """Convert each limit of a budget to a share of the whole model's cost in its table.

        Each limit is checked against the smallest sub-network, which is the cheapest in every table.

        Raises:
            BudgetError: a limit has no table, is an absolute amount above the whole model's, or lies below the smallest
                sub-network.
        """
        return tuple(self._bound(limit) for limit in budget.limits)

    def check(self, budget: Budget) -> None:
        """Raise the BudgetError of `bounds`, for example if no sub-network keeps the budget."""
        self.bounds(budget)

    def fits(self, spec: SubnetSpec, budget: Budget) -> bool:
        """Return whether a spec keeps every limit of a budget."""
        return all(bound.fits(spec) for bound in self.bounds(budget))

    def tightest(self, budget: Budget) -> float:
        """Return the smallest share that a budget allows of any kind, which routers take as their input."""
        return min(bound.share for bound in self.bounds(budget))

    def _bound(self, limit: Limit) -> Bound:
        table = self.main if limit.kind is None else self.tables.get(limit.kind)
        if table is None and self.per_token:
            raise BudgetError(
                f"budget: got {limit}, but a dynamic router stores all weights and the whole cache, so it takes FLOP "
                f"and latency budgets only; this run prices {', '.join(self.tables)}; try router.policy=static"
            )
        if table is None:
            raise BudgetError(
                f"budget: got {limit}, a limit of {limit.kind}, which has no prices in this run, wanted one of "
                f"{', '.join(self.tables)}; try cost={limit.kind}"
            )
        bound = Bound(table, share_of(limit, table))
        if not limit.is_share and bound.share > 1.0:
            raise BudgetError(
                f"budget: got {limit}, but the full model's {table.name} is {nearby(limit, table, table.whole)}; "
                "ask for at most that, or leave this limit out"
            )
        if table.cheapest / table.whole > bound.share:
            raise BudgetError(
                f"budget: got {limit} ({table.name}), but the smallest sub-network costs "
                f"{nearby(limit, table, table.cheapest)}; ask for at least that, or give axes smaller fractions"
            )
        return bound


def share_of(limit: Limit, table: CostTable) -> float:
    """Convert a limit into a share of the whole model's cost."""
    return limit.amount if limit.is_share else limit.amount * limit.factor / table.whole


def nearby(limit: Limit, table: CostTable, cost: float) -> Limit:
    """Round a cost to a short limit in the same unit that can be asked for: up, or down for the whole model's cost."""
    exact = cost / (table.whole if limit.is_share else limit.factor)
    floor = table.cheapest / table.whole
    for digits in range(3, 16):
        step = 10.0 ** (math.floor(math.log10(exact)) - digits)
        rounded = math.floor(exact / step) if cost == table.whole else math.ceil(exact / step)
        candidate = Limit(float(f"{rounded * step:.{digits}e}"), limit.unit)
        if candidate.is_share == limit.is_share and floor <= share_of(candidate, table) <= 1.0:
            return candidate
    return Limit(exact, limit.unit)


def price_inside_blocks(rows: Mapping[Site, tuple[float, ...]], space: SearchSpace) -> Rows:
    """Make prices add up where blocks may be skipped, together with the sites inside them.

    A block that runs is charged the smallest widths of its sites, and a site only what a wider choice adds. Then a
    skipped block, whose sites all take their smallest choice, costs nothing.

    Args:
        rows: prices of every site by itself; of a site that is a block, (0, price of what its other sites do not hold).
        space: the choices.

    Returns:
        The prices as a cost table holds them, in the order of the space.
    """
    added = dict(rows)
    for site, block_site in space.enclosing.items():
        smallest = rows[site][0]
        added[site] = tuple(price - smallest for price in rows[site])
        skipped, runs = added[block_site]
        added[block_site] = (skipped, runs + smallest)
    return tuple(added[site] for site in space.sites)


class Cost(Protocol):
    """A way to price choices, one plug-in of the config group `cost`.

    Attributes:
        prices_tokens: whether the cost depends on what single tokens choose.
    """

    prices_tokens: ClassVar[bool]

    def tabulate(
        self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig, per_token: bool = False
    ) -> CostTable:
        """Price every choice of a model.

        Args:
            space: the choices.
            axes: the axes of the space's sites.
            config: sizes of the whole model.
            per_token: the choice is made for each token: what a later token needs, K and V, runs whole and belongs
                to the constant.

        Raises:
            BudgetError: this cost does not depend on what single tokens choose.
        """
        ...
