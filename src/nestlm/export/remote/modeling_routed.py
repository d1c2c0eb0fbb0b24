"""A decoder that chooses for each token how wide its layers run, within a budget. Load with `trust_remote_code=True`.

Documents that share a row (`position_ids` that start again, without a cache and an `attention_mask`) do not attend to
each other, as in the family's own model, and each decides as it would alone.

Letters of shapes: B batch, L tokens, D model width, H query heads, G groups of heads that share keys, E head width,
S keys; flat lists: t all tokens, n tokens that run any head, c tokens of one width, s slots.
"""

import copy
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .modeling_decisions import Chooser, Routing
from .modeling_nested import NestedLlamaConfig, NestedLlamaForCausalLM, NestedLlamaModel

AXES = ("depth", "attn_heads", "mlp_width")  # in the order in which a layer decides


@strict
class RoutedLlamaConfig(NestedLlamaConfig):
    """Sizes of the layers, and in `router` the sites at which tokens choose widths, with their choices."""

    model_type = "routed_llama"
    router: dict | None = None

    def validate_architecture(self) -> None:
        """Skip the family's check that the number of heads divides the hidden size."""


Widths = tuple[tuple[int, ...], Tensor]  # widths in ascending order, and the index of each token's width, (B, L)
Parts = list[tuple[int, Tensor]]  # widths, the widest first, each with the flat indices of the tokens that run it


def inside(chosen: Widths | None, block: Widths | None, *, whole: int) -> Widths | None:
    """Combine the widths of a part of a block with the choice of whether to run the block: tokens that skip it get 0.

    Args:
        chosen: widths of the part; None: every token runs the whole part.
        block: widths of the block, 0 to skip it; None: every token runs the block.
        whole: full width of the part.

    Returns:
        Widths of the part; None if every token runs the whole part.
    """
    if block is None:
        return chosen
    runs_BL = block[1] > 0
    if chosen is None:
        return (0, whole), runs_BL.long()
    return (0, *chosen[0]), torch.where(runs_BL, chosen[1] + 1, 0)


def by_width(chosen: Widths) -> Parts:
    """Group tokens by width, the widest first. Tokens of width 0 are left out."""
    widths, index = chosen[0], chosen[1].flatten()
    counts = torch.bincount(index, minlength=len(widths)).flip(0).tolist()
    tokens = index.argsort(descending=True, stable=True).split(counts)
    return [(width, part) for width, part in zip(reversed(widths), tokens, strict=True) if width and len(part)]


