"""A router that solves an exact knapsack on the sensitivity of the loss to each site (Puzzle, arXiv 2411.19146)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget, SubnetSpec


class KnapsackRouter(Router):
    """Minimises the sum of what single changes cost in loss, as if changes added up, within the budget."""

    sensitivities: Tensor

    def __init__(self, *, prices: PriceList) -> None:
        super().__init__(prices)
        space = prices.space
        # before `prepare` measures anything, each unit counts the same
        widths = [[1.0 - width / widths[-1] for width in widths] for widths in space.choices.values()]
        padded = [row + [0.0] * (space.max_choices - len(row)) for row in widths]
        self.register_buffer("sensitivities", torch.tensor(padded, dtype=torch.float64))

    @override
    def prepare(self, calibration: CalibrationData) -> None:
        self.sensitivities.copy_(calibration.sensitivities(self.prices.space))

    @override
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        return cheapest_loss(self.sensitivities.tolist(), prices=self.prices, budget=budget)
