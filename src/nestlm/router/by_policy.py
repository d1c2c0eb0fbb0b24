"""Routers that exist for both policies: each function makes the class that `router.policy` asks for."""

from __future__ import annotations

from nestlm.cost.table import PriceList
from nestlm.router.base import Router
from nestlm.router.dynamic.base import Granularity
from nestlm.router.dynamic.logits import DynamicLogitsRouter
from nestlm.router.dynamic.value import DynamicValueRouter
from nestlm.router.static.logits import StaticLogitsRouter
from nestlm.router.static.value import StaticValueRouter


def logits_router(
    *,
    prices: PriceList,
    hidden_width: int,
    init_std: float,
    seed: int,
    hidden_size: int | None = None,
    granularity: Granularity | None = None,
) -> Router:
    """Make a router whose networks turn a budget into logits of choices.

    Args:
        prices: of whole sub-networks, or of choices per token.
        hidden_width: of the router's networks.
        init_std: standard deviation of their first weights.
        seed: of their first weights.
        hidden_size: of the model; None makes the static router.
        granularity: over which tokens a decision reaches; None makes the static router.
    """
    if hidden_size is None or granularity is None:
        return StaticLogitsRouter(prices=prices, hidden_width=hidden_width, init_std=init_std, seed=seed)
    return DynamicLogitsRouter(
        prices=prices,
        hidden_size=hidden_size,
        granularity=granularity,
        hidden_width=hidden_width,
        init_std=init_std,
        seed=seed,
    )


def value_router(
    *,
    prices: PriceList,
    hidden_width: int,
    init_std: float,
    seed: int,
    hidden_size: int | None = None,
    granularity: Granularity | None = None,
) -> Router:
    """Make a router whose networks predict what each choice adds to the loss; arguments as of `logits_router`."""
    if hidden_size is None or granularity is None:
        return StaticValueRouter(prices=prices, hidden_width=hidden_width, init_std=init_std, seed=seed)
    return DynamicValueRouter(
        prices=prices,
        hidden_size=hidden_size,
        granularity=granularity,
        hidden_width=hidden_width,
        init_std=init_std,
        seed=seed,
    )
