"""What a stage trains: terms of a loss, back-propagated one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import TokenLosses
from nestlm.nn.policy import Decision
from nestlm.router.base import Router
from nestlm.spec import Site


@dataclass(frozen=True)
class StageModels:
    """What a stage works with; the teacher is the model before conversion."""

    decoder: Decoder
    teacher: Decoder | None = None
    router: Router | None = None


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    Attributes:
        loss: a scalar, of which every rank has that of its rows.
        logs: numbers to log beside it.
        is_last: whether no later term of the step goes through the model, whose gradients ranks then reduce.
    """

    loss: Tensor
    logs: Mapping[str, Tensor | float] = field(default_factory=dict)
    is_last: bool = True


@dataclass(frozen=True)
class PolicyLoss:
    """What one policy of a step learned.

    Attributes:
        losses: of its tokens, held against the text, the teacher or the full path.
        decisions: what was decided, by site.
        reference_BL: the text's negative log-likelihood under the teacher or the full path, where the step knows it.
    """

    losses: TokenLosses
    decisions: Mapping[Site, Decision]
    reference_BL: Tensor | None


class Objective(nn.Module, ABC):
    """Yields the terms of a step. It owns no part; parameters of its own are those of a signal.

    Each term is back-propagated before the next is computed, so that the memory of a step with many sub-networks is
    that of one pass.
    """

    @abstractmethod
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        """The terms of a step, a pure function of weights, batch and step."""


class Signal(Objective):
    """An objective that trains a router, with a network of its own that is thrown away afterwards.

    Attributes:
        lr: peak learning rate of that network.
    """

    lr: float

    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Learn from what elastic training left behind, before the first step; see `Elastic.record`."""

    @abstractmethod
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """What to report when training has ended, measured on held-out (calibration) text."""

    @abstractmethod
    def forward_passes(self, mean_share: float) -> float:
        """Forward passes of the full model that a token costs, when a routed one costs `mean_share` of it."""


def check_router(router: Router, wanted: tuple[type[Router], ...], *, signal: str) -> None:
    """Raise ConfigError when a signal cannot train such a router."""
    if not isinstance(router, wanted):
        names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in (*wanted,))
        raise ConfigError(
            f"router.network: got {type(router).__module__}.{type(router).__qualname__}, which the signal {signal} "
            f"cannot train, wanted {names}"
        )
