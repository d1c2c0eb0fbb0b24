"""Sampler of sub-networks with the same choice in all layers (MatFormer, arXiv 2310.07707)."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from nestlm.elastic.sampler.base import Sampler, check_count, generator, homogeneous
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True)
class Homogeneous(Sampler):
    """The full model and `num_random` draws of one choice an axis, the same in all layers."""

    num_random: int

    def __post_init__(self) -> None:
        check_count(self.num_random, least=0)

    @override
    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[SubnetSpec, ...]:
        del batch  # the same specs for all of it
        drawn = (homogeneous(space, generator(seed, step, sample)) for sample in range(self.num_random))
        return (space.full(), *drawn)
