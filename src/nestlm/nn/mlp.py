"""The gated MLP, run at the width that it is handed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.linear import PrefixLinear
from nestlm.nn.policy import Decision, Mixed
from nestlm.nn.staircase import Staircase


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
        if isinstance(width, Mixed):
            return self.forward_mixed(hidden_BLD, width, decision.gate)
        neurons_BLF = F.silu(self.gate(hidden_BLD, outputs=width)) * self.up(hidden_BLD, outputs=width)
        if decision.gate is not None:
            neurons_BLF = neurons_BLF * decision.gate
        return self.down(neurons_BLF, inputs=width)

    def forward_mixed(self, hidden_BLD: Tensor, width: Mixed, gate: Tensor | None) -> Tensor:
        """Rows of different widths: sequences where the index is (B,), else tokens."""
        token_wise = width.index.ndim == 2
        rows = hidden_BLD.flatten(0, 1) if token_wise else hidden_BLD
        stairs = Staircase.of(width.index.flatten(), width.widths)
        if not stairs.live():
            return torch.zeros_like(hidden_BLD)
        weights = zip(
            stairs.split(self.gate.weight, dim=0),
            stairs.split(self.up.weight, dim=0),
            stairs.split(self.down.weight, dim=1),
            strict=True,
        )
        by_band = list(weights)
        gates = None if gate is None else gate.flatten(0, width.index.ndim - 1)[stairs.order]
        parts = []
        for band, part in zip(stairs.live(), stairs.down(rows), strict=True):
            gate_weight, up_weight, down_weight = by_band[band]
            neurons = F.silu(F.linear(part, gate_weight)) * F.linear(part, up_weight)
            if gates is not None:
                factor = gates[: len(part), band]
                neurons = neurons * factor.view(-1, *[1] * (neurons.ndim - 1))
            parts.append(F.linear(neurons, down_weight))
        return stairs.up(parts).view_as(hidden_BLD)
