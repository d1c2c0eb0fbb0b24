"""Rows of several prepared folders, sampled in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from nestlm.data.packed_rows import PackedRows, permute_epoch
from nestlm.errors import ConfigError

BLOCK_SAMPLES = 10_000  # each block of the order holds every part's exact share


class MixedRows(Dataset[np.ndarray]):
    """The concatenated rows of several parts, and an order that samples each part in proportion to its weight.

    Args:
        parts: the rows of each prepared folder.
        weights: the sampling weight of each part; they need not sum to 1.

    Raises:
        ConfigError: a weight is too small for one sample in a block.
    """

    def __init__(self, parts: Sequence[PackedRows], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        self.counts = block_counts(weights)
        self.block: tuple[int, str, int] | None = None  # the block that `part_of` and `place_of` describe
        self.part_of = self.place_of = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number][index - int(self.starts[number])]

    def sample(self, position: int, *, seed: int, stream: str) -> int:
        """Return the index of the row at a position of the endless order. Each part has epochs of its own.

        Args:
            position: position in the order, counted from 0.
            seed: seed of the order.
            stream: name of the stage; each stage has an order of its own.
        """
        block, slot = divmod(position, BLOCK_SAMPLES)
        if self.block != (seed, stream, block):
            shuffled = permute_epoch(BLOCK_SAMPLES, seed, f"{stream}/mixture", block)
            self.part_of = np.repeat(np.arange(len(self.parts)), self.counts)[shuffled]
            self.place_of = np.zeros(BLOCK_SAMPLES, dtype=np.int64)
            for number, count in enumerate(self.counts):  # places within a part rise by one
                self.place_of[self.part_of == number] = block * count + np.arange(count)
            self.block = (seed, stream, block)
        number, place = int(self.part_of[slot]), int(self.place_of[slot])
        return int(self.starts[number]) + self.parts[number].sample(place, seed=seed, stream=f"{stream}/{number}")


def block_counts(weights: Sequence[float]) -> list[int]:
    """Return how many samples of a block each part gets: BLOCK_SAMPLES divided by the largest-remainder method.

    Raises:
        ConfigError: a weight is so small that its part would get no sample.
    """
    total = math.fsum(weights)
    shares = [weight / total * BLOCK_SAMPLES for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: counts[number] - shares[number])
    for number in by_remainder[: BLOCK_SAMPLES - sum(counts)]:
        counts[number] += 1
    if min(counts) == 0:
        raise ConfigError(
            f"data.sources: got weight {weights[counts.index(0)]} of {total} together, wanted at least "
            f"{1 / BLOCK_SAMPLES} of that"
        )
    return counts
