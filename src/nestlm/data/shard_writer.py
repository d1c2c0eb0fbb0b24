"""The writer of prepared folders, which resumes an interrupted call after its last full shard."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nestlm.data.manifest import JOURNAL, SPLITS, Manifest, Split, check_counts, render_json, write_file
from nestlm.data.shard_files import ShardReader, write_shard
from nestlm.errors import DataError


def check_same_plan(begun: Manifest, wanted: Manifest, folder: Path) -> None:
    """Check that a folder was begun with the same texts, tokenizer and settings. Raises DataError, naming a difference.

    Args:
        begun: the manifest, or the unfinished one of the journal, that the folder holds.
        wanted: the manifest of the current call; its splits are not compared.
        folder: the folder, for the message.
    """
    other = asdict(begun)
    for name, value in asdict(wanted).items():
        if name != "splits" and other[name] != value:
            raise DataError(
                f"data: {folder} was begun with {name} {other[name]}, now it is {value}; use another folder, or remove "
                "this one"
            )


@dataclass
class ShardWriter:
    """Collects tokenized documents and writes all splits' shards, then the journal, when one shard is full.

    Attributes:
        folder: the prepared folder.
        manifest: the manifest, with splits as far as they are written.
        num_consumed: number of documents in the written shards.
        pending: by split, the tokens of documents that are not written yet, one array a document.
        pending_bytes: by split, the bytes of those documents' texts.
        pending_tokens: by split, the number of those tokens.
    """

    folder: Path
    manifest: Manifest
    num_consumed: int = 0
    pending: dict[str, list[np.ndarray]] = field(default_factory=dict)
    pending_bytes: dict[str, int] = field(default_factory=dict)
    pending_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear_pending()

    @classmethod
    def resume(cls, folder: Path, manifest: Manifest) -> ShardWriter:
        """Create a writer that goes on after the journal's last entry, or begins when there is no journal.

        Args:
            folder: the prepared folder.
            manifest: the manifest of the current call, with empty splits.

        Raises:
            DataError: the journal or a shard is damaged, or the folder was begun with other texts or settings.
        """
        path = folder / JOURNAL
        if not path.is_file():
            return cls(folder, manifest)
        try:
            entry = json.loads(path.read_bytes())
            check_counts(num_consumed := entry["consumed"])
            begun = Manifest.from_json(entry["manifest"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"data: {path} is damaged ({error!r:.100}); remove the folder, begin again") from error
        check_same_plan(begun, manifest, folder)
        for split in begun.splits.values():
            for shard in split.shards:
                ShardReader(folder, shard, dtype=begun.dtype, vocab_size=begun.vocab_size)  # checks the shard
        return cls(folder, begun, num_consumed)

    def clear_pending(self) -> None:
        """Forget the pending documents."""
        self.pending = {name: [] for name in SPLITS}
        self.pending_bytes, self.pending_tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def add(self, split: str, ids: list[int], *, num_bytes: int) -> None:
        """Add a document to a split, and write shards when the split has enough tokens.

        Args:
            split: name of the split.
            ids: token ids; the first is the begin token.
            num_bytes: bytes of the text.
        """
        tokens = np.array(ids, dtype=self.manifest.dtype)
        self.pending[split].append(tokens)
        self.pending_bytes[split] += num_bytes
        self.pending_tokens[split] += len(tokens)
        if self.pending_tokens[split] >= self.manifest.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the pending tokens of all splits, then the journal. A resumed call trusts the journal alone."""
        splits = dict(self.manifest.splits)
        for name, arrays in self.pending.items():
            if arrays:
                old = splits[name]
                shard = write_shard(self.folder, f"{name}-{len(old.shards):05d}.bin", np.concatenate(arrays))
                splits[name] = Split(
                    shards=(*old.shards, shard),
                    documents=old.documents + len(arrays),
                    bound=max(old.bound, *(int(array.max()) + 1 for array in arrays)),
                    tokens=old.tokens + shard.tokens,
                    bytes=old.bytes + self.pending_bytes[name],
                )
        self.manifest = replace(self.manifest, splits=splits)
        self.num_consumed += sum(map(len, self.pending.values()))
        self.clear_pending()
        entry: dict[str, Any] = {"consumed": self.num_consumed, "manifest": asdict(self.manifest)}
        write_file(self.folder / JOURNAL, render_json(entry).encode())

    def finish(self) -> Manifest:
        """Write the pending tokens and the manifest, remove the journal, and return the manifest."""
        self.flush()
        self.manifest.write(self.folder)
        (self.folder / JOURNAL).unlink()
        return self.manifest
