"""Keys and values of the tokens so far, for generation token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlm.errors import ConfigError
from nestlm.nn.config import DecoderConfig
from nestlm.spec import Site


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, (B, G, length, E). The next tokens are written at `start`."""

    keys: Tensor
    values: Tensor
    start: int

    def extend(
        self, k_BGLE: Tensor, v_BGLE: Tensor, *, groups: slice, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values of some KV groups (and sequences); return those of all tokens so far."""
        end = self.start + k_BGLE.shape[2]
        found = []
        for kept, new in ((self.keys, k_BGLE), (self.values, v_BGLE)):
            part = kept[:, groups]
            if rows is None:
                part[:, :, self.start : end] = new
                found.append(part[:, :, :end])
            else:
                part[rows, :, self.start : end] = new
                found.append(part[rows, :, :end])
        return found[0], found[1]


class KVCache:
    """Per-request state of a batch: keys, values, which tokens are real, and what a policy remembers.

    All rows have the same number of tokens; shorter prompts are padded on the left, with negative document numbers.
    """

    def __init__(
        self, config: DecoderConfig, *, batch_size: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate room for `length` tokens a row."""
        self.length = length
        self.num_tokens = 0
        shapes = [(batch_size, block.num_kv_groups, length, config.head_dim) for block in config.blocks]
        self.layers = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for shape in shapes
        ]
        self.rotary = config.rotary_table(torch.arange(length, device=device), dtype=dtype)
        self.documents_BL: Tensor | None = None
        self.memory: dict[Site, Tensor] = {}

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer, with room for the next tokens."""
        keys, values = self.layers[index]
        return LayerCache(keys, values, self.num_tokens)

    def next_rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the next positions, (tokens, E) each."""
        cos, sin = self.rotary
        positions = slice(self.num_tokens, self.num_tokens + tokens)
        return cos[positions], sin[positions]

    def advance(self, documents_BL: Tensor | None, *, tokens: int) -> Tensor | None:
        """Check that tokens fit; return the document numbers of all tokens, the new ones included.

        Raises:
            ConfigError: the cache is full.
        """
        if self.num_tokens + tokens > self.length:
            raise ConfigError(
                f"got {self.num_tokens + tokens} tokens, wanted at most {self.length}, the room of the KV cache"
            )
        if self.num_tokens == 0:
            self.documents_BL = documents_BL
        elif (documents_BL is None) != (self.documents_BL is None):
            raise ValueError("got document numbers for some of a sequence's tokens only, wanted them for all or none")
        elif documents_BL is not None and self.documents_BL is not None:
            self.documents_BL = torch.cat((self.documents_BL, documents_BL), dim=1)
        return self.documents_BL
