"""The base class of routers that choose for each token, by `score - multiplier * cost` under a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from nestlm.cost.knapsack import cheapest_within, use_up
from nestlm.cost.table import Bound, CostTable, PriceList, TokenTable
from nestlm.nn.policy import FULL, Decision, Policy, Stream, Width, fixed, full
from nestlm.router.base import RoutedPolicy, Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.plan import FixedPointPrices, Plan, solve_plan
from nestlm.spec import Budget, Site

LEAST_USED = 0.99  # share of the limits that a plan in which no site decides must use
GAIN_THRESHOLDS = (1.0, 3.0)  # with which plans are tried
ROUNDS = 3  # of calibration: choices change the hidden states on which later choices are made
Scorer = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Granularity:
    """How many tokens one decision of a router applies to.

    Attributes:
        prompt_tokens: 0: decide for each token. P > 0: run the first P tokens of a sequence at full width, decide
            from their mean score, and keep that decision for the rest of the sequence.
        horizon: length of a sequence in which later tokens save what the first P cost above the budget; a shorter
            sequence ends above its budget.
    """

    prompt_tokens: int
    horizon: int


class DynamicRouter(Router):
    """Base class of routers that score the choices of each token at each site from the token's hidden state.

    Attributes:
        rows: index of each site in the search space. Arguments called `row` are such an index.
        planned: prices by which plans are made: those of the router, with the cost of the first P tokens set aside.
        measured: how much each choice adds to the loss when all other sites run whole, in nats, (sites, max choices).
    """

    per_token: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
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
        """Return a function from (row of a site, features (B, L, D)) to scores of its choices (B, L, K).

        Higher is better, and scores of all sites are on one scale.

        Args:
            share: the budget that the networks see (`Plan.budget_feature`).
        """

    @property
    @override
    def floor(self) -> float:
        return self.planned.main.share(self.planned.space.smallest())  # where every site decides

    @override
    def check(self, budget: Budget) -> None:
        self.planned.check(budget)

    @override
    @torch.no_grad()
    def prepare(self, calibration: CalibrationData) -> None:
        self.measured.copy_(calibration.sensitivities(self.prices.space))

    @override
    @torch.no_grad()
    def find(self, budget: Budget, *, calibration: CalibrationData | None = None) -> RoutedPolicy:
        bounds = self.planned.bounds(budget)
        if all(bound.share >= 1.0 for bound in bounds):  # the whole model, without routing
            return RoutedPolicy(full, self.planned.space.full())
        assert calibration is not None, "a dynamic router needs calibration text to meet a budget"
        plan = self.calibrate(budget, calibration=calibration)
        if len(plan.fixed) == len(self.rows):
            spec = self.prices.space.spec({site: plan.fixed[row] for site, row in self.rows.items()})
            return RoutedPolicy(fixed(spec), spec)
        return RoutedPolicy(self.policy(plan), plan=plan.to_json())

    @override
    @torch.no_grad()
    def recall(self, budget: Budget, plan: Mapping[str, Any]) -> RoutedPolicy:
        return RoutedPolicy(self.policy(self.read_plan(budget, plan)), plan=plan)

    def read_plan(self, budget: Budget, kept: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from the plain values that `RoutedPolicy.plan` holds.

        Args:
            budget: the budget of the plan.
            kept: the plain values, as read from JSON.

        Raises:
            KeyError, TypeError, ValueError: the values are not a plan of this router.
        """
        return Plan.from_json(kept, limits=self.fixed_point_prices(self.planned.bounds(budget)))

    def calibrate(self, budget: Budget, *, calibration: CalibrationData) -> Plan:
        """Return the plan of lowest loss on calibration text among a few that keep the budget.

        Plans in which no site decides are tried too, since they may be the best. Such a plan is left out when it uses
        less than `LEAST_USED` of the limits.

        Args:
            budget: the limits to keep.
            calibration: text on which scores and losses are measured.
        """
        bounds = self.planned.bounds(budget)
        start = Plan(self.budget_feature(bounds), self.fixed_point_prices(bounds))
        scores = self.record(start, calibration)
        start = replace(start, implicit_multiplier=self.implicit_multiplier(start, mean_losses(scores)))
        scores = last = {row: start.remove_implicit_cost(row, part) for row, part in scores.items()}
        plans = []
        for threshold in GAIN_THRESHOLDS:
            plan, last = self.refine(start, scores, bounds=bounds, calibration=calibration, gain_threshold=threshold)
            plans.append(plan)
        bounds = self.prices.bounds(budget)  # where nothing is decided, no prompt runs whole first
        for losses in (mean_losses(scores), mean_losses(last), self.measured_losses()):
            uniform = Plan(
                start.budget_feature, self.fixed_point_prices(bounds), fixed=self.solve_knapsack(bounds, losses)
            )
            if uniform.budget_use({}) >= LEAST_USED:
                plans.append(uniform)
        return min(plans, key=lambda plan: calibration.loss(self.policy(plan)))

    def budget_feature(self, bounds: tuple[Bound, ...]) -> float:
        """Return the share that networks see for a budget.

        Networks are trained at the prices of a model in which every site decides, with shares from `floor` to 1. Fixed
        sites are cheaper, so a plan can meet shares down to `cheapest / whole`. This range is mapped linearly to the
        range of training; of several limits, the smallest share is returned.
        """
        shares = []
        for bound in bounds:
            table = bound.table
            cheapest, floor = table.cheapest / table.whole, table.share(table.space.smallest())
            shares.append(floor + (1.0 - floor) * (bound.share - cheapest) / (1.0 - cheapest))
        return min(1.0, *shares)

    def refine(
        self,
        start: Plan,
        scores: dict[int, Tensor],
        *,
        bounds: tuple[Bound, ...],
        calibration: CalibrationData,
        gain_threshold: float,
    ) -> tuple[Plan, dict[int, Tensor]]:
        """Solve for a plan, record scores under it, and solve again, ROUNDS times.

        Args:
            start: budget feature, limits and implicit multiplier of the plan.
            scores: recorded under `start`, (N, L, K) by row.
            bounds: the limits to keep.
            calibration: text on which scores are recorded.
            gain_threshold: see `fix_sites`.

        Returns:
            A plan whose mean cost on calibration text lies just below the limits, and the scores it was solved for.
        """
        plan = start
        for number in range(ROUNDS):
            if number:
                scores = self.record(plan, calibration)
            plan = solve_plan(
                start,
                decision_scores={row: self.decision_scores(part) for row, part in scores.items()},
                decide=lambda plan, scores=scores: self.decide_all(plan, scores),
                paced=not self.granularity.prompt_tokens,
                gain_threshold=gain_threshold,
            )
            if len(plan.fixed) == len(self.rows):
                plan = replace(plan, fixed=self.solve_knapsack(bounds, mean_losses(scores)))
        return plan, scores

    def measured_losses(self) -> list[list[float]]:
        """Return how much each choice adds to the loss when all tokens take it; one list for each site."""
        rows = zip(self.measured.tolist(), self.prices.space.choices.values(), strict=True)
        return [row[: len(widths)] for row, widths in rows]

    def implicit_multiplier(self, plan: Plan, losses: list[list[float]]) -> float:
        """Return the multiplier by which the networks' scores already contain a price of cost; 0 unless overridden.

        Args:
            plan: the plan under which scores were recorded.
            losses: minus the mean score of each choice, one list for each site.
        """
        del plan, losses
        return 0.0

    def fixed_point_prices(self, bounds: tuple[Bound, ...]) -> tuple[FixedPointPrices, ...]:
        """Convert the prices of limits to fixed-point integers, on the router's device."""
        device = next(self.parameters()).device
        return tuple(FixedPointPrices.from_bound(bound, device=device) for bound in bounds)

    def solve_knapsack(self, bounds: tuple[Bound, ...], losses: list[list[float]]) -> dict[int, int]:
        """Find the best choices that all tokens share, by an exact knapsack, then spend what is left of the limits.

        Args:
            bounds: the limits.
            losses: how much each choice adds to the loss, one list for each site.

        Returns:
            The index of the choice, by row.
        """
        space = self.prices.space
        uniform = [Bound(token_table(bound.table).alike, bound.share) for bound in bounds]
        spec = cheapest_within(losses, bounds=uniform, space=space)
        return dict(enumerate(space.indices(use_up(spec, losses, space=space, bounds=tuple(uniform)))))

    def record(self, plan: Plan, calibration: CalibrationData) -> dict[int, Tensor]:
        """Run calibration text under a plan; return the scores of its tokens, (N, L, K) by row, in running order."""
        seen: dict[int, list[Tensor]] = defaultdict(list)

        def observe(row: int, scores_BLK: Tensor) -> None:
            seen[row].append(scores_BLK)

        for _ in calibration.outputs(self.policy(plan, observe=observe)):
            pass
        return {row: torch.cat(parts) for row, parts in seen.items()}

    def decision_scores(self, scores_NLK: Tensor) -> Tensor:
        """Return the scores that decide: those of each token, or the mean (N, 1, K) of the first P tokens."""
        limit = self.granularity.prompt_tokens
        return scores_NLK[:, :limit].mean(1, keepdim=True) if limit else scores_NLK

    def decide_all(self, plan: Plan, scores: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the choices that a plan makes on recorded scores: indices by row, for the sites that decide."""
        stream = Stream()
        decided = {row: self.decide(row, part, plan, stream) for row, part in scores.items() if row not in plan.fixed}
        if self.granularity.prompt_tokens:  # what the first tokens cost is in the planned prices already
            return {row: index_NL[:, -1:] for row, index_NL in decided.items()}
        return decided

    def policy(self, plan: Plan, *, observe: Callable[[int, Tensor], None] | None = None) -> Policy:
        """Return the policy that a plan describes.

        Args:
            plan: a plan over this router's sites.
            observe: called with the row and the scores (B, L, K) of each site, fixed sites included.
        """
        scorer = self.scorer(plan.budget_feature)

        def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            row = self.rows.get(site)
            if row is None:
                return FULL
            widths, index = self.prices.space.choices[site], plan.fixed.get(row)
            if index is not None and observe is None:
                return Decision(Width(widths[index]))
            scores_BLK = plan.remove_implicit_cost(row, scorer(row, features(hidden_BLD)))
            if observe is not None:
                observe(row, scores_BLK)
            if index is not None:
                return Decision(Width(widths[index]))
            return Decision(Width.per_row(widths, self.decide(row, scores_BLK, plan, stream)))

        return policy

    def decide(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Choose for each token at one site, from the scores of its choices.

        Args:
            row: index of the site.
            scores_BLK: scores of the site's choices; higher is better.
            plan: multiplier, refill rates and paces.
            stream: tells which tokens are padding. Its memory holds the state of the site from earlier tokens of the
                sequences, and is updated.

        Returns:
            Indices of the choices, (B, L).
        """
        decide = self.decide_by_prompt if self.granularity.prompt_tokens else self.decide_by_token
        return decide(row, scores_BLK, plan, stream)

    def decide_by_token(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Compute `decide` for a router that decides for each token: the best choice that the token buckets can pay."""
        paced, site = plan.paced.get(row), self.prices.space.sites[row]
        if paced is None:
            return plan.best_choice(row, scores_BLK)
        index_BL, stream.memory[site] = paced.decide(scores_BLK, real_BL=stream.real_BL, kept=stream.memory.get(site))
        return index_BL

    def decide_by_prompt(self, row: int, scores_BLK: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Compute `decide` once a sequence: the widest choice for the first P tokens, then the decision."""
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
            choice_B = self.limit_by_rates(row, plan.best_choice(row, sums_BK / limit), plan, stream)
            decided_B = torch.where(deciding_B, choice_B, decided_B)
        stream.memory[site] = torch.cat((sums_BK, seen_B[:, None], decided_B[:, None].to(sums_BK)), dim=1)
        return torch.where(real_BL & (position_BL >= limit), decided_B.clamp_min(0)[:, None], choices - 1)

    def limit_by_rates(self, row: int, wanted_B: Tensor, plan: Plan, stream: Stream) -> Tensor:
        """Narrow the choice of each sequence at a site until the limits can pay it.

        A site can spend its refill rate, and what earlier sites of the same sequence left of their rates.

        Args:
            row: index of the site.
            wanted_B: index of the choice with the best score.
            plan: limits and refill rates.
            stream: its memory holds the decisions of the other sites.
        """
        for limit, rates in plan.limits_with_rates:
            left_B = torch.full_like(wanted_B, rates[row])
            for site, kept in stream.memory.items():
                other, decided_B = self.rows[site], kept[:, -1].long()
                saved_B = rates[other] - limit.prices[other].take(decided_B.clamp_min(0))
                left_B = left_B + torch.where(decided_B >= 0, saved_B, 0)
            widest_B = torch.searchsorted(limit.prices[row], left_B, right=True) - 1
            wanted_B = wanted_B.minimum(widest_B.clamp_min(0))
        return wanted_B


def mean_losses(scores: Mapping[int, Tensor]) -> list[list[float]]:
    """Return minus the mean score of each choice over all tokens, one list for each site.

    Args:
        scores: (N, L, K) by row.
    """
    return [(-scores[row].double().flatten(0, -2).mean(0)).tolist() for row in range(len(scores))]


def features(hidden_BLD: Tensor) -> Tensor:
    """Compute the input of router networks: hidden states scaled to a root mean square of 1, (B, L, D)."""
    return F.rms_norm(hidden_BLD, hidden_BLD.shape[-1:])


def with_router(prices: PriceList, hidden_width: int) -> PriceList:
    """Return a price list that includes the router's own networks, of `hidden_width` hidden units."""

    def add(table: CostTable) -> CostTable:
        return token_table(table).with_router(hidden_width)

    return prices.change(add)


def token_table(table: CostTable) -> TokenTable:
    """Return the table typed as a `TokenTable`, after an assertion that it is one."""
    assert isinstance(table, TokenTable), "the prices of a dynamic router are prices per token"
    return table
