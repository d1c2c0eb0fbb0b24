"""Grouped-query attention over the first KV groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nestlm.nn.attention_context import AttentionContext, attend
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.kv_cache import LayerCache
from nestlm.nn.linear import PrefixLinear, joined_products, prefix_products
from nestlm.nn.norm import RMSNorm
from nestlm.nn.policy import Decision, Width
from nestlm.nn.ragged.dispatch import RowGroups, widest_masked, zero_skipped
from nestlm.nn.ragged.ragged_attention import attend_ragged
from nestlm.nn.rope import apply_rotary_emb


class GroupedQueryAttention(nn.Module):
    """Causal self-attention over the first `width` of G KV groups, each with all its query heads."""

    def __init__(self, config: DecoderConfig, *, block: BlockConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.head_dim, self.query_rows = head_dim, block.heads_per_group * head_dim
        self.num_groups = block.num_kv_groups
        self.heads_per_group = block.heads_per_group
        self.q = nn.Linear(size, block.num_heads * head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(size, block.num_kv_groups * head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(size, block.num_kv_groups * head_dim, bias=config.qkv_bias)
        self.o = PrefixLinear(block.num_heads * head_dim, size, bias=config.output_bias)
        self.q_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, hidden_BLD: Tensor, decision: Decision, *, context: AttentionContext, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        width = decision.width
        if width.index is not None:
            if hidden_BLD.shape[1] == 1 and decision.gate is None:
                return self.forward_next(hidden_BLD, width, context=context, cache=cache)
            run = self.forward_tokens if width.index.ndim == 2 else self.forward_sequences
            return run(hidden_BLD, width, decision.gate, context=context, cache=cache)
        groups = width.count(self.num_groups)
        ((q_BHLE, k_BGLE, v_BGLE),) = self.project([hidden_BLD], [groups], [groups], context=context)
        if cache is not None:
            k_BGLE, v_BGLE = cache.extend(k_BGLE, v_BGLE, groups=slice(groups))
        found_BHLE = attend(q_BHLE, k_BGLE, v_BGLE, context=context)
        return self.o(self.merge(found_BHLE, decision.gate))

    def forward_next(
        self, hidden_B1D: Tensor, width: Width, *, context: AttentionContext, cache: LayerCache | None
    ) -> Tensor:
        """Decode one token a sequence at ragged widths.

        With a width for each token, keys and values are those of the widest choice: later tokens may be wider.
        """
        assert width.index is not None
        decision = widest_masked(width)
        queries = decision.width.count(self.num_groups)
        keys = width.choices[-1] if width.index.ndim == 2 else queries
        if keys == 0:
            return torch.zeros_like(hidden_B1D)
        ((q_BH1E, k_BGLE, v_BGLE),) = self.project([hidden_B1D], [queries], [keys], context=context)
        if cache is not None:
            k_BGLE, v_BGLE = cache.extend(k_BGLE, v_BGLE, groups=slice(keys))
        if queries == 0:
            return torch.zeros_like(hidden_B1D)
        found_BH1E = attend(q_BH1E, k_BGLE[:, :queries], v_BGLE[:, :queries], context=context)
        return zero_skipped(self.o(self.merge(found_BH1E, decision.gate)), width)

    def forward_sequences(
        self,
        hidden_BLD: Tensor,
        width: Width,
        gate: Tensor | None,
        *,
        context: AttentionContext,
        cache: LayerCache | None,
    ) -> Tensor:
        """Run sequences that differ in their number of KV groups."""
        groups = RowGroups.by_width(width)
        if not groups.widths:
            return torch.zeros_like(hidden_BLD)
        parts = groups.permute(hidden_BLD)
        factors = [None] * len(parts) if gate is None else [each.unsqueeze(1) for each in groups.factors(gate)]
        heads = []
        for (q, k, v), units, rows, factor in zip(
            self.project(parts, groups.widths, groups.widths, context=context),
            groups.widths,
            groups.rows,
            factors,
            strict=True,
        ):
            seen = (k, v) if cache is None else cache.extend(k, v, groups=slice(units), rows=rows)
            heads.append(self.merge(attend(q, *seen, context=context.select_sequences(rows)), factor))
        return groups.unpermute(joined_products(heads, self.o))

    def forward_tokens(
        self,
        hidden_BLD: Tensor,
        width: Width,
        gate: Tensor | None,
        *,
        context: AttentionContext,
        cache: LayerCache | None,
    ) -> Tensor:
        """Run tokens that differ in their number of query heads.

        All tokens have the keys and values of the widest choice, since later tokens may attend to them.
        """
        length, rows = hidden_BLD.shape[1], hidden_BLD.flatten(0, 1)
        kept = [[width.choices[-1] * self.head_dim]] * 2
        ((k_BLE,), (v_BLE,)) = prefix_products([hidden_BLD], [self.k, self.v], outputs=kept)
        k_BGLE, v_BGLE = normalize_and_rotate(self.heads(k_BLE), self.k_norm, context.rotary), self.heads(v_BLE)
        if cache is not None:
            k_BGLE, v_BGLE = cache.extend(k_BGLE, v_BGLE, groups=slice(width.choices[-1]))
        groups = RowGroups.by_width(width)
        if not groups.widths:
            return torch.zeros_like(hidden_BLD)
        outputs = [units * self.query_rows for units in groups.widths]
        q_nE = joined_products(groups.permute(rows), self.q, outputs=outputs)
        q_BHLE = self.heads(groups.unpermute(q_nE).unflatten(0, (-1, length)))
        heads = attend_ragged(
            normalize_and_rotate(q_BHLE, self.q_norm, context.rotary),
            k_BGLE,
            v_BGLE,
            width=width,
            groups=groups,
            context=context,
        )
        if gate is not None:
            factors = groups.factors(gate)
            heads = [part * self.by_head(each) for part, each in zip(heads, factors, strict=True)]
        added = joined_products([part.flatten(1) for part in heads], self.o)
        return groups.unpermute(added).view_as(hidden_BLD)

    def project(
        self, parts: Sequence[Tensor], queries: Sequence[int], keys: Sequence[int], *, context: AttentionContext
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Project parts (b, L, D) to queries, keys and values of the first KV groups, (b, heads or groups, L, E)."""
        kept = [units * self.head_dim for units in keys]
        outputs = [[units * self.query_rows for units in queries], kept, kept]
        for q, k, v in zip(*prefix_products(parts, [self.q, self.k, self.v], outputs=outputs), strict=True):
            q_bHLE, k_bGLE = (
                normalize_and_rotate(self.heads(q), self.q_norm, context.rotary),
                normalize_and_rotate(self.heads(k), self.k_norm, context.rotary),
            )
            yield q_bHLE, k_bGLE, self.heads(v)

    def heads(self, flat_BLE: Tensor) -> Tensor:
        """Split heads: (B, L, heads * E) to (B, heads, L, E)."""
        return flat_BLE.unflatten(-1, (flat_BLE.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)

    def by_head(self, gate: Tensor) -> Tensor:
        """Repeat the factor of each KV group for its query heads: (..., G) to (..., H, 1)."""
        return gate.repeat_interleave(self.heads_per_group, dim=-1).unsqueeze(-1)

    def merge(self, heads_BHLE: Tensor, gate: Tensor | None) -> Tensor:
        """Join heads, times a factor for each KV group: (B, heads, L, E) to (B, L, heads * E)."""
        heads_BLHE = heads_BHLE.transpose(1, 2)
        return (heads_BLHE if gate is None else heads_BLHE * self.by_head(gate)).flatten(2)


def normalize_and_rotate(heads: Tensor, norm: nn.Module | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the norm of queries or keys, where the model has one, then rotary positions: (..., E) to (..., E)."""
    return apply_rotary_emb(heads if norm is None else norm(heads), rotary)
