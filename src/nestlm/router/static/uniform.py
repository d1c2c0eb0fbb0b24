"""The baseline router: equal widths in all layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from typing_extensions import override

from nestlm.cost.table import PriceList
from nestlm.nn.policy import fixed
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget, SubnetSpec


class UniformRouter(Router):
    """Widens all layers together, the narrowest axis first, while the budget is kept."""

    def __init__(self, *, prices: PriceList) -> None:
        super().__init__(prices)

    @override
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        self.prices.check(budget)
        space = self.prices.space
        level = dict.fromkeys(space.axes, 0)

        def spec_at(level: dict[str, int]) -> SubnetSpec:
            return space.spec({site: level[site.axis] for site in space.sites})

        def share_of_units(axis: str) -> float:
            site = space.axes[axis][0]
            return space.choices[site][level[axis]] / space.choices[site][-1]

        growing = set(space.axes)
        while growing:
            axis = min(sorted(growing), key=share_of_units)
            grown = level | {axis: level[axis] + 1}
            if grown[axis] >= len(space.choices[space.axes[axis][0]]):
                growing.remove(axis)
            elif self.prices.fits(spec_at(grown), budget):
                level = grown
            else:
                growing.remove(axis)
        return spec_at(level)


def best_uniform(prices: PriceList, budget: Budget, *, calibration: Callable[[], CalibrationData]) -> SubnetSpec:
    """Return the sub-network of equal widths in all layers with the lowest loss on calibration text, within a budget.

    Sub-networks that a wider one within the budget contains are not tried.

    Args:
        prices: prices of the choices.
        budget: one limit or several.
        calibration: returns calibration text; called where several sub-networks are left to try.

    Raises:
        BudgetError: even the smallest sub-network costs more.
    """
    prices.check(budget)
    space = prices.space
    heights = [len(space.choices[sites[0]]) for sites in space.axes.values()]
    fitting = {}
    for levels in product(*map(range, heights)):
        at = dict(zip(space.axes, levels, strict=True))
        spec = space.spec({site: at[site.axis] for site in space.sites})
        if prices.fits(spec, budget):
            fitting[levels] = spec
    widest = [
        spec
        for levels, spec in fitting.items()
        if not any(other != levels and all(map(int.__ge__, other, levels)) for other in fitting)
    ]
    if len(widest) == 1:
        return widest[0]
    text = calibration()
    return min(dict.fromkeys(widest), key=lambda spec: text.loss(fixed(spec)))
