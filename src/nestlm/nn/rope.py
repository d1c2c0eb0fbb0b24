"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Llama checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions_L: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, each of shape (L, E), computed in float32 or wider."""
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions_L.device) / head_dim
    frequencies = 1.0 / theta**exponents
    angles_LE = torch.outer(positions_L.to(dtype), frequencies).repeat(1, 2)
    return angles_LE.cos(), angles_LE.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + E/2) of the last dimension by its position's angle; the table broadcasts to x (..., E)."""
    cos, sin = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
