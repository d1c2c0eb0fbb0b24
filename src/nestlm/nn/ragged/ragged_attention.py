"""Attention of queries that are scattered over a batch, since tokens ask for different numbers of heads.

The heads between two neighbouring widths, a band, serve the tokens that reach them. These move up to seats in rows that
are padded to the sequence with most of them, so that no score is computed that no token asked for, but for the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestlm.nn.attention_context import Sight, attend
from nestlm.nn.policy import Width
from nestlm.nn.ragged.dispatch import RowGroups, Sort, put_rows

Places = Sequence[tuple[slice, slice]]  # rows and heads


@dataclass(frozen=True)
class Band:
    """KV groups whose heads look from the same seats.

    Attributes:
        start: first of them.
        end: what follows the last.
        tokens: flat indices of those that reach the first of them, sorted as the groups are, (n,).
        seats: that they look from, in each sequence; as many as positions: from their own.
    """

    start: int
    end: int
    tokens: Tensor
    seats: int


def bands_of(width: Width, groups: RowGroups) -> list[Band]:
    """One from each width to the next; those that all tokens of some sequence reach are one, and all positions look."""
    widths_BL = width.units_by_row
    ends, numbers = groups.widths[::-1], list(accumulate(groups.counts))[::-1]
    most = torch.stack([(widths_BL >= end).sum(1).max() for end in ends]).tolist()
    bands: list[Band] = []
    for end, seats, number in zip(ends, most, numbers, strict=True):
        if seats == widths_BL.shape[1]:
            bands = [Band(0, end, groups.order, seats)]
        else:
            bands.append(Band(bands[-1].end if bands else 0, end, groups.order[:number], seats))
    return bands


def attend_scattered(
    q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, *, width: Width, groups: RowGroups, sight: Sight
) -> list[Tensor]:
    """What the queries of each group of tokens find: (count, heads, E) a group.

    Args:
        q_BHLE: queries at their positions, 0 where a token did not ask for a head.
        k_BGLE: keys of the widest choice.
        v_BGLE: values of the widest choice.
        width: of every token, (B, L).
        groups: the same, grouped.
        sight: what a token may look at.
    """
    q_mHE, bands = q_BHLE.transpose(1, 2).flatten(0, 1), bands_of(width, groups)
    heads_per_group = q_mHE.shape[1] // groups.widths[0]
    heads = [slice(band.start * heads_per_group, band.end * heads_per_group) for band in bands]
    found = []
    for band, q_mhE in zip(bands, CutOut.apply(q_mHE, [(slice(None), part) for part in heads]), strict=True):
        units = slice(band.start, band.end)
        found.append(attend_band(q_mhE, k_BGLE[:, units], v_BGLE[:, units], band, width=width, sight=sight))
    places = [(slice(len(band.tokens)), part) for band, part in zip(bands, heads, strict=True)]
    found_nHE = PutTogether.apply(places, (len(groups.order), *q_mHE.shape[1:]), *found)
    rows = pairwise((0, *accumulate(groups.counts)))
    slots = [(slice(*each), slice(end * heads_per_group)) for each, end in zip(rows, groups.widths, strict=True)]
    return list(CutOut.apply(found_nHE, slots))


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


def attend_band(q_mHE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, band: Band, *, width: Width, sight: Sight) -> Tensor:
    """What a band's heads find for its tokens: (all tokens, H, E) to (n, H, E).

    Args:
        q_mHE: queries of its heads, of all tokens in their places.
        k_BGLE: keys of its KV groups.
        v_BGLE: values of its KV groups.
        band: which these are.
        width: of every token, (B, L).
        sight: what a token may look at.
    """
    assert width.index is not None
    (batch, length), seats = width.index.shape, band.seats
    if seats == length:
        rows_mHE, seat, seen = q_mHE, band.tokens, sight
    else:
        reached_BL = width.units_by_row >= band.end
        seat = band.tokens // length * seats + (reached_BL.cumsum(1) - 1).flatten()[band.tokens]
        sitting = seat.new_zeros(batch * seats).index_copy(0, seat, band.tokens)  # any token where a seat is empty
        rows_mHE = TakeSeats.apply(q_mHE, sitting, seat, band.tokens)
        seen = replace(sight, mask=sight.mask_of(sitting.view(batch, seats)), causal=False)
    found_BHSE = attend(rows_mHE.unflatten(0, (batch, seats)).transpose(1, 2), k_BGLE, v_BGLE, sight=seen)
    return Sort.apply(found_BHSE.transpose(1, 2).flatten(0, 1), seat)


class TakeSeats(Function):
    """Queries of those who sit; what an empty seat finds is not asked for."""

    @staticmethod
    def forward(ctx: Any, q_mHE: Tensor, sitting: Tensor, seat: Tensor, tokens: Tensor) -> Tensor:
        """(all tokens, H, E) to (all seats, H, E)."""
        ctx.seat, ctx.tokens, ctx.num_tokens = seat, tokens, len(q_mHE)
        return q_mHE.index_select(0, sitting)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From the seats that were taken, once each."""
        taken = grads[0].index_select(0, ctx.seat)
        return put_rows(taken, ctx.tokens, ctx.num_tokens), None, None, None
