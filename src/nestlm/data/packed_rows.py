"""Packed rows from memory-mapped shards, in an order that is a pure function of (seed, stream, step)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nestlm.data.batch import Batch
from nestlm.data.manifest import Manifest, ShardReader
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.errors import DataError

OPEN_SHARDS = 128  # mapped at once; a mapping holds a file descriptor


class Rows(Protocol):
    """Rows of tokens, and the order in which training meets them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def sample(self, position: int, *, seed: int, stream: str) -> int:
        """Number of the row at a position of the order, which has no end."""
        ...


class PackedRows(Dataset[np.ndarray]):
    """Row i of a split: L + 1 tokens, the last of which is the first of row i + 1."""

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
        """For a process of its own, which maps the files itself."""
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
        """Number of the row at a position of the order. Epochs follow each other without a break."""
        epoch, place = divmod(position, len(self))
        if (seed, stream, epoch) not in self.epochs:
            self.epochs[seed, stream, epoch] = permute_epoch(len(self), seed, stream, epoch)
            if len(self.epochs) > 2:  # a batch may lie across the end of one
                self.epochs.popitem(last=False)
        return int(self.epochs[seed, stream, epoch][place])


def permute_epoch(number: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    """The order of an epoch's rows."""
    digest = hashlib.sha256(f"{seed}/{stream}/{epoch}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big"))).permutation(number)


def rows_of_step(step: int, *, rows: Rows, batch_size: int, seed: int, stream: str) -> list[int]:
    """Row numbers of a step's global batch."""
    return [rows.sample(p, seed=seed, stream=stream) for p in range(step * batch_size, (step + 1) * batch_size)]


def collate_rows(
    rows: Sequence[np.ndarray], *, separator: int | None, row_shard: RowShard = ALL_ROWS, is_counted: bool = True
) -> Batch:
    """Stack rows into a batch; with a separator, number the documents of each row."""
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
    documents_BL = None
    if separator is not None and bool((inputs_BL[:, 1:] == separator).any()):
        documents_BL = (inputs_BL == separator).cumsum(dim=1)
    return Batch(inputs_BL.contiguous(), targets_BL.contiguous(), documents_BL, row_shard, is_counted)


class HeldOutBatches(Dataset[Batch]):
    """Batches of a held-out split that one rank sees, in its order; the last may not count."""

    def __init__(self, rows: Rows, batches: list[list[int]], *, separator: int | None, last_counts: bool) -> None:
        self.rows, self.batches, self.separator, self.last_counts = rows, batches, separator, last_counts

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        is_counted = self.last_counts or index < len(self) - 1
        return collate_rows(
            [self.rows[row] for row in self.batches[index]], separator=self.separator, is_counted=is_counted
        )


class StepLoader:
    """Batches of the steps from 0 to `num_steps`, as one rank sees them; its state is the next step's number.

    It has a length, so that Lightning fetches no batch ahead and the saved state is exact.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        num_steps: int,
        batch_size: int,
        seed: int,
        stream: str,
        separator: int | None,
        row_shard: RowShard = ALL_ROWS,
        num_workers: int = 0,
    ) -> None:
        self.rows = rows
        self.num_steps = num_steps
        self.next_step = 0
        self.num_workers = num_workers
        self.collate = partial(collate_rows, separator=separator, row_shard=row_shard)
        self.own = slice(row_shard.rank, None, row_shard.num_ranks)
        self.order = partial(rows_of_step, rows=rows, batch_size=batch_size, seed=seed, stream=stream)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        batches = (self.order(step)[self.own] for step in range(self.next_step, self.num_steps))
        loader: DataLoader[Any] = DataLoader(
            self.rows,  # pyright: ignore[reportArgumentType]
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        for batch in loader:
            self.next_step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, for a checkpoint."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self.next_step = state["next_step"]
