"""Packed rows of a split in memory-mapped shards, and their order as a pure function of (seed, stream, position)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from nestlm.data.manifest import Manifest
from nestlm.data.shard_files import ShardReader
from nestlm.errors import DataError

OPEN_SHARDS = 128  # shards that stay mapped; each holds a file descriptor


class Rows(Protocol):
    """Rows of token ids, and the order in which training reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def sample(self, position: int, *, seed: int, stream: str) -> int:
        """Return the index of the row at a position of the endless order.

        Args:
            position: position in the order, counted from 0.
            seed: seed of the order.
            stream: name of the stage; each stage has an order of its own.
        """
        ...


class PackedRows(Dataset[np.ndarray]):
    """The rows of one split of one prepared folder.

    A row has L + 1 tokens. Its last token, which is only a target, is the first token of the next row. No row crosses
    the end of a shard.

    Args:
        folder: the prepared folder.
        split: `train`, `calibration` or `validation`.
        sequence_length: L.

    Raises:
        DataError: the manifest or a shard is missing or damaged, or the split is shorter than one row.
    """

    def __init__(self, folder: Path, split: str, *, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        manifest = Manifest.read(folder)
        self.split = manifest.splits[split]
        self.shards = [
            ShardReader(folder, shard, dtype=manifest.dtype, vocab_size=manifest.vocab_size)
            for shard in self.split.shards
        ]
        self.row_ends = np.cumsum([max(0, shard.tokens - 1) // sequence_length for shard in self.shards])
        self.mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self.epochs: OrderedDict[tuple[int, str, int], np.ndarray] = OrderedDict()
        if len(self) == 0:
            raise DataError(
                f"data: the {split} split of {folder} has {self.split.tokens} tokens, fewer than one row of "
                f"data.sequence_length={sequence_length}; bring more text or shorten the rows"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out mapped files and cached orders, which a worker process makes anew."""
        return self.__dict__ | {"mapped": OrderedDict(), "epochs": OrderedDict()}

    def __len__(self) -> int:
        return int(self.row_ends[-1]) if len(self.row_ends) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.row_ends, index, side="right"))
        start = (index - (int(self.row_ends[number - 1]) if number else 0)) * self.sequence_length
        if number not in self.mapped:
            self.mapped[number] = self.shards[number].open()
            if len(self.mapped) > OPEN_SHARDS:
                self.mapped.popitem(last=False)
        return self.shards[number].read(self.mapped[number], start, start + self.sequence_length + 1)

    def sample(self, position: int, *, seed: int, stream: str) -> int:
        """Return the index of the row at a position of the endless order; each epoch is a new permutation."""
        epoch, place = divmod(position, len(self))
        if (seed, stream, epoch) not in self.epochs:
            self.epochs[seed, stream, epoch] = permute_epoch(len(self), seed, stream, epoch)
            if len(self.epochs) > 2:  # a batch may cross the boundary between two epochs
                self.epochs.popitem(last=False)
        return int(self.epochs[seed, stream, epoch][place])


def permute_epoch(number: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    """Return the order of an epoch: a permutation of range(number) that depends on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{stream}/{epoch}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big"))).permutation(number)
