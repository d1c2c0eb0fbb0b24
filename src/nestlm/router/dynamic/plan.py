"""The plan by which a dynamic router keeps a budget: one multiplier for the cost, fixed sites, and refill rates.

At each site the router takes the choice of highest `score - multiplier * cost`, a Lagrangian relaxation of the budget
(our choice; the paper, arXiv 2406.10260, trains one router for each range of budgets and guarantees none).
"""

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
from nestlm.router.dynamic.token_bucket import UNITS, TokenBucket
from nestlm.spec import SearchSpace

MARGIN = 0.002  # share of a bound left over, since other text spends a little more than calibration text
LARGEST = 1e6  # multiplier, in units of score for the cost of the whole model
HALVINGS = 40
TARGET_HALVINGS = 10
SMALLEST_TARGET, LARGEST_TARGET = 0.1, 1.5
ROUNDING = 1e-9  # relative


@dataclass(frozen=True)
class FixedPointPrices:
    """One limit of a budget, with the prices of all choices in fixed-point units.

    Attributes:
        table: prices per token as floats.
        share: the limit, as a share of the cost of the whole model.
        prices: of the choices of each site that decides, strictly ascending integers, (K,) a site.
    """

    table: TokenTable
    share: float
    prices: tuple[Tensor, ...]

    @classmethod
    def from_bound(cls, bound: Bound, *, device: torch.device) -> FixedPointPrices:
        """Convert a limit. Prices are rounded up, so that no sum in floats is above the limit either."""
        table = bound.table
        assert isinstance(table, TokenTable), "the prices of a dynamic router are prices per token"
        prices = (to_fixed_point([price / table.whole for price in row]) for row in table.prices)
        return cls(table, bound.share, tuple(row.to(device) for row in prices))

    def uniform_costs(self, row: int) -> Tensor | None:
        """Return the cost of each choice of a site where all tokens take the same, as shares (K,).

        The site's `shared` cost, which every token pays, is not part of it. None where the table cannot price it.
        """
        if self.table.fixed is None:
            return None
        prices = torch.tensor(self.table.fixed[row], dtype=torch.float64)
        return (prices - self.table.shared[row]) / self.table.whole

    def base_cost(self, fixed: Mapping[int, int]) -> float:
        """Return the cost that no decision changes, as a share of the whole model's.

        Args:
            fixed: index of the choice at each site (by row) where all tokens take the same.
        """
        total = self.table.constant / self.table.whole
        for row, index in fixed.items():
            costs = self.uniform_costs(row)
            assert costs is not None, "only sites that can be fixed are fixed"
            total += float(costs[index])
        return total

    def total_refill_rate(self, fixed: Mapping[int, int]) -> int:
        """Return what a token may spend at all sites that decide, in fixed-point units, rounded down."""
        return math.floor((self.share - self.base_cost(fixed)) * UNITS * (1.0 - ROUNDING))


def to_fixed_point(shares: list[float]) -> Tensor:
    """Round shares up to fixed-point units; equal shares become units that differ by one, so prices ascend strictly."""
    rounded: list[int] = []
    for share in shares:
        least = rounded[-1] + 1 if rounded else 1
        rounded.append(max(least, math.ceil(share * UNITS)))
    return torch.tensor(rounded)


