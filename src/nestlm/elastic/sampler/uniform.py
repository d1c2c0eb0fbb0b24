"""Independent choices at every site, several times a step."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from nestlm.elastic.sampler.base import Sampler, check_count, generator, independent
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True)
class Uniform(Sampler):
    """`num_random` independent draws; with `full`, the whole model runs too, as in the paper's summed loss."""

    num_random: int
    full: bool

    def __post_init__(self) -> None:
        check_count(self.num_random, least=1)

    @override
    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[SubnetSpec, ...]:
        del batch  # the same specs for all of it
        drawn = tuple(independent(space, generator(seed, step, sample)) for sample in range(self.num_random))
        return (space.full(), *drawn) if self.full else drawn
