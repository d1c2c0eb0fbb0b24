"""Policies: functions that decide, at every site of a decoder, how many units run.

A policy travels as an argument of the forward pass. No module remembers an active sub-network.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nestlm.spec import SearchSpace, Site, SubnetSpec


@dataclass(frozen=True)
class Width:
    """Number of units that a site runs, always a prefix of its units: one number for all rows, or one for each row.

    `Width(8)` runs 8 units, `Width(0)` skips the site, `Width()` runs all units. `Width.per_row(choices, index)` is
    *ragged*: each row of the batch has a width of its own.

    Attributes:
        units: units that run in all rows; None where all units run, or where the width is ragged.
        choices: widths that a ragged site chooses from, ascending; empty otherwise.
        index: index into `choices`, integers: (B,) with a choice for each sequence, (B, L) with one for each token.
            None where all rows have one width.
    """

    units: int | None = None
    choices: tuple[int, ...] = ()
    index: Tensor | None = None

    @classmethod
    def per_row(cls, choices: tuple[int, ...], index: Tensor) -> Width:
        """Make a ragged width from the choices of a site, ascending, and an index into them, (B,) or (B, L)."""
        return cls(choices=choices, index=index)

    @property
    def is_zero(self) -> bool:
        """Whether no row runs the site. A ragged width counts as not zero, whatever its rows chose."""
        return self.units == 0

    def count(self, num_units: int) -> int:
        """Return the units that run in all rows, at a site of `num_units` units. Ragged widths have no such number."""
        assert self.index is None, "one width for all rows"
        return num_units if self.units is None else self.units

    @cached_property
    def units_by_row(self) -> Tensor:
        """Units that each row of a ragged width runs, in the shape of `index`."""
        assert self.index is not None, "a width for each row"
        return torch.tensor(self.choices, device=self.index.device)[self.index]


@dataclass(frozen=True)
class Decision:
    """What a policy decides at a site.

    Attributes:
        width: units that run. The depth site of a block has one unit, the block.
        gate: factor of each unit that runs, (width,) or broadcastable to (B, L, width). With a ragged width, factor of
            each band of units between two neighbouring choices, `index.shape + (K,)`. Its value is 1 where it only
            carries gradients to a router, and 0 or 1 where a test masks units. None multiplies nothing.
        probabilities: distribution over the choices that the width was drawn from, (..., K), for objectives that price
            it. None where nothing was drawn.
    """

    width: Width = Width()
    gate: Tensor | None = None
    probabilities: Tensor | None = None

    def restrict_to(self, block: Decision, *, num_units: int) -> Decision:
        """Return this decision with width 0 for the rows that skip the block.

        Args:
            block: the decision at the depth site of the block.
            num_units: all units of this site.
        """
        if block.width.is_zero or self.width.is_zero:
            return Decision(Width(0))
        if block.width.index is None:
            return self
        runs = block.width.units_by_row > 0
        if self.width.index is None:
            assert self.gate is None, "units have no gates where only some rows run a block"
            return Decision(Width.per_row((0, self.width.count(num_units)), runs.long()))
        index = torch.where(runs, self.width.index + 1, 0)
        gate = None if self.gate is None else torch.cat((torch.ones_like(self.gate[..., :1]), self.gate), dim=-1)
        return Decision(Width.per_row((0, *self.width.choices), index), gate)


def expand_bands(bands: Tensor, choices: tuple[int, ...]) -> Tensor:
    """Repeat the numbers of bands of units between neighbouring choices, (..., K), for each unit, (..., widest)."""
    sizes = torch.tensor(choices).diff(prepend=torch.tensor([0])).to(bands.device)
    return bands.repeat_interleave(sizes, dim=-1, output_size=choices[-1])


@dataclass(frozen=True)
class Stream:
    """What a policy may know about the sequences besides their hidden states.

    Attributes:
        real_BL: False where a token is padding; None where no token is.
        memory: state that a policy carries from token to token of the same sequences, by site. It lives in the KV
            cache; a call without a cache starts with an empty memory.
    """

    real_BL: Tensor | None = None
    memory: MutableMapping[Site, Tensor] = field(default_factory=dict, hash=False)


# A function of (site, hidden_BLD, stream). Activation checkpointing calls it twice, and both calls must answer alike.
# So where gradients are taken, each block gets an empty memory, and what is written to it is dropped.
Policy = Callable[[Site, Tensor, Stream], Decision]

FULL = Decision()


def full(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
    """Run all units: the policy of the full model."""
    del site, hidden_BLD, stream
    return FULL


def constant(decisions: dict[Site, Decision]) -> Policy:
    """Make a policy from decisions that are known beforehand. Sites without one run all units."""

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        del hidden_BLD, stream
        return decisions.get(site, FULL)

    return policy


def fixed(spec: SubnetSpec) -> Policy:
    """Make the policy that runs one sub-network for every token."""
    return constant({site: Decision(Width(units)) for site, units in spec.items()})


def mixed(space: SearchSpace, indices: Tensor) -> Policy:
    """Make the policy that runs a batch in which each sequence, or each token, has a sub-network of its own.

    Args:
        space: the choices of every site.
        indices: index of the choice at every site, in the order of the space: (sites, B) with a choice for each
            sequence, (sites, B, L) with one for each token.
    """
    rows = zip(space.choices.items(), indices, strict=True)
    return constant({site: Decision(Width.per_row(choices, index)) for (site, choices), index in rows})
