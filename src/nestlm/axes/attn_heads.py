"""Axis: how many attention heads run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nestlm.axes.base import Axis, Cut
from nestlm.nn.config import BlockConfig
from nestlm.spec import ATTN_HEADS


@dataclass(frozen=True)
class AttnHeads(Axis):
    """Unit: one KV group with all its query heads (our choice where G < H); a single head where G = H."""

    name: ClassVar[str] = ATTN_HEADS
    mixes_tokens: ClassVar[bool] = True

    def units(self, block: BlockConfig) -> int:
        return block.num_kv_groups

    def cuts(self, block: BlockConfig, *, head_dim: int) -> tuple[Cut, ...]:
        query_rows = block.heads_per_group * head_dim
        return (
            Cut("attn.q.weight", 0, query_rows),
            Cut("attn.k.weight", 0, head_dim, serves_later_tokens=True),
            Cut("attn.v.weight", 0, head_dim, serves_later_tokens=True),
            Cut("attn.o.weight", 1, query_rows),
        )

    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, num_heads=width * block.heads_per_group, num_kv_groups=width)

    def observed(self, block: BlockConfig, *, head_dim: int) -> tuple[str, tuple[int, int]]:
        return "attn.o", (block.heads_per_group, head_dim)
