"""A folder of local text files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nestlm.data.source.base import Document, read_text
from nestlm.errors import DataError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True)
class TextFolder:
    """Every .txt, .md and .py file is a document; every line of a .jsonl file is one, under its key `text`."""

    path: str

    def documents(self) -> Iterator[Document]:
        root = Path(self.path)
        if not root.is_dir():
            raise DataError(f"data.path: {root} is no folder; wanted one that holds {', '.join(SUFFIXES)} files")
        paths = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f"data.path: {root} holds no {', '.join(SUFFIXES)} file; put some text there")
        for path in paths:
            name, text = path.relative_to(root).as_posix(), read_text(path)
            for document in read_lines(name, text) if path.suffix == ".jsonl" else (Document(name, text),):
                if document.text.strip():
                    yield document


def read_lines(name: str, text: str) -> Iterator[Document]:
    """The documents of a JSON-lines file. Raises DataError, naming the line, when one has no key `text`."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
            if not isinstance(value, str):
                raise TypeError(f"text is {value!r}")
            value.encode()
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'data: {name} line {number} is not {{"text": ...}} ({error!r}); mend or remove it'
            ) from error
        yield Document(f"{name}:{number}", value)
