"""The MLP over its first neurons."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.config import DecoderConfig
from nestlm.nn.linear import PrefixLinear, joined_products, prefix_products
from nestlm.nn.policy import Decision, Width
from nestlm.nn.ragged.dispatch import RowGroups, widest_masked, zero_skipped


def relu2(x: Tensor) -> Tensor:
    """Compute the squared ReLU (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": relu2}


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`, over the first `width` of F neurons."""

    def __init__(self, config: DecoderConfig, *, mlp_width: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(size, mlp_width, bias=bias) if config.gated_mlp else None
        self.up = nn.Linear(size, mlp_width, bias=bias)
        self.down = PrefixLinear(mlp_width, size, bias=bias)

    @property
    def inward(self) -> list[nn.Linear]:
        """Projections from the residual stream to the neurons."""
        return [self.up] if self.gate is None else [self.up, self.gate]

    def neurons(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """Compute the neurons' outputs from their projections."""
        return self.activation(up) if gate is None else self.activation(gate) * up

    def forward(self, hidden_BLD: Tensor, decision: Decision) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        width = decision.width
        if width.index is not None:
            if hidden_BLD.shape[1] == 1 and decision.gate is None:
                return zero_skipped(self.forward(hidden_BLD, widest_masked(width)), width)
            return self.forward_mixed(hidden_BLD, width, decision.gate)
        if width.is_zero:
            return torch.zeros_like(hidden_BLD)
        outputs = None if width.units is None else [[width.units]] * len(self.inward)
        projected = prefix_products([hidden_BLD], self.inward, outputs=outputs)
        neurons_BLF = self.neurons(*(made for (made,) in projected))
        if decision.gate is not None:
            neurons_BLF = neurons_BLF * decision.gate
        return self.down(neurons_BLF)

    def forward_mixed(self, hidden_BLD: Tensor, width: Width, gate: Tensor | None) -> Tensor:
        """Run rows of different widths: sequences where the index is (B,), else tokens."""
        assert width.index is not None
        rows = hidden_BLD.flatten(0, 1) if width.index.ndim == 2 else hidden_BLD
        groups = RowGroups.by_width(width)
        if not groups.widths:
            return torch.zeros_like(hidden_BLD)
        parts = groups.permute(rows)
        projected = prefix_products(parts, self.inward, outputs=[groups.widths] * len(self.inward))
        neurons = [self.neurons(*made) for made in zip(*projected, strict=True)]
        if gate is not None:
            neurons = [
                part * factors.view(-1, *[1] * (part.ndim - 2), units)
                for part, factors, units in zip(neurons, groups.factors(gate), groups.widths, strict=True)
            ]
        return groups.unpermute(joined_products(neurons, self.down)).view_as(hidden_BLD)