def part(linear: nn.Linear, *, inputs: int | None = None, outputs: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear layer, cut to its first `inputs` and `outputs`.

    Raises:
        ValueError: the layer is not a plain `torch.nn.Linear`, so its weight alone does not say what it computes.
    """
    if type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"got a {type(linear).__module__}.{type(linear).__name__}, wanted torch.nn.Linear, of which tokens run "
            "a part; merge adapters into the weights, and load them unquantised"
        )
    return linear.weight[:outputs, :inputs], None if linear.bias is None else linear.bias[:outputs]


class RoutedLlamaAttention(LlamaAttention):
    """The family's attention, in which each token may run the query heads of only the first groups."""

    def forward(self, *args: Any, groups: Widths | None = None, **kwargs: Any) -> Any:
        """Run attention with the family's arguments; `groups` says how many groups of heads each token runs."""
        return super().forward(*args, **kwargs) if groups is None else self.attend(*args, groups=groups, **kwargs)

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        groups: Widths,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run attention with a number of groups of query heads for each token.

        Args:
            hidden_states: input, (B, L, D).
            position_embeddings: cosines and sines of rotary positions, (B or 1, L, E) each.
            attention_mask: (B or 1, 1, L, S), bool or added to scores; None: causal.
            past_key_values: KV cache; keys and values of all groups are added to it.
            groups: number of groups that each token runs.

        Returns:
            Output (B, L, D), and with eager attention the weights (B, H, L, S), 0 for heads that a token does not run.
        """
        k_BGSE = self.split(self.k_proj(hidden_states), "k_norm").transpose(1, 2)
        k_BGSE = apply_rotary_pos_emb(k_BGSE, k_BGSE, *position_embeddings)[1]
        v_BGSE = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        start = 0
        if past_key_values is not None:
            start = int(past_key_values.get_seq_length(self.layer_idx))
            k_BGSE, v_BGSE = past_key_values.update(k_BGSE, v_BGSE, self.layer_idx)
        rows, parts = hidden_states.flatten(0, 1), by_width(groups)
        cos, sin = (table.expand(len(hidden_states), -1, -1).flatten(0, 1) for table in position_embeddings)
        heads, q_nHE = self.num_key_value_groups, []
        for width, tokens in parts:
            flat = F.linear(rows[tokens], *part(self.q_proj, outputs=width * heads * self.head_dim))
            q_cHE = self.split(flat, "q_norm")
            q_cHE = apply_rotary_pos_emb(q_cHE, q_cHE, cos[tokens], sin[tokens])[0]
            q_nHE.append(F.pad(q_cHE, (0, 0, 0, (parts[0][0] - width) * heads)))
        eager = self.config._attn_implementation == "eager"
        look = self.look_with_all_heads if eager else self.look_in_bands
        found, weights = look(q_nHE, k_BGSE, v_BGSE, attention_mask, parts, groups, start)
        total = torch.zeros_like(rows)
        for found_cHE, (width, tokens) in zip(found, parts, strict=True):
            flat = found_cHE[:, : width * heads].flatten(1)
            total[tokens] = F.linear(flat, *part(self.o_proj, inputs=flat.shape[1])).to(total.dtype)
        return total.view_as(hidden_states), weights

    def split(self, flat: Tensor, norm: str) -> Tensor:
        """Split a projection into heads, (..., heads * E) to (..., heads, E), and apply the norm if the family has it.

        Args:
            flat: the projection.
            norm: name of the family's norm of queries or keys.
        """
        heads = flat.unflatten(-1, (-1, self.head_dim))
        normalise = getattr(self, norm, None)
        return heads if normalise is None else normalise(heads)

    @property
    def dropped(self) -> Any:
        """Probability of dropout of attention weights: 0 outside training."""
        return self.attention_dropout if self.training else 0.0

    def look_with_all_heads(
        self, queries: list[Tensor], k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, parts: Parts, groups: Widths,
        start: int,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """Run the family's eager attention, with queries of 0 for heads that a token does not run.

        Takes and returns the same as `look_in_bands`, and the weights (B, H, L, S) in addition.
        """
        heads, shape, (widths, index_BL) = self.num_key_value_groups, groups[1].shape, groups
        q_tHE = k_BGSE.new_zeros(index_BL.numel(), k_BGSE.shape[1] * heads, self.head_dim)
        for q_cHE, (_, tokens) in zip(queries, parts, strict=True):
            q_tHE[tokens, : q_cHE.shape[1]] = q_cHE
        q_BHLE = q_tHE.unflatten(0, shape).transpose(1, 2)
        scale = {"scaling": self.scaling, "dropout": self.dropped}
        found_BLHE, weights_BHLS = eager_attention_forward(self, q_BHLE, k_BGSE, v_BGSE, mask, **scale)
        group_H = torch.arange(q_tHE.shape[1], device=q_tHE.device) // heads
        run_BHL = group_H[:, None] < torch.tensor(widths, device=q_tHE.device)[index_BL][:, None]
        found_tHE = found_BLHE.flatten(0, 1)
        return [found_tHE[tokens] for _, tokens in parts], weights_BHLS * run_BHL[..., None]

    def look_in_bands(
        self, queries: list[Tensor], k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, parts: Parts, groups: Widths,
        start: int,
    ) -> tuple[list[Tensor], None]:  # fmt: skip
        """Run attention in bands of heads: each band has all groups between two widths, and the tokens that run them.

        Args:
            queries: a tensor (c, H, E) for each entry of `parts`, with zeros for heads that its tokens do not run.
            k_BGSE: keys of all groups.
            v_BGSE: values of all groups.
            mask: attention mask; None: causal.
            parts: the tokens by width.
            groups: number of groups that each token runs.
            start: number of tokens in the cache before this call.

        Returns:
            Outputs of the heads (c, H, E) for each entry of `parts`, and no weights.
        """
        if not parts:
            return [], None
        q_nHE, order, (widths, index_BL) = torch.cat(queries), torch.cat([tokens for _, tokens in parts]), groups
        widths_BL = torch.tensor(widths, device=order.device)[index_BL]
        found_nHE, low, heads = torch.empty_like(q_nHE), 0, self.num_key_value_groups
        ends = accumulate(len(tokens) for _, tokens in parts)
        for end, (width, _) in reversed(list(zip(ends, parts, strict=True))):
            band, seated = slice(low * heads, width * heads), take_seats(widths_BL >= width, order[:end])
            seen = k_BGSE[:, low:width], v_BGSE[:, low:width], mask
            found_nHE[:end, band] = self.look(q_nHE[:end, band], *seen, order[:end], seated, start, index_BL.shape[1])
            low = width
        return list(found_nHE.split([len(tokens) for _, tokens in parts])), None

    def look(
        self,
        q_nHE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        mask: Tensor | None,
        tokens: Tensor,
        seated: tuple[Tensor, int],
        start: int,
        length: int,
    ) -> Tensor:
        """Run attention of queries of some tokens of each row, packed into padded slots.

        Args:
            q_nHE: queries of the tokens.
            k_BGSE: keys.
            v_BGSE: values.
            mask: attention mask of all tokens; None: causal.
            tokens: flat indices of the tokens, (n,).
            seated: slot of each token, and slots per row, from `take_seats`.
            start: number of tokens in the cache before this call.
            length: number of tokens per row in this call.

        Returns:
            Outputs of the heads (n, H, E).
        """
        batch, (seat, seats), (heads, head_dim) = len(k_BGSE), seated, q_nHE.shape[1:]
        q_sHE = q_nHE.new_zeros(batch * seats, heads, head_dim).index_copy(0, seat, q_nHE)
        if len(tokens) != batch * length:  # else each token's slot is its own position, and the mask fits
            if mask is None:
                mask = causal(start, length, k_BGSE.shape[2], device=tokens.device)
            position = tokens.new_zeros(batch * seats).index_copy(0, seat, tokens % length).view(batch, seats)
            row = torch.arange(batch, device=tokens.device)[:, None]
            mask = mask.expand(batch, -1, -1, -1)[row, 0, position].unsqueeze(1)
        found_BHsE = F.scaled_dot_product_attention(
            q_sHE.view(batch, seats, heads, head_dim).transpose(1, 2), k_BGSE, v_BGSE, attn_mask=mask,
            dropout_p=self.dropped, is_causal=mask is None and length > 1, enable_gqa=self.num_key_value_groups > 1,
        )  # fmt: skip
        return found_BHsE.transpose(1, 2).reshape(batch * seats, heads, head_dim)[seat]


def causal(start: int, length: int, keys: int, *, device: torch.device) -> Tensor:
    """Return the causal mask (1, 1, L, S), True to attend, of `length` tokens after `start` earlier ones.

    `keys` is S, the number of keys in the cache; a static cache has unused ones at its end.
    """
    position = torch.arange(keys, device=device)
    offset = min(start, keys - length)
    return (position <= position[offset : offset + length, None])[None, None]


def take_seats(reached_BL: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Assign chosen tokens to the first slots of their rows, in order.

    Args:
        reached_BL: True for chosen tokens.
        tokens: flat indices of the chosen tokens, in any order.

    Returns:
        Flat slot of each token of `tokens`, (n,), and the number of slots per row.
    """
    seat_BL = reached_BL.cumsum(1) - 1
    seats = int(seat_BL[:, -1].max()) + 1
    return tokens // reached_BL.shape[1] * seats + seat_BL.flatten()[tokens], seats


class RoutedLlamaDecoderLayer(LlamaDecoderLayer):
    """The family's layer, of which each token runs the widths that were chosen for it."""

    def __init__(self, config: RoutedLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.router is not None, "a config of this class"
        own = [site for site in config.router["sites"] if site["layer"] == layer_idx]
        self.widths = {site["axis"]: tuple(site["widths"]) for site in own}
        self.choosers = nn.ModuleDict(
            {
                axis: Chooser(config.router, hidden_size=config.hidden_size, choices=len(widths))
                for axis, widths in self.widths.items()
            }
        )
        self.self_attn = RoutedLlamaAttention(config, layer_idx)
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
        """Choose widths for each token, and run the layer: (B, L, D) to (B, L, D).

        Takes the family's arguments, and `routing`: the state of the call's documents.
        """
        routing: Routing = kwargs.pop("routing")
        batch, length, _ = hidden_states.shape
        routing.enter(attention_mask, past_key_values, batch=batch, length=length)

        def choose(axis: str) -> Widths | None:
            if axis not in self.choosers:
                return None
            chooser: Any = self.choosers[axis]
            site = self.self_attn.layer_idx, AXES.index(axis)
            return self.widths[axis], chooser.decide(hidden_states, routing, site)

        block = choose("depth")
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            groups=inside(choose("attn_heads"), block, whole=self.num_groups),
            **kwargs,
        )
        hidden_states = hidden_states + attended
        neurons = inside(choose("mlp_width"), block, whole=self.mlp_width)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) if neurons is None else self.transform(normed, neurons))

    def transform(self, hidden_BLD: Tensor, chosen: Widths) -> Tensor:
        """Run the MLP with the first neurons only, as many as chosen for each token: (B, L, D) to (B, L, D)."""
        mlp, rows = self.mlp, hidden_BLD.flatten(0, 1)
        gate, total = getattr(mlp, "gate_proj", None), torch.zeros_like(rows)
        for width, tokens in by_width(chosen):
            mine = rows[tokens]
            up = F.linear(mine, *part(mlp.up_proj, outputs=width))
            neurons = mlp.act_fn(up if gate is None else F.linear(mine, *part(gate, outputs=width)))
            neurons = neurons if gate is None else neurons * up
            total[tokens] = F.linear(neurons, *part(mlp.down_proj, inputs=width)).to(total.dtype)
        return total.view_as(hidden_BLD)


