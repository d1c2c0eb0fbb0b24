"""A Llama-shaped decoder whose every block obeys the widths that a policy hands it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlm.errors import ConfigError
from nestlm.nn.attention import GroupedQueryAttention
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.mlp import GatedMLP
from nestlm.nn.policy import Decision, Policy, full
from nestlm.nn.rope import rotary_table
from nestlm.spec import ATTN_HEADS, MLP_WIDTH, Site


@dataclass(frozen=True)
class DecoderOutput:
    """Logits, and what the policy decided on the way (a dynamic router's decisions are only known afterwards)."""

    logits_BLV: Tensor
    decisions: dict[Site, Decision]


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, block: BlockConfig, layer: int) -> None:
        super().__init__()
        self.heads_site, self.mlp_site = Site(ATTN_HEADS, layer), Site(MLP_WIDTH, layer)
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GroupedQueryAttention(config.hidden_size, head_dim=config.head_dim, block=block)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, mlp_width=block.mlp_width)

    def forward(
        self, hidden_BLD: Tensor, policy: Policy, rotary: tuple[Tensor, Tensor], mask_B1LL: Tensor | None
    ) -> tuple[Tensor, dict[Site, Decision]]:
        """The new residual stream (B, L, D), and the decisions taken on the old one."""
        heads = policy(self.heads_site, hidden_BLD)
        attended_BLD = self.attn(self.attn_norm(hidden_BLD), heads, rotary=rotary, mask_B1LL=mask_B1LL)
        hidden_BLD = hidden_BLD + attended_BLD
        neurons = policy(self.mlp_site, hidden_BLD)
        hidden_BLD = hidden_BLD + self.mlp(self.mlp_norm(hidden_BLD), neurons)
        return hidden_BLD, {self.heads_site: heads, self.mlp_site: neurons}


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
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BL: Tensor, policy: Policy = full, *, documents_BL: Tensor | None = None) -> DecoderOutput:
        """Logits of the next token at every position.

        Args:
            tokens_BL: token ids, (B, L), L at most the context length.
            policy: how wide each site runs.
            documents_BL: number of the document that a token belongs to; tokens of different documents don't
                attend to each other. None: each row is one document.

        Raises:
            ConfigError: the rows are longer than the model's context.
        """
        length = tokens_BL.shape[1]
        if length > self.config.context_length:
            raise ConfigError(
                f"got rows of {length} tokens, wanted at most model.context_length={self.config.context_length}"
            )
        rotary = rotary_table(
            length, head_dim=self.config.head_dim, theta=self.config.rope_theta, device=tokens_BL.device
        )
        mask_B1LL = None if documents_BL is None else document_mask(documents_BL)
        hidden_BLD = self.embed(tokens_BL)
        decisions: dict[Site, Decision] = {}
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BLD, decided = checkpoint(block, hidden_BLD, policy, rotary, mask_B1LL, use_reentrant=False)
            else:
                hidden_BLD, decided = block(hidden_BLD, policy, rotary, mask_B1LL)
            decisions |= decided
        hidden_BLD = self.norm(hidden_BLD)
        head = self.embed.weight if self.head is None else self.head.weight
        return DecoderOutput(F.linear(hidden_BLD, head), decisions)

    def init_weights(self, *, seed: int) -> None:
        """Fill the weights: normal with variance 2/(5D) (Nguyen and Salazar, arXiv 1910.05895).

        Projections into the residual stream are scaled down by sqrt(2N) (GPT-2); norms start at 1.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        std = (0.4 / self.config.hidden_size) ** 0.5
        residual_std = std / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            else:
                scale = residual_std if name.endswith(("attn.o.weight", "mlp.down.weight")) else std
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def document_mask(documents_BL: Tensor) -> Tensor:
    """True where a query may look: at itself and before, within its own document. Shape (B, 1, L, L)."""
    same_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    return same_BLL.tril().unsqueeze(1)
