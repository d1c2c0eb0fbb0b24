"""Norms of the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.config import DecoderConfig
from nestlm.nn.cpu_kernels import ScaleByRMS, scale_by_rms


class LayerNorm1P(nn.Module):
    """LayerNorm whose stored weight is the factor less 1, as in the GPT-3 family of NVIDIA."""

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def reset_parameters(self) -> None:
        """Set the factor to 1 and the bias to 0."""
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
            return ScaleByRMS.apply(x, self.weight, self.eps)
        return scale_by_rms(x, self.weight, self.eps)[0]


def make_norm(config: DecoderConfig) -> RMSNorm | LayerNorm1P:
    """Make a norm of the residual stream, of the kind that the config names."""
    if config.norm == "layer_norm_1p":
        return LayerNorm1P(config.hidden_size, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, eps=config.norm_eps)
