"""Local text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nestlm.data.formats import SUFFIXES, read_documents
from nestlm.data.source.base import Document
from nestlm.errors import DataError


@dataclass(frozen=True)
class TextFolder:
    """A folder, or a single file.

    Every .txt, .md and .py file is a document; so is every line of a .jsonl file and every row of a .parquet file,
    under `text_key`. All but parquet may be packed, as .gz or .zst.
    """

    path: str
    text_key: str = "text"

    def documents(self) -> Iterator[Document]:
        root = Path(self.path)
        if root.is_file() and root.name.endswith(SUFFIXES):
            paths, root = [root], root.parent
        elif root.is_dir():
            paths = sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
        else:
            raise DataError(f"data.path: {root} is no folder; wanted one that holds {', '.join(SUFFIXES)} files")
        if not paths:
            raise DataError(f"data.path: {root} holds no {', '.join(SUFFIXES)} file; put some text there")
        for path in paths:
            name = path.relative_to(root).as_posix()
            for document in read_documents(path, name=name, text_key=self.text_key):
                if document.text.strip():
                    yield document
