"""Packed rows from memory-mapped shards, in an order that is a pure function of (seed, stream, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nestlm.data.batch import Batch
from nestlm.data.prepare import Manifest
from nestlm.errors import DataError


class PackedRows(Dataset[np.ndarray]):
    """Row i of a split: L + 1 tokens, the last of which is the first of row i + 1."""

    def __init__(self, folder: Path, split: str, *, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.split = Manifest.read(folder).splits[split]
        self.shards = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in self.split.shards]
        self.row_ends = np.cumsum([max(0, len(shard) - 1) // sequence_length for shard in self.shards])
        if len(self) == 0:
            raise DataError(
                f"data: the {split} split has {self.split.tokens} tokens, fewer than one row of "
                f"data.sequence_length={sequence_length}; bring more text or shorten the rows"
            )

    def __len__(self) -> int:
        return int(self.row_ends[-1]) if len(self.row_ends) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.row_ends, index, side="right"))
        start = (index - (int(self.row_ends[shard - 1]) if shard else 0)) * self.sequence_length
        return self.shards[shard][start : start + self.sequence_length + 1]


def collate(rows: Sequence[np.ndarray], *, separator: int | None) -> Batch:
    """Stack rows into a batch; with a separator, number the documents of each row."""
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
    documents_BL = None
    if separator is not None and bool((inputs_BL[:, 1:] == separator).any()):
        documents_BL = (inputs_BL == separator).cumsum(dim=1)
    return Batch(inputs_BL.contiguous(), targets_BL.contiguous(), documents_BL)


@lru_cache(maxsize=2)
def permutation(num_rows: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    """The order of an epoch's rows."""
    digest = hashlib.sha256(f"{seed}/{stream}/{epoch}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big"))).permutation(num_rows)


def step_rows(step: int, *, num_rows: int, batch_size: int, seed: int, stream: str) -> list[int]:
    """Row numbers of a step's global batch. Epochs follow each other without a break."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(num_rows, seed, stream, p // num_rows)[p % num_rows]) for p in positions]


class StepLoader:
    """Batches of the steps from 0 to `num_steps`, as one rank sees them; its state is the next step's number.

    It has a length, so that Lightning fetches no batch ahead and the saved state is exact.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        num_steps: int,
        batch_size: int,
        seed: int,
        stream: str,
        separator: int | None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.rows = rows
        self.num_steps = num_steps
        self.next_step = 0
        self.num_workers = num_workers
        self.collate = partial(collate, separator=separator)
        self.share = slice(rank, None, world_size)
        self.order = partial(step_rows, num_rows=len(rows), batch_size=batch_size, seed=seed, stream=stream)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        batches = (self.order(step)[self.share] for step in range(self.next_step, self.num_steps))
        loader = DataLoader(self.rows, batch_sampler=batches, collate_fn=self.collate, num_workers=self.num_workers)
        for batch in loader:
            self.next_step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, for a checkpoint."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self.next_step = state["next_step"]
