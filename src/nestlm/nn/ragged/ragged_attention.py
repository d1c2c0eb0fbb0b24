"""Ragged attention: tokens of one batch differ in their number of query heads.

Heads between two neighbouring widths form a head band. Its queries, those of the tokens that are wide enough, are
gathered into slots, padded to the sequence with most of them. So only the padding costs scores that nobody needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestlm.nn.attention_context import AttentionContext, attend
from nestlm.nn.policy import Width
from nestlm.nn.ragged.dispatch import Permute, RowGroups, scatter_rows

Places = Sequence[tuple[slice, slice]]  # rows and heads


@dataclass(frozen=True)
class HeadBand:
    """KV groups whose heads serve the same tokens.

    Attributes:
        start: first KV group.
        end: KV group after the last.
        tokens: flat indices of the tokens that are wide enough, in the order of the row groups, (n,).
        seats: that they look from, in each sequence; as many as positions: from their own.
    """

    start: int
    end: int
    tokens: Tensor
    num_slots: int


def split_into_bands(width: Width, groups: RowGroups) -> list[HeadBand]:
    """Make a band from each width to the next. Bands that all tokens of a sequence reach are merged, without slots."""
    widths_BL = width.units_by_row
    ends, numbers = groups.widths[::-1], list(accumulate(groups.counts))[::-1]
    most = torch.stack([(widths_BL >= end).sum(1).max() for end in ends]).tolist()
    bands: list[HeadBand] = []
    for end, num_slots, number in zip(ends, most, numbers, strict=True):
        if num_slots == widths_BL.shape[1]:
            bands = [HeadBand(0, end, groups.order, num_slots)]
        else:
            bands.append(HeadBand(bands[-1].end if bands else 0, end, groups.order[:number], num_slots))
    return bands


def attend_ragged(
    q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, *, width: Width, groups: RowGroups, context: AttentionContext
) -> list[Tensor]:
    """Compute the attention of each group of tokens: (count, heads, E) for each group.

    Args:
        q_BHLE: queries at their positions, 0 where a token has no such head.
        k_BGLE: keys of the widest choice.
        v_BGLE: values of the widest choice.
        width: of every token, (B, L).
        groups: the same, grouped.
        context: what a token may look at.
    """
    q_mHE, bands = q_BHLE.transpose(1, 2).flatten(0, 1), split_into_bands(width, groups)
    heads_per_group = q_mHE.shape[1] // groups.widths[0]
    heads = [slice(band.start * heads_per_group, band.end * heads_per_group) for band in bands]
    found = []
    for band, q_mhE in zip(bands, SplitBlocks.apply(q_mHE, [(slice(None), part) for part in heads]), strict=True):
        units = slice(band.start, band.end)
        found.append(attend_band(q_mhE, k_BGLE[:, units], v_BGLE[:, units], band, width=width, context=context))
    places = [(slice(len(band.tokens)), part) for band, part in zip(bands, heads, strict=True)]
    found_nHE = JoinBlocks.apply(places, (len(groups.order), *q_mHE.shape[1:]), *found)
    rows = pairwise((0, *accumulate(groups.counts)))
    slots = [(slice(*each), slice(end * heads_per_group)) for each, end in zip(rows, groups.widths, strict=True)]
    return list(SplitBlocks.apply(found_nHE, slots))


class JoinBlocks(Function):
    """Write blocks into one tensor; the rest of it is not initialised."""

    @staticmethod
    def forward(ctx: Any, places: Places, shape: tuple[int, ...], *parts: Tensor) -> Tensor:
        """(count, heads, E) each to (n, H, E)."""
        ctx.places = places
        return join_blocks(parts, places, parts[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Slice the gradient of each block out."""
        return None, None, *(grads[0][place] for place in ctx.places)


class SplitBlocks(Function):
    """Slice blocks that do not overlap out of one tensor."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, places: Places) -> tuple[Tensor, ...]:
        """(n, H, E) to (count, heads, E) each."""
        ctx.places, ctx.shape = places, whole.shape
        return tuple(whole[place] for place in places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Write the gradients of the blocks into one tensor."""
        return join_blocks(grads, ctx.places, grads[0].new_zeros(ctx.shape)), None


def join_blocks(parts: Sequence[Tensor], places: Places, whole: Tensor) -> Tensor:
    """Write each part to its slice of a tensor."""
    for place, part in zip(places, parts, strict=True):
        whole[place] = part
    return whole


def attend_band(
    q_mHE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, band: HeadBand, *, width: Width, context: AttentionContext
) -> Tensor:
    """Compute the attention of one head band: (all tokens, H, E) to (n, H, E).

    Args:
        q_mHE: queries of the band's heads, of all tokens.
        k_BGLE: keys of the band's KV groups.
        v_BGLE: values of the band's KV groups.
        band: the band.
        width: of every token, (B, L).
        context: what a token may look at.
    """
    assert width.index is not None
    (batch, length), num_slots = width.index.shape, band.num_slots
    if num_slots == length:
        rows_mHE, slot, seen = q_mHE, band.tokens, context
    else:
        reached_BL = width.units_by_row >= band.end
        slot = band.tokens // length * num_slots + (reached_BL.cumsum(1) - 1).flatten()[band.tokens]
        token_of_slot = slot.new_zeros(batch * num_slots).index_copy(
            0, slot, band.tokens
        )  # any token where a seat is empty
        rows_mHE = PadQueries.apply(q_mHE, token_of_slot, slot, band.tokens)
        seen = replace(context, mask=context.select_tokens(token_of_slot.view(batch, num_slots)), causal=False)
    found_BHSE = attend(rows_mHE.unflatten(0, (batch, num_slots)).transpose(1, 2), k_BGLE, v_BGLE, context=seen)
    return Permute.apply(found_BHSE.transpose(1, 2).flatten(0, 1), slot)


class PadQueries(Function):
    """Gather queries into padded slots. Outputs of empty slots are discarded."""

    @staticmethod
    def forward(ctx: Any, q_mHE: Tensor, token_of_slot: Tensor, slot: Tensor, tokens: Tensor) -> Tensor:
        """Gather (all tokens, H, E) to (all slots, H, E)."""
        ctx.slot, ctx.tokens, ctx.num_tokens = slot, tokens, len(q_mHE)
        return q_mHE.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Write the gradient of each filled slot to its token."""
        taken = grads[0].index_select(0, ctx.slot)
        return scatter_rows(taken, ctx.tokens, ctx.num_tokens), None, None, None
