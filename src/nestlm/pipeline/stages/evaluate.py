"""Stage `evaluate`: find every router's policy for every budget, and measure its loss, spending and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from nestlm.cost.table import PriceList
from nestlm.eval.policy_scores import Scores, Spending, forward_seconds
from nestlm.nn.policy import full
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.settings import BudgetSetting, RoutingSettings
from nestlm.pipeline.stages.base import ModelStage, Readings, StageResult, load_router
from nestlm.router.base import RoutedPolicy, Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.static.uniform import UniformRouter
from nestlm.spec import Budget

TIMED_ROWS = 4  # rows of a batch on which policies are timed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The choice of a router for a budget, with its loss, cost and time.

    Attributes:
        router: label of the router.
        budget: the budget, as `Budget` prints it.
        achieved: cost of what ran, as a share of the whole model's; a mean over sequences.
        spread: standard deviation of that share over sequences.
        worst: largest share of a sequence.
        cost: name of the cost that the shares are of.
        achieved_cost: the same cost as an amount.
        costs: amounts of all costs of the run, by name. What a dynamic router stores is the whole model.
        readings: loss on the validation text.
        loss_vs_full: loss above that of the whole model.
        seed: seed of the run.
        widths: units that run, by axis and layer; of a dynamic router their means over tokens.
        plan: how a dynamic router keeps the budget; None for one sub-network.
        find_seconds: time in which the router found the answer.
        forward_seconds: time of a forward pass.
    """

    router: str
    budget: str
    achieved: float
    spread: float
    worst: float
    cost: str
    achieved_cost: int | float
    costs: Mapping[str, int | float]
    readings: Readings
    loss_vs_full: float
    seed: int
    widths: Mapping[str, Sequence[int | float]]
    plan: Mapping[str, Any] | None
    find_seconds: float
    forward_seconds: float

    def cells(self) -> dict[str, Any]:
        """Return the row of results.csv, by column."""
        return {
            "router": self.router,
            "budget": self.budget,
            "achieved": self.achieved,
            "spread": self.spread,
            "worst": self.worst,
            "cost": self.cost,
            "achieved_cost": self.achieved_cost,
            **self.costs,
            **asdict(self.readings),
            "loss_vs_full": self.loss_vs_full,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(StageResult):
    """Result of the evaluate stage: the outcomes of all routers and budgets.

    Attributes:
        outcomes: one a router and budget, the uniform router's first.
        full_widths: widths of the whole model, by axis and layer.
        layers: layers at which an axis has choices, by axis.
        full_seconds: time of a forward pass of the whole model.
    """

    outcomes: Sequence[Outcome]
    full_widths: Mapping[str, Sequence[int]]
    layers: Mapping[str, Sequence[int]]
    full_seconds: float

    @override
    def metrics(self) -> dict[str, Any]:
        """Return nothing: outcomes go to results.csv, specs/ and timings.csv."""
        return {}


@dataclass(frozen=True)
class BudgetAnswer:
    """The policy that a router found for a budget, and the name of the file of its score."""

    router: str
    budget: Budget
    routed: RoutedPolicy
    prices: PriceList
    seconds: float
    name: str


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(RoutingSettings, ModelStage[EvaluateResult]):
    """Scores the run's router beside the best sub-network of equal widths in all layers."""

    name = "evaluate"
    after = ("joint", "profile")

    budget: BudgetSetting

    def load_router(self, runtime: StageRuntime) -> Router:
        """Build the run's router as the joint stage left it."""
        return load_router(self.make_router(), runtime.inputs["joint"])

    @override
    def run(self, runtime: StageRuntime) -> EvaluateResult:
        decoder, router = self.load_decoder(runtime, "joint"), self.load_router(runtime).eval()
        num_sequences = self.router.num_sequences
        calibration = self.calibration_data(decoder.eval(), runtime, num_sequences=num_sequences)
        prices = self.prices()
        routers = {"uniform": UniformRouter(prices=prices), self.router.label: router.to(calibration.device)}
        answers = [
            find_answer(label, candidate, budget, calibration=calibration)
            for label, candidate in routers.items()
            for budget in Budget.parse_all(self.budget)
        ]
        policies = [full, *(each.routed.policy for each in answers)]
        full_seconds, *seconds = forward_seconds(calibration, policies, num_rows=TIMED_ROWS)
        scores = self.score(
            decoder,
            {"full": full} | {each.name: each.routed.policy for each in answers},
            runtime,
            prices={"full": prices} | {each.name: each.prices for each in answers},
        )
        outcomes = [
            self.outcome(answer, scores[answer.name], runtime, whole=scores["full"], prices=prices, seconds=passed)
            for answer, passed in zip(answers, seconds, strict=True)
        ]
        return EvaluateResult(
            outcomes=outcomes,
            full_widths=prices.space.full().widths_by_axis(),
            layers={axis: [site.layer for site in sites] for axis, sites in prices.space.axes.items()},
            full_seconds=full_seconds,
        )

    def outcome(
        self,
        found: BudgetAnswer,
        scores: Scores,
        runtime: StageRuntime,
        *,
        whole: Scores,
        prices: PriceList,
        seconds: float,
    ) -> Outcome:
        """Combine an answer and its scores.

        Args:
            found: the answer.
            scores: its scores on the validation text.
            runtime: knows the folder of the text.
            whole: scores of the whole model.
            prices: prices of sub-networks.
            seconds: time of a forward pass under the answer.
        """
        main, spec = prices.main, found.routed.spec
        stored = prices.space.full() if spec is None else spec
        spent = scores.spending[main.name] if spec is None else Spending(main.share(spec), 0.0, main.share(spec))
        costs = {name: prices.tables[name].cost(stored) for name in self.costs}
        if spec is None:
            costs |= {
                name: spending.mean * prices.tables[name].whole
                for name, spending in scores.spending.items()
                if name in costs
            }
        return Outcome(
            router=found.router,
            budget=str(found.budget),
            achieved=spent.mean,
            spread=spent.spread,
            worst=spent.worst,
            cost=main.name,
            achieved_cost=spent.mean * main.whole if spec is None else main.cost(spec),
            costs=costs,
            readings=self.readings(scores, runtime),
            loss_vs_full=scores.loss - whole.loss,
            seed=self.seed,
            widths=dict(scores.widths) if spec is None else spec.widths_by_axis(),
            plan=found.routed.plan if spec is None else None,
            find_seconds=found.seconds,
            forward_seconds=seconds,
        )


def find_answer(label: str, router: Router, budget: Budget, *, calibration: CalibrationData) -> BudgetAnswer:
    """Ask a router for a budget, and name the answer: answers that are the same sub-network share a score."""
    started = time.perf_counter()
    routed = router.find(budget, calibration=calibration)
    seconds = time.perf_counter() - started
    if routed.spec is None:
        name = f"{label}-{budget}"
    elif routed.spec == router.prices.space.full():
        name = "full"
    else:
        name = "subnet-" + "-".join(map(str, router.prices.space.indices(routed.spec)))
    return BudgetAnswer(label, budget, routed, router.prices, seconds, name)
