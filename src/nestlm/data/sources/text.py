"""The source of local text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from nestlm.data.file_readers import SUFFIXES, NoTextError, has_reader, read_documents
from nestlm.data.sources.base import Document, Source
from nestlm.data.text_files import TextFiles, printable_path
from nestlm.errors import DataError
from nestlm.utils.console import print_once


@dataclass(frozen=True)
class TextFolder(Source):
    """The texts of a folder, or of a single file.

    Every .txt, .md and .py file is a document. So is every line of a .jsonl or .ndjson file, every element of a .json
    file, and every row of a .csv or .parquet file, with the text under `text_key`. All but parquet may be compressed as
    .gz, .zst, .xz or .bz2. Links are followed, and each file is read once. Hidden files and folders are skipped; all
    other files that are left out are named on standard error.

    Attributes:
        path: the folder or file.
        text_key: key of JSON objects, or column of tables, that holds the text.
    """

    path: str
    text_key: str = "text"

    @override
    def documents(self) -> Iterator[Document]:
        root = Path(self.path)
        try:
            is_file, is_folder = root.is_file() and has_reader(root), root.is_dir()
        except OSError as error:
            raise DataError(
                f"data.path: cannot read {printable_path(root):.100} ({error.strerror}); wanted text"
            ) from error
        if is_file:
            try:
                yield from drop_blank(read_documents(root, name=printable_path(root.name), text_key=self.text_key))
            except NoTextError as error:
                raise DataError(
                    f"data.path: {printable_path(root)}: {error}; name the one with the text (text_key)"
                ) from error
            return
        if not is_folder:
            raise DataError(
                f"data.path: {printable_path(root)} is no folder; wanted one that holds {', '.join(SUFFIXES)} files"
            )
        found = TextFiles.find(root)
        if not found.files:
            rest = f"; left out: {found.summary()}" if found.left_out else ""
            raise DataError(
                f"data.path: {printable_path(root)} holds no {', '.join(SUFFIXES)} file; put some text there{rest}"
            )
        for path in found.files:
            name = printable_path(path.relative_to(root).as_posix())
            try:
                yield from drop_blank(read_documents(path, name=name, text_key=self.text_key))
            except NoTextError as error:
                found.left_out.append((name, str(error)))
        if found.left_out:
            print_once(f"data: left out of {printable_path(root)}: {found.summary()}")


def drop_blank(documents: Iterator[Document]) -> Iterator[Document]:
    """Leave out documents that hold only whitespace."""
    return (document for document in documents if document.text.strip())
