"""What a router is: for a budget, a policy that keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nestlm.cost.table import PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Policy, fixed
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget, SubnetSpec


@dataclass(frozen=True)
class Answer:
    """What a router found for a budget.

    Attributes:
        policy: as the decoder takes it.
        spec: the one sub-network that serves all tokens; None where tokens differ.
        plan: how a dynamic router keeps the budget, as plain values.
    """

    policy: Policy
    spec: SubnetSpec | None = None
    plan: Mapping[str, Any] | None = None


class Router(nn.Module):
    """Finds policies within budgets. One whose choice is the same for every token only defines `spec`.

    Attributes:
        per_token: whether tokens differ in what it chooses for them.
        needs_calibration: whether it cannot answer well without calibration text.
    """

    per_token: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    def __init__(self, prices: PriceList) -> None:
        super().__init__()
        self.prices = prices

    @property
    def floor(self) -> float:
        """The smallest share of the run's cost that can be kept."""
        return self.prices.main.share(self.prices.space.smallest())

    def check(self, budget: Budget) -> None:
        """Raise BudgetError for a budget that the router can never keep."""
        self.prices.check(budget)

    def prepare(self, calibration: CalibrationData) -> None:
        """Measure what all budgets need, once; the results belong to the router's state."""

    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        """The sub-network for a budget; its cost is never above it.

        Args:
            budget: what must be kept.
            calibration: calibration text to try candidates on, for routers that search.

        Raises:
            BudgetError: even the smallest sub-network costs more.
        """
        raise TypeError(f"{type(self).__name__} decides per token: ask it for an answer, not for one spec")

    def find(self, budget: Budget, *, calibration: CalibrationData | None = None) -> Answer:
        """The policy for a budget.

        Raises:
            BudgetError: even the cheapest choices cost more.
        """
        spec = self.spec(budget, calibration=calibration)
        return Answer(fixed(spec), spec)

    def recall(self, budget: Budget, plan: Mapping[str, Any]) -> Answer:
        """The answer to a budget that was found before, from its plan.

        Raises:
            KeyError, TypeError, ValueError: it is no plan of this router's.
        """
        raise TypeError(f"{type(self).__name__} names one sub-network for a budget: it makes no plans")

    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        """A policy for training at a budget. A router that learns samples it, with gradients to its own weights.

        Args:
            budget: what must be kept.
            generator: of the sample, the same on all ranks.
            row_shard: which rows of the step it will see.
        """
        del generator, row_shard
        return fixed(self.spec(budget))
