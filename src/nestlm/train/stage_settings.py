"""What a run is told: the top-level settings. Plug-ins bring their own classes; YAML names them by `_target_`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from nestlm.errors import ConfigError
from nestlm.router.base import Router
from nestlm.train.objective.base import Signal
from nestlm.train.objective.elastic_values import ValueSettings
from nestlm.utils.deferred import Deferred
from nestlm.utils.messages import check_folder_name


@dataclass(frozen=True)
class StageSettings:
    """Length and peak learning rate of a training stage."""

    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps: got {self.steps}, wanted 0 (leave the stage out) or more")
        if self.lr <= 0:
            raise ConfigError(f"lr: got {self.lr}, wanted a positive learning rate")


@dataclass(frozen=True)
class ElasticSettings(StageSettings):
    """Settings of elastic training: its length, learning rate, and networks of values.

    Attributes:
        values: networks that learn what choices cost tokens along with the model; None leaves them out.
    """

    values: ValueSettings | None


@dataclass(frozen=True)
class JointSettings(StageSettings):
    """Joint tuning of model and router.

    Attributes:
        budgets_per_step: routed sub-networks that a step trains beside the full model.
        cost_weight: lambda of the routers' distance from the budget.
        dead_zone: relative distance that costs nothing.
    """

    budgets_per_step: int
    cost_weight: float
    dead_zone: float


@dataclass(frozen=True)
class RouterSettings:
    """The router group. A router that learns nothing leaves the fields with defaults out.

    Attributes:
        name: NAME of `router=NAME`.
        policy: `static` chooses one sub-network for all tokens; `dynamic` chooses for each token from its hidden state.
        network: makes the router from a price list.
        num_sequences: calibration sequences on which the router tries candidates or meets budgets.
        granularity: of a dynamic policy: a decision for each `token`, or for each `prompt`, whose first `prompt_tokens`
            run whole.
        prompt_tokens: number of those first tokens.
        signal: makes the objective that trains the router; None where nothing is learned.
        steps: training steps of the router stage.
        lr: peak learning rate of the router, in its own stage.
        joint_lr: peak learning rate of the router in joint tuning.
    """

    name: str
    policy: Literal["static", "dynamic"]
    network: Annotated[Callable[..., Router], Deferred(("prices", "hidden_size", "granularity"))]
    num_sequences: int
    granularity: Literal["token", "prompt"] = "token"
    prompt_tokens: int = 0
    signal: Annotated[Callable[..., Signal], Deferred(("router",))] | None = None
    steps: int = 0
    lr: float = 0.0
    joint_lr: float = 0.0

    def __post_init__(self) -> None:
        check_folder_name(self.name, "router.name", parts=1)
        if self.steps < 0:
            raise ConfigError(f"router.steps: got {self.steps}, wanted 0 or more")
        if self.signal is not None and (self.lr <= 0 or self.joint_lr <= 0):
            raise ConfigError(f"router: got lr={self.lr}, joint_lr={self.joint_lr}, wanted positive learning rates")
        if self.num_sequences <= 0 or (self.signal is not None and self.prompt_tokens <= 0):
            raise ConfigError(
                f"router: got prompt_tokens={self.prompt_tokens}, num_sequences={self.num_sequences}, wanted 1 or more"
            )
        if self.granularity == "prompt" and not self.per_token:
            raise ConfigError(
                "router.granularity: got prompt with a static policy, which chooses once for all tokens; "
                "set router.policy=dynamic"
            )
        if self.per_token and self.signal is None:
            raise ConfigError(
                f"router.policy: got dynamic, but router={self.name} learns nothing; set router.policy=static"
            )
        self.check_policy()

    def check_policy(self) -> None:
        """Raise ConfigError where the class of the router has the other policy only."""
        made = getattr(self.network, "func", self.network)  # a class; a function makes one for either policy
        per_token = getattr(made, "per_token", self.per_token)
        if per_token != self.per_token:
            wanted = "dynamic" if per_token else "static"
            raise ConfigError(
                f"router.policy: got {self.policy}, but {made.__name__} of router={self.name} is {wanted} only; set "
                f"router.policy={wanted}"
            )

    @property
    def per_token(self) -> bool:
        """Whether the router chooses for each token."""
        return self.policy == "dynamic"

    @property
    def label(self) -> str:
        """Name in tables, such as `uniform`, `surrogate-static` or `value-dynamic-prompt`."""
        parts = [self.name, *([self.policy] if self.signal is not None else [])]
        return "-".join([*parts, "prompt"] if self.granularity == "prompt" else parts)
