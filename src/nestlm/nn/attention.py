"""Grouped-query attention, run with the KV groups that it is handed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.kv_cache import LayerCache
from nestlm.nn.linear import PrefixLinear
from nestlm.nn.norm import RMSNorm
from nestlm.nn.policy import Decision, Mixed
from nestlm.nn.rope import rotate
from nestlm.nn.staircase import Staircase


@dataclass(frozen=True)
class Sight:
    """Where the queries of a call stand, and what they may look at.

    Attributes:
        rotary: cosines and sines of the call's positions, (L, E) each.
        mask: True where a query may look, (B or 1, 1, L, tokens so far); None where `causal` says it all.
        causal: whether, without a mask, a query sees itself and what is before it, rather than everything.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    causal: bool

    def rows(self, chosen: Tensor) -> Sight:
        """The same for some sequences of the batch."""
        if self.mask is None or len(self.mask) == 1:
            return self
        return Sight(self.rotary, self.mask[chosen], self.causal)

    def explicit_mask(self, *, num_queries: int, num_keys: int) -> Tensor:
        """The mask, also where it goes without saying: (B or 1, L, tokens so far)."""
        if self.mask is not None:
            return self.mask[:, 0]
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=self.rotary[0].device)
        return (visible.tril(num_keys - num_queries) if self.causal else visible)[None]


