"""Distillation losses: a sub-network is compared with the text, a frozen teacher, or the full path of the same step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder, DecoderOutput, OutputFn
from nestlm.nn.loss import LossFn, TokenLosses
from nestlm.nn.policy import Policy, full
from nestlm.train.objective.base import PolicyLoss, StageModels


@dataclass(frozen=True)
class DistillationLoss(ABC):
    """Computes the loss of each policy of a step, one after the other.

    Attributes:
        needs_teacher: whether the stage must load the model before conversion.
    """

    needs_teacher: ClassVar[bool] = False

    def extra_passes(self, *, runs_full: bool) -> float:
        """Return the forward passes of the whole model that a step takes besides its policies.

        Args:
            runs_full: whether one of the policies is the whole model.
        """
        del runs_full
        return 1.0 if self.needs_teacher else 0.0

    @abstractmethod
    def policy_losses(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        """Yield the loss of each policy, in order. The caller back-propagates each before it asks for the next.

        Args:
            models: the model that is trained, and its teacher where `needs_teacher`.
            batch: the rows that every policy sees.
            policies: each with whether it is the whole model, which comes first where it takes part.
        """


def run_policy(decoder: Decoder, batch: Batch, policy: Policy, output_fn: OutputFn) -> DecoderOutput:
    """Run a decoder on a batch under a policy; `output_fn` makes losses of the last hidden states and the head."""
    return decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, output_fn=output_fn)


@dataclass(frozen=True)
class CrossEntropy(DistillationLoss):
    """Cross-entropy on the text, as in Flextron (arXiv 2406.10260)."""

    @override
    def policy_losses(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        reference_BL: Tensor | None = None
        for policy, whole in policies:
            losses, decisions = run_policy(models.decoder, batch, policy, LossFn(batch.targets_BL))
            if whole:
                reference_BL = losses.nll_BL
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

    @override
    def policy_losses(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        assert models.teacher is not None, "kd_frozen needs the model before conversion"
        with torch.no_grad():
            reference, _ = run_policy(models.teacher, batch, full, LossFn(batch.targets_BL))
        reference_BL = reference.nll_BL
        output_fn = LossFn(batch.targets_BL, reference.head_inputs, self.ce_share)
        for policy, whole in policies:
            losses, decisions = run_policy(models.decoder, batch, policy, output_fn)
            if whole:
                reference_BL = losses.nll_BL
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

    @override
    def extra_passes(self, *, runs_full: bool) -> float:
        return 0.0 if runs_full else 1.0

    @override
    def policy_losses(
        self, models: StageModels, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]
    ) -> Iterator[PolicyLoss]:
        reference: TokenLosses | None = None
        for policy, whole in policies:
            if not whole and reference is None:  # the step does not train the full path, so it runs for this alone
                with torch.no_grad():
                    reference, _ = run_policy(models.decoder, batch, full, LossFn(batch.targets_BL))
            if whole:
                losses, decisions = run_policy(models.decoder, batch, policy, LossFn(batch.targets_BL))
                reference = losses
                yield PolicyLoss(losses, decisions, losses.nll_BL)
            else:
                assert reference is not None, "made above"
                output_fn = LossFn(batch.targets_BL, reference.head_inputs, self.ce_share)
                losses, decisions = run_policy(models.decoder, batch, policy, output_fn)
                yield PolicyLoss(losses, decisions, reference.nll_BL)


def check_share(ce_share: float) -> None:
    """Raise ConfigError unless a value is a share, from 0 to 1."""
    if not 0 <= ce_share <= 1:
        raise ConfigError(f"teacher.ce_share: got {ce_share}, wanted a share of 1")
