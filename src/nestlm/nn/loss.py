"""Losses per token, in nats, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Negative log-likelihood of each target: (B, L)."""
    check_shapes(logits_BLV, targets_BL)
    losses = F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="none")
    return losses.view_as(targets_BL)


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distributions, made once a step for all its students: (B, L, V), and their entropies, (B, L)."""

    probabilities_BLV: Tensor
    entropy_BL: Tensor

    @classmethod
    def of(cls, logits_BLV: Tensor) -> SoftTargets:
        """The distributions of logits; no gradient reaches them."""
        log_probabilities_BLV = logits_BLV.detach().float().log_softmax(-1)
        probabilities_BLV = log_probabilities_BLV.exp()
        return cls(probabilities_BLV, -(probabilities_BLV * log_probabilities_BLV).sum(-1))


def forward_kl(student_BLV: Tensor, teacher: SoftTargets) -> Tensor:
    """KL(teacher || student) of each token: (B, L).

    Computed as cross-entropy with soft targets less their entropy, which takes less than half the time of `kl_div`.
    """
    if student_BLV.shape != teacher.probabilities_BLV.shape:
        raise ValueError(f"got {student_BLV.shape} and {teacher.probabilities_BLV.shape}, wanted the same shape")
    soft = F.cross_entropy(student_BLV.flatten(0, 1).float(), teacher.probabilities_BLV.flatten(0, 1), reduction="none")
    return soft.view_as(teacher.entropy_BL) - teacher.entropy_BL


def check_shapes(logits_BLV: Tensor, targets_BL: Tensor) -> None:
    """Raise ValueError unless there is one row of logits for each target."""
    if logits_BLV.shape[:-1] != targets_BL.shape:
        raise ValueError(
            f"got logits {tuple(logits_BLV.shape)} for targets {tuple(targets_BL.shape)}, wanted (B, L, V)"
        )
