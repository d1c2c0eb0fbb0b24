"""Grouped-query attention, run with the KV groups that it is handed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.config import BlockConfig
from nestlm.nn.linear import PrefixLinear
from nestlm.nn.policy import Decision
from nestlm.nn.rope import rotate


class GroupedQueryAttention(nn.Module):
    """Causal self-attention over the first `width` of G KV groups, each with all its query heads."""

    def __init__(self, hidden_size: int, *, head_dim: int, block: BlockConfig) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_groups = block.num_kv_groups
        self.heads_per_group = block.heads_per_group
        self.q = PrefixLinear(hidden_size, block.num_heads * head_dim, bias=False)
        self.k = PrefixLinear(hidden_size, block.num_kv_groups * head_dim, bias=False)
        self.v = PrefixLinear(hidden_size, block.num_kv_groups * head_dim, bias=False)
        self.o = PrefixLinear(block.num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, hidden_BLD: Tensor, decision: Decision, *, rotary: tuple[Tensor, Tensor], mask_B1LL: Tensor | None
    ) -> Tensor:
        """(B, L, D) to (B, L, D). The mask is True where a query may look; None means plain causal attention."""
        batch, length, _ = hidden_BLD.shape
        groups = self.num_groups if decision.width is None else decision.width
        heads = groups * self.heads_per_group

        def project(linear: PrefixLinear, count: int) -> Tensor:
            flat = linear(hidden_BLD, outputs=count * self.head_dim)
            return flat.view(batch, length, count, self.head_dim).transpose(1, 2)

        q_BHLE = rotate(project(self.q, heads), rotary)
        k_BGLE = rotate(project(self.k, groups), rotary)
        v_BGLE = project(self.v, groups)
        heads_BHLE = F.scaled_dot_product_attention(
            q_BHLE,
            k_BGLE,
            v_BGLE,
            attn_mask=mask_B1LL,
            is_causal=mask_B1LL is None,
            enable_gqa=self.heads_per_group > 1,
        )
        heads_BLHE = heads_BHLE.transpose(1, 2)
        if decision.gate is not None:
            heads_BLHE = heads_BLHE * decision.gate.repeat_interleave(self.heads_per_group, dim=-1).unsqueeze(-1)
        return self.o(heads_BLHE.reshape(batch, length, heads * self.head_dim), inputs=heads * self.head_dim)
