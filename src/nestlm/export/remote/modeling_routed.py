"""A decoder that decides for each token how wide its layers run, within a budget. Opens with `trust_remote_code=True`.

Decisions look at the tokens before only. What a sequence has spent so far lives in its KV cache, so decoding token by
token decides as one pass over all tokens does.

Letters of shapes: B batch, L tokens, D model width, K choices of a site, J multipliers, n scattered tokens.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from .modeling_nested import NestedLlamaConfig, NestedLlamaForCausalLM, NestedLlamaModel

PATIENCE = 32  # tokens of calibration text that a sequence's count starts with
START = 4.0  # of growths: softplus(-4) is small


@strict
class RoutedLlamaConfig(NestedLlamaConfig):
    """Sizes of the layers, and where tokens decide: `router` names the sites and their choices."""

    model_type = "routed_llama"
    router: dict | None = None

    def validate_architecture(self) -> None:
        """As the parent: none of the family's checks of head counts."""


class Chooser(nn.Module):
    """One site: scores of its choices for each token, and the ledger by which its budget is kept."""

    def __init__(self, config: RoutedLlamaConfig, *, choices: int) -> None:
        super().__init__()
        router, size = config.router, config.hidden_size
        assert router is not None, "a config of this class"
        self.kind, self.prompt_tokens = router["kind"], router["prompt_tokens"]
        width, bounds, levels = router["hidden_width"], router["bounds"], router["levels"]
        self.input = nn.Parameter(torch.zeros(size, width))
        self.input_bias = nn.Parameter(torch.zeros(width))
        self.output = nn.Parameter(torch.zeros(width, choices))
        self.output_bias = nn.Parameter(torch.zeros(choices))
        # what the budget adds to the network, and how its scores are put on one scale with those of other sites
        self.budget = nn.Buffer(torch.zeros(width))
        self.scale = nn.Buffer(torch.zeros(choices))
        self.held = nn.Buffer(torch.zeros(choices))
        # cost of the choices in score at each multiplier, and under each bound in integers
        self.priced = nn.Buffer(torch.zeros(levels, choices))
        self.prices = nn.Buffer(torch.zeros(bounds, choices, dtype=torch.long))
        self.incomes = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.aims = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.demands = nn.Buffer(torch.zeros(bounds, levels, dtype=torch.long))

    def scores(self, hidden_BLD: Tensor) -> Tensor:
        """Of each choice, (B, L, K); higher is better."""
        features = F.rms_norm(hidden_BLD, hidden_BLD.shape[-1:])
        inner = F.linear(features, self.input.T) + self.input_bias
        if self.kind == "logits":
            inner = inner + self.budget
        said = F.linear(F.leaky_relu(inner, 0.1), self.output.T, self.output_bias)
        if self.kind == "logits":
            return said.log_softmax(-1) + self.held
        losses = F.softplus(said[..., :-1] - START).flip(-1).cumsum(-1).flip(-1)
        return -torch.cat((losses, torch.zeros_like(said[..., :1])), dim=-1) * self.scale

    def wanted(self, scores: Tensor) -> Tensor:
        """Choices of highest score less priced cost: (..., K) to (J, ...)."""
        return (scores - self.priced.to(scores.dtype).view(len(self.priced), *[1] * (scores.ndim - 1), -1)).argmax(-1)

    def decide(self, hidden_BLD: Tensor, real_BL: Tensor | None, memory: dict, site: tuple[str, int]) -> Tensor:
        """Choice indices (B, L); what later tokens need to know goes to the memory of their sequences."""
        scores_BLK = self.scores(hidden_BLD)
        if self.prompt_tokens:
            return self.by_prompt(scores_BLK, real_BL, memory, site)
        kept = memory.get(site)
        if kept is None:
            opening = torch.cat((torch.zeros_like(self.prices), PATIENCE * (self.demands - self.aims[:, None])), dim=1)
            kept = opening.expand(len(scores_BLK), -1, -1)
        index_BL, memory[site] = self.by_token(scores_BLK, real_BL, kept)
        return index_BL

    def by_token(self, scores_BLK: Tensor, real_BL: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens want at the multiplier that their sequence could have afforded, or what its ledger allows."""
        choices = scores_BLK.shape[-1]
        wanted_JBL = self.wanted(scores_BLK)
        over, counts = [], []
        for prices_K, aim, count_BJ in zip(self.prices, self.aims, kept[:, :, choices:].unbind(1), strict=True):
            beyond_JBL = (prices_K - aim).take(wanted_JBL)
            if real_BL is not None:
                beyond_JBL = beyond_JBL * real_BL
            after_JBL = beyond_JBL.cumsum(2) + count_BJ.T[..., None]
            over.append(after_JBL > beyond_JBL)
            counts.append(after_JBL[..., -1].T)
        level_BL = torch.stack(over).any(0).sum(0).clamp_max(len(wanted_JBL) - 1)
        index_BL = wanted_JBL.gather(0, level_BL[None])[0]
        left = []
        for bound, (prices_K, income) in enumerate(zip(self.prices, self.incomes, strict=True)):
            index_BL, account_BK = grant(index_BL, prices_K, income, real_BL, kept[:, bound, :choices])
            left.append(torch.cat((account_BK, counts[bound]), dim=1))
        return index_BL, torch.stack(left, dim=1)

    def by_prompt(self, scores_BLK: Tensor, real_BL: Tensor | None, memory: dict, site: tuple[str, int]) -> Tensor:
        """Whole for a sequence's first tokens; then what the mean of their scores wants and the sequence can pay."""
        limit = self.prompt_tokens
        batch, length, choices = scores_BLK.shape
        if real_BL is None:
            real_BL = scores_BLK.new_ones(batch, length, dtype=torch.bool)
        kept = memory.get(site, (None,))[0]  # sums of scores (K), tokens seen, the decision or -1
        if kept is None:
            kept = scores_BLK.new_zeros(batch, choices + 2, dtype=torch.float64)
            kept[:, -1] = -1.0
        sums_BK, seen_B, decided_B = kept[:, :choices], kept[:, choices], kept[:, -1].long()
        position_BL = seen_B.long()[:, None] + real_BL.cumsum(1) - 1
        sums_BK = sums_BK + (scores_BLK * (real_BL & (position_BL < limit))[..., None]).sum(1)
        seen_B = seen_B + real_BL.sum(1)
        deciding_B = (decided_B < 0) & (seen_B >= limit)
        if bool(deciding_B.any()):
            choice_B = self.affordable(self.wanted(sums_BK / limit)[0], memory)
            decided_B = torch.where(deciding_B, choice_B, decided_B)
        memory[site] = torch.cat((sums_BK, seen_B[:, None], decided_B[:, None].to(sums_BK)), dim=1), self
        return torch.where(real_BL & (position_BL >= limit), decided_B.clamp_min(0)[:, None], choices - 1)

    def affordable(self, wanted_B: Tensor, memory: dict) -> Tensor:
        """At most this site's income and what the sites that decided before it left of theirs."""
        for bound, (prices_K, income) in enumerate(zip(self.prices, self.incomes, strict=True)):
            left_B = income.repeat(len(wanted_B))
            for kept, other in memory.values():
                decided_B = kept[:, -1].long()
                saved_B = other.incomes[bound] - other.prices[bound].take(decided_B.clamp_min(0))
                left_B = left_B + torch.where(decided_B >= 0, saved_B, 0)
            reach_B = torch.searchsorted(prices_K, left_B, right=True) - 1
            wanted_B = wanted_B.minimum(reach_B.clamp_min(0))
        return wanted_B


def grant(
    wanted_BL: Tensor, prices_K: Tensor, income: Tensor, real_BL: Tensor | None, account_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Choices that sequences can pay, none wider than wanted, and what is left: balance, and savings for each step."""
    price_BL = prices_K.take(wanted_BL)
    beyond_BL = price_BL - income
    if real_BL is not None:
        price_BL, beyond_BL = price_BL * real_BL, beyond_BL * real_BL
    overdraft_BL = beyond_BL.cumsum(1) - account_BK[:, :1]
    forgone_BL = overdraft_BL.clamp_min(0).cummax(1).values
    paid_BL, steps = price_BL - since(forgone_BL), prices_K.diff()
    towards_BLK = (paid_BL[..., None] - prices_K[:-1]).clamp(torch.zeros_like(steps), steps)
    saved_BLK = towards_BLK.cumsum(1) + account_BK[:, None, 1:]
    bought_BLK = saved_BLK // steps
    left_B1 = forgone_BL[:, -1:] - overdraft_BL[:, -1:]
    return since(bought_BLK.sum(-1)), torch.cat((left_B1, saved_BLK[:, -1] - bought_BLK[:, -1] * steps), dim=1)


def since(running_BL: Tensor) -> Tensor:
    """What each token added to a running total that was 0 before the first."""
    return running_BL.diff(dim=1, prepend=running_BL.new_zeros(len(running_BL), 1))


Widths = tuple[tuple[int, ...], Tensor]  # ascending, and which of them each token takes, (B, L)


def inside(chosen: Widths | None, block: Widths | None, *, whole: int) -> Widths | None:
    """The same choice where a token may skip the block: then it takes width 0. None runs everything."""
    if block is None:
        return chosen
    runs_BL = block[1] > 0
    if chosen is None:
        return (0, whole), runs_BL.long()
    return (0, *chosen[0]), torch.where(runs_BL, chosen[1] + 1, 0)


def by_width(chosen: Widths) -> list[tuple[int, Tensor]]:
    """The widths that tokens take, and which (flat) take them, widest first; without those that run nothing."""
    widths, index = chosen[0], chosen[1].flatten()
    counts = torch.bincount(index, minlength=len(widths)).flip(0).tolist()
    tokens = index.argsort(descending=True, stable=True).split(counts)
    return [(width, part) for width, part in zip(reversed(widths), tokens, strict=True) if width and len(part)]


def first(linear: nn.Linear, outputs: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a map to its first outputs."""
    return linear.weight[:outputs], None if linear.bias is None else linear.bias[:outputs]


class RoutedLlamaDecoderLayer(LlamaDecoderLayer):
    """The family's layer, of which each token runs what is chosen for it."""

    def __init__(self, config: RoutedLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.router is not None, "a config of this class"
        own = [site for site in config.router["sites"] if site["layer"] == layer_idx]
        self.widths = {site["axis"]: tuple(site["widths"]) for site in own}
        self.choosers = nn.ModuleDict({axis: Chooser(config, choices=len(each)) for axis, each in self.widths.items()})
        self.num_groups = config.num_key_value_heads or config.num_attention_heads
        self.mlp_width = config.intermediate_size

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The residual stream, (B, L, D) to (B, L, D)."""
        assert past_key_values is not None, "the model makes one"
        assert position_embeddings is not None, "the model makes them"
        layer = self.self_attn.layer_idx
        start, memory = past_key_values.get_seq_length(layer), memory_of(past_key_values)
        real_BL = None if attention_mask is None else real_tokens(attention_mask, start, hidden_states)

        def choose(axis: str) -> Widths | None:
            if axis not in self.choosers:
                return None
            chooser: Any = self.choosers[axis]
            return self.widths[axis], chooser.decide(hidden_states, real_BL, memory, (axis, layer))

        block = choose("depth")
        heads = inside(choose("attn_heads"), block, whole=self.num_groups)
        normed = self.input_layernorm(hidden_states)
        if heads is None:
            seen = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
            attended = self.self_attn(hidden_states=normed, position_embeddings=position_embeddings, **seen)[0]
        else:
            attended = self.attend(normed, heads, attention_mask, position_embeddings, past_key_values)
        hidden_states = hidden_states + attended
        neurons = inside(choose("mlp_width"), block, whole=self.mlp_width)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) if neurons is None else self.transform(normed, neurons))

    def transform(self, hidden_BLD: Tensor, chosen: Widths) -> Tensor:
        """The MLP, of which each token runs a prefix of the neurons."""
        mlp, rows = self.mlp, hidden_BLD.flatten(0, 1)
        gate, total = getattr(mlp, "gate_proj", None), torch.zeros_like(rows)
        for width, tokens in by_width(chosen):
            part = rows[tokens]
            up = F.linear(part, *first(mlp.up_proj, width))
            neurons = mlp.act_fn(up) if gate is None else mlp.act_fn(F.linear(part, *first(gate, width))) * up
            total[tokens] = F.linear(neurons, mlp.down_proj.weight[:, :width], mlp.down_proj.bias)
        return total.view_as(hidden_BLD)

    def attend(
        self,
        hidden_BLD: Tensor,
        chosen: Widths,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: Cache,
    ) -> Tensor:
        """Attention, of which each token runs the queries of a prefix of the groups; all give keys and values."""
        attn, (batch, length, _) = self.self_attn, hidden_BLD.shape
        k_BGLE = self.split(attn.k_proj(hidden_BLD), "k_norm").transpose(1, 2)
        k_BGLE = apply_rotary_pos_emb(k_BGLE, k_BGLE, *rotary)[1]
        v_BGLE = attn.v_proj(hidden_BLD).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        k_BGLE, v_BGLE = cache.update(k_BGLE, v_BGLE, attn.layer_idx)
        rows, total, parts = hidden_BLD.flatten(0, 1), torch.zeros_like(hidden_BLD.flatten(0, 1)), by_width(chosen)
        if not parts:
            return total.view_as(hidden_BLD)
        cos, sin = (table.expand(batch, -1, -1).flatten(0, 1) for table in rotary)
        heads, order = attn.num_key_value_groups, torch.cat([tokens for _, tokens in parts])
        ends = list(accumulate(len(tokens) for _, tokens in parts))
        q_nHE = rows.new_zeros(len(order), parts[0][0] * heads, attn.head_dim)
        for end, (width, tokens) in zip(ends, parts, strict=True):
            q_cHE = self.split(F.linear(rows[tokens], *first(attn.q_proj, width * heads * attn.head_dim)), "q_norm")
            turned = apply_rotary_pos_emb(q_cHE, q_cHE, cos[tokens], sin[tokens])[0]
            q_nHE[end - len(tokens) : end, : width * heads] = turned
        found_nHE, start = torch.empty_like(q_nHE), 0
        widths_BL = torch.tensor(chosen[0], device=order.device)[chosen[1]]
        for end, (width, _) in zip(
            reversed(ends), reversed(parts), strict=True
        ):  # all tokens look with the first heads
            band, groups = slice(start * heads, width * heads), slice(start, width)
            seated = take_seats(widths_BL >= width, order[:end])
            seen = k_BGLE[:, groups], v_BGLE[:, groups], mask
            found_nHE[:end, band] = self.look(q_nHE[:end, band], *seen, order[:end], seated, length)
            start = width
        for end, (width, tokens) in zip(ends, parts, strict=True):
            part = found_nHE[end - len(tokens) : end, : width * heads].flatten(1)
            total[tokens] = F.linear(part, attn.o_proj.weight[:, : part.shape[1]], attn.o_proj.bias)
        return total.view_as(hidden_BLD)

    def split(self, flat: Tensor, norm: str) -> Tensor:
        """(..., heads * E) to (..., heads, E), normalised where the family does."""
        heads = flat.unflatten(-1, (-1, self.self_attn.head_dim))
        normalise = getattr(self.self_attn, norm, None)
        return heads if normalise is None else normalise(heads)

    def look(
        self,
        q_nHE: Tensor,
        k_BGLE: Tensor,
        v_BGLE: Tensor,
        mask: Tensor | None,
        tokens: Tensor,
        seated: tuple[Tensor, int],
        length: int,
    ) -> Tensor:
        """Attention of scattered queries: each takes a seat in its sequence's row, (n, H, E) to (n, H, E)."""
        batch, keys = len(k_BGLE), k_BGLE.shape[2]
        (seat, seats), (heads, head_dim) = seated, q_nHE.shape[1:]
        q_sHE = q_nHE.new_zeros(batch * seats, heads, head_dim).index_copy(0, seat, q_nHE)
        if len(tokens) != batch * length:  # else each sits at its own position
            if mask is None:
                ones = torch.ones(length, keys, dtype=torch.bool, device=tokens.device)
                mask = ones.tril(keys - length)[None, None]
            position = tokens.new_zeros(batch * seats).index_copy(0, seat, tokens % length).view(batch, seats)
            row = torch.arange(batch, device=tokens.device)[:, None]
            mask = mask.expand(batch, -1, -1, -1)[row, 0, position].unsqueeze(1)
        out_BHSE = F.scaled_dot_product_attention(
            q_sHE.view(batch, seats, heads, head_dim).transpose(1, 2), k_BGLE, v_BGLE, attn_mask=mask,
            is_causal=mask is None and length > 1, enable_gqa=self.self_attn.num_key_value_groups > 1,
        )  # fmt: skip
        return out_BHSE.transpose(1, 2).reshape(batch * seats, heads, head_dim)[seat]


def take_seats(reached_BL: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Where chosen tokens sit when each sequence's chosen ones move up: seat (n,), seats a row."""
    seat_BL = reached_BL.cumsum(1) - 1
    seats = int(seat_BL[:, -1].max()) + 1
    return tokens // reached_BL.shape[1] * seats + seat_BL.flatten()[tokens], seats


def real_tokens(mask: Tensor, start: int, hidden_BLD: Tensor) -> Tensor:
    """False for padding, (B, L): what a token may not look at itself is none. True or 0 in a mask lets it look."""
    batch, length, _ = hidden_BLD.shape
    own = mask[:, 0, :, start : start + length].diagonal(dim1=-2, dim2=-1)
    return (own if mask.dtype == torch.bool else own == 0).expand(batch, -1)


def memory_of(cache: Cache) -> dict:
    """What the sequences of a cache have decided and spent so far, by site."""
    return cache.__dict__.setdefault("routing", {})


class RoutedLlamaModel(NestedLlamaModel):
    """The family's decoder, deciding for each token."""

    config_class = RoutedLlamaConfig
    layer_class = RoutedLlamaDecoderLayer
    supports_gradient_checkpointing = False  # a layer that runs twice would spend twice
    _supports_flash_attn = False
    _supports_flex_attn = False

    def forward(self, *args: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        """As the family's; without a cache, one is made for this call: decisions are kept in it."""
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


class RoutedLlamaForCausalLM(NestedLlamaForCausalLM):
    """With a head for the next token."""

    config_class = RoutedLlamaConfig
    model_class = RoutedLlamaModel
    supports_gradient_checkpointing = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, one continuation at a time: what was spent cannot be handed from beam to beam, or undone.

        Raises:
            ValueError: beams, or tokens that are guessed first.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        asked = {
            name: kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "prompt_lookup_num_tokens")
        }
        if (asked["num_beams"] or 1) > 1 or asked["prompt_lookup_num_tokens"] or kwargs.get("assistant_model"):
            raise ValueError(f"got {asked}, wanted greedy decoding or sampling: this model decides as it goes")
        family: Any = super()
        return family.generate(*args, **kwargs)
