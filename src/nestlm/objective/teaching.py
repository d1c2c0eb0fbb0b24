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
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import SoftTargets, cross_entropy, forward_kl
from nestlm.nn.policy import Policy, full
from nestlm.objective.base import Parts


@dataclass(frozen=True)
class Teaching(ABC):
    """Turns the policies of a step into losses, one after the other."""

    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def losses(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Tensor]:
        """One loss a policy, in order.

        Args:
            parts: the model that is trained, and its teacher where `needs_teacher`.
            batch: what all of them see.
            policies: each with whether it runs the whole model, which comes first where it takes part.
        """


def logits(decoder: Decoder, batch: Batch, policy: Policy) -> Tensor:
    """Logits of a policy on a batch, (B, L, V)."""
    return decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL).logits_BLV


@dataclass(frozen=True)
class CrossEntropy(Teaching):
    """Cross-entropy on the text, as the paper."""

    def losses(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Tensor]:
        for policy, _ in policies:
            yield cross_entropy(logits(parts.decoder, batch, policy), batch.targets_BL)


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

    def losses(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Tensor]:
        assert parts.teacher is not None, "kd_frozen needs the model before conversion"
        with torch.no_grad():
            targets = SoftTargets.of(logits(parts.teacher, batch, full))
        for policy, _ in policies:
            yield mixed(logits(parts.decoder, batch, policy), targets, batch, ce_share=self.ce_share)


@dataclass(frozen=True)
class InPlace(Teaching):
    """Cross-entropy for the full path, whose logits then teach the sub-networks of the same step (our choice).

    Attributes:
        ce_share: share of cross-entropy mixed into the sub-networks' loss.
    """

    ce_share: float

    def __post_init__(self) -> None:
        check_share(self.ce_share)

    def losses(self, parts: Parts, batch: Batch, *, policies: tuple[tuple[Policy, bool], ...]) -> Iterator[Tensor]:
        lesson: SoftTargets | None = None
        for policy, whole in policies:
            if whole:
                student_BLV = logits(parts.decoder, batch, policy)
                lesson = SoftTargets.of(student_BLV)
                yield cross_entropy(student_BLV, batch.targets_BL)
            else:
                if lesson is None:  # the step does not train the full path, so it runs for the lesson alone
                    with torch.no_grad():
                        lesson = SoftTargets.of(logits(parts.decoder, batch, full))
                yield mixed(logits(parts.decoder, batch, policy), lesson, batch, ce_share=self.ce_share)


def check_share(ce_share: float) -> None:
    """Raise ConfigError unless it is a share of 1."""
    if not 0 <= ce_share <= 1:
        raise ConfigError(f"teacher.ce_share: got {ce_share}, wanted a share of 1")


def mixed(student_BLV: Tensor, teacher: SoftTargets, batch: Batch, *, ce_share: float) -> Tensor:
    """(1 - ce_share) * KL to the teacher + ce_share * cross-entropy on the text."""
    kl = forward_kl(student_BLV, teacher)
    if ce_share == 0.0:
        return kl
    return (1.0 - ce_share) * kl + ce_share * cross_entropy(student_BLV, batch.targets_BL)
