"""What other parts of the project need of a router, as protocols. Nobody outside this folder asks for a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import get_protocol_members

from nestlm.cost.table import PriceList
from nestlm.distributed.collectives import RowShard
from nestlm.errors import ConfigError
from nestlm.nn.policy import Policy
from nestlm.router.base import Router
from nestlm.router.dynamic.base import Granularity
from nestlm.router.dynamic.plan import Plan
from nestlm.router.networks import SiteNetworks, SiteWeights
from nestlm.spec import Budget, Site

T = TypeVar("T")


class PricedRouter(Protocol):
    """What every router has: prices, and whether its choices differ between tokens."""

    per_token: ClassVar[bool]
    prices: PriceList

    @property
    def floor(self) -> float:
        """Smallest share of the run's cost that the router can keep."""
        ...


class BudgetLogits(PricedRouter, Protocol):
    """A router whose networks turn a budget into logits of choices, the same for all tokens."""

    def budget_logits(self, shares_N: Tensor) -> Tensor:
        """Return logits (N, sites, max choices) for N budgets as shares; -inf where a site has fewer choices."""
        ...


class TokenLogits(PricedRouter, Protocol):
    """A router whose networks turn a budget and a hidden state into logits of choices."""

    hidden_size: int
    rows: dict[Site, int]

    def token_logits(self, row: int, features_BLD: Tensor, shares_B: Tensor) -> Tensor:
        """Return logits (B, L, K) of one site's choices, for budgets as shares (B,), or (1,) for all sequences."""
        ...


class RelaxedPolicies(PricedRouter, Protocol):
    """A router that can run every choice at once, each weighed by its probability."""

    def relaxed(
        self, shares_B: Tensor, *, generator: torch.Generator, temperature: float, gain: float, row_shard: RowShard
    ) -> Policy:
        """Return a policy of soft masks for budgets as shares (B,), with gradients to the router."""
        ...


class ChoiceValues(PricedRouter, Protocol):
    """A router whose networks predict how much each choice adds to a token's KL from the whole model."""

    networks: SiteNetworks

    def values(self, row: int, features_BLD: Tensor) -> Tensor:
        """Return the predictions in nats for one site's choices, (B, L, K) or (1, 1, K); 0 for the widest."""
        ...


class PlanningRouter(PricedRouter, Protocol):
    """A router that keeps a budget by a plan, since its choices differ between tokens."""

    granularity: Granularity
    rows: dict[Site, int]
    measured: Tensor

    def read_plan(self, budget: Budget, kept: Mapping[str, Any]) -> Plan:
        """Return the plan that `RoutedPolicy.plan` holds as plain values."""
        ...

    def policy(self, plan: Plan) -> Policy:
        """Return the policy that a plan describes."""
        ...


class ExportableRouter(PlanningRouter, Protocol):
    """A planning router whose site networks a modelling file can hold.

    Attributes:
        output_kind: whether networks return logits of choices, or steps of the loss that choices add.
    """

    output_kind: ClassVar[Literal["logits", "values"]]

    def site_weights(self, row: int, share: float) -> SiteWeights:
        """Return the network of one site for a budget as a share."""
        ...


def lacking(router: Any, protocol: type[Any]) -> list[str]:
    """Return the names of a protocol's members that a router does not have, sorted; empty where it fits."""
    return sorted(name for name in get_protocol_members(protocol) if not hasattr(router, name))


def exportable(router: Any) -> ExportableRouter | None:
    """Return the router typed as exportable, None where a modelling file cannot hold its networks."""
    return None if lacking(router, ExportableRouter) else router


def narrow(router: Router | None, protocol: type[T]) -> T:
    """Return the router typed as a protocol that is known to fit it."""
    assert router is not None, "the stage has a router"
    assert not lacking(router, protocol), f"{type(router).__name__} is no {protocol.__name__}"
    return router  # pyright: ignore[reportReturnType]


def check_router(router: Router, protocol: type[Any], *, signal: str) -> None:
    """Raise ConfigError where a signal cannot train a router, since it lacks what the signal needs.

    Args:
        router: made by `router.network`.
        protocol: what the signal needs.
        signal: its name, for the message.
    """
    names = lacking(router, protocol)
    if names:
        kind = type(router)
        raise ConfigError(
            f"router.network: got {kind.__module__}.{kind.__qualname__}, which the signal {signal} cannot train; "
            f"wanted a {protocol.__name__} router (it has no {', '.join(names)})"
        )
