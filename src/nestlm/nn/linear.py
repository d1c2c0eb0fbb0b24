"""A linear map of which only a prefix runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixLinear(nn.Linear):
    """`nn.Linear` that can run the first outputs or take the first inputs only."""

    def forward(self, input: Tensor, *, outputs: int | None = None, inputs: int | None = None) -> Tensor:
        """Map (..., inputs) to (..., outputs); None stands for all. A view of the weight is used, never a mask."""
        weight, bias = self.weight, self.bias
        # Slicing a whole tensor would still cost a copy of its gradient, so it is left out.
        if outputs is not None and outputs != self.out_features:
            weight = weight[:outputs]
            bias = None if bias is None else bias[:outputs]
        if inputs is not None and inputs != self.in_features:
            weight = weight[:, :inputs]
        return F.linear(input, weight, bias)


def hold_linear(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold the linear maps of a frozen module in the dtype that autocast would cast them to at every call.

    Embeddings and norms stay as they are, so the module computes the same numbers.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.to(dtype)
