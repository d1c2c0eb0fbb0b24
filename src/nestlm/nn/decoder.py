"""A pre-norm decoder. A policy decides the width of each part of each block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlm.errors import ConfigError
from nestlm.nn.attention import GroupedQueryAttention
from nestlm.nn.attention_context import AttentionContext, additive_mask
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.kv_cache import KVCache, LayerCache
from nestlm.nn.linear import product_dtype
from nestlm.nn.mlp import MLP
from nestlm.nn.norm import LayerNorm1P, make_norm
from nestlm.nn.policy import Decision, Policy, Stream, full
from nestlm.spec import ATTN_HEADS, DEPTH, MLP_WIDTH, Site

SERVES_LATER_TOKENS = ("attn.k", "attn.v")  # modules of a block whose outputs later tokens read

# Makes something of the residual stream after the final norm, (B, L, D), and of the head's weight, (V, D). It is called
# within the forward pass, since weights in shards are whole only there.
OutputFn = Callable[[Tensor, Tensor], Any]


class DecoderOutput(NamedTuple):  # not a dataclass: FSDP looks for tensors in tuples
    """The output of a forward pass, and the decisions that the policy took in it.

    Attributes:
        output: what `output_fn` returned.
        decisions: by site.
    """

    output: Any
    decisions: dict[Site, Decision]

    @property
    def logits_BLV(self) -> Tensor:  # noqa: N802
        """Logits of the next token, the output of the default `output_fn`."""
        assert isinstance(self.output, Tensor), "no other reader was given"
        return self.output


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream; a part of size 0 does not exist."""

    def __init__(self, config: DecoderConfig, *, block: BlockConfig, layer: int) -> None:
        super().__init__()
        self.depth_site = Site(DEPTH, layer)
        self.heads_site, self.mlp_site = Site(ATTN_HEADS, layer), Site(MLP_WIDTH, layer)
        self.num_groups, self.mlp_width = block.num_kv_groups, block.mlp_width
        if block.num_heads:
            self.attn_norm = make_norm(config)
            self.attn = GroupedQueryAttention(config, block=block)
        if block.mlp_width:
            self.mlp_norm = make_norm(config)
            self.mlp = MLP(config, mlp_width=block.mlp_width)

    def forward(
        self, hidden_BLD: Tensor, policy: Policy, *, context: AttentionContext, stream: Stream, cache: LayerCache | None
    ) -> tuple[Tensor, dict[Site, Decision]]:
        """Run the block at the widths that the policy decides; width 0 skips a part.

        The policy is called at all sites, also in a block that is skipped. A token that skips the block still gives
        keys and values to later tokens that run it.

        Returns:
            The new residual stream (B, L, D), and the decisions by site.
        """
        if torch.is_grad_enabled():  # checkpointing runs this twice: the second time must not find the first's notes
            stream = Stream(stream.real_BL)
        new_BLD = hidden_BLD
        depth = policy(self.depth_site, hidden_BLD, stream)
        heads = policy(self.heads_site, hidden_BLD, stream)
        ran = heads.restrict_to(depth, num_units=self.num_groups)
        if self.num_groups and not ran.width.is_zero:
            new_BLD = new_BLD + self.attn(self.attn_norm(new_BLD), ran, context=context, cache=cache)
        neurons = policy(self.mlp_site, new_BLD, stream)
        ran = neurons.restrict_to(depth, num_units=self.mlp_width)
        if self.mlp_width and not ran.width.is_zero:
            new_BLD = new_BLD + self.mlp(self.mlp_norm(new_BLD), ran)
        if depth.gate is not None and not depth.width.is_zero:
            new_BLD = hidden_BLD + block_gate(depth) * (new_BLD - hidden_BLD)
        return new_BLD, {self.depth_site: depth, self.heads_site: heads, self.mlp_site: neurons}


