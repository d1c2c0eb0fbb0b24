"""How a dynamic router meets a budget: one multiplier for the cost, sites that decide or don't, and their incomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestlm.cost.table import Bound, TokenTable
from nestlm.router.dynamic.pacing import Pace, PacedSite
from nestlm.router.dynamic.token_bucket import UNITS, Ledger
from nestlm.spec import SearchSpace

MARGIN = 0.002  # of the bound: calibration text and other text do not spend quite alike
LARGEST = 1e6  # multiplier, in units of score for the cost of the whole model
HALVINGS = 40
AIM_HALVINGS = 10
SMALLEST_AIM, LARGEST_AIM = 0.1, 1.5
ROUNDING = 1e-9  # relative


@dataclass(frozen=True)
class Tariff:
    """One bound in a ledger's units.

    Attributes:
        table: prices as shares of the whole model are `table`'s.
        share: the bound, as such a share.
        prices: of the choices of each site that decides, strictly ascending integers, (K,).
    """

    table: TokenTable
    share: float
    prices: tuple[Tensor, ...]

    @classmethod
    def of(cls, bound: Bound, *, device: torch.device) -> Tariff:
        """Prices are rounded up, so that sums in floats are not above the bound either."""
        table = bound.table
        assert isinstance(table, TokenTable), "a dynamic router's prices are those of tokens"
        prices = (integers([price / table.whole for price in row]) for row in table.prices)
        return cls(table, bound.share, tuple(row.to(device) for row in prices))

    def fixed(self, row: int) -> Tensor | None:
        """Cost of each choice of a site where all tokens take the same, as shares (K,), beyond the site's `shared`."""
        if self.table.fixed is None:
            return None
        prices = torch.tensor(self.table.fixed[row], dtype=torch.float64)
        return (prices - self.table.shared[row]) / self.table.whole

    def constant(self, fixed: Mapping[int, int]) -> float:
        """What each token costs whatever is decided, as a share, with some sites' choices fixed."""
        total = self.table.constant / self.table.whole
        for row, index in fixed.items():
            prices = self.fixed(row)
            assert prices is not None, "only sites that can be fixed are"
            total += float(prices[index])
        return total

    def allowance(self, fixed: Mapping[int, int]) -> int:
        """What a token may spend on the sites that decide, rounded down."""
        return math.floor((self.share - self.constant(fixed)) * UNITS * (1.0 - ROUNDING))


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
        tariffs: one a bound.
        multiplier: price of cost, in units of score.
        fixed: the choice of each site (by its row) at which all tokens run alike, since deciding would not pay.
        incomes: by tariff, one a site: what each token brings to the site's ledger (0 where the choice is fixed); empty
            for a plan without ledgers.
        paces: by site, where each sequence finds its own multiplier.
        aim: the income that paces aim at, relative to the ledger's.
        held: price of cost that the networks' scores hold already.
    """

    share: float
    tariffs: tuple[Tariff, ...]
    multiplier: float = 0.0
    fixed: Mapping[int, int] = field(default_factory=dict)
    incomes: tuple[tuple[int, ...], ...] = ()
    paces: Mapping[int, Pace] = field(default_factory=dict)
    aim: float = 1.0
    held: float = 0.0

    def unpriced(self, row: int, scores: Tensor) -> Tensor:
        """What networks say, without the price that it holds: (..., K)."""
        return scores + (self.held * self.prices[row]).to(scores.dtype) if self.held else scores

    def wanted(self, row: int, scores: Tensor) -> Tensor:
        """The choice of highest score less priced cost: (..., K) to (...)."""
        return (scores - (self.multiplier * self.prices[row]).to(scores.dtype)).argmax(-1)

    @cached_property
    def prices(self) -> list[Tensor]:
        """Cost of each site's choices as shares, summed over the bounds, (K,) in float64."""
        sites = zip(*(tariff.prices for tariff in self.tariffs), strict=True)
        return [torch.stack([row.double() / UNITS for row in rows]).sum(0) for rows in sites]

    @cached_property
    def paced(self) -> dict[int, PacedSite]:
        """The sites at which each sequence finds its own multiplier."""
        return {
            row: PacedSite(
                pace, tuple(Ledger(tariff.prices[row], incomes[row]) for tariff, incomes in self.funded), self.aim
            )
            for row, pace in self.paces.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All but the tariffs, which follow from the budget, as plain values: sites by their names."""
        names = [str(site) for site in self.tariffs[0].table.space.sites]
        return {
            "share": self.share,
            "multiplier": self.multiplier,
            "held": self.held,
            "aim": self.aim,
            "fixed": {names[row]: index for row, index in self.fixed.items()},
            "incomes": [list(incomes) for incomes in self.incomes],
            "paces": {names[row]: pace.to_json() for row, pace in self.paces.items()},
            "units": UNITS,
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any], *, tariffs: tuple[Tariff, ...]) -> Plan:
        """The plan that `to_json` wrote, for the same budget.

        Raises:
            KeyError, TypeError, ValueError: it is no such plan, or of other sites.
        """
        rows = {str(site): row for row, site in enumerate(tariffs[0].table.space.sites)}
        if kept["units"] != UNITS:
            raise ValueError(f"got a ledger in units of {kept['units']}, wanted {UNITS}")
        device = tariffs[0].prices[0].device
        return cls(
            kept["share"],
            tariffs,
            kept["multiplier"],
            {rows[name]: index for name, index in kept["fixed"].items()},
            tuple(tuple(incomes) for incomes in kept["incomes"]),
            {rows[name]: Pace.from_json(pace, device=device) for name, pace in kept["paces"].items()},
            kept["aim"],
            kept["held"],
        )

    @property
    def funded(self) -> list[tuple[Tariff, tuple[int, ...]]]:
        """Each tariff with its incomes; none for a plan without ledgers."""
        return list(zip(self.tariffs, self.incomes, strict=True)) if self.incomes else []

    def fund(self, wanted: Mapping[int, Tensor]) -> Plan | None:
        """With incomes: sites that decide share the allowance as what is wanted at them costs on average.

        Args:
            wanted: choice indices of tokens at each site that decides.

        Returns:
            None when the allowance does not cover the cheapest choices.
        """
        incomes = []
        for tariff in self.tariffs:
            least = {row: int(tariff.prices[row][0]) for row in wanted}
            asked = {
                row: float(tariff.prices[row].take(index).double().mean()) - least[row] for row, index in wanted.items()
            }
            if sum(asked.values()) <= 0.0:  # the cheapest is wanted everywhere: any division will do
                asked = {row: float(tariff.prices[row][-1] - tariff.prices[row][0]) for row in wanted}
            spare = tariff.allowance(self.fixed) - sum(least.values())
            if spare < 0:
                return None
            total = sum(asked.values()) or 1.0
            parts = {row: least[row] + math.floor(spare * asked[row] / total) for row in wanted}
            incomes.append(tuple(parts.get(row, 0) for row in range(len(tariff.prices))))
        return replace(self, incomes=tuple(incomes))

    def spent(self, indices: Mapping[int, Tensor]) -> float:
        """Mean cost of decisions in the bound that they come nearest to: 1 uses it up."""
        ratios = []
        for tariff in self.tariffs:
            decided = (tariff.prices[row].take(index).double().mean() for row, index in indices.items())
            ratios.append((tariff.constant(self.fixed) + sum(map(float, decided)) / UNITS) / tariff.share)
        return max(ratios)


Decide = Callable[[Plan], Mapping[int, Tensor]]


def fix_sites(plan: Plan, heard: Mapping[int, Tensor], *, caution: float) -> Plan:
    """Fix the choice at each site where looking at tokens gains less score than it costs.

    In a block that all tokens skip nothing decides.

    Args:
        plan: its multiplier turns cost into score.
        heard: scores on calibration text, (N, L, K) a site.
        caution: how many times its cost a decision must gain, since networks overrate what they prefer.
    """
    fixed = {}
    for row, scores in heard.items():
        offers = [offer for tariff in plan.tariffs if (offer := tariff.fixed(row)) is not None]
        if len(offers) < len(plan.tariffs):
            continue
        shared = sum(tariff.table.shared[row] / tariff.table.whole for tariff in plan.tariffs)
        prices = torch.stack(offers).sum(0) + shared
        alike = scores.double().flatten(0, -2).mean(0).cpu() - plan.multiplier * prices
        index = plan.wanted(row, scores)
        paid = plan.prices[row].take(index)
        apart = (scores.gather(-1, index[..., None]).squeeze(-1) - plan.multiplier * paid).mean()
        # where money is to be spent (a multiplier below 0), spending it on decisions is no gain
        if float(alike.max()) >= float(apart) - caution * max(0.0, plan.multiplier) * shared:
            fixed[row] = int(alike.argmax())
    return replace(plan, fixed=fixed | inside_skipped(fixed, plan.tariffs[0].table.space))


def inside_skipped(fixed: Mapping[int, int], space: SearchSpace) -> dict[int, int]:
    """The smallest choice, by row, of the sites in blocks that are skipped."""
    rows = {site: row for row, site in enumerate(space.sites)}
    return {rows[site]: 0 for site, depth in space.enclosing.items() if fixed.get(rows[depth]) == 0}


def settle(start: Plan, heard: Mapping[int, Tensor], *, caution: float = 1.0) -> Plan:
    """One multiplier settles which sites decide, the choices of the others, and the incomes.

    What is wanted costs a little less than the bounds, where it can; the ledgers keep them all the same.
    """

    def attempt(multiplier: float) -> Plan | None:
        plan = fix_sites(replace(start, multiplier=multiplier), heard, caution=caution)
        wanted = {row: plan.wanted(row, scores) for row, scores in heard.items() if row not in plan.fixed}
        return None if plan.spent(wanted) > 1.0 - MARGIN else plan.fund(wanted)

    return bisect(attempt, low=-LARGEST, high=LARGEST, halvings=HALVINGS) or cheapest(start, heard)


def cheapest(start: Plan, rows: Iterable[int]) -> Plan:
    """The cheapest choices everywhere, which keep every bound that can be kept."""
    tariffs = start.tariffs
    if all(tariff.table.fixed is not None for tariff in tariffs):
        nothing = ((0,) * len(tariffs[0].prices),) * len(tariffs)
        return replace(start, multiplier=LARGEST, fixed=dict.fromkeys(rows, 0), incomes=nothing)
    incomes = tuple(tuple(int(prices[0]) for prices in tariff.prices) for tariff in tariffs)
    return replace(start, multiplier=LARGEST, incomes=incomes)


def solve(
    start: Plan,
    *,
    heard: Mapping[int, Tensor],
    decided: Decide,
    paced: bool,
    caution: float,
) -> Plan:
    """The plan that comes just below the tightest bound on calibration text.

    Args:
        start: what is known of the plan: share, tariffs, and the price that scores hold.
        heard: scores by which tokens (or prompts) choose, (N, L, K) a site's row.
        decided: what is decided under a plan at each site that decides, its ledgers included.
        caution: see `fix_sites`.
        paced: each sequence finds its own multipliers, and aims at an income with which the bound is used up.
    """
    settled = settle(start, heard, caution=caution)
    deciding = {row: scores for row, scores in heard.items() if row not in settled.fixed}
    if not deciding or not paced:
        return settled
    paces = {}
    for row, scores in deciding.items():
        prices = tuple(tariff.prices[row] for tariff in settled.tariffs)
        incomes = tuple(incomes[row] for incomes in settled.incomes)
        paces[row] = Pace.of(scores.flatten(0, -2), settled.prices[row], prices=prices, incomes=incomes)
    settled = replace(settled, paces=paces)

    def attempt(value: float) -> Plan | None:
        plan = replace(settled, aim=-value)
        return None if plan.spent(decided(plan)) > 1.0 - MARGIN else plan

    return bisect(attempt, low=-LARGEST_AIM, high=-SMALLEST_AIM, halvings=AIM_HALVINGS) or settled


def bisect(attempt: Callable[[float], Plan | None], *, low: float, high: float, halvings: int) -> Plan | None:
    """The plan of the smallest value that yields one; None where the largest does not."""
    best = attempt(high)
    for _ in range(halvings if best is not None else 0):
        # finer near 0, where scores are small
        middle = math.sinh((math.asinh(low * 1e3) + math.asinh(high * 1e3)) / 2) / 1e3
        plan = attempt(middle)
        if plan is None:
            low = middle
        else:
            high, best = middle, plan
    return best
