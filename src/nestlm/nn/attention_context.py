"""What the queries of a call may look at, and what they find there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionContext:
    """Where the queries of a call stand, and what they may look at.

    Attributes:
        rotary: cosines and sines of the call's positions, (L, E) each.
        mask: what scores take on, 0 where a query may look and -inf elsewhere, (B or 1, 1, L, tokens so far); None
            where `causal` says it all.
        causal: whether, without a mask, a query sees itself and what is before it, rather than everything.
        dtype: of queries and keys, and so of masks: kernels for GPUs read a mask of another one wrongly, or refuse it.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    causal: bool
    dtype: torch.dtype

    def select_sequences(self, chosen: Tensor) -> AttentionContext:
        """The same for some sequences of the batch."""
        if self.mask is None or len(self.mask) == 1:
            return self
        return replace(self, mask=self.mask[chosen])

    def select_tokens(self, tokens_BS: Tensor) -> Tensor | None:
        """The mask of some tokens of each sequence, given as flat indices: (B, 1, S, tokens so far)."""
        if self.dense_mask is None:
            return None
        shared, length = len(self.dense_mask) == 1, self.dense_mask.shape[1]
        rows = (tokens_BS % length if shared else tokens_BS).flatten()
        return self.dense_mask.flatten(0, 1).index_select(0, rows).unflatten(0, tokens_BS.shape).unsqueeze(1)

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """The mask, also where it goes without saying: (B or 1, L, tokens so far); None where everything is seen."""
        if self.mask is not None:
            return self.mask[:, 0]
        if not self.causal:
            return None
        cos_LE = self.rotary[0]
        past_LL = torch.ones(len(cos_LE), len(cos_LE), dtype=torch.bool, device=cos_LE.device).tril()
        return additive_mask(past_LL[None], dtype=self.dtype)


def additive_mask(visible: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What scores take on: 0 where a query may look, -inf where it may not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def attend(q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, *, context: AttentionContext) -> Tensor:
    """Scaled dot-product attention, (B, H, L, E); the query heads are shared out evenly among the KV groups."""
    return F.scaled_dot_product_attention(
        q_BHLE,
        k_BGLE,
        v_BGLE,
        attn_mask=context.mask,
        is_causal=context.mask is None and context.causal,
        enable_gqa=q_BHLE.shape[1] != k_BGLE.shape[1],
    )