class GroupedQueryAttention(nn.Module):
    """Causal self-attention over the first `width` of G KV groups, each with all its query heads."""

    def __init__(self, config: DecoderConfig, *, block: BlockConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.num_groups = block.num_kv_groups
        self.heads_per_group = block.heads_per_group
        self.q = PrefixLinear(size, block.num_heads * head_dim, bias=config.qkv_bias)
        self.k = PrefixLinear(size, block.num_kv_groups * head_dim, bias=config.qkv_bias)
        self.v = PrefixLinear(size, block.num_kv_groups * head_dim, bias=config.qkv_bias)
        self.o = PrefixLinear(block.num_heads * head_dim, size, bias=config.output_bias)
        self.q_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, hidden_BLD: Tensor, decision: Decision, *, sight: Sight, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        width = decision.width
        if isinstance(width, Mixed):
            if hidden_BLD.shape[1] == 1 and decision.gate is None:
                return self.forward_next(hidden_BLD, width, sight=sight, cache=cache)
            run = self.forward_tokens if width.index.ndim == 2 else self.forward_sequences
            return run(hidden_BLD, width, decision.gate, sight=sight, cache=cache)
        groups = self.num_groups if width is None else width
        k_BGLE, v_BGLE = self.keys_and_values(hidden_BLD, groups=groups, sight=sight, cache=cache)
        return self.read_out(hidden_BLD, Decision(groups, decision.gate), k_BGLE, v_BGLE, sight=sight)

    def keys_and_values(
        self, hidden_BLD: Tensor, *, groups: int, sight: Sight, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Those of the first groups, of all tokens so far: (B, G, tokens so far, E) each."""
        k_BGLE = turn(self.heads(self.k(hidden_BLD, outputs=groups * self.head_dim)), self.k_norm, sight.rotary)
        v_BGLE = self.heads(self.v(hidden_BLD, outputs=groups * self.head_dim))
        return (k_BGLE, v_BGLE) if cache is None else cache.extend(k_BGLE, v_BGLE, groups=slice(groups))

    def read_out(
        self, hidden_BLD: Tensor, decision: Decision, k_BGLE: Tensor, v_BGLE: Tensor, *, sight: Sight
    ) -> Tensor:
        """What the query heads of the decision's groups find, (B, L, D)."""
        groups = decision.width
        assert isinstance(groups, int), "one width for all"
        heads = groups * self.heads_per_group
        q_BHLE = turn(self.heads(self.q(hidden_BLD, outputs=heads * self.head_dim)), self.q_norm, sight.rotary)
        heads_BLHE = self.attend(q_BHLE, k_BGLE[:, :groups], v_BGLE[:, :groups], sight=sight).transpose(1, 2)
        if decision.gate is not None:
            heads_BLHE = heads_BLHE * decision.gate.repeat_interleave(self.heads_per_group, dim=-1).unsqueeze(-1)
        return self.o(heads_BLHE.flatten(2), inputs=heads * self.head_dim)

    def forward_next(self, hidden_B1D: Tensor, width: Mixed, *, sight: Sight, cache: LayerCache | None) -> Tensor:
        """One token a sequence, each with KV groups or query heads of its own.

        Where widths are of tokens, later ones may look at wider keys and values than this one has queries.
        """
        decision = width.gated()
        groups = width.widths[-1] if width.index.ndim == 2 else decision.width
        assert isinstance(groups, int), "one width for all"
        if groups == 0:
            return torch.zeros_like(hidden_B1D)
        k_BGLE, v_BGLE = self.keys_and_values(hidden_B1D, groups=groups, sight=sight, cache=cache)
        if decision.width == 0:
            return torch.zeros_like(hidden_B1D)
        return width.close(self.read_out(hidden_B1D, decision, k_BGLE, v_BGLE, sight=sight))

    def heads(self, flat_BLE: Tensor) -> Tensor:
        """(B, L, heads * E) to (B, heads, L, E)."""
        return flat_BLE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, *, sight: Sight) -> Tensor:
        """Scaled dot-product attention, (B, H, L, E)."""
        return F.scaled_dot_product_attention(
            q_BHLE,
            k_BGLE,
            v_BGLE,
            attn_mask=sight.mask,
            is_causal=sight.mask is None and sight.causal,
            enable_gqa=self.heads_per_group > 1,
        )

    def forward_sequences(
        self, hidden_BLD: Tensor, width: Mixed, gate: Tensor | None, *, sight: Sight, cache: LayerCache | None
    ) -> Tensor:
        """Each sequence with KV groups of its own: a band of groups serves the sequences that reach it."""
        stairs = Staircase.of(width.index, width.widths)
        if not stairs.live():
            return torch.zeros_like(hidden_BLD)
        query_rows = self.heads_per_group * self.head_dim
        q_bands = stairs.split_outputs(self.q, rows=query_rows)
        k_bands = stairs.split_outputs(self.k, rows=self.head_dim)
        v_bands = stairs.split_outputs(self.v, rows=self.head_dim)
        o_bands = stairs.split_inputs(self.o, rows=query_rows)
        ends = list(accumulate(stairs.bands))
        parts = []
        for band, part in zip(stairs.live(), stairs.down(hidden_BLD), strict=True):
            chosen = stairs.order[: len(part)]
            q = turn(self.heads(F.linear(part, *q_bands[band])), self.q_norm, sight.rotary)
            k = turn(self.heads(F.linear(part, *k_bands[band])), self.k_norm, sight.rotary)
            v = self.heads(F.linear(part, *v_bands[band]))
            if cache is not None:
                k, v = cache.extend(k, v, groups=slice(ends[band] - stairs.bands[band], ends[band]), rows=chosen)
            heads_BLHE = self.attend(q, k, v, sight=sight.rows(chosen)).transpose(1, 2)
            if gate is not None:
                heads_BLHE = heads_BLHE * gate[chosen, band].view(-1, 1, 1, 1)
            parts.append(F.linear(heads_BLHE.flatten(2), *o_bands[band]))
        return stairs.up(parts)

    def forward_tokens(
        self, hidden_BLD: Tensor, width: Mixed, gate: Tensor | None, *, sight: Sight, cache: LayerCache | None
    ) -> Tensor:
        """Each token with query heads of its own. All have the keys and values of the widest choice, since later tokens
        may look at them.

        Projections run on exactly the tokens that reach a band. Their scores are computed in rows that are padded to
        the sequence with most of them.
        """  # noqa: D205
        length, widest = hidden_BLD.shape[1], width.widths[-1]
        k_BGLE = turn(self.heads(self.k(hidden_BLD, outputs=widest * self.head_dim)), self.k_norm, sight.rotary)
        v_BGLE = self.heads(self.v(hidden_BLD, outputs=widest * self.head_dim))
        if cache is not None:
            k_BGLE, v_BGLE = cache.extend(k_BGLE, v_BGLE, groups=slice(widest))
        stairs = Staircase.of(width.index.flatten(), width.widths)
        if not stairs.live():
            return torch.zeros_like(hidden_BLD)
        query_rows = self.heads_per_group * self.head_dim
        q_bands = stairs.split_outputs(self.q, rows=query_rows)
        o_bands = stairs.split_inputs(self.o, rows=query_rows)
        gates = None if gate is None else gate.flatten(0, 1)[stairs.order]
        ends = list(accumulate(stairs.bands))
        parts = []
        for band, part in zip(stairs.live(), stairs.down(hidden_BLD.flatten(0, 1)), strict=True):
            tokens = stairs.order[: len(part)]
            groups = slice(ends[band] - stairs.bands[band], ends[band])
            q_nHE = F.linear(part, *q_bands[band]).unflatten(-1, (-1, self.head_dim))
            cos, sin = (table.index_select(0, tokens % length).unsqueeze(1) for table in sight.rotary)
            seat, seats = take_seats(width.index >= band, tokens)
            heads = self.attend_seated(
                turn(q_nHE, self.q_norm, (cos, sin)), k_BGLE[:, groups], v_BGLE[:, groups],
                tokens=tokens, seat=seat, seats=seats, length=length, sight=sight,
            )  # fmt: skip
            if gates is not None:
                heads = heads * gates[: len(part), band].view(-1, 1, 1)
            parts.append(F.linear(heads.flatten(1), *o_bands[band]))
        return stairs.up(parts).view_as(hidden_BLD)

    def attend_seated(
        self,
        q_nHE: Tensor,
        k_BGLE: Tensor,
        v_BGLE: Tensor,
        *,
        tokens: Tensor,
        seat: Tensor,
        seats: int,
        length: int,
        sight: Sight,
    ) -> Tensor:
        """Attention of scattered queries: each takes a seat in its sequence's row, (n, H, E) to (n, H, E)."""
        batch = len(k_BGLE)
        heads, head_dim = q_nHE.shape[1:]
        seated = q_nHE.new_zeros(batch * seats, heads, head_dim).index_copy(0, seat, q_nHE)
        if len(tokens) == batch * length:  # all of them: each sits at its own position
            seen = sight
        else:
            position = tokens.new_zeros(batch * seats).index_copy(0, seat, tokens % length).view(batch, seats)
            mask = sight.explicit_mask(num_queries=length, num_keys=k_BGLE.shape[2])
            row = torch.arange(batch, device=tokens.device)[:, None] if len(mask) > 1 else 0
            chosen = mask.flatten(0, 1).index_select(0, (row * length + position).flatten())
            seen = Sight(sight.rotary, chosen.view(batch, 1, seats, -1), causal=False)
        out_BHSE = self.attend(seated.view(batch, seats, heads, head_dim).transpose(1, 2), k_BGLE, v_BGLE, sight=seen)
        return out_BHSE.transpose(1, 2).reshape(batch * seats, heads, head_dim).index_select(0, seat)


def turn(heads: Tensor, norm: nn.Module | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys with their positions, after their norm where the model has one: (..., E) to (..., E)."""
    return rotate(heads if norm is None else norm(heads), rotary)


def take_seats(reached_BL: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Where the given tokens (flat indices) sit when each sequence's chosen tokens move up: seat (n,), seats a row."""
    seat_BL = reached_BL.cumsum(1) - 1
    seats = int(seat_BL[:, -1].max()) + 1
    row = tokens // reached_BL.shape[1]
    return row * seats + seat_BL.flatten()[tokens], seats
