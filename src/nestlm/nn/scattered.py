"""Attention of queries that are scattered over a batch, since tokens ask for different numbers of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestlm.nn.policy import Mixed
from nestlm.nn.row_groups import RowGroups
from nestlm.nn.sight import Sight, attend

Places = Sequence[tuple[slice, slice]]  # rows and heads


def attend_scattered(
    queries: Sequence[Tensor], k_BGLE: Tensor, v_BGLE: Tensor, *, width: Mixed, groups: RowGroups, sight: Sight
) -> list[Tensor]:
    """What the queries of each group of tokens find.

    The heads between two neighbouring widths, a band, serve the tokens that reach them: the first of the sorted ones.
    Scores are computed in rows that are padded to the sequence with most of these.

    Args:
        queries: of each group, (count, heads, E).
        k_BGLE: keys of the widest choice.
        v_BGLE: values of the widest choice.
        width: of every token, (B, L).
        groups: the same, grouped.
        sight: what a token may look at.
    """
    heads_per_group = queries[0].shape[1] // groups.widths[0]
    starts = (0, *accumulate(map(len, groups.rows)))
    slots = [
        (slice(start, end), slice(q_cHE.shape[1]))
        for (start, end), q_cHE in zip(pairwise(starts), queries, strict=True)
    ]
    shape, tokens = (starts[-1], *queries[0].shape[1:]), torch.cat(groups.rows)
    bands, seen = [], []
    for reaching, (start, end) in zip(reversed(starts[1:]), pairwise((0, *reversed(groups.widths))), strict=True):
        bands.append((slice(reaching), slice(start * heads_per_group, end * heads_per_group)))
        seen.append((slice(start, end), tokens[:reaching], width.widths_of_rows.view_as(width.index) >= end))
    found = [
        attend_seated(q_mHE, k_BGLE[:, units], v_BGLE[:, units], chosen, reached_BL, sight=sight)
        for q_mHE, (units, chosen, reached_BL) in zip(
            CutOut.apply(PutTogether.apply(slots, shape, *queries), bands), seen, strict=True
        )
    ]
    return list(CutOut.apply(PutTogether.apply(bands, shape, *found), slots))


class PutTogether(Function):
    """Parts in their places of one tensor, the rest of which nobody reads."""

    @staticmethod
    def forward(ctx: Any, places: Places, shape: tuple[int, ...], *parts: Tensor) -> Tensor:
        """(count, heads, E) each to (n, H, E)."""
        ctx.places = places
        return put_together(parts, places, parts[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Cut out again."""
        return None, None, *(grads[0][place] for place in ctx.places)


class CutOut(Function):
    """Parts of one tensor that don't overlap."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, places: Places) -> tuple[Tensor, ...]:
        """(n, H, E) to (count, heads, E) each."""
        ctx.places, ctx.shape = places, whole.shape
        return tuple(whole[place] for place in places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Put together again."""
        return put_together(grads, ctx.places, grads[0].new_zeros(ctx.shape)), None


def put_together(parts: Sequence[Tensor], places: Places, whole: Tensor) -> Tensor:
    """Parts in their places."""
    for place, part in zip(places, parts, strict=True):
        whole[place] = part
    return whole


def attend_seated(
    q_nHE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, tokens: Tensor, reached_BL: Tensor, *, sight: Sight
) -> Tensor:
    """Each query takes a seat in its sequence's row: (n, H, E) to the same.

    Args:
        q_nHE: queries.
        k_BGLE: keys of their heads.
        v_BGLE: values of their heads.
        tokens: whose queries they are, (n,), counted over the whole batch.
        reached_BL: the same, as True.
        sight: what a token may look at.
    """
    batch, length = reached_BL.shape
    if len(tokens) == batch * length:  # each sits at its own position
        seat, seats, seen = tokens, length, sight
    else:
        seat, seats = take_seats(reached_BL, tokens)
        seen = replace(sight, mask=seated_mask(tokens, seat, (batch, seats), length, sight), causal=False)
    rows_nHE = q_nHE.new_zeros(batch * seats, *q_nHE.shape[1:]).index_copy(0, seat, q_nHE)
    found_BHSE = attend(rows_nHE.unflatten(0, (batch, seats)).transpose(1, 2), k_BGLE, v_BGLE, sight=seen)
    return found_BHSE.transpose(1, 2).flatten(0, 1).index_select(0, seat)


def seated_mask(tokens: Tensor, seat: Tensor, shape: tuple[int, int], length: int, sight: Sight) -> Tensor | None:
    """The rows of the mask of those who sit, (B, 1, seats, tokens so far); an empty seat has that of a first token."""
    if sight.explicit_mask is None:
        return None
    batch, seats = shape
    position = tokens.new_zeros(batch * seats).index_copy(0, seat, tokens % length)
    if len(sight.explicit_mask) > 1:
        position += torch.arange(batch, device=tokens.device).repeat_interleave(seats) * length
    return sight.explicit_mask.flatten(0, 1).index_select(0, position).view(batch, 1, seats, -1)


def take_seats(reached_BL: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Where the given tokens (flat indices) sit when each sequence's chosen tokens move up: seat (n,), seats a row."""
    seat_BL = reached_BL.cumsum(1) - 1
    seats = int(seat_BL[:, -1].max()) + 1
    row = tokens // reached_BL.shape[1]
    return row * seats + seat_BL.flatten()[tokens], seats
