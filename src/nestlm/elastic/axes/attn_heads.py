"""Axis: how many attention heads run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nestlm.elastic.axes.base import Cut, WidthAxis
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import ATTN_HEADS


@dataclass(frozen=True)
class AttnHeads(WidthAxis):
    """Unit: one KV group with all its query heads (our choice where G < H); a single head where G = H."""

    name: ClassVar[str] = ATTN_HEADS
    mixes_tokens: ClassVar[bool] = True

    def units(self, block: BlockConfig) -> int:
        return block.num_kv_groups

    def cuts(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[Cut, ...]:
        query_rows = block.heads_per_group * config.head_dim
        projected = [
            cut
            for kind in (("weight", "bias") if config.qkv_bias else ("weight",))
            for cut in (
                Cut(f"attn.q.{kind}", 0, query_rows),
                Cut(f"attn.k.{kind}", 0, config.head_dim, serves_later_tokens=True),
                Cut(f"attn.v.{kind}", 0, config.head_dim, serves_later_tokens=True),
            )
        ]
        return (*projected, Cut("attn.o.weight", 1, query_rows))

    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, num_heads=width * block.heads_per_group, num_kv_groups=width)

    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]]:
        return "attn.o", (block.heads_per_group, config.head_dim)
