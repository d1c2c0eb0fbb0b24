"""One sub-network a step: the cheapest elastic training."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from nestlm.elastic.sampler.base import Sampler, check_shares, generator, independent
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True)
class One(Sampler):
    """The full model with probability `p_full`, the smallest with `p_smallest`, otherwise one independent draw.

    With `p_smallest` 1 and axes of one width below the full this trains a single size: a baseline, not a nested model.
    """

    p_full: float
    p_smallest: float

    def __post_init__(self) -> None:
        check_shares(p_full=self.p_full, p_smallest=self.p_smallest)

    @override
    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[SubnetSpec, ...]:
        del batch  # the same specs for all of it
        random = generator(seed, step, 0)
        kind = random.random()
        if kind < self.p_full:
            return (space.full(),)
        return (space.smallest() if kind < self.p_full + self.p_smallest else independent(space, random),)
