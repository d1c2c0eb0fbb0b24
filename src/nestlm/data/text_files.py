"""The search for text files in a folder."""

from __future__ import annotations

import os
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from nestlm.data.file_readers import COMPRESSED, has_reader
from nestlm.errors import DataError

MAX_NAMED = 12  # left-out files and suffixes that a message lists


@dataclass(frozen=True)
class TextFiles:
    """The files of a text folder.

    Attributes:
        files: files that can be read, sorted.
        left_out: names of all other files, each with the reason; an empty reason means that the suffix is unknown.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def find(cls, root: Path) -> TextFiles:
        """Search a folder and its subfolders, then the targets of links in them. Each file and folder is taken once.

        Raises:
            DataError: a folder cannot be read.
        """
        found, folders, links = cls(), deque([(root, root.resolve())]), deque[Path]()
        walked, linked = set[Path](), set[Path]()  # resolved folders, and resolved files that links lead to

        def take(path: Path) -> None:
            if has_reader(path):
                found.files.append(path)
            else:
                found.left_out.append((printable_path(path.relative_to(root).as_posix()), ""))

        while folders or links:
            if not folders:
                link = links.popleft()
                if link.is_dir():
                    folders.append((link, link.resolve()))
                elif not link.is_file():
                    found.left_out.append((printable_path(link.relative_to(root).as_posix()), "a link to nowhere"))
                elif (real := link.resolve()) not in linked and (real.parent not in walked or is_hidden(real.name)):
                    linked.add(real)
                    take(link)
                continue
            folder, real = folders.popleft()
            if real in walked:
                continue
            walked.add(real)
            for entry in list_entries(folder):
                path = folder / entry.name
                if entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    folders.append((path, real / entry.name))
                elif not entry.is_file():
                    found.left_out.append((printable_path(path.relative_to(root).as_posix()), "no file"))
                elif real / entry.name not in linked:
                    take(path)
        found.files.sort()
        return found

    def summary(self) -> str:
        """Describe the left-out files: the number by suffix, and the names of those left out for another reason."""
        counts = Counter(describe_suffix(name) for name, reason in self.left_out if not reason)
        parts = [f"{number} {kind}" for kind, number in sorted(counts.items())]
        parts += [f"{name} ({reason})" for name, reason in sorted(self.left_out) if reason]
        more = f", and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
        return f"{', '.join(parts[:MAX_NAMED])}{more}"


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder that are not hidden, sorted by name. Raises DataError if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"data.path: cannot read the folder {printable_path(folder)} ({error.strerror}); make it readable, or "
            "take it away"
        ) from error


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot."""
    return name.startswith(".")


def describe_suffix(name: str) -> str:
    """Return the suffix of a file name for a message, such as `.tar.gz`, or `without a suffix`."""
    path = Path(name)
    kinds = path.suffixes[-2:] if path.suffix.lower() in COMPRESSED[1:] else path.suffixes[-1:]
    return "".join(kinds) or "without a suffix"


def printable_path(path: Path | str) -> str:
    """Convert a path to text that can be printed; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
