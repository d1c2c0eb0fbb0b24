"""Local text files."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nestlm.data.formats import COMPRESSED, SUFFIXES, NoText, is_read, read_documents
from nestlm.data.source.base import Document
from nestlm.errors import DataError
from nestlm.progress import print_once

SHOWN = 12  # left-out files and suffixes that a message names


@dataclass(frozen=True)
class TextFolder:
    """A folder, or a single file.

    Every .txt, .md and .py file is a document; so is every line of a .jsonl or .ndjson file, every element of a .json
    file, and every row of a .csv or .parquet file, under `text_key`. All but parquet may be packed, as .gz, .zst, .xz
    or .bz2. Links are followed, and each file is read once. Hidden files and folders are not read; what else is left
    out is printed.
    """

    path: str
    text_key: str = "text"

    def documents(self) -> Iterator[Document]:
        root = Path(self.path)
        try:
            is_file, is_folder = root.is_file() and is_read(root), root.is_dir()
        except OSError as error:
            raise DataError(f"data.path: cannot read {shown(root):.100} ({error.strerror}); wanted text") from error
        if is_file:
            try:
                yield from filled(read_documents(root, name=shown(root.name), text_key=self.text_key))
            except NoText as error:
                raise DataError(f"data.path: {shown(root)}: {error}; name the one with the text (text_key)") from error
            return
        if not is_folder:
            raise DataError(f"data.path: {shown(root)} is no folder; wanted one that holds {', '.join(SUFFIXES)} files")
        found = Found.below(root)
        if not found.files:
            rest = f"; left out: {found.summary()}" if found.left_out else ""
            raise DataError(f"data.path: {shown(root)} holds no {', '.join(SUFFIXES)} file; put some text there{rest}")
        for path in found.files:
            name = shown(path.relative_to(root).as_posix())
            try:
                yield from filled(read_documents(path, name=name, text_key=self.text_key))
            except NoText as error:
                found.left_out.append((name, str(error)))
        if found.left_out:
            print_once(f"data: left out of {shown(root)}: {found.summary()}")


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        files: to read, sorted.
        left_out: names of other files, with the reason; without one it is the suffix.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def below(cls, root: Path) -> Found:
        """Go through a folder, then through what links in it lead to; no folder and no file is met twice.

        Raises:
            DataError: a folder cannot be read.
        """
        found, folders, links = cls(), deque([(root, root.resolve())]), deque[Path]()
        walked, linked = set[Path](), set[Path]()  # real paths of folders, and of files that links lead to

        def take(path: Path) -> None:
            if is_read(path):
                found.files.append(path)
            else:
                found.left_out.append((shown(path.relative_to(root).as_posix()), ""))

        while folders or links:
            if not folders:
                link = links.popleft()
                if link.is_dir():
                    folders.append((link, link.resolve()))
                elif not link.is_file():
                    found.left_out.append((shown(link.relative_to(root).as_posix()), "a link to nowhere"))
                elif (real := link.resolve()) not in linked and (real.parent not in walked or is_hidden(real.name)):
                    linked.add(real)
                    take(link)
                continue
            folder, real = folders.popleft()
            if real in walked:
                continue
            walked.add(real)
            for entry in entries(folder):
                path = folder / entry.name
                if entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    folders.append((path, real / entry.name))
                elif not entry.is_file():
                    found.left_out.append((shown(path.relative_to(root).as_posix()), "no file"))
                elif real / entry.name not in linked:
                    take(path)
        found.files.sort()
        return found

    def summary(self) -> str:
        """The left-out files: how many of which suffix, and the names of those with a reason of their own."""
        counts = Counter(suffix(name) for name, reason in self.left_out if not reason)
        parts = [f"{number} {kind}" for kind, number in sorted(counts.items())]
        parts += [f"{name} ({reason})" for name, reason in sorted(self.left_out) if reason]
        more = f", and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        return f"{', '.join(parts[:SHOWN])}{more}"


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, but hidden entries. Raises DataError where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"data.path: cannot read the folder {shown(folder)} ({error.strerror}); make it readable, or take it away"
        ) from error


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name begins with a dot."""
    return name.startswith(".")


def suffix(name: str) -> str:
    """How a message calls files of a kind."""
    path = Path(name)
    kinds = path.suffixes[-2:] if path.suffix.lower() in COMPRESSED[1:] else path.suffixes[-1:]
    return "".join(kinds) or "without a suffix"


def shown(path: Path | str) -> str:
    """A name that can be printed and encoded, also of a file whose name is no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def filled(documents: Iterator[Document]) -> Iterator[Document]:
    """Documents that hold more than blanks."""
    return (document for document in documents if document.text.strip())