@dataclass(frozen=True)
class Plan:
    """How a budget is kept.

    Attributes:
        budget_feature: the budget that the router's networks see, as a share.
        limits: one for each limit of the budget.
        multiplier: price of cost, in units of score for the cost of the whole model.
        fixed: index of the choice at each site (by row) where all tokens take the same, since deciding would not pay.
        refill_rates: for each limit, one a site: units that each token adds to the site's bucket (0 where the choice is
            fixed); empty for a plan without buckets.
        paces: by row, at sites where each sequence finds its own multiplier.
        target_ratio: spending that paces aim at, relative to the refill rates.
        implicit_multiplier: price of cost that the networks' scores contain already.
    """

    budget_feature: float
    limits: tuple[FixedPointPrices, ...]
    multiplier: float = 0.0
    fixed: Mapping[int, int] = field(default_factory=dict)
    refill_rates: tuple[tuple[int, ...], ...] = ()
    paces: Mapping[int, Pace] = field(default_factory=dict)
    target_ratio: float = 1.0
    implicit_multiplier: float = 0.0

    def remove_implicit_cost(self, row: int, scores: Tensor) -> Tensor:
        """Return scores (..., K) of a site without the price of cost that they contain."""
        if not self.implicit_multiplier:
            return scores
        return scores + (self.implicit_multiplier * self.costs[row]).to(scores.dtype)

    def best_choice(self, row: int, scores: Tensor) -> Tensor:
        """Return the choice of highest score minus priced cost at a site: (..., K) to (...)."""
        return (scores - (self.multiplier * self.costs[row]).to(scores.dtype)).argmax(-1)

    @cached_property
    def costs(self) -> list[Tensor]:
        """Cost of each site's choices as shares, summed over the limits, (K,) in float64."""
        sites = zip(*(limit.prices for limit in self.limits), strict=True)
        return [torch.stack([row.double() / UNITS for row in rows]).sum(0) for rows in sites]

    @cached_property
    def paced(self) -> dict[int, PacedSite]:
        """The sites, by row, at which each sequence finds its own multiplier."""
        return {
            row: PacedSite(
                pace,
                tuple(TokenBucket(limit.prices[row], rates[row]) for limit, rates in self.limits_with_rates),
                self.target_ratio,
            )
            for row, pace in self.paces.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain values without the limits, which follow from the budget; sites go by their names."""
        names = [str(site) for site in self.limits[0].table.space.sites]
        return {
            "budget_feature": self.budget_feature,
            "multiplier": self.multiplier,
            "implicit_multiplier": self.implicit_multiplier,
            "target_ratio": self.target_ratio,
            "fixed": {names[row]: index for row, index in self.fixed.items()},
            "refill_rates": [list(rates) for rates in self.refill_rates],
            "paces": {names[row]: pace.to_json() for row, pace in self.paces.items()},
            "units": UNITS,
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any], *, limits: tuple[FixedPointPrices, ...]) -> Plan:
        """Read what `to_json` returned, for the limits of the same budget.

        Raises:
            KeyError, TypeError, ValueError: the values are no plan over these sites.
        """
        rows = {str(site): row for row, site in enumerate(limits[0].table.space.sites)}
        if kept["units"] != UNITS:
            raise ValueError(f"got a plan in units of 1/{kept['units']}, wanted 1/{UNITS}")
        device = limits[0].prices[0].device
        return cls(
            kept["budget_feature"],
            limits,
            kept["multiplier"],
            {rows[name]: index for name, index in kept["fixed"].items()},
            tuple(tuple(rates) for rates in kept["refill_rates"]),
            {rows[name]: Pace.from_json(pace, device=device) for name, pace in kept["paces"].items()},
            kept["target_ratio"],
            kept["implicit_multiplier"],
        )

    @property
    def limits_with_rates(self) -> list[tuple[FixedPointPrices, tuple[int, ...]]]:
        """Each limit with its refill rates; empty for a plan without buckets."""
        return list(zip(self.limits, self.refill_rates, strict=True)) if self.refill_rates else []

    def with_refill_rates(self, best: Mapping[int, Tensor]) -> Plan | None:
        """Divide what a token may spend among the sites that decide, as their best choices cost on average.

        Args:
            best: choice indices of tokens at each site that decides, by row.

        Returns:
            The plan with refill rates; None where a limit does not cover the cheapest choices.
        """
        all_rates = []
        for limit in self.limits:
            least = {row: int(limit.prices[row][0]) for row in best}
            asked = {
                row: float(limit.prices[row].take(index).double().mean()) - least[row] for row, index in best.items()
            }
            if sum(asked.values()) <= 0.0:  # the cheapest choice is best everywhere: any division will do
                asked = {row: float(limit.prices[row][-1] - limit.prices[row][0]) for row in best}
            spare = limit.total_refill_rate(self.fixed) - sum(least.values())
            if spare < 0:
                return None
            total = sum(asked.values()) or 1.0
            rates = {row: least[row] + math.floor(spare * asked[row] / total) for row in best}
            all_rates.append(tuple(rates.get(row, 0) for row in range(len(limit.prices))))
        return replace(self, refill_rates=tuple(all_rates))

    def budget_use(self, indices: Mapping[int, Tensor]) -> float:
        """Return the mean cost of decisions relative to the tightest limit: 1 uses the budget up.

        Args:
            indices: choice indices of tokens at each site that decides, by row.
        """
        ratios = []
        for limit in self.limits:
            decided = (limit.prices[row].take(index).double().mean() for row, index in indices.items())
            ratios.append((limit.base_cost(self.fixed) + sum(map(float, decided)) / UNITS) / limit.share)
        return max(ratios)


Decide = Callable[[Plan], Mapping[int, Tensor]]


def fix_sites(plan: Plan, decision_scores: Mapping[int, Tensor], *, gain_threshold: float) -> Plan:
    """Fix the choice at each site where deciding per token gains less score than it costs.

    At sites of a block that all tokens skip, nothing decides.

    Args:
        plan: its multiplier turns cost into score.
        decision_scores: scores on calibration text by row, (N, L, K).
        gain_threshold: how many times its cost a decision must gain, since networks overrate the choices that they
            prefer.
    """
    fixed = {}
    for row, scores in decision_scores.items():
        offers = [offer for limit in plan.limits if (offer := limit.uniform_costs(row)) is not None]
        if len(offers) < len(plan.limits):
            continue
        shared = sum(limit.table.shared[row] / limit.table.whole for limit in plan.limits)
        costs = torch.stack(offers).sum(0) + shared
        uniform = scores.double().flatten(0, -2).mean(0).cpu() - plan.multiplier * costs
        index = plan.best_choice(row, scores)
        paid = plan.costs[row].take(index)
        decided = (scores.gather(-1, index[..., None]).squeeze(-1) - plan.multiplier * paid).mean()
        # below a multiplier of 0 cost is to be spent, and spending it on decisions is no gain
        if float(uniform.max()) >= float(decided) - gain_threshold * max(0.0, plan.multiplier) * shared:
            fixed[row] = int(uniform.argmax())
    return replace(plan, fixed=fixed | skipped_choices(fixed, plan.limits[0].table.space))


def skipped_choices(fixed: Mapping[int, int], space: SearchSpace) -> dict[int, int]:
    """Return the smallest choice, by row, for every site in a block that `fixed` skips."""
    rows = {site: row for row, site in enumerate(space.sites)}
    return {rows[site]: 0 for site, depth in space.enclosing.items() if fixed.get(rows[depth]) == 0}


def solve_multiplier(start: Plan, decision_scores: Mapping[int, Tensor], *, gain_threshold: float = 1.0) -> Plan:
    """Find by bisection the smallest multiplier that keeps the budget on calibration text.

    The multiplier determines which sites decide, the choices of the others, and the refill rates. The best choices cost
    a little less than the limits, where they can; token buckets keep the limits in any case.

    Args:
        start: a plan with its limits.
        decision_scores: scores on calibration text by row, (N, L, K).
        gain_threshold: see `fix_sites`.
    """

    def attempt(multiplier: float) -> Plan | None:
        plan = fix_sites(replace(start, multiplier=multiplier), decision_scores, gain_threshold=gain_threshold)
        best = {row: plan.best_choice(row, scores) for row, scores in decision_scores.items() if row not in plan.fixed}
        return None if plan.budget_use(best) > 1.0 - MARGIN else plan.with_refill_rates(best)

    return bisect(attempt, low=-LARGEST, high=LARGEST, halvings=HALVINGS) or cheapest_plan(start, decision_scores)


def cheapest_plan(start: Plan, rows: Iterable[int]) -> Plan:
    """Return the plan that takes the cheapest choice at every row; it keeps each limit that can be kept."""
    limits = start.limits
    if all(limit.table.fixed is not None for limit in limits):
        nothing = ((0,) * len(limits[0].prices),) * len(limits)
        return replace(start, multiplier=LARGEST, fixed=dict.fromkeys(rows, 0), refill_rates=nothing)
    rates = tuple(tuple(int(prices[0]) for prices in limit.prices) for limit in limits)
    return replace(start, multiplier=LARGEST, refill_rates=rates)


def solve_plan(
    start: Plan,
    *,
    decision_scores: Mapping[int, Tensor],
    decide: Decide,
    paced: bool,
    gain_threshold: float,
) -> Plan:
    """Find the plan whose mean cost on calibration text lies just below the tightest limit.

    Args:
        start: a plan with its budget feature, limits and implicit multiplier.
        decision_scores: scores by which tokens (or prompts) choose, by row, (N, L, K).
        decide: returns what a plan chooses at each site that decides, token buckets included.
        paced: whether each sequence finds its own multipliers; their target ratio is then found, too.
        gain_threshold: see `fix_sites`.
    """
    solved = solve_multiplier(start, decision_scores, gain_threshold=gain_threshold)
    deciding = {row: scores for row, scores in decision_scores.items() if row not in solved.fixed}
    if not deciding or not paced:
        return solved
    paces = {}
    for row, scores in deciding.items():
        prices = tuple(limit.prices[row] for limit in solved.limits)
        rates = tuple(rates[row] for rates in solved.refill_rates)
        paces[row] = Pace.fit(scores.flatten(0, -2), solved.costs[row], prices=prices, rates=rates)
    solved = replace(solved, paces=paces)

    def attempt(value: float) -> Plan | None:
        plan = replace(solved, target_ratio=-value)
        return None if plan.budget_use(decide(plan)) > 1.0 - MARGIN else plan

    return bisect(attempt, low=-LARGEST_TARGET, high=-SMALLEST_TARGET, halvings=TARGET_HALVINGS) or solved


def bisect(attempt: Callable[[float], Plan | None], *, low: float, high: float, halvings: int) -> Plan | None:
    """Return the plan of the smallest value for which `attempt` returns one; None where it returns none for `high`.

    Args:
        attempt: returns None for values below a threshold, a plan above it.
        low: a value below the threshold.
        high: the first value that is tried.
        halvings: number of further attempts, spaced more finely near 0, where scores are small.
    """
    best = attempt(high)
    for _ in range(halvings if best is not None else 0):
        middle = math.sinh((math.asinh(low * 1e3) + math.asinh(high * 1e3)) / 2) / 1e3
        plan = attempt(middle)
        if plan is None:
            low = middle
        else:
            high, best = middle, plan
    return best
