"""What a router is: for a budget, a policy that keeps it."""

from __future__ import annotations

import torch
from torch import nn

from nestlm.cost.table import PriceList
from nestlm.nn.policy import Policy, fixed
from nestlm.spec import Budget, SubnetSpec


class Router(nn.Module):
    """Finds sub-networks within budgets. One whose choice is the same for every token only defines `spec`."""

    def __init__(self, prices: PriceList) -> None:
        super().__init__()
        self.prices = prices

    def spec(self, budget: Budget) -> SubnetSpec:
        """The sub-network for a budget; none of the limits is ever crossed.

        Raises:
            BudgetError: even the smallest sub-network is above a limit.
        """
        raise TypeError(f"{type(self).__name__} decides per token: ask it for a policy, not for one spec")

    def policy(self, budget: Budget) -> Policy:
        """The policy for a budget, as the decoder takes it."""
        return fixed(self.spec(budget))

    def draw(self, budget: Budget, *, generator: torch.Generator) -> Policy:
        """A policy for training at a budget. A router that learns samples it, with gradients to its own weights."""
        del generator
        return self.policy(budget)
