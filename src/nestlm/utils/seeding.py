"""Random generators seeded by their purpose, so that draws depend neither on the rank nor on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def torch_generator(*parts: int | str) -> torch.Generator:
    """Create a CPU generator whose stream is a pure function of the parts, such as (seed, purpose, step, sample)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
