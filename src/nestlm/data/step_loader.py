"""Loaders that collate packed rows into batches: for training steps, and for held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nestlm.data.batch import Batch
from nestlm.data.packed_rows import Rows
from nestlm.distributed.collectives import ALL_ROWS, RowShard


def rows_of_step(step: int, *, rows: Rows, batch_size: int, seed: int, stream: str) -> list[int]:
    """Return the row indices of a step's batch over all ranks, in order."""
    return [rows.sample(p, seed=seed, stream=stream) for p in range(step * batch_size, (step + 1) * batch_size)]


def collate_rows(
    rows: Sequence[np.ndarray], *, separator: int | None, row_shard: RowShard = ALL_ROWS, is_counted: bool = True
) -> Batch:
    """Stack rows into a batch.

    Args:
        rows: arrays of L + 1 token ids.
        separator: id of the token that begins a document; if it is given, the documents of each row are numbered so
            that they do not attend to each other.
        row_shard: which rows of the step these are.
        is_counted: whether the batch's loss counts.
    """
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
    documents_BL = None
    if separator is not None and bool((inputs_BL[:, 1:] == separator).any()):
        documents_BL = (inputs_BL == separator).cumsum(dim=1)
    return Batch(inputs_BL.contiguous(), targets_BL.contiguous(), documents_BL, row_shard, is_counted)


class HeldOutBatches(Dataset[Batch]):
    """The held-out batches of one rank.

    Args:
        rows: the rows of the split.
        batches: row indices of each batch.
        separator: see `collate_rows`.
        last_counts: False when the last batch only fills up the rank's number of batches.
    """

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
    """Iterates over one rank's batches of the steps 0 to `num_steps` - 1. Its state is the number of the next step.

    It has a length, so that Lightning fetches no batch in advance and a saved state is exact.

    Args:
        rows: the rows of the split.
        num_steps: number of training steps.
        batch_size: rows of a step over all ranks, B.
        seed: seed of the order.
        stream: name of the stage; each stage has an order of its own.
        separator: see `collate_rows`.
        row_shard: which rows of a step this rank takes.
        num_workers: number of loader processes.
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
        """Return the position, for a checkpoint."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in a checkpoint."""
        self.next_step = state["next_step"]
