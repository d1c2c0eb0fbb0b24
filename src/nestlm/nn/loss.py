"""Losses per token, in nats, read off the end of the residual stream.

The head's logits are made for a few rows at a time, with their gradient, so that no step ever holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nestlm.nn.linear import product_dtype

LOGITS_AT_ONCE = {"cpu": 2**23}
ON_OTHER_DEVICES = 2**26
LEAST_ROWS = 64  # what a product of matrices needs to be fast


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of the head, without gradient: logits are made from them in chunks.

    Attributes:
        hidden_BLD: the residual stream after the final norm.
        head_VD: weight of the head.
    """

    hidden_BLD: Tensor
    head_VD: Tensor

    @classmethod
    def detached(cls, hidden_BLD: Tensor, head_VD: Tensor) -> HeadInputs:
        """Keep the inputs of the head without gradient: an `output_fn` of the decoder."""
        return cls(hidden_BLD.detach(), head_VD.detach())


class TokenLosses(NamedTuple):
    """Losses of a model on the tokens of a batch.

    Attributes:
        loss: mean over tokens of what is trained on, a scalar with its gradient.
        nll_BL: negative log-likelihood of each target, without gradient.
        kl_BL: KL(teacher || model) of each token, without gradient; None without a teacher.
        head_inputs: inputs of the head, for a model that learns from this one.
    """

    loss: Tensor
    nll_BL: Tensor
    kl_BL: Tensor | None
    head_inputs: HeadInputs


@dataclass(frozen=True)
class LossFn:
    """An `output_fn` that computes losses: `(1 - ce_share)` of the KL to a teacher, `ce_share` of cross-entropy.

    Attributes:
        targets_BL: the token after each.
        teacher: inputs of the teacher's head; None: cross-entropy alone.
        ce_share: share of cross-entropy beside a teacher.
    """

    targets_BL: Tensor
    teacher: HeadInputs | None = None
    ce_share: float = 0.0

    def __call__(self, hidden_BLD: Tensor, head_VD: Tensor) -> TokenLosses:
        """Compute losses from the residual stream after the final norm, (B, L, D), and the head's weight, (V, D).

        Raises:
            ValueError: shapes that do not fit.
        """
        shape = self.targets_BL.shape
        if hidden_BLD.shape[:-1] != shape:
            raise ValueError(
                f"got hidden states {tuple(hidden_BLD.shape)} for targets {tuple(shape)}, wanted (B, L, D)"
            )
        taught = None
        if self.teacher is not None:
            if self.teacher.hidden_BLD.shape[:-1] != shape or len(self.teacher.head_VD) != len(head_VD):
                raise ValueError("got a teacher of other tokens or of another vocabulary, wanted the same")
            taught = (self.teacher.hidden_BLD.flatten(0, 1), self.teacher.head_VD)
        share = 1.0 if taught is None else self.ce_share
        loss, text_n, distance_n = HeadLoss.apply(
            hidden_BLD.flatten(0, 1), head_VD, self.targets_BL.flatten(), taught, share, torch.is_grad_enabled()
        )
        kl_BL = None if taught is None else distance_n.view(shape)
        return TokenLosses(loss, text_n.view(shape), kl_BL, HeadInputs.detached(hidden_BLD, head_VD))


@dataclass(frozen=True)
class ScoreFn:
    """An `output_fn` for evaluation: loss of each token, and whether it was the most likely one, (B, L) both.

    Attributes:
        targets_BL: the token after each.
    """

    targets_BL: Tensor

    @torch.no_grad()
    def __call__(self, hidden_BLD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Score tokens from the residual stream after the final norm, (B, L, D), and the head's weight, (V, D)."""
        hidden_nD, targets_n = hidden_BLD.flatten(0, 1), self.targets_BL.flatten()
        losses, hits = [], []
        for rows in chunks(len(hidden_nD), len(head_VD), device=hidden_nD.device):
            logits_cV = F.linear(hidden_nD[rows], head_VD).float()
            losses.append(F.cross_entropy(logits_cV, targets_n[rows], reduction="none"))
            hits.append(logits_cV.argmax(-1) == targets_n[rows])
        return torch.cat(losses).view_as(self.targets_BL), torch.cat(hits).view_as(self.targets_BL)


class HeadLoss(Function):
    """Mean loss of rows, with the gradient computed in the forward pass, chunk by chunk.

    The method of fused losses (Liger, arXiv 2410.10989), with a teacher whose logits are computed in the same chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: Tensor,
        head_VD: Tensor,
        targets_n: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        ce_share: float,
        trains: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply in autocast's dtype, compute all else in float32."""
        dtypes, dtype = (hidden_nD.dtype, head_VD.dtype), product_dtype(hidden_nD)
        hidden_nD, head_VD = hidden_nD.to(dtype), head_VD.to(dtype)
        taught = None if teacher is None else [part.to(product_dtype(part)) for part in teacher]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        text_n, distance_n = (hidden_nD.new_zeros(len(hidden_nD), dtype=wide) for _ in range(2))
        needs_hidden, needs_head = (trains and needed for needed in ctx.needs_input_grad[:2])
        grad_nD = torch.empty_like(hidden_nD) if needs_hidden else None
        grad_VD = head_VD.new_zeros(head_VD.shape, dtype=wide) if needs_head else None
        with torch.autocast(hidden_nD.device.type, enabled=False):
            for rows in chunks(len(hidden_nD), len(head_VD), device=hidden_nD.device):
                logs_cV = F.linear(hidden_nD[rows], head_VD).to(wide).log_softmax(-1)
                target_c1, wanted_cV = targets_n[rows, None], None
                text_n[rows] = -logs_cV.gather(1, target_c1)[:, 0]
                if taught is not None:
                    wanted_logs_cV = F.linear(taught[0][rows], taught[1]).to(wide).log_softmax(-1)
                    wanted_cV = wanted_logs_cV.exp()
                    distance_n[rows] = torch.linalg.vecdot(wanted_cV, wanted_logs_cV.sub_(logs_cV))
                if grad_nD is None and grad_VD is None:
                    continue
                off_cV = logs_cV.exp_()
                if wanted_cV is not None:
                    off_cV.sub_(wanted_cV, alpha=1 - ce_share)
                if ce_share:
                    off_cV.scatter_add_(1, target_c1, off_cV.new_full(target_c1.shape, -ce_share))
                off_cV = off_cV.to(dtype)
                if grad_nD is not None:
                    torch.mm(off_cV, head_VD, out=grad_nD[rows])
                if grad_VD is not None and dtype == wide:
                    grad_VD.addmm_(off_cV.T, hidden_nD[rows])
                elif grad_VD is not None:
                    grad_VD += off_cV.T @ hidden_nD[rows]
        ctx.made, ctx.dtypes, ctx.rows = (grad_nD, grad_VD), dtypes, len(hidden_nD)
        ctx.mark_non_differentiable(text_n, distance_n)
        ctx.set_materialize_grads(False)
        loss = text_n.mean() if taught is None else distance_n.mean()
        if taught is not None and ce_share:
            loss = (1 - ce_share) * loss + ce_share * text_n.mean()
        return loss, text_n, distance_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradients of the forward pass, in place: a second backward pass is not possible."""
        made, ctx.made = ctx.made, None
        scale = grads[0] / ctx.rows
        scaled = [
            None if grad is None else grad.mul_(scale).to(dtype) for grad, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def chunks(rows: int, vocab_size: int, *, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows, so small that the logits of one slice fit the device's limit."""
    size = max(LEAST_ROWS, LOGITS_AT_ONCE.get(device.type, ON_OTHER_DEVICES) // vocab_size)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
