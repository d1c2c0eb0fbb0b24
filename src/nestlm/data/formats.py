"""Readers of text files, by their suffix; each may be compressed with gzip or zstandard."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from nestlm.data.extra import load_extra
from nestlm.data.source.base import Document
from nestlm.errors import DataError

PLAIN = (".txt", ".md", ".py")  # a document a file
COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (*PLAIN, ".jsonl") for packed in COMPRESSED), ".parquet")
CHUNK = 2**20  # bytes of a compressed file that are read at once
ROWS = 1024  # of a parquet file that are read at once


def read_documents(path: Path, *, name: str, text_key: str) -> Iterator[Document]:
    """The documents of a file whose name ends in one of SUFFIXES.

    Args:
        path: the file.
        name: of the file in names of documents.
        text_key: key of a JSON line, or column of a parquet file, that holds the text.

    Raises:
        DataError: the file cannot be read, is cut short, or holds something else.
    """
    if path.suffix == ".parquet":
        yield from read_parquet(path, name=name, text_key=text_key)
        return
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    try:
        with open_text(path) as file:
            if kind == ".jsonl":
                yield from read_lines(file, name=name, text_key=text_key)
            else:
                yield Document(name, file.read())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"data: cannot read {path} ({error}); wanted UTF-8 text, remove or convert it") from error


def open_text(path: Path) -> IO[str]:
    """A file of UTF-8 text, unpacked on the way."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        zstandard = load_extra("zstandard", wanted_for=str(path))
        return io.TextIOWrapper(io.BufferedReader(ZstdFile(path, zstandard), CHUNK), encoding="utf-8")
    return path.open(encoding="utf-8")


class ZstdFile(io.RawIOBase):
    """Unpacks the frames of a zstandard file, one after the other. The library's own reader takes a cut for the end."""

    def __init__(self, path: Path, zstandard: ModuleType) -> None:
        self.file, self.zstandard = path.open("rb"), zstandard
        self.frame, self.packed, self.ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Unpack more. Raises EOFError for a file that is cut short, OSError for one that is no zstandard file."""
        while not self.ready:
            self.packed = self.packed or self.file.read(CHUNK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it is cut short")
                return 0
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(self.packed))
            except self.zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        number = min(len(buffer), len(self.ready))
        buffer[:number] = self.ready[:number]
        self.ready = self.ready[number:]
        return number

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def read_lines(file: IO[str], *, name: str, text_key: str) -> Iterator[Document]:
    """The documents of JSON lines. Raises DataError, naming the line, when one has no such key."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[text_key]
            if not isinstance(value, str):
                raise TypeError(f"{text_key} is {value!r}")
            value.encode()
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'data: {name} line {number} is not {{"{text_key}": ...}} ({error!r}); mend or remove it, '
                "or name another key (text_key)"
            ) from error
        yield Document(f"{name}:{number}", value)


def read_parquet(path: Path, *, name: str, text_key: str) -> Iterator[Document]:
    """The documents of a column; rows without a text are left out."""
    parquet = load_extra("pyarrow.parquet", wanted_for=str(path))
    arrow = load_extra("pyarrow", wanted_for=str(path))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise DataError(
                    f"data: {path} has no column {text_key!r}; it has {', '.join(file.schema_arrow.names)}: name one "
                    "(text_key)"
                )
            for batch in file.iter_batches(batch_size=ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        raise DataError(f"data: {path} row {number}: {text_key} is {text!r}, wanted text")
                    if text is not None:
                        yield Document(f"{name}:{number}", text)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"data: cannot read {path} after row {number} ({error}); remove or mend it") from error
