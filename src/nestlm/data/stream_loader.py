"""The loader of a stream source: it tokenizes documents while training reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from nestlm.data.batch import Batch
from nestlm.data.prefetch import prefetch
from nestlm.data.sources.base import StreamSource
from nestlm.data.special_tokens import SpecialTokenSettings
from nestlm.data.step_loader import collate_rows
from nestlm.data.tokenizer import check_token_ids, prepend_begin
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.errors import DataError

DOCUMENTS_AT_ONCE = 64  # the tokenizer's threads divide them among themselves


class StreamLoader:
    """Iterates over one rank's batches of the steps 0 to `num_steps` - 1, in the order of the stream.

    Every rank reads the whole stream and takes its rows of each step, so the order is the same for any number of ranks.
    The state is the next token's document and its offset there, so training resumes exactly on any number of ranks.

    Args:
        source: the stream; its first documents are held out and not read here.
        tokenizer: the tokenizer as `make_text_encoder` returns it.
        num_steps: number of training steps.
        batch_size: rows of a step over all ranks, B.
        sequence_length: tokens of a row, L.
        document_separator: id of the token before each document.
        vocab_size: vocabulary size of the model, V.
        separate_documents: whether documents within a row do not attend to each other.
        row_shard: which rows of a step this rank takes.
    """

    def __init__(
        self,
        source: StreamSource,
        tokenizer: Tokenizer,
        *,
        num_steps: int,
        batch_size: int,
        sequence_length: int,
        document_separator: int,
        vocab_size: int,
        separate_documents: bool,
        row_shard: RowShard = ALL_ROWS,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.num_steps, self.batch_size, self.sequence_length = num_steps, batch_size, sequence_length
        self.document_separator = document_separator
        self.collate_separator = document_separator if separate_documents else None
        self.row_shard = row_shard
        self.vocab_size, self.warner = vocab_size, SpecialTokenSettings().make_warner(tokenizer)
        self.next_step, self.number, self.offset = 0, source.heldout_documents, 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        step_tokens = self.batch_size * self.sequence_length
        documents = prefetch(self.tokenized(self.number))
        waiting: deque[tuple[int, np.ndarray]] = deque()
        have, offset = -self.offset, self.offset
        while self.next_step < self.num_steps:
            while have < step_tokens + 1:  # the last target is the next step's first token
                waiting.append(next(documents))
                have += len(waiting[-1][1])
            tokens = np.concatenate([each for _, each in waiting])[offset : offset + step_tokens + 1]
            rows = np.lib.stride_tricks.sliding_window_view(tokens, self.sequence_length + 1)[:: self.sequence_length]
            offset, have = offset + step_tokens, have - step_tokens
            while offset >= len(waiting[0][1]):
                offset -= len(waiting.popleft()[1])
            self.next_step, self.number, self.offset = self.next_step + 1, waiting[0][0], offset
            own = list(rows[self.row_shard.rank :: self.row_shard.num_ranks])
            yield collate_rows(own, separator=self.collate_separator, row_shard=self.row_shard)

    def tokenized(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield number and token ids of each document from `start` on, and begin again after the last one.

        Raises:
            DataError: the stream ends with the held-out documents, or a document holds a token that the model lacks.
        """
        while True:
            texts, found = self.source.numbered_texts(start), False
            while group := list(islice(texts, DOCUMENTS_AT_ONCE)):
                found = True
                encodings = self.tokenizer.encode_batch_fast([text for _, text in group], add_special_tokens=False)
                for (number, text), encoding in zip(group, encodings, strict=True):
                    self.warner.check(text)
                    check_token_ids(
                        self.tokenizer, encoding.ids, vocab_size=self.vocab_size, where=f"data: document {number}"
                    )
                    ids = prepend_begin(self.tokenizer, encoding.ids, begin=self.document_separator)
                    yield number, np.array(ids, dtype=np.int64)
            if not found and start == self.source.heldout_documents:
                raise DataError(f"data: the stream has no more than its {start} held-out documents; bring more text")
            start = self.source.heldout_documents

    def state_dict(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"next_step": self.next_step, "number": self.number, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in a checkpoint."""
        self.next_step, self.number, self.offset = state["next_step"], state["number"], state["offset"]
