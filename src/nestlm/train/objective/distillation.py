"""What a sub-network is held against: the text, a frozen teacher, or the full path of the same step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder, DecoderOutput, Reader
from nestlm.nn.loss import LossReader, TokenLosses
from nestlm.nn.policy import Policy, full
from nestlm.train.objective.base import PolicyLoss, StageModels


@dataclass(frozen=True)
class DistillationLoss(ABC):
    """Turns the policies of a step into lessons, one after the other."""

    needs_teacher: ClassVar[bool] = False

    def extra_passes(self, *, runs_full: bool) -> float:
        """Forward passes of the whole model that a step takes besides its policies, one of which may run it whole."""
        del runs_full
        return 1.0 if self.needs_teacher else 0.0

    @abstractmethod
    def lessons(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        """One lesson a policy, in order.

        Args:
            models: the model that is trained, and its teacher where `needs_teacher`.
            batch: what all of them see.
            policies: each with whether it runs the whole model, which comes first where it takes part.
        """


def run(decoder: Decoder, batch: Batch, policy: Policy, read: Reader) -> DecoderOutput:
    """What a reader makes of a policy on a batch, and decisions."""
    return decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, read=read)


@dataclass(frozen=True)
class CrossEntropy(DistillationLoss):
    """Cross-entropy on the text, as the paper."""

    def lessons(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        reference_BL: Tensor | None = None
        for policy, whole in policies:
            losses, decisions = run(models.decoder, batch, policy, LossReader(batch.targets_BL))
            if whole:
                reference_BL = losses.text_BL
            yield PolicyLoss(losses, decisions, reference_BL)


@dataclass(frozen=True)
class FrozenTeacher(DistillationLoss):
    """Forward KL from the model before conversion (our choice), which runs once a step.

    Attributes:
        ce_share: share of cross-entropy mixed in.
    """

    needs_teacher: ClassVar[bool] = True
    ce_share: float

    def __post_init__(self) -> None:
        check_share(self.ce_share)

    def lessons(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        assert models.teacher is not None, "kd_frozen needs the model before conversion"
        with torch.no_grad():
            taught, _ = run(models.teacher, batch, full, LossReader(batch.targets_BL))
        reference_BL = taught.text_BL
        read = LossReader(batch.targets_BL, taught.beliefs, self.ce_share)
        for policy, whole in policies:
            losses, decisions = run(models.decoder, batch, policy, read)
            if whole:
                reference_BL = losses.text_BL
            yield PolicyLoss(losses, decisions, reference_BL)


@dataclass(frozen=True)
class InPlace(DistillationLoss):
    """Cross-entropy for the full path, which then teaches the sub-networks of the same step (our choice).

    Attributes:
        ce_share: share of cross-entropy mixed into the sub-networks' loss.
    """

    ce_share: float

    def __post_init__(self) -> None:
        check_share(self.ce_share)

    def extra_passes(self, *, runs_full: bool) -> float:
        return 0.0 if runs_full else 1.0

    def lessons(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        taught: TokenLosses | None = None
        for policy, whole in policies:
            if not whole and taught is None:  # the step does not train the full path, so it runs for this alone
                with torch.no_grad():
                    taught, _ = run(models.decoder, batch, full, LossReader(batch.targets_BL))
            if whole:
                losses, decisions = run(models.decoder, batch, policy, LossReader(batch.targets_BL))
                taught = losses
                yield PolicyLoss(losses, decisions, losses.text_BL)
            else:
                assert taught is not None, "made above"
                read = LossReader(batch.targets_BL, taught.beliefs, self.ce_share)
                losses, decisions = run(models.decoder, batch, policy, read)
                yield PolicyLoss(losses, decisions, taught.text_BL)


def check_share(ce_share: float) -> None:
    """Raise ConfigError unless it is a share of 1."""
    if not 0 <= ce_share <= 1:
        raise ConfigError(f"teacher.ce_share: got {ce_share}, wanted a share of 1")