def block_gate(depth: Decision) -> Tensor:
    """Return the factor of the block's contribution to the residual stream, broadcastable to (B, L, D)."""
    assert depth.gate is not None, "there is a gate"
    factor = depth.gate[..., -1:]
    return factor[:, None] if depth.width.index is not None and factor.ndim == 2 else factor


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and (possibly tied) head."""

    def __init__(self, config: DecoderConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, block=block, layer=layer) for layer, block in enumerate(config.blocks)
        )
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def empty(cls, config: DecoderConfig, *, activation_checkpointing: bool = False) -> Decoder:
        """Make a decoder on the CPU with uninitialised parameters, to load weights into."""
        return cls.on_meta(config, activation_checkpointing=activation_checkpointing).to_empty(device="cpu")

    @classmethod
    def on_meta(cls, config: DecoderConfig, *, activation_checkpointing: bool = False) -> Decoder:
        """Make a decoder on the meta device: shapes without memory."""
        with torch.device("meta"):
            return cls(config, activation_checkpointing=activation_checkpointing)

    def forward(
        self,
        tokens_BL: Tensor,
        policy: Policy = full,
        *,
        documents_BL: Tensor | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
        output_fn: OutputFn = F.linear,
    ) -> DecoderOutput:
        """Run the model and apply `output_fn`, by default the head: logits of the next token.

        Args:
            tokens_BL: token ids, (B, L), with those in the cache at most the context length.
            policy: decides the width at each site.
            documents_BL: number of the document that a token belongs to; tokens of different documents don't
                attend to each other, and negative numbers are padding. None: each row is one document.
            cache: keys and values of earlier tokens; those of these tokens are added. Without gradients only.
            last: number of positions at the end of the rows that `output_fn` gets; None: all.
            output_fn: function of the normalised residual stream (B, L, D) and the head's weight (V, D).

        Raises:
            ConfigError: the rows are longer than the model's context, or than the cache.
        """
        length, start = tokens_BL.shape[1], 0 if cache is None else cache.num_tokens
        if start + length > self.config.context_length:
            raise ConfigError(
                f"got rows of {start + length} tokens, wanted at most model.context_length={self.config.context_length}"
            )
        seen_documents_BL = documents_BL if cache is None else cache.advance(documents_BL, tokens=length)
        hidden_BLD = self.embed(tokens_BL)
        context = self.attention_context(hidden_BLD, documents_BL=seen_documents_BL, cache=cache)
        real_BL = None if documents_BL is None else documents_BL >= 0
        stream = Stream(real_BL, {} if cache is None else cache.memory)
        decisions: dict[Site, Decision] = {}
        for layer, block in enumerate(self.blocks):
            seen = {"context": context, "stream": stream, "cache": None if cache is None else cache.layer(layer)}
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD, decided = checkpoint(block, hidden_BLD, policy, use_reentrant=False, **seen)
            else:
                hidden_BLD, decided = block(hidden_BLD, policy, **seen)
            decisions |= decided
        if cache is not None:
            cache.num_tokens += length
        head_VD = self.embed.weight if self.head is None else self.head.weight
        return DecoderOutput(
            output_fn(self.norm(hidden_BLD if last is None else hidden_BLD[:, -last:]), head_VD), decisions
        )

    def attention_context(
        self, hidden_BLD: Tensor, *, documents_BL: Tensor | None, cache: KVCache | None
    ) -> AttentionContext:
        """Make positions and mask of this call's tokens, which begin their rows, or follow the tokens of a cache."""
        length, dtype = hidden_BLD.shape[1], product_dtype(hidden_BLD)
        if cache is None:
            start, positions_L = 0, torch.arange(length, device=hidden_BLD.device)
            rotary = self.config.rotary_table(positions_L, dtype=hidden_BLD.dtype)
        else:
            start, rotary = cache.num_tokens, cache.next_rotary(length)
        if documents_BL is not None:
            visible = document_mask(documents_BL, num_queries=length)
        elif start == 0 or length == 1:
            return AttentionContext(rotary, None, causal=start == 0, dtype=dtype)
        else:
            visible = torch.ones(length, start + length, dtype=torch.bool, device=hidden_BLD.device)
            visible = visible.tril(start)[None, None]
        return AttentionContext(rotary, additive_mask(visible, dtype=dtype), causal=True, dtype=dtype)

    @torch.no_grad()
    def init_weights(self, *, seed: int, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Fill the weights: normal with variance 2/(5D) (Nguyen and Salazar, arXiv 1910.05895).

        Projections into the residual stream are scaled down by sqrt(2N) (GPT-2); norms start at 1, biases at 0.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        std = (0.4 / self.config.hidden_size) ** 0.5
        residual_std = std / (2 * len(self.blocks)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.RMSNorm | LayerNorm1P):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                scale = residual_std if name.endswith(("attn.o.weight", "mlp.down.weight")) else std
                assign(parameter, torch.randn(parameter.shape, generator=generator) * scale)


def document_mask(documents_BL: Tensor, *, num_queries: int) -> Tensor:
    """Make the causal mask of the last `num_queries` tokens within documents: (B, 1, queries, L), True: visible."""
    length = documents_BL.shape[1]
    same_BLL = documents_BL[:, length - num_queries :, None] == documents_BL[:, None, :]
    return same_BLL.tril(length - num_queries).unsqueeze(1)
