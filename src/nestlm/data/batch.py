"""The batch that loaders yield and objectives take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nestlm.distributed.collectives import ALL_ROWS, RowShard


class Batch(NamedTuple):
    """Packed rows with their targets.

    Attributes:
        tokens_BL: token ids, int64.
        targets_BL: the next token id at each position, int64.
        documents_BL: for each token, the number of its document within the row; None when every row holds one document,
            or when documents may attend to each other.
        row_shard: which rows of the step this batch holds.
        is_counted: False for a batch that repeats rows so that all ranks run the same number of batches; its loss is
            not counted.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    documents_BL: Tensor | None
    row_shard: RowShard = ALL_ROWS
    is_counted: bool = True

    def head(self, rows: int) -> Batch:
        """Return a batch of the first `rows` rows."""
        documents_BL = None if self.documents_BL is None else self.documents_BL[:rows]
        return Batch(self.tokens_BL[:rows], self.targets_BL[:rows], documents_BL)
