"""The surrogate signal of Flextron (arXiv 2406.10260): makes the class for the policy of the router."""

from __future__ import annotations

from nestlm.router.base import Router
from nestlm.train.objective.base import Signal
from nestlm.train.signal.surrogate_dynamic import DynamicSurrogateSignal
from nestlm.train.signal.surrogate_static import PairSettings, StaticSurrogateSignal


def surrogate_signal(
    router: Router,
    *,
    target: str,
    random_share: float,
    gate: float,
    cost_weight: float,
    dead_zone: float,
    entropy_weight: float,
    pairs: PairSettings,
    hidden_width: int,
    lr: float,
    seed: int,
) -> Signal:
    """Make the surrogate signal for a router's policy; arguments as of `StaticSurrogateSignal`.

    Raises:
        ConfigError: the router has no logits, or the values do not fit each other.
    """
    if router.per_token:
        return DynamicSurrogateSignal(
            router,
            target=target,
            random_share=random_share,
            gate=gate,
            cost_weight=cost_weight,
            dead_zone=dead_zone,
            entropy_weight=entropy_weight,
            warm_start=pairs.warm_start,
            hidden_width=hidden_width,
            lr=lr,
            seed=seed,
        )
    return StaticSurrogateSignal(
        router,
        target=target,
        random_share=random_share,
        gate=gate,
        cost_weight=cost_weight,
        dead_zone=dead_zone,
        entropy_weight=entropy_weight,
        pairs=pairs,
        hidden_width=hidden_width,
        lr=lr,
        seed=seed,
    )
