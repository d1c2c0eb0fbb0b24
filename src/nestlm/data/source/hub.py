"""Datasets of the Hugging Face hub, or local folders that its library reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nestlm.data.extra import load_extra
from nestlm.data.source.base import Document
from nestlm.errors import DataError

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset:
    """A dataset, downloaded once into the library's cache.

    Attributes:
        path: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, where CONFIG may be empty; SPLIT is `train` where it is not given.
        text_key: the column that holds the text.
    """

    path: str
    text_key: str = "text"

    def documents(self) -> Iterator[Document]:
        datasets = load_extra("datasets", wanted_for=f"{PREFIX}{self.path}")
        name, config, split = (*self.path.split(":"), "", "")[:3]
        split = split or "train"
        if Path(name).is_dir():  # the library takes a folder for a name otherwise, such as `.`
            name = str(Path(name).resolve())
        try:
            rows = datasets.load_dataset(name, config or None, split=split)
        except (OSError, ValueError, RuntimeError) as error:  # the library's own errors are among these
            raise DataError(f"data: cannot load {PREFIX}{self.path} ({str(error).splitlines()[0]})") from error
        if self.text_key not in rows.column_names:
            raise DataError(
                f"data: {PREFIX}{self.path} has no column {self.text_key!r}; it has {', '.join(rows.column_names)}: "
                "name one (text_key)"
            )
        for number, row in enumerate(rows.select_columns([self.text_key])):
            text = row[self.text_key]
            if text is not None and not isinstance(text, str):
                raise DataError(f"data: {PREFIX}{self.path} row {number}: {self.text_key} is {text!r}, wanted text")
            if text is not None and text.strip():
                yield Document(f"{config}:{split}:{number}", text)
