"""What a data source is: named documents that are yet to be tokenized, or folders that `nestlm prepare` made."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from nestlm.errors import ConfigError


class Document(NamedTuple):
    """A text and the name that decides which split it belongs to."""

    name: str
    text: str


class Source(Protocol):
    """Where text comes from. The data stage tokenizes it."""

    def documents(self) -> Iterator[Document]:
        """All documents, in an order that never changes while the source doesn't.

        Raises:
            DataError: there is nothing to read, or it cannot be read.
        """
        ...


class Portion(NamedTuple):
    """A prepared folder, and its weight among others: samples are drawn in proportion."""

    path: Path
    weight: float


class PreparedSource(ABC):
    """Where tokens come from. The data stage checks them and copies nothing."""

    @abstractmethod
    def portions(self) -> list[Portion]:
        """The folders, always in the same order."""


class StreamSource(ABC):
    """Where text comes from that is tokenized while training reads it, in its own order, not stored.

    The first documents are held out: the data stage prepares them.

    Attributes:
        heldout_documents: how many.
    """

    heldout_documents: int

    def __post_init__(self) -> None:
        if self.heldout_documents <= 0:
            raise ConfigError(f"data.source.heldout_documents: got {self.heldout_documents}, wanted 1 or more")

    @abstractmethod
    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        """Texts with their numbers, from a number on to the end. Numbers rise; those of empty texts may be left out."""

    @abstractmethod
    def identity(self) -> str:
        """Tells whether the stream has changed, without reading it."""

    def documents(self) -> Iterator[Document]:
        """The held-out documents."""
        for number, text in self.numbered_texts(0):
            if number >= self.heldout_documents:
                return
            yield Document(str(number), text)


class Fingerprint:
    """SHA-256 over names and texts, document by document: equal for equal documents, on every machine."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, name: str, text: str) -> int:
        """Take a document; returns the bytes of its text."""
        content = text.encode()
        for part in (name.encode(), content):
            self.digest.update(len(part).to_bytes(8, "big"))
            self.digest.update(part)
        return len(content)

    def hexdigest(self) -> str:
        """Of all documents so far."""
        return self.digest.hexdigest()


def fingerprint_documents(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts."""
    whole = Fingerprint()
    for name, text in documents:
        whole.add(name, text)
    return whole.hexdigest()
