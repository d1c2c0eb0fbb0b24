"""The static value router (our choice): predicts what each choice costs on average, and solves the knapsack exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.networks import SiteNetworks, added_losses
from nestlm.spec import Budget, SubnetSpec


class StaticValueRouter(Router):
    """One small network a site for what each choice adds to the KL from the whole model, the same for all tokens."""

    def __init__(self, *, prices: PriceList, hidden_width: int, init_std: float, seed: int) -> None:
        super().__init__(prices)
        self.networks = SiteNetworks(prices.space, num_inputs=1, hidden_width=hidden_width, init_std=init_std)
        self.networks.init_weights(seed=seed)

    def values(self, row: int, features_BLD: Tensor) -> Tensor:
        """Return what each choice of a site adds to the KL, in nats, (1, 1, K); 0 for the widest."""
        return added_losses(self.networks.at(row, features_BLD.new_ones(1, 1, 1)))

    @override
    @torch.no_grad()
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        unseen = self.networks.input.new_zeros(1, 1, 1)
        losses = [self.values(row, unseen).flatten().tolist() for row in range(len(self.prices.space.sites))]
        return cheapest_loss(losses, prices=self.prices, budget=budget)
