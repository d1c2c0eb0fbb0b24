"""Readers of text files by suffix. All but parquet may be compressed with gzip, zstandard, xz or bzip2."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from typing_extensions import override

from nestlm.data.optional_imports import import_optional
from nestlm.data.sources.base import Document
from nestlm.errors import DataError

PLAIN = (".txt", ".md", ".py")  # one document per file
LINES = (".jsonl", ".ndjson")
COMPRESSED = ("", ".gz", ".zst", ".xz", ".bz2")
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSIBLE = (*PLAIN, *LINES, ".json", ".csv")
SUFFIXES = (*COMPRESSIBLE, ".parquet")
CHUNK_BYTES = 2**20  # read at once from a compressed file
ROWS_AT_ONCE = 1024  # read at once from a parquet file
LONGEST_FIELD = 2**31 - 1  # characters of a CSV field
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16 files
QUOTED_LENGTH = 100  # characters of an error or a value that a message quotes


class NoTextError(DataError):
    """A file of a known suffix holds no text under the key, such as a .json file of settings. Folders leave it out."""


def has_reader(path: Path) -> bool:
    """Return whether `read_documents` can read a file, judged by its name."""
    return format_suffix(path) in SUFFIXES


def format_suffix(path: Path) -> str:
    """Return the suffix of a file's format in lower case, such as `.jsonl` for both A.jsonl and A.JSONL.GZ.

    The result is empty for a compressed file of a format that is only read uncompressed.
    """
    name = path.name.lower()
    for compression in COMPRESSED[1:]:
        if name.endswith(compression):
            suffix = Path(name.removesuffix(compression)).suffix
            return suffix if suffix in COMPRESSIBLE else ""
    return Path(name).suffix


def read_documents(path: Path, *, name: str, text_key: str) -> Iterator[Document]:
    """Yield the documents of a file for which `has_reader` is true.

    Args:
        path: the file.
        name: the prefix of the documents' names.
        text_key: key of JSON objects, or column of tables, that holds the text.

    Raises:
        NoTextError: a .json or .csv file has no such key or column.
        DataError: the file cannot be read, is truncated, or is not of its suffix's format.
    """
    kind = format_suffix(path)
    if kind == ".parquet":
        yield from read_parquet_rows(path, name=name, text_key=text_key)
        return
    try:
        with open_text(path) as file:
            if kind in LINES:
                yield from read_json_lines(file, name=name, text_key=text_key)
            elif kind == ".json":
                yield from read_json_array(file, name=name, text_key=text_key)
            elif kind == ".csv":
                yield from read_csv_rows(file, name=name, text_key=text_key)
            else:
                yield Document(name, read_plain_text(file, name))
    except UnicodeDecodeError as error:
        reason = "it begins as UTF-16 does" if error.object[:2] in UTF16 else f"{error!s:.{QUOTED_LENGTH}}"
        raise DataError(f"data: cannot read {name} ({reason}); wanted UTF-8 text, remove or convert it") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(getattr(error, "strerror", None) or error)[:QUOTED_LENGTH]
        raise DataError(f"data: cannot read {path} ({reason}); mend, remove or convert it") from error


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 text file, decompressing it by its suffix and skipping a byte order mark."""
    compression = path.suffix.lower()
    options: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "" if format_suffix(path) == ".csv" else None}
    if compression in OPENERS:
        return OPENERS[compression](path, "rt", **options)
    if compression == ".zst":
        zstandard = import_optional("zstandard", wanted_for=str(path))
        return io.TextIOWrapper(io.BufferedReader(ZstdFile(path, zstandard), CHUNK_BYTES), **options)
    return path.open(**options)


def read_plain_text(file: IO[str], name: str) -> str:
    """Read all text of a file. Raises DataError if it holds NUL characters."""
    text = file.read()
    if "\0" in text:
        raise DataError(f"data: {name} holds NUL characters, as binary files and UTF-16 do; remove or convert it")
    return text


