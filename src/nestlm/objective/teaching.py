"""What a sub-network's logits are held against: the text, a frozen teacher, or the full path of the same step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder, DecoderOutput
from nestlm.nn.loss import SoftTargets, cross_entropy, forward_kl
from nestlm.nn.policy import Policy, full
from nestlm.objective.base import Lesson, Parts


@dataclass(frozen=True)
class Teaching(ABC):
    """Turns the policies of a step into lessons, one after the other."""

    needs_teacher: ClassVar[bool] = False

    def extra_passes(self, *, runs_full: bool) -> float:
        """Forward passes of the whole model that a step takes besides its policies, one of which may run it whole."""
        del runs_full
        return 1.0 if self.needs_teacher else 0.0

    @abstractmethod
    def lessons(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Lesson]:
        """One lesson a policy, in order.

        Args:
            parts: the model that is trained, and its teacher where `needs_teacher`.
            batch: what all of them see.
            policies: each with whether it runs the whole model, which comes first where it takes part.
        """


def run(decoder: Decoder, batch: Batch, policy: Policy) -> DecoderOutput:
    """Logits and decisions of a policy on a batch."""
    return decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL)


@dataclass(frozen=True)
class CrossEntropy(Teaching):
    """Cross-entropy on the text, as the paper."""

    def lessons(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Lesson]:
        reference_BL: Tensor | None = None
        for policy, whole in policies:
            output = run(parts.decoder, batch, policy)
            loss_BL = cross_entropy(output.logits_BLV, batch.targets_BL)
            if whole:
                reference_BL = loss_BL.detach()
            yield Lesson(loss_BL.mean(), loss_BL.detach(), output, None, reference_BL)


@dataclass(frozen=True)
class FrozenTeacher(Teaching):
    """Forward KL from the model before conversion (our choice); its logits are computed once a step.

    Attributes:
        ce_share: share of cross-entropy mixed in.
    """

    needs_teacher: ClassVar[bool] = True
    ce_share: float

    def __post_init__(self) -> None:
        check_share(self.ce_share)

    def lessons(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Lesson]:
        assert parts.teacher is not None, "kd_frozen needs the model before conversion"
        with torch.no_grad():
            teacher_BLV = run(parts.teacher, batch, full).logits_BLV
            targets = SoftTargets.of(teacher_BLV)
            reference_BL = cross_entropy(teacher_BLV, batch.targets_BL)
            del teacher_BLV
        for policy, whole in policies:
            output = run(parts.decoder, batch, policy)
            loss, kl_BL, text_loss_BL = mixed_loss(output.logits_BLV, targets, batch, ce_share=self.ce_share)
            if whole:
                reference_BL = text_loss_BL
            yield Lesson(loss, text_loss_BL, output, kl_BL, reference_BL)


@dataclass(frozen=True)
class InPlace(Teaching):
    """Cross-entropy for the full path, whose logits then teach the sub-networks of the same step (our choice).

    Attributes:
        ce_share: share of cross-entropy mixed into the sub-networks' loss.
    """

    ce_share: float

    def __post_init__(self) -> None:
        check_share(self.ce_share)

    def extra_passes(self, *, runs_full: bool) -> float:
        return 0.0 if runs_full else 1.0

    def lessons(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Lesson]:
        targets: SoftTargets | None = None
        reference_BL: Tensor | None = None
        for policy, whole in policies:
            if not whole and targets is None:  # the step does not train the full path, so it runs for this alone
                with torch.no_grad():
                    full_BLV = run(parts.decoder, batch, full).logits_BLV
                    targets = SoftTargets.of(full_BLV)
                    reference_BL = cross_entropy(full_BLV, batch.targets_BL)
            output = run(parts.decoder, batch, policy)
            if whole:
                loss_BL = cross_entropy(output.logits_BLV, batch.targets_BL)
                targets, reference_BL = SoftTargets.of(output.logits_BLV), loss_BL.detach()
                yield Lesson(loss_BL.mean(), reference_BL, output, None, reference_BL)
            else:
                assert targets is not None, "made above"
                loss, kl_BL, text_loss_BL = mixed_loss(output.logits_BLV, targets, batch, ce_share=self.ce_share)
                yield Lesson(loss, text_loss_BL, output, kl_BL, reference_BL)


def check_share(ce_share: float) -> None:
    """Raise ConfigError unless it is a share of 1."""
    if not 0 <= ce_share <= 1:
        raise ConfigError(f"teacher.ce_share: got {ce_share}, wanted a share of 1")


def mixed_loss(
    student_BLV: Tensor, teacher: SoftTargets, batch: Batch, *, ce_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - ce_share) * KL to the teacher + ce_share * cross-entropy on the text, and both of each token."""
    kl_BL = forward_kl(student_BLV, teacher)
    kl = kl_BL.mean()
    with torch.set_grad_enabled(ce_share > 0 and torch.is_grad_enabled()):
        text_loss_BL = cross_entropy(student_BLV, batch.targets_BL)
    loss = kl if ce_share == 0.0 else (1.0 - ce_share) * kl + ce_share * text_loss_BL.mean()
    return loss, kl_BL.detach(), text_loss_BL.detach()
