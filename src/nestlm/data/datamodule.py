"""The DataModule: the settings of the data group, and the loaders of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from nestlm.data import tokenizer as tokenizers
from nestlm.data.mixed_rows import MixedRows
from nestlm.data.packed_rows import HeldOutBatches, PackedRows, StepLoader
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import PreparedSource, Source, StreamSource, fingerprint_documents
from nestlm.data.special_tokens import SpecialTokenSettings
from nestlm.data.stream_loader import StreamLoader
from nestlm.distributed import collectives
from nestlm.distributed.collectives import RowShard
from nestlm.errors import ConfigError


@dataclass(frozen=True)
class DataSettings:
    """The data group.

    Attributes:
        source: where documents come from, or folders of tokens.
        tokenizer: a tokenizer.json; None trains a byte-level BPE of the model's vocabulary size. Folders of tokens have
            theirs, and must have this one where it is given.
        begin_token: the token before each document; None: the one that the files beside the tokenizer name.
        end_tokens: the tokens that end a text, the main one first; None: likewise.
        special_tokens: whether the name of a special token in a text becomes that token, and not plain text.
        sequence_length: tokens a row, L.
        batch_size: rows a step over all ranks together, B.
        eval_batch_size: rows at once when evaluating.
        heldout_share: share of the bytes in each of calibration and validation; folders of tokens are split already.
            None, for text that is only scored: nothing is split, all of it counts.
        separate_documents: documents packed into one row don't attend to each other.
        num_workers: loader processes a rank.
        path: folder of a source that reads one; its YAML hands it on.
        sources: folders of a mixture; its YAML hands them on.
    """

    source: Source | PreparedSource | StreamSource
    tokenizer: str | None
    begin_token: str | None
    end_tokens: Sequence[str] | None
    special_tokens: bool
    sequence_length: int
    batch_size: int
    eval_batch_size: int
    heldout_share: float | None
    separate_documents: bool
    num_workers: int
    path: str | None = None
    sources: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"data.{name}: got {getattr(self, name)}, wanted a positive number")
        if self.heldout_share is not None and not 0 < self.heldout_share < 0.5:
            raise ConfigError(f"data.heldout_share: got {self.heldout_share}, wanted a share between 0 and 0.5")
        if self.num_workers and isinstance(self.source, StreamSource):
            raise ConfigError(f"data.num_workers: got {self.num_workers}, wanted 0: a stream is read in one place")
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers: got {self.num_workers}, wanted 0 or more")

    @property
    def special(self) -> SpecialTokenSettings:
        """What the user says about special tokens."""
        return SpecialTokenSettings(self.begin_token, self.end_tokens, self.special_tokens)

    @property
    def prepared(self) -> PreparedData | None:
        """The folders of a source that is prepared already; None where there is something to tokenize."""
        return PreparedData.open(self.source.portions()) if isinstance(self.source, PreparedSource) else None

    @property
    def identity(self) -> str:
        """Tells whether the source has changed: of documents by reading them, of tokens by their manifests."""
        prepared = self.prepared
        return self.fingerprint if prepared is None else prepared.identity

    @property
    def fingerprint(self) -> str:
        """Of all texts, also of those that are tokens by now."""
        if isinstance(self.source, PreparedSource):
            return PreparedData.open(self.source.portions()).fingerprint
        if isinstance(self.source, StreamSource):
            return self.source.identity()
        return fingerprint_documents(self.source.documents())

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ConfigError unless a step's rows divide over the ranks."""
        if self.batch_size % num_ranks:
            raise ConfigError(f"data.batch_size: got {self.batch_size}, wanted a multiple of the {num_ranks} ranks")


class PackedTokens(L.LightningDataModule):
    """Packed rows of a prepared folder, for one stage of a run."""

    def __init__(
        self, settings: DataSettings, prepared: PreparedData, *, seed: int, stream: str, num_steps: int = 0
    ) -> None:
        """Take the folder.

        Args:
            settings: the data group.
            prepared: what the data stage left.
            seed: seed of the order.
            stream: the stage; each stage has its own order.
            num_steps: steps that the stage trains.
        """
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.stream = stream
        self.num_steps = num_steps
        self.prepared = prepared
        self.separator = self.prepared.special_tokens.begin if settings.separate_documents else None

    def rows(self, split: str) -> PackedRows | MixedRows:
        """The rows of a split.

        Raises:
            DataError: the folders with the training tokens are absent, or have changed.
        """
        prepared = self.prepared
        if split == "train" and isinstance(self.settings.source, PreparedSource):
            prepared = PreparedData.open(
                self.settings.source.portions()
            )  # the data stage copied the held-out parts alone
            self.prepared.check_same(prepared)
        return prepared.rows(split, sequence_length=self.settings.sequence_length)

    def train_dataloader(self) -> StepLoader | StreamLoader:
        """This rank's share of every step's rows.

        Raises:
            ConfigError: the batch does not divide over the ranks.
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
            num_workers=self.settings.num_workers,
        )

    def heldout_dataloader(self, split: str, *, num_rows: int | None = None, shared: bool = True) -> DataLoader[Any]:
        """Batches of a held-out split in its order; each rank has its share of them, as many as every other.

        Args:
            split: its name.
            num_rows: rows spread over all documents; None: all rows.
            shared: False where every rank is to see all batches.
        """
        rows = self.rows(split)
        number = len(rows) if num_rows is None else min(num_rows, len(rows))
        chosen = [index * len(rows) // number for index in range(number)]
        size = self.settings.eval_batch_size
        batches = [list(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        row_shard = RowShard(collectives.rank(), collectives.num_ranks()) if shared else RowShard()
        fillers = -len(batches) % row_shard.num_ranks
        own = [*batches, *[batches[-1]] * fillers][row_shard.rank :: row_shard.num_ranks]
        last_counts = row_shard.rank < row_shard.num_ranks - fillers
        return DataLoader(HeldOutBatches(rows, own, separator=self.separator, last_counts=last_counts), batch_size=None)
