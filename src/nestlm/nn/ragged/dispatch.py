"""Rows of different widths in one pass: those of one width stand together, and run as the prefix that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestlm.nn.policy import Decision, Width, expand_bands


@dataclass(frozen=True)
class RowGroups:
    """Rows sorted by falling width.

    Attributes:
        choices: all widths of the site, ascending.
        widths: of the groups, falling; none is 0, and each has rows.
        counts: rows of each group.
        order: the places of these rows in the batch, group after group, (n,).
        num_rows: those of width 0 included.
    """

    choices: tuple[int, ...]
    widths: tuple[int, ...]
    counts: tuple[int, ...]
    order: Tensor
    num_rows: int

    @classmethod
    def by_width(cls, width: Width) -> RowGroups:
        """Group the sequences, or the tokens, of a batch."""
        assert width.index is not None
        index_n, choices = width.index.flatten(), width.choices
        all_counts = torch.bincount(index_n, minlength=len(choices)).tolist()
        groups = [(units, count) for units, count in zip(choices, all_counts, strict=True) if units and count][::-1]
        widths, counts = tuple(units for units, _ in groups), tuple(count for _, count in groups)
        order = index_n.argsort(descending=True, stable=True)[: sum(counts)]
        return cls(choices, widths, counts, order, len(index_n))

    @property
    def rows(self) -> Sequence[Tensor]:
        """The places of each group's rows."""
        return self.split(self.order)

    def permute(self, rows: Tensor) -> list[Tensor]:
        """The rows of each group: of a batch, (num_rows, ...) to (count, ...) a group."""
        return self.split(Permute.apply(rows, self.order))

    def unpermute(self, rows: Tensor) -> Tensor:
        """Rows back in their places, and zeros for those of width 0: inverse of `gather`, joined."""
        return Unpermute.apply(rows, self.order, self.num_rows)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Those of each group, from sorted ones."""
        return list(rows.split(self.counts))

    def factors(self, gate: Tensor) -> list[Tensor]:
        """The factor of each unit that a group runs, from those of bands, `index.shape + (K,)`: (count, width)."""
        found = []
        for part, units in zip(self.permute(gate.flatten(0, gate.ndim - 2)), self.widths, strict=True):
            choices = self.choices[: self.choices.index(units) + 1]
            found.append(expand_bands(part[:, : len(choices)], choices))
        return found


def widest_masked(width: Width) -> Decision:
    """Run all rows at the widest of their widths; gates close what is beyond a row's."""
    assert width.index is not None, "a width for each row"
    units_B = width.units_by_row.flatten()
    widest, least = int(units_B.max()), int(units_B.min())
    if widest == least:
        return Decision(Width(widest))
    units = torch.arange(widest, device=units_B.device)
    return Decision(Width(widest), (units < units_B[:, None])[:, None])


def zero_skipped(added_B1D: Tensor, width: Width) -> Tensor:
    """Zero the output, its bias included, of rows whose width is 0."""
    return added_B1D * (width.units_by_row.flatten() > 0)[:, None, None] if width.choices[0] == 0 else added_B1D


class Permute(Function):
    """Each row is taken once, so that gradients are put, not added."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        """(num_rows, ...) to (n, ...)."""
        ctx.order, ctx.num_rows = order, len(rows)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Back into their places."""
        return scatter_rows(grads[0], ctx.order, ctx.num_rows), None


class Unpermute(Function):
    """The inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, num_rows: int) -> Tensor:
        """(n, ...) to (num_rows, ...)."""
        ctx.order = order
        return scatter_rows(rows, order, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """To each its own."""
        return grads[0].index_select(0, ctx.order), None, None


def scatter_rows(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    """Rows in their places among others, which are 0."""
    if len(places) < num_rows:
        return rows.new_zeros((num_rows, *rows.shape[1:])).index_copy_(0, places, rows)
    origin = torch.empty_like(places).index_copy_(0, places, torch.arange(num_rows, device=places.device))
    return rows.index_select(0, origin)
