"""The settings of the `data` config group, and the Lightning DataModule that builds a stage's loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from nestlm.data import tokenizer as tokenizers
from nestlm.data.mixed_rows import MixedRows
from nestlm.data.packed_rows import PackedRows
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import PreparedSource, Source, StreamSource, fingerprint_documents
from nestlm.data.special_tokens import SpecialTokenSettings
from nestlm.data.step_loader import HeldOutBatches, StepLoader
from nestlm.data.stream_loader import StreamLoader
from nestlm.distributed import collectives
from nestlm.distributed.collectives import RowShard
from nestlm.errors import ConfigError


@dataclass(frozen=True)
class DataSettings:
    """The settings of the `data` config group.

    Attributes:
        source: the documents to tokenize, or prepared folders.
        tokenizer: a tokenizer.json; None trains a byte-level BPE of the model's vocabulary size. Prepared folders have
            their own tokenizer, which must equal this one if it is given.
        begin_token: the token before each document; None takes the one that the files beside the tokenizer name.
        end_tokens: the tokens that end a text, the main one first; None takes those that the files name.
        special_tokens: whether the name of a special token in a text becomes that token instead of plain text.
        sequence_length: tokens of a row, L.
        batch_size: rows of a training step over all ranks, B.
        eval_batch_size: rows of an evaluation batch.
        separate_documents: whether documents packed into one row do not attend to each other.
        heldout_share: share of the bytes in each of calibration and validation. None for prepared folders, which are
            split already, and for text that is only scored: all of its documents are validation.
        num_workers: loader processes of each rank; None for a stream, which the training process reads itself.
        path: the folder that some sources read; their YAML interpolates it.
        sources: the folders of a mixture; its YAML interpolates them.
    """

    source: Source | PreparedSource | StreamSource
    tokenizer: str | None
    begin_token: str | None
    end_tokens: Sequence[str] | None
    special_tokens: bool
    sequence_length: int
    batch_size: int
    eval_batch_size: int
    separate_documents: bool
    heldout_share: float | None = None
    num_workers: int | None = None
    path: str | None = None
    sources: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"data.{name}: got {getattr(self, name)}, wanted a positive number")
        if self.heldout_share is not None and not 0 < self.heldout_share < 0.5:
            raise ConfigError(f"data.heldout_share: got {self.heldout_share}, wanted a share between 0 and 0.5")
        if self.num_workers and isinstance(self.source, StreamSource):
            raise ConfigError(f"data.num_workers: got {self.num_workers}, wanted none: a stream is read in one place")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"data.num_workers: got {self.num_workers}, wanted 0 or more")

    @property
    def special(self) -> SpecialTokenSettings:
        """The user's settings for special tokens."""
        return SpecialTokenSettings(self.begin_token, self.end_tokens, self.special_tokens)

    @property
    def prepared(self) -> PreparedData | None:
        """The prepared folders of the source, read and checked; None for a source that yields documents."""
        return PreparedData.open(self.source.portions()) if isinstance(self.source, PreparedSource) else None

    @property
    def identity(self) -> str:
        """A text that changes with the content. Documents are read for it; of prepared folders, only the manifests."""
        prepared = self.prepared
        return self.fingerprint if prepared is None else prepared.identity

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all texts; for prepared folders, that of the texts that they were made from."""
        if isinstance(self.source, PreparedSource):
            return PreparedData.open(self.source.portions()).fingerprint
        if isinstance(self.source, StreamSource):
            return self.source.identity()
        return fingerprint_documents(self.source.documents())

    def check_ranks(self, num_ranks: int) -> None:
        """Check that the rows of a step divide evenly over the ranks. Raises ConfigError otherwise."""
        if self.batch_size % num_ranks:
            raise ConfigError(f"data.batch_size: got {self.batch_size}, wanted a multiple of the {num_ranks} ranks")


class PackedTokens(L.LightningDataModule):
    """Loaders of packed rows for one stage of a run."""

    def __init__(
        self, settings: DataSettings, prepared: PreparedData, *, seed: int, stream: str, num_steps: int = 0
    ) -> None:
        """Keep the settings; files are opened by the loaders.

        Args:
            settings: the `data` config group.
            prepared: the output of the data stage.
            seed: seed of the order of rows.
            stream: name of the stage; each stage has an order of its own.
            num_steps: number of training steps.
        """
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.stream = stream
        self.num_steps = num_steps
        self.prepared = prepared
        self.separator = self.prepared.special_tokens.begin if settings.separate_documents else None

    def rows(self, split: str) -> PackedRows | MixedRows:
        """Open the rows of a split: `train`, `calibration` or `validation`.

        Raises:
            DataError: the folders with the training tokens are missing, or have changed since the run began.
        """
        prepared = self.prepared
        if split == "train" and isinstance(self.settings.source, PreparedSource):
            prepared = PreparedData.open(
                self.settings.source.portions()
            )  # the data stage copied the held-out parts alone
            self.prepared.check_same(prepared)
        return prepared.rows(split, sequence_length=self.settings.sequence_length)

    def train_dataloader(self) -> StepLoader | StreamLoader:
        """Create the loader of this rank's rows of every training step.

        Raises:
            ConfigError: `batch_size` is not a multiple of the number of ranks.
        """
        row_shard = RowShard(collectives.rank(), collectives.num_ranks())
        self.settings.check_ranks(row_shard.num_ranks)
        if isinstance(self.settings.source, StreamSource):
            return StreamLoader(
                self.settings.source,
                tokenizers.make_text_encoder(
                    tokenizers.load_tokenizer(self.prepared.tokenizer_file),
                    special_tokens=self.settings.special_tokens,
                ),
                num_steps=self.num_steps,
                batch_size=self.settings.batch_size,
                sequence_length=self.settings.sequence_length,
                document_separator=self.prepared.special_tokens.begin,
                vocab_size=self.prepared.manifests[0].vocab_size,
                separate_documents=self.settings.separate_documents,
                row_shard=row_shard,
            )
        return StepLoader(
            self.rows("train"),
            num_steps=self.num_steps,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            stream=self.stream,
            separator=self.separator,
            row_shard=row_shard,
            num_workers=self.settings.num_workers or 0,
        )

    def heldout_dataloader(self, split: str, *, num_rows: int | None = None, shared: bool = True) -> DataLoader[Any]:
        """Create the loader of a held-out split. Batches are dealt out to the ranks, the same number to each.

        Args:
            split: `calibration` or `validation`.
            num_rows: number of rows to read, evenly spaced over the split; None reads all.
            shared: False gives all batches to every rank.
        """
        rows = self.rows(split)
        count = len(rows) if num_rows is None else min(num_rows, len(rows))
        chosen = [index * len(rows) // count for index in range(count)]
        size = self.settings.eval_batch_size
        batches = [chosen[start : start + size] for start in range(0, count, size)]
        row_shard = RowShard(collectives.rank(), collectives.num_ranks()) if shared else RowShard()
        num_fillers = -len(batches) % row_shard.num_ranks
        own = [*batches, *[batches[-1]] * num_fillers][row_shard.rank :: row_shard.num_ranks]
        last_counts = row_shard.rank < row_shard.num_ranks - num_fillers
        return DataLoader(HeldOutBatches(rows, own, separator=self.separator, last_counts=last_counts), batch_size=None)