class ZstdFile(io.RawIOBase):
    """A raw stream over all frames of a zstandard file.

    It raises EOFError for a truncated file, which the library's own reader takes for a complete one.
    """

    def __init__(self, path: Path, zstandard: ModuleType) -> None:
        self.file, self.zstandard = path.open("rb"), zstandard
        self.frame, self.packed, self.ready = None, b"", memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any, /) -> int:
        """Decompress into `buffer`. Raises EOFError for a truncated file, OSError for one that is not zstandard."""
        while not self.ready:
            self.packed = self.packed or self.file.read(CHUNK_BYTES)
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

    @override
    def close(self) -> None:
        self.file.close()
        super().close()


def read_json_lines(file: IO[str], *, name: str, text_key: str) -> Iterator[Document]:
    """Yield a document for each line of JSON. Raises DataError, naming the line, if a line holds no such key."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield Document(f"{name}:{number}", get_text(json.loads(line), text_key))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f'data: {name} line {number} is not {{"{text_key}": ...}} ({error!s:.{QUOTED_LENGTH}}); mend or remove '
                "it, or name another key (text_key)"
            ) from error


def read_json_array(file: IO[str], *, name: str, text_key: str) -> Iterator[Document]:
    """Yield the documents of one JSON value: an array of texts or of objects with a text, or one such object.

    Raises:
        NoTextError: no element holds a text.
        DataError: the file is not JSON, or an element holds no text while others do.
    """
    try:
        value = json.load(file)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {name} is no JSON ({error!s:.{QUOTED_LENGTH}}); mend or remove it") from error
    elements = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    if not any(isinstance(each, str) or (isinstance(each, dict) and text_key in each) for each in elements):
        raise NoTextError(f"no {text_key!r} in it")
    for number, each in enumerate(elements, start=1):
        try:
            yield Document(f"{name}:{number}", get_text({text_key: each} if isinstance(each, str) else each, text_key))
        except ValueError as error:
            raise DataError(
                f"data: {name} element {number} holds no text ({error!s:.{QUOTED_LENGTH}}); mend or remove it, or name "
                "another key (text_key)"
            ) from error


def get_text(value: Any, key: str) -> str:
    """Return the text under a key of a JSON object. Raises ValueError if there is none, or it is not valid Unicode."""
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"no {key!r}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} is {text!r:.{QUOTED_LENGTH}}")
    text.encode()
    return text


def read_csv_rows(file: IO[str], *, name: str, text_key: str) -> Iterator[Document]:
    """Yield a document for each row of a CSV file that has a text in the column `text_key`.

    Raises:
        NoTextError: there is no such column.
        DataError: the file is not CSV.
    """
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.DictReader(file, strict=True)
    try:
        if text_key not in (rows.fieldnames or ()):
            raise NoTextError(f"no column {text_key!r}")
        for number, row in enumerate(rows, start=1):
            if row[text_key] is not None:
                yield Document(f"{name}:{number}", row[text_key])
    except csv.Error as error:
        raise DataError(f"data: {name} line {rows.line_num} is no CSV ({error}); mend or remove it") from error


def read_parquet_rows(path: Path, *, name: str, text_key: str) -> Iterator[Document]:
    """Yield a document for each row of a parquet file that has a text in the column `text_key`.

    Raises:
        DataError: the file cannot be read, or has no such column, or the column holds something else than text.
    """
    parquet = import_optional("pyarrow.parquet", wanted_for=str(path))
    arrow = import_optional("pyarrow", wanted_for=str(path))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise DataError(
                    f"data: {name} has no column {text_key!r}; it has {', '.join(file.schema_arrow.names)}: name one "
                    "(text_key)"
                )
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        raise DataError(
                            f"data: {name} row {number}: {text_key} is {text!r:.{QUOTED_LENGTH}}, wanted text"
                        )
                    if text is not None:
                        yield Document(f"{name}:{number}", text)
    except (OSError, ValueError, arrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{error!s:.{QUOTED_LENGTH}}".splitlines()[0]
        raise DataError(f"data: cannot read {name} after row {number} ({reason}); remove or mend it") from error
