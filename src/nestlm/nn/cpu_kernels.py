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
    """What it makes of rows (..., D), and what they were multiplied by, (..., 1)."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight_D), scale


class ScaleByRMS(Function):
    """Torch has one kernel for this on GPUs; on CPUs it takes a dozen steps forward and back, and keeps what they make.

    Forward the steps are torch's. Back it is the gradient of a layer norm whose mean is 0, for which CPUs have a
    kernel; that one also takes out what moves the mean, which is put back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """(..., D) to (..., D)."""
        scaled, scale = scale_by_rms(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return scaled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of input and weight."""
        x, weight_D, scale = ctx.saved_tensors
        grad_x, grad_D, _ = torch.ops.aten.native_layer_norm_backward(
            grads[0], x, weight_D.shape, torch.zeros_like(scale), scale, weight_D, None,
            [True, ctx.needs_input_grad[1], False],
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):  # which may reach to here, and narrow this product
            mean = (grads[0] @ weight_D).div_(len(weight_D)).unsqueeze(-1)
        return grad_x.addcmul_(mean, scale), grad_D if ctx.needs_input_grad[1] else None, None


class ApplyRotary(Function):
    """Its gradient is turned back; nothing but the table is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        ctx.save_for_backward(cos, sin)
        return rotate_pairs(x, cos, sin, direction=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By the same angles, the other way."""
        return rotate_pairs(grads[0], *ctx.saved_tensors, direction=-1.0), None, None


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> Tensor:
    """The first `dim` entries turned; the second half of the table repeats the first."""
    dim, half = cos.shape[-1], cos.shape[-1] // 2
    out = torch.empty_like(x)
    torch.mul(x[..., half:dim], sin[..., :half] * -direction, out=out[..., :half])
    torch.mul(x[..., :half], sin[..., half:] * direction, out=out[..., half:dim])
    out[..., :dim] += x[..., :dim] * cos
    if x.shape[-1] > dim:
        out[..., dim:] = x[..., dim:]
    return out
