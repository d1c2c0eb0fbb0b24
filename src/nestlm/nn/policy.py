"""A policy says how wide each site runs. It travels as an argument; no module remembers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nestlm.spec import Site, SubnetSpec


@dataclass(frozen=True)
class Decision:
    """What a policy answers at a site.

    Attributes:
        width: units that run, as a prefix; None runs the site whole.
        gate: factor of each unit that runs, shape (width,) or broadcastable to (B, L, width). Its value is 1 where
            it only carries gradients to a router, and 0 or 1 where a test masks units; None multiplies nothing.
    """

    width: int | None = None
    gate: Tensor | None = None


# A pure function of (site, hidden_BLD): with activation checkpointing it is asked twice and must answer the same.
Policy = Callable[[Site, Tensor], Decision]

WHOLE = Decision()


def full(site: Site, hidden_BLD: Tensor) -> Decision:
    """The policy of the whole model."""
    del site, hidden_BLD
    return WHOLE


def fixed(spec: SubnetSpec) -> Policy:
    """The policy that runs one sub-network for every token; sites that the spec does not name run whole."""
    decisions = {site: Decision(width) for site, width in spec.items()}

    def policy(site: Site, hidden_BLD: Tensor) -> Decision:
        del hidden_BLD
        return decisions.get(site, WHOLE)

    return policy
