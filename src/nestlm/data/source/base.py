"""What a data source is: named documents, always in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from nestlm.errors import DataError


class Document(NamedTuple):
    """A text and the name that decides which split it belongs to."""

    name: str
    text: str


class Source(Protocol):
    """Where text comes from."""

    def documents(self) -> Iterator[Document]:
        """All documents, in an order that never changes while the source doesn't.

        Raises:
            DataError: there is nothing to read, or it cannot be read.
        """
        ...


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts: equal for equal documents, on every machine."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError, naming the file, when it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: cannot read {path} ({error}); wanted UTF-8 text, remove or convert it") from error
