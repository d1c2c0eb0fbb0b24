"""Losses as the books have them, over all logits at once."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Negative log-likelihood of each target: (B, L)."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="none").view_as(targets_BL)


def forward_kl(student_BLV: Tensor, teacher_BLV: Tensor) -> Tensor:
    """KL(teacher || student) of each token: (B, L); no gradient reaches the teacher."""
    student_logs, teacher_logs = student_BLV.log_softmax(-1), teacher_BLV.detach().log_softmax(-1)
    return F.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum(-1)
