"""Formulas written for speed on CPUs: each computes what a few lines of plain PyTorch compute, in fewer passes.

Torch has fused kernels for them on GPUs. A CPU takes a dozen operations, each of which reads and writes whole tensors,
and autograd keeps what they make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def scale_by_rms(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise rows (..., D); return them and the inverse root mean square of each, (..., 1)."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight_D), scale


class ScaleByRMS(Function):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) with a fused backward pass.

    The backward pass calls torch's kernel for the gradient of a layer norm of mean 0. That kernel also removes the
    component along the mean, which is added again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """(..., D) to (..., D)."""
        scaled, scale = scale_by_rms(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return scaled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of input and weight."""
        x, weight_D, scale = ctx.saved_tensors
        grad_x, grad_D, _ = torch.ops.aten.native_layer_norm_backward(
            grads[0], x, weight_D.shape, torch.zeros_like(scale), scale, weight_D, None,
            [True, ctx.needs_input_grad[1], False],
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):  # which may reach to here, and narrow this product
            mean = (grads[0] @ weight_D).div_(len(weight_D)).unsqueeze(-1)
        return grad_x.addcmul_(mean, scale), grad_D if ctx.needs_input_grad[1] else None, None


class ApplyRotary(Function):
    """Rotary positions whose backward pass rotates by the negative angles; only the table is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        ctx.save_for_backward(cos, sin)
        return rotate_pairs(x, cos, sin, direction=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient by the negative angles."""
        return rotate_pairs(grads[0], *ctx.saved_tensors, direction=-1.0), None, None


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> Tensor:
    """Rotate the first `dim` entries. The second half of the table repeats the first half."""
    dim, half = cos.shape[-1], cos.shape[-1] // 2
    out = torch.empty_like(x)
    torch.mul(x[..., half:dim], sin[..., :half] * -direction, out=out[..., :half])
    torch.mul(x[..., :half], sin[..., half:] * direction, out=out[..., half:dim])
    out[..., :dim] += x[..., :dim] * cos
    if x.shape[-1] > dim:
        out[..., dim:] = x[..., dim:]
    return out
