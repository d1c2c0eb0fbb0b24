"""Axis: how many attention heads run (Flextron cuts this axis)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from nestlm.elastic.axes.base import WidthAxis
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import ATTN_HEADS


@dataclass(frozen=True)
class AttnHeads(WidthAxis):
    """Unit: one KV group with all its query heads (our choice where G < H); a single head where G = H."""

    name: ClassVar[str] = ATTN_HEADS

    @override
    def units(self, block: BlockConfig) -> int:
        return block.num_kv_groups

    @override
    def resize(self, block: BlockConfig, width: int) -> BlockConfig:
        return replace(block, num_heads=width * block.heads_per_group, num_kv_groups=width)

    @override
    def observed(self, block: BlockConfig, *, config: DecoderConfig) -> tuple[str, tuple[int, int]]:
        return "attn.o", (block.heads_per_group, config.head_dim)
