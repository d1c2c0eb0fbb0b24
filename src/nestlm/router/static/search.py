"""Routers that search on calibration text, one budget at a time: random search and evolution."""

from __future__ import annotations

from random import Random

import torch
from typing_extensions import override

from nestlm.cost.table import PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.errors import ConfigError
from nestlm.nn.policy import Policy, fixed
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import Budget, Site, SubnetSpec

MUTATION = 0.15  # probability that a site of a child changes


def random_spec(prices: PriceList, budget: Budget, random: Random) -> SubnetSpec:
    """Draw a sub-network that uses a budget up: random widths, then random sites narrowed or widened until it fits."""
    prices.check(budget)
    space = prices.space
    start = {site: random.randrange(len(widths)) for site, widths in space.choices.items()}
    return grow(shrink(start, prices, budget, random), prices, budget, random)


def shrink(indices: dict[Site, int], prices: PriceList, budget: Budget, random: Random) -> dict[Site, int]:
    """Narrow random sites, a choice at a time, until the budget is kept; returns choice indices by site."""
    indices = dict(indices)
    while not prices.fits(prices.space.spec(indices), budget):
        site = random.choice([site for site, index in indices.items() if index])
        indices[site] -= 1
    return indices


def grow(indices: dict[Site, int], prices: PriceList, budget: Budget, random: Random) -> SubnetSpec:
    """Widen random sites, a choice at a time, until none can grow within the budget; sites of skipped blocks wait."""
    space = prices.space
    indices = dict(zip(space.sites, space.indices(space.spec(indices)), strict=True))
    growing = list(space.sites)
    while awake := [site for site in growing if space.runs(site, indices)]:
        site = random.choice(awake)
        wider = indices | {site: indices[site] + 1}
        if wider[site] < len(space.choices[site]) and prices.fits(space.spec(wider), budget):
            indices = wider
        else:
            growing.remove(site)
    return space.spec(indices)


class RandomRouter(Router):
    """Takes the best on calibration text of `candidates` random sub-networks that use the budget up."""

    needs_calibration = True

    def __init__(self, *, prices: PriceList, candidates: int, seed: int) -> None:
        super().__init__(prices)
        if candidates <= 0:
            raise ConfigError(f"router.network.candidates: got {candidates}, wanted 1 or more")
        self.candidates, self.seed = candidates, seed

    @override
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        random = Random(f"random router/{self.seed}")
        drawn = dict.fromkeys(random_spec(self.prices, budget, random) for _ in range(self.candidates))
        if calibration is None or len(drawn) == 1:
            return next(iter(drawn))
        return min(drawn, key=lambda spec: calibration.loss(fixed(spec)))

    @override
    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        del row_shard
        random = Random(int(torch.randint(2**31, (), generator=generator)))
        return fixed(random_spec(self.prices, budget, random))


class EvolutionRouter(Router):
    """Evolutionary search within the budget (Cai et al., arXiv 1908.09791): the best are crossed and mutated."""

    needs_calibration = True

    def __init__(self, *, prices: PriceList, population: int, generations: int, parents: int, seed: int) -> None:
        super().__init__(prices)
        if not 0 < parents <= population or generations < 0:
            raise ConfigError(
                f"router.network: got population={population}, parents={parents}, generations={generations}, wanted "
                "1 or more parents, at most the population, and no negative number"
            )
        self.population, self.generations, self.parents, self.seed = population, generations, parents, seed

    @override
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        random = Random(f"evolution router/{self.seed}")
        candidates = [random_spec(self.prices, budget, random) for _ in range(self.population)]
        if calibration is None:
            return candidates[0]
        losses: dict[SubnetSpec, float] = {}

        def loss(spec: SubnetSpec) -> float:
            if spec not in losses:
                losses[spec] = calibration.loss(fixed(spec))
            return losses[spec]

        for _ in range(self.generations):
            best = sorted(dict.fromkeys(candidates), key=loss)[: self.parents]
            children = [self.breed(best, budget, random) for _ in range(self.population - len(best))]
            candidates = [*best, *children]
        return min(candidates, key=loss)

    def breed(self, parents: list[SubnetSpec], budget: Budget, random: Random) -> SubnetSpec:
        """Take each site from one of two parents, mutate some, and make the result fit and use the budget up."""
        space = self.prices.space
        pair = [space.indices(random.choice(parents)) for _ in range(2)]
        indices = {site: random.choice(genes) for site, genes in zip(space.sites, zip(*pair, strict=True), strict=True)}
        for site in space.sites:
            if random.random() < MUTATION:
                indices[site] = random.randrange(len(space.choices[site]))
        return grow(shrink(indices, self.prices, budget, random), self.prices, budget, random)

    @override
    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        del row_shard
        random = Random(int(torch.randint(2**31, (), generator=generator)))
        return fixed(random_spec(self.prices, budget, random))