class RoutedLlamaModel(NestedLlamaModel):
    """The family's decoder, with widths that are chosen for each token."""

    config_class = RoutedLlamaConfig
    layer_class = RoutedLlamaDecoderLayer
    _no_split_modules = ("RoutedLlamaDecoderLayer",)
    _can_compile_fullgraph = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder with the family's arguments. With a KV cache, the state of the budgets is kept in it.

        Raises:
            ValueError: the attention implementation is not `eager` or `sdpa`, or this model did not fill the KV cache.
        """
        name = self.config._attn_implementation
        if name not in ("eager", "sdpa"):
            raise ValueError(f"got attn_implementation={name!r}, wanted 'sdpa' or 'eager': tokens run some heads each")
        routing = Routing()
        family: Any = super()
        output = family.forward(*args, **kwargs, routing=routing)
        routing.leave()
        return output


class RoutedLlamaForCausalLM(NestedLlamaForCausalLM):
    """`RoutedLlamaModel` with a language modelling head."""

    config_class = RoutedLlamaConfig
    model_class = RoutedLlamaModel
    _no_split_modules = ("RoutedLlamaDecoderLayer",)
    _can_compile_fullgraph = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate with the family's arguments, by greedy search or sampling.

        Other modes move the state of a budget between beams, or undo spending, which is not possible.

        Raises:
            ValueError: beam search or assisted decoding.
        """
        settings = copy.deepcopy(generation_config or self.generation_config)
        settings.update(**kwargs)
        mode = settings.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in ("greedy_search", "sample"):
            raise ValueError(
                f"got generation by {mode.value}, wanted greedy decoding or sampling (num_beams=1, no assistant): "
                "this model decides as it goes"
            )
        family: Any = super()
        return family.generate(inputs, generation_config, *args, **kwargs)
