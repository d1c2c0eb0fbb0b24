"""The gated MLP, run at the width that it is handed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.linear import PrefixLinear
from nestlm.nn.policy import Decision


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` over the first `width` of F neurons."""

    def __init__(self, hidden_size: int, *, mlp_width: int) -> None:
        super().__init__()
        self.gate = PrefixLinear(hidden_size, mlp_width, bias=False)
        self.up = PrefixLinear(hidden_size, mlp_width, bias=False)
        self.down = PrefixLinear(mlp_width, hidden_size, bias=False)

    def forward(self, hidden_BLD: Tensor, decision: Decision) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        width = decision.width
        neurons_BLF = F.silu(self.gate(hidden_BLD, outputs=width)) * self.up(hidden_BLD, outputs=width)
        if decision.gate is not None:
            neurons_BLF = neurons_BLF * decision.gate
        return self.down(neurons_BLF, inputs=width)
