"""Define the decoders that speed is measured on, and the passes and steps that are timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from nestlm.config.compose import build, compose
from nestlm.data.batch import Batch
from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.axes.mlp_width import MLPWidth
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.spec import SearchSpace, SubnetSpec
from nestlm.train.objective.base import Objective, StageModels
from turns import Way

QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Shape:
    """A decoder, the batch that it runs on, and their device.

    Attributes:
        name: for tables.
        config: sizes.
        rows: sequences of a batch.
        length: tokens of a sequence.
        device: where it runs.
        dtype: of weights and activations.
    """

    name: str
    config: DecoderConfig
    rows: int = 8
    length: int = 256
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def decoder(self) -> Decoder:
        """Return the decoder with random weights, the same at each call."""
        decoder = Decoder(self.config)
        decoder.init_weights(seed=0)
        return decoder.to(self.device, self.dtype)

    @cached_property
    def batch(self) -> Batch:
        """Return a batch of random tokens; each row is one document."""
        generator = torch.Generator().manual_seed(1)
        rows_BL = torch.randint(self.config.vocab_size, (self.rows, self.length + 1), generator=generator)
        rows_BL = rows_BL.to(self.device)
        return Batch(rows_BL[:, :-1].contiguous(), rows_BL[:, 1:].contiguous(), None)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Return elastic axes with four choices each: quarters of the neurons and of the heads."""
        return MLPWidth(fractions=QUARTERS, multiple_of=1), AttnHeads(fractions=QUARTERS, multiple_of=1)

    @property
    def space(self) -> SearchSpace:
        """Return the search space of `axes`."""
        return search_space(self.axes, self.config)

    def litgpt_sizes(self) -> dict[str, Any]:
        """Return the arguments of litgpt's `Config`, which whittle's networks use as well."""
        config, block = self.config, self.config.blocks[0]
        return {
            "block_size": config.context_length, "vocab_size": config.vocab_size,
            "padded_vocab_size": config.vocab_size, "n_layer": len(config.blocks), "n_embd": config.hidden_size,
            "n_head": block.num_heads, "n_query_groups": block.num_kv_groups, "head_size": config.head_dim,
            "intermediate_size": block.mlp_width, "bias": False, "parallel_residual": False, "rotary_percentage": 1.0,
            "norm_class_name": "RMSNorm", "norm_eps": config.norm_eps, "mlp_class_name": "LLaMAMLP",
            "rope_base": int(config.rope_theta),
        }  # fmt: skip

    def half(self) -> SubnetSpec:
        """Return the sub-network with half of all neurons and heads."""
        return self.space.spec(dict.fromkeys(self.space.sites, QUARTERS.index(0.5)))


def llama(hidden_size: int) -> Shape:
    """Return the Llama shape of the claims: 6 layers, 8 heads, MLP width 2.6875 D, V 2048."""
    block = BlockConfig(num_heads=8, num_kv_groups=8, mlp_width=hidden_size * 43 // 16)
    config = DecoderConfig(
        vocab_size=2048, hidden_size=hidden_size, head_dim=hidden_size // 8, context_length=512, blocks=(block,) * 6,
        tie_embeddings=False,
    )  # fmt: skip
    return Shape(f"D {hidden_size}", config)


def on_gpu(model: str) -> Shape:
    """Return four layers of a named model, in bfloat16."""
    config = build(compose([f"model={model}", "model.init=random", "data=synthetic"])).model.decoder_config()
    config = replace(config, blocks=config.blocks[:4])
    return Shape(f"`{model}`, 4 layers", config, rows=8, length=2048, device="cuda", dtype=torch.bfloat16)


def forward_backward(model: nn.Module, loss: Way) -> Way:
    """Return a forward and backward pass that starts without gradients."""

    def way() -> None:
        model.zero_grad()
        loss().backward()

    return way


def training_step(
    decoder: Decoder, objective: Objective, batch: Batch, *, first_steps: int, teacher: Decoder | None = None
) -> Way:
    """Return a step as the LightningModule does it: all terms of an objective, clipping, and the optimizer.

    The first steps come again and again, so that each turn draws the same sub-networks.
    """
    optimizer = build(compose(["data=synthetic"])).optim.optimizer(decoder.parameters(), lr=1e-4)
    models, steps = StageModels(decoder, teacher), cycle(range(first_steps))

    def way() -> None:
        optimizer.zero_grad()
        for term in objective.terms(models, batch, step=next(steps)):
            term.loss.backward()
        clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()

    return way


def no_grad(way: Way) -> Way:
    """Return the same function without gradients."""

    def quiet() -> Tensor:
        with torch.no_grad():
            return way()

    return quiet
