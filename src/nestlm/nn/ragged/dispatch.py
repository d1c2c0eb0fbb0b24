"""Dispatch of rows to groups of one width: rows are permuted, each group runs its prefix of units, rows return.

The same scheme as token dispatch in mixture-of-experts layers, with nested experts.
"""

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
    """Rows of a batch grouped by width, in descending order.

    Attributes:
        choices: all widths of the site, ascending.
        widths: of the groups, descending; without 0, and without groups of no rows.
        counts: rows of each group.
        order: indices of these rows in the batch, group after group, (n,).
        num_rows: rows of the batch, those of width 0 included.
    """

    choices: tuple[int, ...]
    widths: tuple[int, ...]
    counts: tuple[int, ...]
    order: Tensor
    num_rows: int

    @classmethod
    def by_width(cls, width: Width) -> RowGroups:
        """Group the sequences, or the tokens, of a batch by their widths."""
        assert width.index is not None
        index_n, choices = width.index.flatten(), width.choices
        all_counts = torch.bincount(index_n, minlength=len(choices)).tolist()
        groups = [(units, count) for units, count in zip(choices, all_counts, strict=True) if units and count][::-1]
        widths, counts = tuple(units for units, _ in groups), tuple(count for _, count in groups)
        order = index_n.argsort(descending=True, stable=True)[: sum(counts)]
        return cls(choices, widths, counts, order, len(index_n))

    @property
    def rows(self) -> Sequence[Tensor]:
        """Indices in the batch of each group's rows."""
        return self.split(self.order)

    def permute(self, rows: Tensor) -> list[Tensor]:
        """Gather the rows of each group from a batch: (num_rows, ...) to (count, ...) for each group."""
        return self.split(Permute.apply(rows, self.order))

    def unpermute(self, rows: Tensor) -> Tensor:
        """Return grouped rows (n, ...) to their places, (num_rows, ...), with zeros for rows of width 0."""
        return Unpermute.apply(rows, self.order, self.num_rows)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split grouped rows (n, ...) into one tensor for each group."""
        return list(rows.split(self.counts))

    def factors(self, gate: Tensor) -> list[Tensor]:
        """Expand gates of bands, `index.shape + (K,)`, to a factor of each unit that a group runs: (count, width)."""
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
    """Gather rows. Each is taken at most once, so its gradient is written, not added."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        """(num_rows, ...) to (n, ...)."""
        ctx.order, ctx.num_rows = order, len(rows)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Write each gradient row to the place of its input row."""
        return scatter_rows(grads[0], ctx.order, ctx.num_rows), None


class Unpermute(Function):
    """Scatter rows to their places: the inverse of `Permute`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, num_rows: int) -> Tensor:
        """(n, ...) to (num_rows, ...)."""
        ctx.order = order
        return scatter_rows(rows, order, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Route each gradient row back to the input row it came from."""
        return grads[0].index_select(0, ctx.order), None, None


def scatter_rows(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    """Write rows to their places among `num_rows` rows; the others are 0."""
    if len(places) < num_rows:
        return rows.new_zeros((num_rows, *rows.shape[1:])).index_copy_(0, places, rows)
    origin = torch.empty_like(places).index_copy_(0, places, torch.arange(num_rows, device=places.device))
    return rows.index_select(0, origin)
