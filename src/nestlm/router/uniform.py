"""The baseline: the same fraction in all layers."""

from __future__ import annotations

from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.trial import Trial
from nestlm.spec import Budget, SubnetSpec


class UniformRouter(Router):
    """Grows all layers together, the narrowest axis first, as long as the budget holds."""

    def __init__(self, *, prices: PriceList) -> None:
        super().__init__(prices)

    def spec(self, budget: Budget, *, trial: Trial | None = None) -> SubnetSpec:
        del trial
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
