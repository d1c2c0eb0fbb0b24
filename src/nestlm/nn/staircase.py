"""Rows of different widths in one pass of prefix products.

Rows are sorted by falling width. Band k of the units, between two neighbouring choices, then serves a prefix of the
rows: those that reach it. Each weight is read once, nothing is masked, and no row is computed wider than it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


@dataclass(frozen=True)
class Staircase:
    """Which rows reach which band.

    Attributes:
        order: rows by falling choice, (n,).
        inverse: where each row went, (n,).
        bands: units between neighbouring choices, one a choice.
        counts: rows that reach each band, falling.
    """

    order: Tensor
    inverse: Tensor
    bands: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, index_n: Tensor, widths: tuple[int, ...]) -> Staircase:
        """Sort rows by their choice among ascending widths."""
        order = index_n.argsort(descending=True, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        reached = torch.bincount(index_n, minlength=len(widths)).flip(0).cumsum(0).flip(0)
        bands = (widths[0], *(wide - narrow for narrow, wide in pairwise(widths)))
        return cls(order, inverse, bands, tuple(reached.tolist()))

    def live(self) -> list[int]:
        """The bands that have units and rows."""
        return [band for band, units in enumerate(self.bands) if units and self.counts[band]]

    def split(self, weight: Tensor, *, dim: int, rows: int = 1) -> list[Tensor]:
        """The weight of each band, `rows` entries along `dim` a unit; without what lies beyond the widest choice."""
        sizes = [units * rows for units in self.bands]
        rest = weight.shape[dim] - sum(sizes)
        return list(weight.split([*sizes, rest] if rest else sizes, dim))[: len(sizes)]

    def split_outputs(self, linear: nn.Linear, *, rows: int = 1) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each band of a map to the units."""
        weights = self.split(linear.weight, dim=0, rows=rows)
        biases = [None] * len(weights) if linear.bias is None else self.split(linear.bias, dim=0, rows=rows)
        return list(zip(weights, biases, strict=True))

    def split_inputs(self, linear: nn.Linear, *, rows: int = 1) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each band of a map from the units. The bias is that of the first live band.

        Every row that runs at all reaches that one, and gets the bias once.
        """
        first, weights = self.live()[0], self.split(linear.weight, dim=1, rows=rows)
        return [(weight, linear.bias if band == first else None) for band, weight in enumerate(weights)]

    def down(self, rows: Tensor) -> list[Tensor]:
        """The rows that reach each live band, sorted: (n, ...) to one (count, ...) a live band."""
        return list(Prefixes.apply(rows, self.order, self.inverse, [self.counts[band] for band in self.live()]))

    def up(self, parts: list[Tensor]) -> Tensor:
        """Sum what the live bands computed and put the rows back in their places: inverse of `down`."""
        return PrefixSum.apply(self.order, self.inverse, *parts)


def sum_of_prefixes(parts: list[Tensor], num_rows: int) -> Tensor:
    """Add parts that are each a prefix of the rows, the longest first."""
    first = parts[0]
    total = (
        first.clone()
        if len(first) == num_rows
        else F.pad(first, (0, 0) * (first.ndim - 1) + (0, num_rows - len(first)))
    )
    for part in parts[1:]:
        total[: len(part)] += part
    return total


class Prefixes(Function):
    """Prefixes of sorted rows. Its gradient is the sum of the prefixes' gradients: nothing is padded with zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        """(n, ...) to (count, ...) for each count."""
        ctx.save_for_backward(inverse)
        sorted_rows = rows.index_select(0, order)  # whole rows: faster than by indexing
        return tuple(sorted_rows[:count] for count in counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Sum, then unsort."""
        (inverse,) = ctx.saved_tensors
        return sum_of_prefixes(list(grads), len(inverse)).index_select(0, inverse), None, None, None


class PrefixSum(Function):
    """The sum of parts that are each a prefix of the sorted rows, unsorted. Its gradient is `Prefixes`."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, inverse: Tensor, *parts: Tensor) -> Tensor:
        """(count, ...) for each part to (n, ...)."""
        ctx.save_for_backward(order)
        ctx.counts = [len(part) for part in parts]
        return sum_of_prefixes(list(parts), len(inverse)).index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Sort, then hand each part its prefix."""
        (order,) = ctx.saved_tensors
        sorted_grad = grads[0].index_select(0, order)
        return (None, None, *(sorted_grad[:count] for count in ctx.counts))
