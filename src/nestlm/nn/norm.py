"""Norms of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from nestlm.nn.config import DecoderConfig


class LayerNorm1P(nn.Module):
    """LayerNorm whose stored weight is the factor less 1, as in the GPT-3 family of NVIDIA."""

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def reset_parameters(self) -> None:
        """Factor 1, bias 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return F.layer_norm(hidden, self.weight.shape, self.weight + 1.0, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), on CPUs in fewer passes than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)
        assert self.eps is not None, "it is given"
        if torch.is_grad_enabled():
            return ScaledByRMS.apply(x, self.weight, self.eps)
        return scaled_by_rms(x, self.weight, self.eps)[0]


def scaled_by_rms(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What it makes of rows (..., D), and what they were multiplied by, (..., 1)."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight_D), scale


class ScaledByRMS(Function):
    """Torch has one kernel for this on GPUs; on CPUs it takes a dozen steps forward and back, and keeps what they make.

    Forward the steps are torch's. Back it is the gradient of a layer norm whose mean is 0, for which CPUs have a
    kernel; that one also takes out what moves the mean, which is put back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """(..., D) to (..., D)."""
        scaled, scale = scaled_by_rms(x, weight_D, eps)
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


def make_norm(config: DecoderConfig) -> RMSNorm | LayerNorm1P:
    """The norm that a decoder puts before attention, before the MLP and before the head."""
    if config.norm == "layer_norm_1p":
        return LayerNorm1P(config.hidden_size, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, eps=config.norm_eps)
