"""The one cost interface: a price per (site, choice) plus a constant prices specs and distributions alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nestlm.axes.base import Axis
from nestlm.errors import BudgetError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import Budget, Limit, SearchSpace, SubnetSpec


@dataclass(frozen=True)
class CostTable:
    """Prices in one unit. A spec's cost is the constant plus the price of its choice at every site.

    Attributes:
        name: what is counted, such as `params`.
        unit: what one is, such as `FLOPs a token`.
        space: the choices that are priced.
        constant: cost of what no choice cuts.
        prices: per site, one price a choice, aligned to `space.choices`; wider is dearer.
        whole: cost of the whole model, to which shares refer.
        router: what a router that decides for each token adds to a table of choices per token: a constant, and so much
            for each unit of its networks' hidden width.
    """

    name: str
    unit: str
    space: SearchSpace
    constant: float
    prices: tuple[tuple[float, ...], ...]
    whole: float
    router: tuple[float, float] = (0.0, 0.0)

    def cost(self, spec: SubnetSpec) -> float:
        """Cost of a spec, in the table's unit."""
        choices = zip(self.prices, self.space.indices(spec), strict=True)
        return self.constant + sum(prices[index] for prices, index in choices)

    def share(self, spec: SubnetSpec) -> float:
        """Cost relative to the whole model."""
        return self.cost(spec) / self.whole

    @cached_property
    def shares(self) -> Tensor:
        """Relative prices, (sites, max choices), 0 where a site has fewer choices."""
        table = torch.zeros(len(self.space.sites), self.space.max_choices, dtype=torch.float64)
        for row, prices in enumerate(self.prices):
            table[row, : len(prices)] = torch.tensor(prices, dtype=torch.float64) / self.whole
        return table

    def expected_share(self, probabilities: Tensor) -> Tensor:
        """Relative cost of distributions over choices: (..., sites, max choices) to (...). Differentiable."""
        shares = self.shares.to(probabilities)
        return self.constant / self.whole + (probabilities * shares).sum((-2, -1))


@dataclass(frozen=True)
class Bound:
    """One limit, as a share of what one table calls whole."""

    table: CostTable
    share: float

    def fits(self, spec: SubnetSpec) -> bool:
        """Whether a spec is at or below the bound: the one comparison by which budgets are kept."""
        return self.table.share(spec) <= self.share


@dataclass(frozen=True)
class PriceList:
    """The tables of all kinds that a budget can limit.

    Attributes:
        main: prices of the run's own cost, which bare shares count.
        others: further tables, by their names.
        per_token: whether the tables price choices per token.
    """

    main: CostTable
    others: Mapping[str, CostTable]
    per_token: bool = False

    def with_router(self, hidden_width: int) -> PriceList:
        """The prices of choices that a router of that width makes for each token: its own cost counts."""

        def own(table: CostTable) -> CostTable:
            constant, per_unit = table.router
            return replace(table, constant=table.constant + constant + per_unit * hidden_width, router=(0.0, 0.0))

        return self._changed(own)

    def after_prompt(self, prompt_share: float) -> PriceList:
        """The mean over a sequence of which that share runs whole first, and the rest as is chosen."""
        rest = 1.0 - prompt_share

        def averaged(table: CostTable) -> CostTable:
            constant = rest * table.constant + prompt_share * table.cost(table.space.full())
            return replace(table, constant=constant, prices=tuple(tuple(rest * p for p in row) for row in table.prices))

        return self._changed(averaged) if prompt_share else self

    def _changed(self, change: Callable[[CostTable], CostTable]) -> PriceList:
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
        """The limits of a budget, each as a share of its table.

        Since wider is dearer in every table, the smallest sub-network keeps all limits when it keeps each.

        Raises:
            BudgetError: a kind without a table, an absolute limit above the whole model, or one below the smallest
                sub-network.
        """
        return tuple(self._bound(limit) for limit in budget.limits)

    def check(self, budget: Budget) -> None:
        """Raise BudgetError when no sub-network keeps the budget, as `bounds` does."""
        self.bounds(budget)

    def fits(self, spec: SubnetSpec, budget: Budget) -> bool:
        """Whether a spec keeps every limit."""
        return all(bound.fits(spec) for bound in self.bounds(budget))

    def tightest(self, budget: Budget) -> float:
        """The smallest share that a budget allows of any kind: what a router that sees budgets is told."""
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
        smallest = self.space.smallest()
        if not bound.fits(smallest):
            raise BudgetError(
                f"budget: got {limit} ({table.name}), but the smallest sub-network costs "
                f"{nearby(limit, table, table.cost(smallest))}; ask for at least that, or give axes smaller fractions"
            )
        return bound


def share_of(limit: Limit, table: CostTable) -> float:
    """A limit as a share of what its table calls whole."""
    return limit.amount if limit.is_share else limit.amount * limit.factor / table.whole


def nearby(limit: Limit, table: CostTable, cost: float) -> Limit:
    """A short number in the limit's unit that can be asked for: a little above `cost`, or below it for the whole."""
    exact = cost / (table.whole if limit.is_share else limit.factor)
    floor = table.share(table.space.smallest())
    for digits in range(3, 16):
        step = 10.0 ** (math.floor(math.log10(exact)) - digits)
        rounded = math.floor(exact / step) if cost == table.whole else math.ceil(exact / step)
        candidate = Limit(float(f"{rounded * step:.{digits}e}"), limit.unit)
        if candidate.is_share == limit.is_share and floor <= share_of(candidate, table) <= 1.0:
            return candidate
    return Limit(exact, limit.unit)


class Cost(Protocol):
    """A way to price: makes the table of a model's choices.

    Attributes:
        prices_tokens: whether it depends on what single tokens choose.
    """

    prices_tokens: ClassVar[bool]

    def table(
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
