"""What a sampler is, and the draws that samplers share."""

from __future__ import annotations

from random import Random
from typing import Protocol

from nestlm.errors import ConfigError
from nestlm.spec import SearchSpace, SubnetSpec


class Sampler(Protocol):
    """Says which sub-networks a training step runs."""

    def draw(self, space: SearchSpace, *, seed: int, step: int) -> tuple[SubnetSpec, ...]:
        """The specs of a step: a pure function of the arguments, so that all ranks draw alike."""
        ...


def check_count(num_random: int, *, least: int) -> None:
    """Raise ConfigError for too few draws."""
    if num_random < least:
        raise ConfigError(f"sampler.num_random: got {num_random}, wanted {least} or more")


def generator(seed: int, step: int, sample: int) -> Random:
    """The source of randomness of one draw; it depends on (seed, step, sample) alone."""
    return Random(f"nestlm/{seed}/{step}/{sample}")


def independent(space: SearchSpace, random: Random) -> SubnetSpec:
    """Every site draws its choice by itself, all choices alike."""
    return space.spec({site: random.randrange(len(widths)) for site, widths in space.choices.items()})


def homogeneous(space: SearchSpace, random: Random) -> SubnetSpec:
    """Every axis draws one choice, the same in all layers."""
    drawn = {
        axis: random.randrange(min(len(space.choices[site]) for site in sites)) for axis, sites in space.axes.items()
    }
    return space.spec({site: drawn[site.axis] for site in space.sites})
