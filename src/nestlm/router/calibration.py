"""How a dynamic router meets a budget: one multiplier for the cost, and an income a site for the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlm.cost.table import Bound
from nestlm.router.ledger import UNITS, Ledger

MARGIN = 0.004  # of the bound: calibration text and other text do not spend quite alike
LARGEST = 1e4  # multiplier, in units of score for the cost of the whole model
HALVINGS = 40
ROUNDING = 1e-9  # relative


@dataclass(frozen=True)
class Tariff:
    """One bound in a ledger's units.

    Attributes:
        share: the bound, as a share of the whole model.
        constant: what each token costs whatever is chosen, as such a share.
        prices: of each site's choices, strictly ascending integers, (K,).
        allowance: what a token may spend on all sites together, as an integer.
    """

    share: float
    constant: float
    prices: tuple[Tensor, ...]
    allowance: int

    @classmethod
    def of(cls, bound: Bound) -> Tariff:
        """Prices rounded up, the allowance rounded down, so that sums in floats are not above the bound either."""
        table = bound.table
        prices = tuple(integers([price / table.whole for price in row]) for row in table.prices)
        constant = table.constant / table.whole
        allowance = math.floor((bound.share - constant) * UNITS * (1.0 - ROUNDING))
        return cls(bound.share, constant, prices, max(allowance, sum(int(row[0]) for row in prices)))


def integers(shares: list[float]) -> Tensor:
    """Shares in a ledger's units, rounded up; equal ones are told apart by a unit."""
    rounded: list[int] = []
    for share in shares:
        least = rounded[-1] + 1 if rounded else 1
        rounded.append(max(least, math.ceil(share * UNITS)))
    return torch.tensor(rounded)


@dataclass(frozen=True)
class Plan:
    """A budget, and how it is kept.

    Attributes:
        share: the budget as a router's networks are told it.
        multiplier: price of cost, in units of score.
        tariffs: one a bound.
        incomes: by tariff, one a site: what each token brings to the site's ledger; empty for a plan without ledgers.
    """

    share: float
    multiplier: float
    tariffs: tuple[Tariff, ...]
    incomes: tuple[tuple[int, ...], ...]

    def wanted(self, row: int, scores: Tensor) -> Tensor:
        """The choice of highest score less priced cost: (..., K) to (...)."""
        cost_K = sum(tariff.prices[row].to(scores.dtype) / UNITS for tariff in self.tariffs)
        assert isinstance(cost_K, Tensor), "a plan has a tariff"
        return (scores - self.multiplier * cost_K.to(scores.device)).argmax(-1)

    def ledgers(self, row: int, device: torch.device) -> list[Ledger]:
        """A site's ledgers, one a bound; none where there are no incomes."""
        return [Ledger(tariff.prices[row].to(device), incomes[row]) for tariff, incomes in self.funded]

    @property
    def funded(self) -> list[tuple[Tariff, tuple[int, ...]]]:
        """Each tariff with its incomes; none for a plan without ledgers."""
        return list(zip(self.tariffs, self.incomes, strict=True)) if self.incomes else []

    @classmethod
    def make(cls, share: float, multiplier: float, tariffs: tuple[Tariff, ...], wanted: list[Tensor]) -> Plan:
        """A plan whose sites share the allowance as what is wanted at them costs on average.

        Args:
            share: told to the networks.
            multiplier: price of cost.
            tariffs: one a bound.
            wanted: choice indices of tokens, one tensor a site.
        """
        incomes = []
        for tariff in tariffs:
            least = [int(prices[0]) for prices in tariff.prices]
            asked = [
                float(prices.to(index.device)[index].double().mean()) - cheapest
                for prices, index, cheapest in zip(tariff.prices, wanted, least, strict=True)
            ]
            if sum(asked) <= 0.0:  # the cheapest is wanted everywhere: any division will do
                asked = [float(prices[-1] - prices[0]) for prices in tariff.prices]
            spare = tariff.allowance - sum(least)
            total = sum(asked) or 1.0
            incomes.append(
                tuple(low + math.floor(spare * part / total) for low, part in zip(least, asked, strict=True))
            )
        return cls(share, multiplier, tariffs, tuple(incomes))

    def spent(self, indices: list[Tensor]) -> list[float]:
        """Mean cost of choices (one tensor a site) as a share of each bound."""
        ratios = []
        for tariff in self.tariffs:
            sites = zip(tariff.prices, indices, strict=True)
            prices = sum(float(row.to(index.device)[index].double().mean()) for row, index in sites)
            ratios.append((tariff.constant + prices / UNITS) / tariff.share)
        return ratios


def solve(
    share: float,
    tariffs: tuple[Tariff, ...],
    *,
    wanted: Callable[[Plan], list[Tensor]],
    decided: Callable[[Plan], list[Tensor]],
) -> Plan:
    """The smallest multiplier at which what is decided costs just less than the tightest bound.

    Args:
        share: told to the networks.
        tariffs: one a bound.
        wanted: what tokens would choose under a plan without ledgers, one tensor a site.
        decided: the same with ledgers.
    """

    def plan_at(multiplier: float) -> Plan:
        bare = Plan(share, multiplier, tariffs, ())
        return Plan.make(share, multiplier, tariffs, wanted(bare))

    low, high = -LARGEST, LARGEST
    for _ in range(HALVINGS):
        # finer near 0, where scores are small
        middle = math.sinh((math.asinh(low * 1e3) + math.asinh(high * 1e3)) / 2) / 1e3
        plan = plan_at(middle)
        if max(plan.spent(decided(plan))) > 1.0 - MARGIN:
            low = middle
        else:
            high = middle
    return plan_at(high)
