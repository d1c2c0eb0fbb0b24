"""The value router without a view of the token: what a choice costs on average, solved exactly (our choice)."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.networks import SiteNetworks, growth
from nestlm.spec import Budget, SubnetSpec


class StaticValueRouter(Router):
    """How much each choice adds to the KL to the whole model. Sums are minimised by the knapsack."""

    def __init__(self, *, prices: PriceList, hidden_width: int, init_std: float, seed: int) -> None:
        super().__init__(prices)
        self.networks = SiteNetworks(prices.space, num_inputs=1, hidden_width=hidden_width, init_std=init_std)
        self.networks.init_weights(seed=seed)

    def values(self, row: int, features_BLD: Tensor) -> Tensor:
        """Growth of the KL by each choice of a site, (1, 1, K): the same for all tokens."""
        return growth(self.networks.at(row, features_BLD.new_ones(1, 1, 1)))

    @torch.no_grad()
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        unseen = self.networks.input.new_zeros(1, 1, 1)
        losses = [self.values(row, unseen).flatten().tolist() for row in range(len(self.prices.space.sites))]
        return cheapest_loss(losses, prices=self.prices, budget=budget)
