"""One sub-network a step: the cheapest elastic training."""

from __future__ import annotations

from dataclasses import dataclass

from nestlm.errors import ConfigError
from nestlm.sampler.base import generator, independent
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True)
class One:
    """The full model with probability `p_full`, otherwise one independent draw."""

    p_full: float

    def __post_init__(self) -> None:
        if not 0 <= self.p_full <= 1:
            raise ConfigError(f"sampler.p_full: got {self.p_full}, wanted a probability")

    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[SubnetSpec, ...]:
        del batch  # the same specs for all of it
        random = generator(seed, step, 0)
        return (space.full() if random.random() < self.p_full else independent(space, random),)
