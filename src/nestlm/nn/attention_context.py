"""Positions and masks of a call's queries, and scaled dot-product attention with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionContext:
    """Rotary table and mask of the queries of a call.

    Attributes:
        rotary: cosines and sines of the call's positions, (L, E) each.
        mask: added to scores: 0 where a query attends and -inf elsewhere, (B or 1, 1, L, tokens so far). None where
            `causal` describes the mask.
        causal: without a mask, whether a query attends to itself and earlier tokens only, rather than to all.
        dtype: of queries and keys, and of masks: GPU kernels refuse a mask of another dtype, or read it wrongly.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    causal: bool
    dtype: torch.dtype

    def select_sequences(self, chosen: Tensor) -> AttentionContext:
        """Select the context of some sequences of the batch, given by their indices."""
        if self.mask is None or len(self.mask) == 1:
            return self
        return replace(self, mask=self.mask[chosen])

    def select_tokens(self, tokens_BS: Tensor) -> Tensor | None:
        """Select the mask rows of S tokens of each sequence, given as flat indices (B, S): (B, 1, S, tokens so far)."""
        if self.dense_mask is None:
            return None
        shared, length = len(self.dense_mask) == 1, self.dense_mask.shape[1]
        rows = (tokens_BS % length if shared else tokens_BS).flatten()
        return self.dense_mask.flatten(0, 1).index_select(0, rows).unflatten(0, tokens_BS.shape).unsqueeze(1)

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """The mask as a tensor, also of a causal call: (B or 1, L, tokens so far); None where all is visible."""
        if self.mask is not None:
            return self.mask[:, 0]
        if not self.causal:
            return None
        cos_LE = self.rotary[0]
        past_LL = torch.ones(len(cos_LE), len(cos_LE), dtype=torch.bool, device=cos_LE.device).tril()
        return additive_mask(past_LL[None], dtype=self.dtype)


def additive_mask(visible: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into one that is added to scores: 0 where True, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def attend(q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, *, context: AttentionContext) -> Tensor:
    """Compute scaled dot-product attention, (B, H, L, E), with H / G query heads for each KV group."""
    return F.scaled_dot_product_attention(
        q_BHLE,
        k_BGLE,
        v_BGLE,
        attn_mask=context.mask,
        is_causal=context.mask is None and context.causal,
        enable_gqa=q_BHLE.shape[1] != k_BGLE.shape[1],
    )
