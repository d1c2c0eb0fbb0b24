"""Single-site sensitivities, then the exact knapsack under the cost (as Puzzle does, arXiv 2411.19146)."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget, SubnetSpec


class KnapsackRouter(Router):
    """Takes what each single change costs in loss, as if changes added up."""

    sensitivities: Tensor

    def __init__(self, *, prices: PriceList) -> None:
        super().__init__(prices)
        space = prices.space
        # before anything is measured, a unit is a unit
        widths = [[1.0 - width / widths[-1] for width in widths] for widths in space.choices.values()]
        padded = [row + [0.0] * (space.max_choices - len(row)) for row in widths]
        self.register_buffer("sensitivities", torch.tensor(padded, dtype=torch.float64))

    def prepare(self, calibration: CalibrationData) -> None:
        """Measure the loss of every spec that differs from the whole model at one site."""
        self.sensitivities.copy_(calibration.sensitivities(self.prices.space))

    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        return cheapest_loss(self.sensitivities.tolist(), prices=self.prices, budget=budget)
