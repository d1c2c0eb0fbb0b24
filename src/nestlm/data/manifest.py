"""The manifest of a prepared folder, which lists its shards and their checksums.

The manifest holds a checksum of itself, the hash of the tokenizer, and for each shard the hash of its file of block
checksums. Opening a folder therefore reads little, and a row is checked by the blocks in which it lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestlm.data.special_tokens import SpecialTokens
from nestlm.errors import DataError

DTYPES = ("<u2", "<u4")
SPLITS: tuple[str, ...] = ("train", "calibration", "validation")
COUNTS = ("documents", "tokens", "bytes", "bound")  # fields of a split
SHARD_NAME = re.compile(r"(train|calibration|validation)-\d{5,}\.bin")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
JOURNAL = "journal.json"  # only in an unfinished folder
CURE = "copy the folder again, or prepare it again"


@dataclass(frozen=True)
class Shard:
    """The manifest's entry for a file of tokens.

    Attributes:
        name: name of the file; NAME.crc beside it holds the CRC-32 of each of its blocks, 4 bytes each.
        tokens: number of tokens.
        checksums: SHA-256 of NAME.crc.
    """

    name: str
    tokens: int
    checksums: str


@dataclass(frozen=True)
class Split:
    """The manifest's entry for a split.

    Attributes:
        shards: its files, in order.
        documents: number of documents.
        tokens: number of tokens.
        bytes: bytes of its texts in UTF-8.
        bound: all token ids are below this.
    """

    shards: tuple[Shard, ...] = ()
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bound: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Split:
        """Build an entry from its JSON form. Raises ValueError for an unsafe file name or an invalid number."""
        shards = tuple(Shard(**shard) for shard in fields["shards"])
        for shard in shards:
            if not SHARD_NAME.fullmatch(shard.name):
                raise ValueError(f"shard {shard.name[:80]!r}")
        check_counts(*(shard.tokens for shard in shards), *(fields[name] for name in COUNTS))
        return cls(**{**fields, "shards": shards})


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder, and the settings with which it was made.

    Attributes:
        fingerprint: SHA-256 over the names and texts of the documents.
        tokenizer_hash: SHA-256 of tokenizer.json, as the library writes it.
        vocab_size: all token ids are below this.
        begin: id of the token before each document.
        ends: ids of the tokens that end a text, the main one first.
        special_tokens: whether names of special tokens in texts became special tokens.
        dtype: dtype of a token id in the shards, `<u2` or `<u4`.
        heldout_share: share of the bytes in each of calibration and validation; None if all documents are validation.
        shard_tokens: a shard was closed when it had this many tokens.
        splits: the entry of each split, by name.
    """

    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    begin: int
    ends: tuple[int, ...]
    special_tokens: bool
    dtype: str
    heldout_share: float | None
    shard_tokens: int
    splits: dict[str, Split]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Manifest:
        """Build a manifest from its JSON form without the checksum. Raises ValueError or KeyError for a damaged one."""
        splits = {name: Split.from_json(fields["splits"][name]) for name in SPLITS}
        check_counts(fields["begin"], *fields["ends"], fields["vocab_size"], fields["shard_tokens"])
        if fields["dtype"] not in DTYPES or not fields["ends"]:
            raise ValueError("dtype or ends")
        return cls(**fields | {"splits": splits, "ends": tuple(fields["ends"])})

    @property
    def special_token_ids(self) -> SpecialTokens:
        """Ids of the tokens that begin and end a text."""
        return SpecialTokens(self.begin, self.ends)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all splits."""
        return sum(split.tokens for split in self.splits.values())

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest, which covers every token: equal for equal folders."""
        return hashlib.sha256(render_json(asdict(self)).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`. Raises DataError when it is missing, damaged or of another version."""
        path = path_inside(folder, MANIFEST)
        if not path.is_file():
            raise DataError(f"data: {folder} holds no {MANIFEST}; wanted a folder that nestlm prepare has finished")
        try:
            content = path.read_bytes()
            fields = json.loads(content)
            if "separator" in fields:
                raise DataError(f"data: {folder} was prepared by an earlier version of nestlm; prepare it again")
            checksum = fields.pop("checksum")
            manifest = cls.from_json(fields)
            unchanged = content == manifest.text().encode() and checksum == manifest.checksum
        except OSError as error:
            raise DataError(f"data: cannot read {path} ({error.strerror}); {CURE}") from error
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unchanged, manifest = False, None
        if manifest is None or not unchanged:
            raise DataError(f"data: {path} is damaged, or of another version of nestlm; {CURE}")
        return manifest

    def write(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        write_file(folder / MANIFEST, self.text().encode())

    def text(self) -> str:
        """Return the content of `manifest.json`."""
        return render_json(asdict(self) | {"checksum": self.checksum})


def check_counts(*numbers: Any) -> None:
    """Check that all values are whole numbers from 0 on. Raises ValueError otherwise."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("wanted numbers from 0 on")


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder. Raises DataError if it is a link that leads out of the folder."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"data: {path} is a link out of its folder; wanted a file, copy it there (cp -rL)")
    return path


def render_json(fields: dict[str, Any]) -> str:
    """Format as JSON with sorted keys, so that equal content gives equal bytes."""
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically and sync it to disk, so that it survives a power failure."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
