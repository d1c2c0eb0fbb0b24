"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Llama checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, *, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to length - 1, each of shape (L, E), in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_LE = torch.outer(positions, frequencies).repeat(1, 2)
    return angles_LE.cos(), angles_LE.sin()


def rotate(x_BHLE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + E/2) of the last dimension by its position's angle."""
    cos_LE, sin_LE = (part.to(x_BHLE.dtype) for part in table)
    first, second = x_BHLE.chunk(2, dim=-1)
    return x_BHLE * cos_LE + torch.cat((-second, first), dim=-1) * sin_LE
