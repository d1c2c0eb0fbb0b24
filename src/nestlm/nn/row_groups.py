"""Rows of different widths in one pass: those of one width stand together, and run as the prefix that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestlm.nn.policy import Mixed, by_unit


@dataclass(frozen=True)
class RowGroups:
    """Rows sorted by falling width.

    Attributes:
        choices: all widths of the site, ascending.
        widths: of the groups, falling; none is 0, and each has rows.
        rows: of each group: their places in the batch, (count,).
        num_rows: those of width 0 included.
    """

    choices: tuple[int, ...]
    widths: tuple[int, ...]
    rows: tuple[Tensor, ...]
    num_rows: int

    @classmethod
    def of(cls, width: Mixed) -> RowGroups:
        """Group the sequences, or the tokens, of a batch."""
        index_n, choices = width.index.flatten(), width.widths
        counts = torch.bincount(index_n, minlength=len(choices)).tolist()[::-1]
        rows = index_n.argsort(descending=True, stable=True).split(counts)
        groups = [(units, part) for units, part in zip(reversed(choices), rows, strict=True) if units and len(part)]
        return cls(choices, tuple(units for units, _ in groups), tuple(part for _, part in groups), len(index_n))

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The rows of each group: (n, ...) to (count, ...) a group."""
        return list(Gather.apply(rows, *self.rows))

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """What the groups made, in its rows' places, and zeros for rows of width 0: inverse of `gather`."""
        return Scatter.apply(self, *parts)

    def factors(self, gate: Tensor) -> list[Tensor]:
        """The factor of each unit that a group runs, from those of bands, `index.shape + (K,)`: (count, width)."""
        found = []
        for part, units in zip(self.gather(gate.flatten(0, gate.ndim - 2)), self.widths, strict=True):
            choices = self.choices[: self.choices.index(units) + 1]
            found.append(by_unit(part[:, : len(choices)], choices))
        return found


class Gather(Function):
    """Hands each group its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *groups: Tensor) -> tuple[Tensor, ...]:
        """(n, ...) to (count, ...) each."""
        ctx.groups, ctx.num_rows = groups, len(rows)
        return tuple(rows.index_select(0, group) for group in groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Back into their places."""
        return put_rows(grads, ctx.groups, ctx.num_rows), *(None for _ in ctx.groups)


class Scatter(Function):
    """Puts each group's rows into their places."""

    @staticmethod
    def forward(ctx: Any, groups: RowGroups, *parts: Tensor) -> Tensor:
        """(count, ...) each to (n, ...)."""
        ctx.rows = groups.rows
        return put_rows(parts, groups.rows, groups.num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """To each its own."""
        return None, *(grads[0].index_select(0, group) for group in ctx.rows)


def put_rows(parts: Sequence[Tensor], places: Sequence[Tensor], num_rows: int) -> Tensor:
    """Rows in their places among others, which are 0."""
    complete = num_rows == sum(map(len, places))
    whole = (parts[0].new_empty if complete else parts[0].new_zeros)((num_rows, *parts[0].shape[1:]))
    for part, rows in zip(parts, places, strict=True):
        whole.index_copy_(0, rows, part)
    return whole
