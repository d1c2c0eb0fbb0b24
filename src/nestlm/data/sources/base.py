"""The three kinds of data sources: documents, prepared folders, and streams of documents."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from nestlm.errors import ConfigError


class Document(NamedTuple):
    """A text and its name.

    Attributes:
        name: a unique name; its hash decides which split the document belongs to.
        text: the text, not empty.
    """

    name: str
    text: str


class Source(Protocol):
    """A source of documents, which the data stage tokenizes and stores."""

    def documents(self) -> Iterator[Document]:
        """Yield all documents, each time in the same order.

        Raises:
            DataError: there are no documents, or they cannot be read.
        """
        ...


class Portion(NamedTuple):
    """A prepared folder and its sampling weight in a mixture; weights need not sum to 1."""

    path: Path
    weight: float


class PreparedSource(ABC):
    """A source of tokens that `nestlm prepare` stored. Training reads its folders in place."""

    @abstractmethod
    def portions(self) -> list[Portion]:
        """Return the prepared folders and their weights, always in the same order."""


class StreamSource(ABC):
    """A source of documents that are tokenized while training reads them, in the order of the source, and not stored.

    Its first documents are held out: the data stage tokenizes and stores them.

    Attributes:
        heldout_documents: number of held-out documents.
    """

    heldout_documents: int

    def __post_init__(self) -> None:
        if self.heldout_documents <= 0:
            raise ConfigError(f"data.source.heldout_documents: got {self.heldout_documents}, wanted 1 or more")

    @abstractmethod
    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        """Yield the numbers and texts of documents from number `start` to the end, in ascending order.

        Numbers of empty texts may be skipped.
        """

    @abstractmethod
    def identity(self) -> str:
        """Return a text that changes when the stream's content changes, without reading the documents."""

    def documents(self) -> Iterator[Document]:
        """Yield the held-out documents."""
        for number, text in self.numbered_texts(0):
            if number >= self.heldout_documents:
                return
            yield Document(str(number), text)


class Fingerprint:
    """An incremental SHA-256 over the names and texts of documents."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, name: str, text: str) -> int:
        """Add a document, and return the number of bytes of its text in UTF-8."""
        content = text.encode()
        for part in (name.encode(), content):
            self.digest.update(len(part).to_bytes(8, "big"))
            self.digest.update(part)
        return len(content)

    def hexdigest(self) -> str:
        """Return the hash of all documents added so far."""
        return self.digest.hexdigest()


def fingerprint_documents(documents: Iterable[Document]) -> str:
    """Return the SHA-256 over the names and texts of all documents, in hexadecimal."""
    whole = Fingerprint()
    for name, text in documents:
        whole.add(name, text)
    return whole.hexdigest()
