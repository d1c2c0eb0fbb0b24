"""The one cost interface: a price per (site, choice) plus a constant prices specs and distributions alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nestlm.axes.base import Axis
from nestlm.errors import BudgetError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import Budget, SearchSpace, SubnetSpec


@dataclass(frozen=True)
class CostTable:
    """Prices in one unit. A spec's cost is the constant plus the price of its choice at every site.

    Attributes:
        name: what is counted, such as `params`.
        unit: what one is, such as `FLOPs a token`.
        space: the choices that are priced.
        constant: cost of what no choice cuts.
        prices: per site, one price a choice, aligned to `space.choices`.
    """

    name: str
    unit: str
    space: SearchSpace
    constant: float
    prices: tuple[tuple[float, ...], ...]

    def cost(self, spec: SubnetSpec) -> float:
        """Cost of a spec, in the table's unit."""
        choices = zip(self.prices, self.space.indices(spec), strict=True)
        return self.constant + sum(prices[index] for prices, index in choices)

    @cached_property
    def full_cost(self) -> float:
        """Cost of the whole model."""
        return self.cost(self.space.full())

    def share(self, spec: SubnetSpec) -> float:
        """Cost relative to the whole model."""
        return self.cost(spec) / self.full_cost

    def fits(self, spec: SubnetSpec, budget: Budget) -> bool:
        """Whether a spec is at or below the budget: the one comparison by which budgets are kept."""
        return self.share(spec) <= budget.share

    @cached_property
    def shares(self) -> Tensor:
        """Relative prices, (sites, max choices), 0 where a site has fewer choices."""
        table = torch.zeros(len(self.space.sites), self.space.max_choices, dtype=torch.float64)
        for row, prices in enumerate(self.prices):
            table[row, : len(prices)] = torch.tensor(prices, dtype=torch.float64) / self.full_cost
        return table

    def expected_share(self, probabilities: Tensor) -> Tensor:
        """Relative cost of distributions over choices: (..., sites, max choices) to (...). Differentiable."""
        shares = self.shares.to(probabilities)
        return self.constant / self.full_cost + (probabilities * shares).sum((-2, -1))

    def check(self, budget: Budget) -> None:
        """Raise BudgetError when even the smallest sub-network costs more."""
        if not self.fits(self.space.smallest(), budget):
            floor = math.ceil(self.share(self.space.smallest()) * 1e4) / 1e4  # rounded to a budget that can be met
            raise BudgetError(
                f"budget: got {budget} of the full model's {self.name}, but the smallest sub-network costs "
                f"{floor:.4f}; ask for at least that, or give axes smaller fractions"
            )


class Cost(Protocol):
    """A way to price: makes the table of a model's choices."""

    def table(self, space: SearchSpace, *, axes: tuple[Axis, ...], config: DecoderConfig) -> CostTable:
        """Price every choice of a model whose rows are `config.context_length` tokens long."""
        ...
