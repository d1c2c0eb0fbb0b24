"""The base class of all routers: a router finds, for a budget, a policy that keeps it."""

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
class RoutedPolicy:
    """The sub-network, or the per-token policy, that a router chose for a budget.

    Attributes:
        policy: what the decoder is called with.
        spec: the sub-network that serves all tokens; None where choices differ between tokens.
        plan: how a dynamic router keeps the budget, as plain values (`Plan.to_json`); None otherwise.
    """

    policy: Policy
    spec: SubnetSpec | None = None
    plan: Mapping[str, Any] | None = None


class Router(nn.Module):
    """Finds policies within budgets. A router that chooses the same for every token only overrides `spec`.

    Attributes:
        per_token: whether choices differ between tokens.
        needs_calibration: whether `find` needs calibration text.
    """

    per_token: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    def __init__(self, prices: PriceList) -> None:
        super().__init__()
        self.prices = prices

    @property
    def floor(self) -> float:
        """The smallest share of the run's cost that the router can keep."""
        return self.prices.main.share(self.prices.space.smallest())

    def check(self, budget: Budget) -> None:
        """Raise BudgetError for a budget that the router can never keep."""
        self.prices.check(budget)

    def prepare(self, calibration: CalibrationData) -> None:
        """Measure once what `find` needs for every budget, and keep it in buffers of the module."""

    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        """Return the sub-network for a budget; its cost is never above the budget.

        Args:
            budget: one limit or several.
            calibration: text on which a searching router tries candidates; without it the first candidate is returned.

        Raises:
            BudgetError: even the smallest sub-network costs more.
        """
        raise TypeError(f"{type(self).__name__} chooses for each token: call `find` for a policy, not `spec`")

    def find(self, budget: Budget, *, calibration: CalibrationData | None = None) -> RoutedPolicy:
        """Return the policy for a budget.

        Args:
            budget: one limit or several.
            calibration: text; a router with `needs_calibration` wants it.

        Raises:
            BudgetError: even the cheapest choices cost more.
        """
        spec = self.spec(budget, calibration=calibration)
        return RoutedPolicy(fixed(spec), spec)

    def recall(self, budget: Budget, plan: Mapping[str, Any]) -> RoutedPolicy:
        """Rebuild the policy that `find` returned before, from its plan.

        Raises:
            KeyError, TypeError, ValueError: the values are no plan of this router.
        """
        raise TypeError(f"{type(self).__name__} chooses one sub-network for a budget: it makes no plans")

    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        """Return a policy for one step of joint tuning. A router that learns samples it, with gradients to its weights.

        Args:
            budget: one limit or several.
            generator: for the sample, in the same state on all ranks.
            row_shard: this rank's rows of the step's batch.
        """
        del generator, row_shard
        return fixed(self.spec(budget))
