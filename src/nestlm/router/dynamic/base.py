"""What routers that look at each token share: the choice by `score - multiplier * cost`, the ledger, calibration."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlm.cost.knapsack import cheapest_within, use_up
from nestlm.cost.table import Bound, CostTable, PriceList, TokenTable
from nestlm.nn.policy import WHOLE, Decision, Mixed, Policy, Stream, fixed, full
from nestlm.router.base import Answer, Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.plan import Plan, Tariff, solve
from nestlm.spec import Budget, Site

LEAST_USED = 0.99  # of the bounds, by a plan in which no site decides
CAUTIONS = (1.0, 3.0)  # with which plans are tried
ROUNDS = 3  # of calibration: choices change the hidden states that later choices are made on
Scorer = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Granularity:
    """Over which tokens a decision reaches.

    Attributes:
        prompt_tokens: 0 decides for each token; P > 0 runs the first P tokens of a sequence whole, decides on them, and
            keeps that decision for the rest.
        horizon: tokens over which the whole first P are paid back; a sequence that ends sooner ends above its budget.
    """

    prompt_tokens: int
    horizon: int


class DynamicRouter(Router):
    """Scores the choices of each token at each site from its hidden state, which no later token has touched."""

    per_token = True
    needs_calibration = True
    measured: Tensor

    def __init__(self, prices: PriceList, *, hidden_size: int, granularity: Granularity) -> None:
        super().__init__(prices)
        self.hidden_size = hidden_size
        self.granularity = granularity
        prompt_share = granularity.prompt_tokens / granularity.horizon
        self.planned = (
            prices.change(lambda table: token_table(table).after_prompt(prompt_share)) if prompt_share else prices
        )
        self.rows = {site: row for row, site in enumerate(prices.space.sites)}
        self.register_buffer("measured", torch.zeros(len(self.rows), prices.space.max_choices, dtype=torch.float64))

    @abstractmethod
    def scorer(self, share: float) -> Scorer:
        """A function of (site's row, features (B, L, D)) to the scores of its choices (B, L, K) at a budget's share.

        Higher is better; scores of all sites are on one scale.
        """

    @property
    def floor(self) -> float:
        return self.planned.main.share(self.planned.space.smallest())  # where every site decides

    def check(self, budget: Budget) -> None:
        self.planned.check(budget)

    @torch.no_grad()
    def prepare(self, calibration: CalibrationData) -> None:
        """Measure what each choice adds to the loss beside sites that run whole: all tokens take it."""
        self.measured.copy_(calibration.sensitivities(self.prices.space))

    @torch.no_grad()
    def find(self, budget: Budget, *, calibration: CalibrationData | None = None) -> Answer:
        bounds = self.planned.bounds(budget)
        if all(bound.share >= 1.0 for bound in bounds):  # the whole model, without routing
            return Answer(full, self.planned.space.full())
        assert calibration is not None, "a dynamic router needs calibration text to meet a budget"
        plan = self.calibrate(budget, calibration=calibration)
        if len(plan.fixed) == len(self.rows):
            spec = self.prices.space.spec({site: plan.fixed[row] for site, row in self.rows.items()})
            return Answer(fixed(spec), spec)
        return Answer(self.policy(plan), plan=plan.to_json())

    @torch.no_grad()
    def recall(self, budget: Budget, plan: Mapping[str, Any]) -> Answer:
        return Answer(self.policy(Plan.from_json(plan, tariffs=self.tariffs(self.planned.bounds(budget)))), plan=plan)

    def calibrate(self, budget: Budget, *, calibration: CalibrationData) -> Plan:
        """The best on the calibration's text of a few plans. In some no site decides: nothing may be better than that.

        Of these, one that leaves more than a hundredth of a bound is no answer to it, however good.
        """
        bounds = self.planned.bounds(budget)
        start = Plan(self.told(bounds), self.tariffs(bounds))
        scores = self.record(start, calibration)
        start = replace(start, held=self.held(start, mean_losses(scores)))
        scores = near = {row: start.unpriced(row, part) for row, part in scores.items()}
        plans = []
        for caution in CAUTIONS:
            plan, near = self.approach(start, scores, bounds=bounds, calibration=calibration, caution=caution)
            plans.append(plan)
        bounds = self.prices.bounds(budget)  # where nothing is decided, no prompt runs whole first
        for losses in (mean_losses(scores), mean_losses(near), self.measured_losses()):
            alike = Plan(start.share, self.tariffs(bounds), fixed=self.exact(bounds, losses))
            if alike.spent({}) >= LEAST_USED:
                plans.append(alike)
        return min(plans, key=lambda plan: calibration.loss(self.policy(plan)))

    def told(self, bounds: tuple[Bound, ...]) -> float:
        """The share that networks are told for a budget.

        They learn at the prices of a model in which every site decides. Sites that don't are cheaper, so the same share
        buys more: what it leaves above the cheapest choices is taken as so much of the shares that networks know.
        """
        told = []
        for bound in bounds:
            table = bound.table
            cheapest, floor = table.cheapest / table.whole, table.share(table.space.smallest())
            told.append(floor + (1.0 - floor) * (bound.share - cheapest) / (1.0 - cheapest))
        return min(1.0, *told)

    def approach(
        self,
        start: Plan,
        scores: dict[int, Tensor],
        *,
        bounds: tuple[Bound, ...],
        calibration: CalibrationData,
        caution: float,
    ) -> tuple[Plan, dict[int, Tensor]]:
        """A plan whose mean cost on calibration text lies just below the bounds, and the scores it was made from.

        Args:
            start: what is known of the plan.
            scores: recorded under it.
            bounds: to keep.
            calibration: the text.
            caution: see `fix_sites`.
        """
        plan = start
        for number in range(ROUNDS):
            if number:
                scores = self.record(plan, calibration)
            plan = solve(
                start,
                heard={row: self.heard(part) for row, part in scores.items()},
                decided=lambda plan, scores=scores: self.decide_all(plan, scores),
                paced=not self.granularity.prompt_tokens,
                caution=caution,
            )
            if len(plan.fixed) == len(self.rows):
                plan = replace(plan, fixed=self.exact(bounds, mean_losses(scores)))
        return plan, scores

    def measured_losses(self) -> list[list[float]]:
        """What choices lose when all tokens take the same, a row a site, as `prepare` has measured it."""
        rows = zip(self.measured.tolist(), self.prices.space.choices.values(), strict=True)
        return [row[: len(widths)] for row, widths in rows]

    def held(self, plan: Plan, losses: list[list[float]]) -> float:
        """The price of cost that scores hold, with which a plan has recorded these mean losses."""
        del plan, losses
        return 0.0

    def tariffs(self, bounds: tuple[Bound, ...]) -> tuple[Tariff, ...]:
        """Bounds as ledgers count them, where the router computes."""
        device = next(self.parameters()).device
        return tuple(Tariff.of(bound, device=device) for bound in bounds)

    def exact(self, bounds: tuple[Bound, ...], losses: list[list[float]]) -> dict[int, int]:
        """The choices of one sub-network for all tokens: an exact knapsack, and what it leaves is used up."""
        space = self.prices.space
        alike = [Bound(token_table(bound.table).alike, bound.share) for bound in bounds]
        spec = use_up(cheapest_within(losses, bounds=alike, space=space), losses, space=space, bounds=tuple(alike))
        return dict(enumerate(space.indices(spec)))

    def record(self, plan: Plan, calibration: CalibrationData) -> dict[int, Tensor]:
        """The scores of all tokens under a plan, (N, L, K) a site's row, in the order in which sites run."""
        seen: dict[int, list[Tensor]] = defaultdict(list)

        def observe(row: int, scores_BLK: Tensor) -> None:
            seen[row].append(scores_BLK)

        for _ in calibration.outputs(self.policy(plan, observe=observe)):
            pass
        return {row: torch.cat(parts) for row, parts in seen.items()}

    def heard(self, scores_NLK: Tensor) -> Tensor:
        """The scores by which something is decided: each token's, or the mean of the first P."""
        limit = self.granularity.prompt_tokens
        return scores_NLK[:, :limit].mean(1, keepdim=True) if limit else scores_NLK

    def decide_all(self, plan: Plan, scores: dict[int, Tensor]) -> dict[int, Tensor]:
        """What a plan decides on recorded scores at the sites that decide."""
        stream = Stream()
        decided = {row: self.decide(row, part, plan, stream) for row, part in scores.items() if row not in plan.fixed}
        if self.granularity.prompt_tokens:  # what the first tokens cost is in the planned prices already
            return {row: index_NL[:, -1:] for row, index_NL in decided.items()}
        return decided

    def policy(self, plan: Plan, *, observe: Callable[[int, Tensor], None] | None = None) -> Policy:
        """The policy of a plan; `observe` is shown the scores at each site."""
        scorer = self.scorer(plan.share)

        def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            row = self.rows.get(site)
            if row is None:
                return WHOLE
            widths, index = self.prices.space.choices[site], plan.fixed.get(row)
            if index is not None and observe is None:
                return Decision(widths[index])
            scores_BLK = plan.unpriced(row, scorer(row, features(hidden_BLD)))
            if observe is not None:
                observe(row, scores_BLK)
            if index is not None:
                return Decision(widths[index])
            return Decision(Mixed(widths, self.decide(row, scores_BLK, plan, stream)))

        return policy

    def decide(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Choice indices, (B, L); what later tokens of the same sequences need to know goes to the stream's memory."""
        decide = self.decide_by_prompt if self.granularity.prompt_tokens else self.decide_by_token
        return decide(row, scores_BLK, plan, stream)

    def decide_by_token(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """What each token wants at its sequence's pace, or less where the sequence's ledgers do not allow it."""
        paced, site = plan.paced.get(row), self.prices.space.sites[row]
        if paced is None:
            return plan.wanted(row, scores_BLK)
        index_BL, stream.memory[site] = paced.decide(scores_BLK, real_BL=stream.real_BL, kept=stream.memory.get(site))
        return index_BL

    def decide_by_prompt(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Whole for the first P tokens; then what the mean of their scores wants and the sequence can pay."""
        limit, site = self.granularity.prompt_tokens, self.prices.space.sites[row]
        batch, length, choices = scores_BLK.shape
        real_BL = scores_BLK.new_ones(batch, length, dtype=torch.bool) if stream.real_BL is None else stream.real_BL
        kept = stream.memory.get(site)  # sums of scores (K), tokens seen, the decision or -1; counts need float64
        if kept is None:
            kept = scores_BLK.new_zeros(batch, choices + 2, dtype=torch.float64)
            kept[:, -1] = -1.0
        sums_BK, seen_B, decided_B = kept[:, :choices], kept[:, choices], kept[:, -1].long()
        position_BL = seen_B.long()[:, None] + real_BL.cumsum(1) - 1
        sums_BK = sums_BK + (scores_BLK * (real_BL & (position_BL < limit))[..., None]).sum(1)
        seen_B = seen_B + real_BL.sum(1)
        deciding_B = (decided_B < 0) & (seen_B >= limit)
        if bool(deciding_B.any()):
            choice_B = self.affordable(row, plan.wanted(row, sums_BK / limit), plan, stream)
            decided_B = torch.where(deciding_B, choice_B, decided_B)
        stream.memory[site] = torch.cat((sums_BK, seen_B[:, None], decided_B[:, None].to(sums_BK)), dim=1)
        return torch.where(real_BL & (position_BL >= limit), decided_B.clamp_min(0)[:, None], choices - 1)

    def affordable(self, row: int, wanted_B: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """At most this site's income and what the sites that decided before it for the same sequence left of theirs."""
        for tariff, incomes in plan.funded:
            left_B = torch.full_like(wanted_B, incomes[row])
            for site, kept in stream.memory.items():
                other, decided_B = self.rows[site], kept[:, -1].long()
                saved_B = incomes[other] - tariff.prices[other].take(decided_B.clamp_min(0))
                left_B = left_B + torch.where(decided_B >= 0, saved_B, 0)
            reach_B = torch.searchsorted(tariff.prices[row], left_B, right=True) - 1
            wanted_B = wanted_B.minimum(reach_B.clamp_min(0))
        return wanted_B


def mean_losses(scores: Mapping[int, Tensor]) -> list[list[float]]:
    """Minus the mean score of each choice over all tokens, a row a site."""
    return [(-scores[row].double().flatten(0, -2).mean(0)).tolist() for row in range(len(scores))]


def features(hidden_BLD: Tensor) -> Tensor:
    """What networks see of a residual stream: it, at unit scale."""
    return F.rms_norm(hidden_BLD, hidden_BLD.shape[-1:])


def with_router(prices: PriceList, hidden_width: int) -> PriceList:
    """The prices of tokens' choices with the cost of a router's networks: its own cost counts."""

    def own(table: CostTable) -> CostTable:
        return token_table(table).with_router(hidden_width)

    return prices.change(own)


def token_table(table: CostTable) -> TokenTable:
    """The table as what it is in a dynamic router's price list."""
    assert isinstance(table, TokenTable), "a dynamic router's prices are those of tokens"
    return table
