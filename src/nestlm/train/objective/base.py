"""Objectives: what a training stage minimises, as terms of a loss that are back-propagated one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nestlm.data.batch import Batch
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import TokenLosses
from nestlm.nn.policy import Decision
from nestlm.router.base import Router
from nestlm.spec import Site


@dataclass(frozen=True)
class StageModels:
    """The models of a training stage.

    Attributes:
        decoder: the nested model.
        teacher: the model before conversion, frozen; None where nothing needs it.
        router: the router that is trained or used; None before the router stage.
    """

    decoder: Decoder
    teacher: Decoder | None = None
    router: Router | None = None


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    Attributes:
        loss: a scalar, the mean over this rank's rows.
        logs: numbers to log beside the loss, by name.
        is_last: whether no later term of the step goes through the model, so that ranks reduce its gradients now.
    """

    loss: Tensor
    logs: Mapping[str, Tensor | float] = field(default_factory=dict)
    is_last: bool = True


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one policy of a step.

    Attributes:
        losses: loss and losses per token, against the text, the teacher or the full path.
        decisions: the decision at each site.
        reference_BL: negative log-likelihood of the text under the teacher or the full path, in nats; None where the
            step does not compute it.
    """

    losses: TokenLosses
    decisions: Mapping[Site, Decision]
    reference_BL: Tensor | None


class Objective(nn.Module, ABC):
    """Yields the terms of a step. The models are arguments; parameters of an objective are those of a signal's network.

    Each term is back-propagated before the next is computed, so that a step with many sub-networks takes the memory of
    one pass.
    """

    @abstractmethod
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        """Yield the terms of a step, as a pure function of weights, batch and step.

        Args:
            models: the models of the stage.
            batch: this rank's rows.
            step: number of the step; random draws are keyed by it.
        """


class Signal(Objective):
    """An objective that trains a router. Networks of its own are thrown away afterwards.

    Attributes:
        lr: peak learning rate of the signal's own networks.
    """

    lr: float

    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Learn before the first step from what elastic training recorded.

        Args:
            router: the router that will be trained.
            record: tensors by name; see `ElasticObjective.record`.
        """

    @abstractmethod
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Return what to report after training, measured on calibration text; values are finite or None.

        Args:
            models: the models of the stage.
            held_out: batches of calibration text, which the signal was not trained on.
        """

    @abstractmethod
    def forward_passes(self, mean_share: float) -> float:
        """Return the forward passes of the full model that training takes per token, for estimates of FLOPs.

        Args:
            mean_share: cost of a routed pass as a share of the full model's.
        """
