"""A policy says how wide each site runs. It travels as an argument; no module remembers it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nestlm.spec import SearchSpace, Site, SubnetSpec


@dataclass(frozen=True)
class Mixed:
    """A width of its own for each sequence or each token of a batch.

    Attributes:
        widths: the site's choices, ascending.
        index: which of them: (B,) for whole sequences, (B, L) for tokens; integers.
    """

    widths: tuple[int, ...]
    index: Tensor

    def gated(self) -> Decision:
        """The same for one token a sequence: all run at the widest of their widths, gates close what is beyond a row's.

        The widest row's weights are read whatever the others ask for, and a product a width costs more than it saves.
        """
        widths_B = self.widths_of_rows
        widest, least = int(widths_B.max()), int(widths_B.min())
        if widest == least:
            return Decision(widest)
        units = torch.arange(widest, device=widths_B.device)
        return Decision(widest, (units < widths_B[:, None])[:, None])

    def close(self, added_B1D: Tensor) -> Tensor:
        """What a site adds to one token a sequence: nothing, not even a bias, where a row's width is 0."""
        return added_B1D * (self.widths_of_rows > 0)[:, None, None] if self.widths[0] == 0 else added_B1D

    @cached_property
    def widths_of_rows(self) -> Tensor:
        """The width of each sequence or token, (n,)."""
        return torch.tensor(self.widths, device=self.index.device)[self.index.flatten()]


def by_unit(bands: Tensor, widths: tuple[int, ...]) -> Tensor:
    """From a number for each band between two choices, (..., K), to one for each unit, (..., widest)."""
    sizes = torch.tensor(widths).diff(prepend=torch.tensor([0])).to(bands.device)
    return bands.repeat_interleave(sizes, dim=-1, output_size=widths[-1])


@dataclass(frozen=True)
class Decision:
    """What a policy answers at a site.

    Attributes:
        width: units that run, as a prefix, for all tokens or for each; 0 skips the site, None runs it whole. A block is
            the one unit of its depth.
        gate: factor of each unit that runs, (width,) or broadcastable to (B, L, width); with a `Mixed` width the
            factor of each band of units between two neighbouring choices, `index.shape + (K,)`. Its value is 1 where it
            only carries gradients to a router, and 0 or 1 where a test masks units; None multiplies nothing.
        probabilities: the distribution over the choices that a width was drawn from, (..., K), so that an objective can
            price it; None where nothing was drawn.
    """

    width: int | Mixed | None = None
    gate: Tensor | None = None
    probabilities: Tensor | None = None

    def inside(self, block: Decision, *, whole: int) -> Decision:
        """The same decision in a block that is skipped, or by some of the rows: these run the site at width 0.

        Args:
            block: whether the block runs.
            whole: all units of the site.
        """
        if block.width == 0 or self.width == 0:
            return Decision(0)
        if not isinstance(block.width, Mixed):
            return self
        runs = torch.tensor(block.width.widths, device=block.width.index.device)[block.width.index] > 0
        if not isinstance(self.width, Mixed):
            assert self.gate is None, "units have no gates where only some rows run a block"
            return Decision(Mixed((0, whole if self.width is None else self.width), runs.long()))
        index = torch.where(runs, self.width.index + 1, 0)
        gate = None if self.gate is None else torch.cat((torch.ones_like(self.gate[..., :1]), self.gate), dim=-1)
        return Decision(Mixed((0, *self.width.widths), index), gate)


@dataclass(frozen=True)
class Stream:
    """What a policy may know of the sequences beside their hidden states.

    Attributes:
        real_BL: False where a token is padding; None where none is.
        memory: what a policy carries from token to token of the same sequences, by site. It lives in the KV cache;
            without one, a call starts with an empty memory.
    """

    real_BL: Tensor | None = None
    memory: MutableMapping[Site, Tensor] = field(default_factory=dict, hash=False)


# A function of (site, hidden_BLD, stream): with activation checkpointing it is asked twice and must answer the same, so
# where gradients are taken each block is handed an empty memory and what is written to it is dropped.
Policy = Callable[[Site, Tensor, Stream], Decision]

WHOLE = Decision()


def full(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
    """The policy of the whole model."""
    del site, hidden_BLD, stream
    return WHOLE


def constant(decisions: dict[Site, Decision]) -> Policy:
    """The policy whose answers are known before it is asked; sites without one run whole."""

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        del hidden_BLD, stream
        return decisions.get(site, WHOLE)

    return policy


def fixed(spec: SubnetSpec) -> Policy:
    """The policy that runs one sub-network for every token."""
    return constant({site: Decision(width) for site, width in spec.items()})


def mixed(space: SearchSpace, indices: Tensor) -> Policy:
    """The policy that runs a batch in which each sequence, or each token, has a spec of its own.

    Args:
        space: the choices.
        indices: choice index at every site, in the order of the space: (sites, B) for sequences, (sites, B, L) for
            tokens.
    """
    rows = zip(space.choices.items(), indices, strict=True)
    return constant({site: Decision(Mixed(widths, index)) for (site, widths), index in rows})
