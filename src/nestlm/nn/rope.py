"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Llama checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nestlm.nn.cpu_kernels import ApplyRotary

# MKL's first cosine of a process, when two threads take it at once, now and then has 11 good bits in one of them (seen
# with torch 2.13 in 1 of 15 processes). One number is computed by one thread.
for function in (torch.cos, torch.sin):
    function(torch.ones(1))

FEW = 2**15  # numbers


@runtime_checkable
class RopeScaling(Protocol):
    """Lowers rotary frequencies, so that a model can take a longer context than it was trained on."""

    @property
    def attention_factor(self) -> float:
        """Factor by which cosines and sines are multiplied."""
        ...

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """Return scaled frequencies, (dim/2,) in radians a token; `theta` is the base of the rotary embedding."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divide all frequencies, and thereby all positions, by one factor (Chen et al., arXiv 2306.15595)."""

    factor: float
    attention_factor = 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """Divide all frequencies by the factor."""
        del theta
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between them (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor = 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """Keep frequencies that make at least `high_freq_factor` turns within the original context.

        Divide those of at most `low_freq_factor` turns by `factor`, and interpolate linearly between the two.
        """
        del theta
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071): a ramp over dimensions, and a factor of the attention logits."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def attention_factor(self) -> float:
        """Factor by which cosines and sines are multiplied: the square root of the factor of attention logits."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """Keep frequencies that make at least `beta_fast` turns within the original context.

        Divide those of at most `beta_slow` turns by `factor`, and interpolate linearly over dimensions between the two.
        """
        dim = 2 * len(frequencies)

        def dimension(turns: float) -> float:
            return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = max(math.floor(dimension(self.beta_fast)), 0), min(math.ceil(dimension(self.beta_slow)), dim - 1)
        steps = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        divided = ((steps - first) / max(last - first, 1e-3)).clamp(0, 1)
        return divided * frequencies / self.factor + (1 - divided) * frequencies


def rotary_table(
    positions_L: Tensor,
    *,
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that `apply_rotary_emb` takes, (L, dim) each.

    Args:
        positions_L: position of each token.
        dim: number of entries of a head that are rotated.
        theta: base of the frequencies, `theta ** (-2i / dim)`.
        scaling: changes the frequencies for a longer context; None: they stay as they are.
        dtype: float32 or wider.
    """
    exponents = torch.arange(0, dim, 2, dtype=dtype, device=positions_L.device) / dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta=theta)
    angles = torch.outer(positions_L.to(dtype), frequencies).repeat(1, 2)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return angles.cos() * factor, angles.sin() * factor


def apply_rotary_emb(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + dim/2) of the last dimension by its position's angle; entries from `dim` on stay.

    Args:
        x: queries or keys, (..., E).
        table: cosines and sines, (..., dim) each; the dimensions before the last broadcast to those of x.
    """
    cos, sin = (part.to(x.dtype) for part in table)
    if torch.is_grad_enabled() or x.numel() > FEW:
        return ApplyRotary.apply(x, cos, sin)
    dim = cos.shape[-1]  # few operations are what few numbers take least time by
    first, second = x[..., :dim].chunk(2, dim=-1)
    turned_few = x[..., :dim] * cos + torch.cat((-second, first), dim=-1) * sin
    return turned_few if dim == x.shape[-1] else torch.cat((turned_few, x[..., dim:]), dim=-1)
