"""The interface of samplers, and draws that samplers share."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from nestlm.distributed.collectives import RowShard
from nestlm.errors import ConfigError
from nestlm.nn.policy import Policy, fixed, full, mixed
from nestlm.spec import SearchSpace, SubnetSpec


@dataclass(frozen=True, eq=False)
class MixedSpecs:
    """Specs that differ within a batch.

    Attributes:
        indices: choice index at every site, (sites, B) where sequences differ, (sites, B, L) where tokens do.
    """

    indices: Tensor

    def local_rows(self, row_shard: RowShard) -> MixedSpecs:
        """Return the specs of one rank's rows, given those of all rows of a step."""
        return MixedSpecs(row_shard.local_rows(self.indices, dim=1))


Sample = SubnetSpec | MixedSpecs


class Sampler(Protocol):
    """Draws the sub-networks that a training step runs."""

    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[Sample, ...]:
        """Draw the specs that a step runs: each for the whole batch, or as `MixedSpecs`, which differ within the batch.

        The result depends on the arguments alone, so that all ranks draw the same. If the full model is drawn, it
        comes first.

        Args:
            space: the choices.
            seed: seed of the run.
            step: number of the training step.
            batch: number of sequences of all ranks together, and of tokens in each.
        """
        ...


def policy_of(drawn: Sample, space: SearchSpace, *, device: torch.device) -> Policy:
    """Convert the draw of a sampler to a policy for a decoder on `device`."""
    if isinstance(drawn, MixedSpecs):
        return mixed(space, drawn.indices.to(device))
    return full if drawn == space.full() else fixed(drawn)


def check_count(num_random: int, *, least: int) -> None:
    """Raise ConfigError if `num_random`, the number of random specs of a step, is below `least`."""
    if num_random < least:
        raise ConfigError(f"sampler.num_random: got {num_random}, wanted {least} or more")


def check_shares(*, p_full: float, p_smallest: float) -> None:
    """Raise ConfigError unless `p_full` and `p_smallest` are probabilities whose sum is at most 1."""
    for name, share in (("p_full", p_full), ("p_smallest", p_smallest)):
        if not 0 <= share <= 1:
            raise ConfigError(f"sampler.{name}: got {share}, wanted a probability")
    if p_full + p_smallest > 1:
        raise ConfigError(f"sampler: p_full + p_smallest is {p_full + p_smallest:g}, wanted at most 1")


def generator(seed: int, step: int, sample: int) -> Random:
    """Make the random generator of one draw, which depends on (seed, step, sample) alone."""
    return Random(f"nestlm/{seed}/{step}/{sample}")


def independent(space: SearchSpace, random: Random) -> SubnetSpec:
    """Draw a choice at every site, independently and uniformly."""
    return space.spec({site: random.randrange(len(widths)) for site, widths in space.choices.items()})


def homogeneous(space: SearchSpace, random: Random) -> SubnetSpec:
    """Draw one choice for every axis, the same in all layers."""
    drawn = {
        axis: random.randrange(min(len(space.choices[site]) for site in sites)) for axis, sites in space.axes.items()
    }
    return space.spec({site: drawn[site.axis] for site in space.sites})
