"""Norms of the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def make_norm(config: DecoderConfig) -> nn.RMSNorm | LayerNorm1P:
    """The norm that a decoder puts before attention, before the MLP and before the head."""
    if config.norm == "layer_norm_1p":
        return LayerNorm1P(config.hidden_size, eps=config.norm_eps)
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
