"""The MLP, run at the width that it is handed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.config import DecoderConfig
from nestlm.nn.linear import PrefixLinear
from nestlm.nn.policy import Decision, Mixed
from nestlm.nn.staircase import Staircase


def relu2(x: Tensor) -> Tensor:
    """The squared ReLU (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": relu2}


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`, over the first `width` of F neurons."""

    def __init__(self, config: DecoderConfig, *, mlp_width: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate = PrefixLinear(size, mlp_width, bias=bias) if config.gated_mlp else None
        self.up = PrefixLinear(size, mlp_width, bias=bias)
        self.down = PrefixLinear(mlp_width, size, bias=bias)

    def neurons(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """What the neurons hand on, from their projections."""
        return self.activation(up) if gate is None else self.activation(gate) * up

    def forward(self, hidden_BLD: Tensor, decision: Decision) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        width = decision.width
        if isinstance(width, Mixed):
            if hidden_BLD.shape[1] == 1 and decision.gate is None:
                return width.close(self.forward(hidden_BLD, width.gated()))
            return self.forward_mixed(hidden_BLD, width, decision.gate)
        if width == 0:
            return torch.zeros_like(hidden_BLD)
        gate_BLF = None if self.gate is None else self.gate(hidden_BLD, outputs=width)
        neurons_BLF = self.neurons(self.up(hidden_BLD, outputs=width), gate_BLF)
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
        gate_bands = None if self.gate is None else stairs.split_outputs(self.gate)
        up_bands, down_bands = stairs.split_outputs(self.up), stairs.split_inputs(self.down)
        gates = None if gate is None else gate.flatten(0, width.index.ndim - 1)[stairs.order]
        parts = []
        for band, part in zip(stairs.live(), stairs.down(rows), strict=True):
            activated = None if gate_bands is None else F.linear(part, *gate_bands[band])
            neurons = self.neurons(F.linear(part, *up_bands[band]), activated)
            if gates is not None:
                factor = gates[: len(part), band]
                neurons = neurons * factor.view(-1, *[1] * (neurons.ndim - 1))
            parts.append(F.linear(neurons, *down_bands[band]))
        return stairs.up(parts).view_as(hidden_BLD)
