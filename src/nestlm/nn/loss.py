"""Losses per token, in nats, computed in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets: a scalar."""
    check_shapes(logits_BLV, targets_BL)
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def forward_kl(student_BLV: Tensor, teacher_BLV: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student): a scalar. No gradient reaches the teacher."""
    if student_BLV.shape != teacher_BLV.shape:
        raise ValueError(f"got logits of shapes {student_BLV.shape} and {teacher_BLV.shape}, wanted the same")
    student = F.log_softmax(student_BLV.flatten(0, 1).float(), dim=-1)
    teacher = F.log_softmax(teacher_BLV.detach().flatten(0, 1).float(), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def check_shapes(logits_BLV: Tensor, targets_BL: Tensor) -> None:
    """Raise ValueError unless there is one row of logits for each target."""
    if logits_BLV.shape[:-1] != targets_BL.shape:
        raise ValueError(
            f"got logits {tuple(logits_BLV.shape)} for targets {tuple(targets_BL.shape)}, wanted (B, L, V)"
        )
