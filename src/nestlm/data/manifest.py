"""Prepared folders: token shards with checksums of their blocks, and the manifest that vouches for them.

The manifest holds a checksum of itself, the hash of the tokenizer, and for each shard the hash of its file of block
checksums. So opening a folder reads little, and a row is checked by the blocks that it touches.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestlm.data.special_tokens import SpecialTokens
from nestlm.errors import DataError

DTYPES = ("<u2", "<u4")
SPLITS: tuple[str, ...] = ("train", "calibration", "validation")
NUMBERS = ("documents", "tokens", "bytes", "bound")  # fields of a split
SHARD_NAME = re.compile(r"(train|calibration|validation)-\d{5,}\.bin")
BLOCK_BYTES = 2**14  # bytes that one checksum covers
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
JOURNAL = "journal.json"  # of a folder that is not finished
CURE = "copy the folder again, or prepare it again"


@dataclass(frozen=True)
class Shard:
    """A file of tokens.

    Attributes:
        name: of the file; its block checksums (CRC-32, 4 bytes each) lie beside it as NAME.crc.
        tokens: how many.
        checksums: SHA-256 of NAME.crc.
    """

    name: str
    tokens: int
    checksums: str


@dataclass(frozen=True)
class Split:
    """What a split holds.

    Attributes:
        shards: its files.
        documents: how many.
        tokens: how many.
        bytes: of its texts.
        bound: all its token ids are below.
    """

    shards: tuple[Shard, ...] = ()
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bound: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Split:
        """As `asdict` wrote it. Raises ValueError for a name that may lead out of the folder, or no number."""
        shards = tuple(Shard(**shard) for shard in fields["shards"])
        for shard in shards:
            if not SHARD_NAME.fullmatch(shard.name):
                raise ValueError(f"shard {shard.name[:80]!r}")
        check_counts(*(shard.tokens for shard in shards), *(fields[name] for name in NUMBERS))
        return cls(**{**fields, "shards": shards})


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, and what it was made from.

    Attributes:
        fingerprint: of the documents' names and texts.
        tokenizer_hash: SHA-256 of tokenizer.json, as the library writes it.
        vocab_size: all token ids are below.
        begin: id of the token before each document.
        ends: ids at which a text ends, the main one first.
        special_tokens: whether names of special tokens in texts became special tokens.
        dtype: of the tokens in a shard, `<u2` or `<u4`.
        heldout_share: share of the bytes in each of calibration and validation; None: all of it is validation.
        shard_tokens: a shard is closed at this many.
        splits: by name.
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
        """As `asdict` and JSON leave it."""
        splits = {name: Split.from_json(fields["splits"][name]) for name in SPLITS}
        check_counts(fields["begin"], *fields["ends"], fields["vocab_size"], fields["shard_tokens"])
        if fields["dtype"] not in DTYPES or not fields["ends"]:
            raise ValueError("dtype or ends")
        return cls(**fields | {"splits": splits, "ends": tuple(fields["ends"])})

    @property
    def special_token_ids(self) -> SpecialTokens:
        """Ids of the tokens around a text."""
        return SpecialTokens(self.begin, self.ends)

    @property
    def num_tokens(self) -> int:
        """Of all splits."""
        return sum(split.tokens for split in self.splits.values())

    @property
    def checksum(self) -> str:
        """Of all that is in it, and so of every token: equal for equal folders."""
        return hashlib.sha256(render_json(asdict(self)).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`. Raises DataError when there is none, or it is not as it was written."""
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
        """Write `manifest.json`, whole or not at all."""
        write_file(folder / MANIFEST, self.text().encode())

    def text(self) -> str:
        """The content of `manifest.json`."""
        return render_json(asdict(self) | {"checksum": self.checksum})


def check_counts(*numbers: Any) -> None:
    """Raise ValueError unless all are whole numbers from 0 on."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("wanted numbers from 0 on")


def path_inside(folder: Path, name: str) -> Path:
    """A file of a folder. Raises DataError where it is a link that leads out of it."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"data: {path} is a link out of its folder; wanted a file, copy it there (cp -rL)")
    return path


def render_json(fields: dict[str, Any]) -> str:
    """JSON, in one way only."""
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, also when the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_shard(folder: Path, name: str, tokens: np.ndarray) -> Shard:
    """Write tokens and their block checksums."""
    content = memoryview(tokens.tobytes())
    sums = [zlib.crc32(content[start : start + BLOCK_BYTES]) for start in range(0, len(content), BLOCK_BYTES)]
    checksums = np.array(sums, dtype="<u4").tobytes()
    write_file(folder / name, content)
    write_file(folder / f"{name}.crc", checksums)
    return Shard(name, len(tokens), hashlib.sha256(checksums).hexdigest())


class ShardReader:
    """Reads a shard's tokens. Its size and its file of checksums are checked now, its blocks when they are read."""

    def __init__(self, folder: Path, shard: Shard, *, dtype: str, vocab_size: int) -> None:
        self.path, self.tokens = path_inside(folder, shard.name), shard.tokens
        self.dtype, self.vocab_size = np.dtype(dtype), vocab_size
        try:
            size = self.path.stat().st_size
            checksums = path_inside(folder, f"{shard.name}.crc").read_bytes()
        except OSError as error:
            raise DataError(f"data: cannot read {error.filename} ({error.strerror}); {CURE}") from error
        if size != shard.tokens * self.dtype.itemsize:
            raise DataError(
                f"data: {self.path} has {size} bytes, wanted {shard.tokens * self.dtype.itemsize}: it was cut or "
                f"exchanged; {CURE}"
            )
        if hashlib.sha256(checksums).hexdigest() != shard.checksums:
            raise DataError(f"data: {self.path}.crc is not what the manifest says: damaged or exchanged; {CURE}")
        self.checksums = np.frombuffer(checksums, dtype="<u4")

    def open(self) -> np.ndarray:
        """The mapped bytes."""
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.tokens * self.dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise DataError(f"data: cannot map {self.path} ({error}); {CURE}") from error

    def read(self, mapped: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, copied.

        Raises:
            DataError: a block that they lie in is not what was written, or an id is beyond the vocabulary.
        """
        size = self.dtype.itemsize
        first, last = start * size // BLOCK_BYTES, (stop * size - 1) // BLOCK_BYTES
        offset = first * BLOCK_BYTES
        content = mapped[offset : (last + 1) * BLOCK_BYTES].tobytes()  # checked and used: the same copy
        for block in range(first, last + 1):
            begin = block * BLOCK_BYTES - offset
            if zlib.crc32(content[begin : begin + BLOCK_BYTES]) != self.checksums[block]:
                raise DataError(
                    f"data: {self.path} is damaged in bytes {block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES}; "
                    f"{CURE}"
                )
        tokens = np.frombuffer(content, dtype=self.dtype)[start - offset // size : stop - offset // size]
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"data: {self.path} holds token {int(tokens.max())}, the vocabulary has {self.vocab_size}; "
                "prepare it again with the model's tokenizer"
            )
        return tokens
