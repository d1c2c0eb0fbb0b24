"""The sandwich rule (Yu & Huang, arXiv 1903.05134): largest, smallest, and some between."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from nestlm.elastic.sampler.base import Sampler, check_count, generator, independent
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True)
class Sandwich(Sampler):
    """The full model, the smallest, and `num_random` independent draws."""

    num_random: int

    def __post_init__(self) -> None:
        check_count(self.num_random, least=0)

    @override
    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[SubnetSpec, ...]:
        del batch  # the same specs for all of it
        drawn = (independent(space, generator(seed, step, sample)) for sample in range(self.num_random))
        return (space.full(), space.smallest(), *drawn)
