"""A batch of packed rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nestlm.distributed.collectives import ALL_ROWS, RowShard


class Batch(NamedTuple):
    """Rows of tokens with their targets.

    Attributes:
        tokens_BL: token ids, int64.
        targets_BL: the token after each, int64.
        documents_BL: number of the document within its row, or None where all rows hold one document, or where
            documents may attend to each other.
        share: which rows of the step these are.
        is_counted: False for rows that are there only so that every rank runs as many batches as the others.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    documents_BL: Tensor | None
    row_shard: RowShard = ALL_ROWS
    is_counted: bool = True

    def head(self, rows: int) -> Batch:
        """The first rows."""
        documents_BL = None if self.documents_BL is None else self.documents_BL[:rows]
        return Batch(self.tokens_BL[:rows], self.targets_BL[:rows], documents_BL)
