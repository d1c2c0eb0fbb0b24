"""Datasets of the Hugging Face hub, or local folders that its library reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlm.data.optional_imports import import_optional
from nestlm.data.sources.base import Document, StreamSource
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
        rows = load_dataset(self.path, text_key=self.text_key, streaming=False)
        for number, text in numbered_texts_of(rows, path=self.path, text_key=self.text_key, start=0):
            yield Document(f"{self.path.partition(':')[2]}:{number}", text)


@dataclass(frozen=True)
class HubStream(StreamSource):
    """A dataset that is read over the network while it trains, in its own order, unshuffled.

    The order is the same for any number of ranks, each of which reads all of it, and a resume is exact on any number,
    by skipping rows. Loader processes are refused.

    Attributes:
        path: as of `HubDataset`.
        heldout_documents: the first ones, for calibration and validation, and to train a tokenizer where none is given.
        text_key: the column that holds the text.
    """

    path: str
    heldout_documents: int
    text_key: str = "text"

    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        rows = load_dataset(self.path, text_key=self.text_key, streaming=True)
        yield from numbered_texts_of(rows.skip(start), path=self.path, text_key=self.text_key, start=start)

    def identity(self) -> str:
        return load_dataset(self.path, text_key=self.text_key, streaming=None)


def load_dataset(path: str, *, text_key: str, streaming: bool | None) -> Any:
    """A split of a dataset, or with `streaming=None` what tells its version. Raises DataError where there is none."""
    datasets = import_optional("datasets", wanted_for=f"{PREFIX}{path}")
    name, config, split = (*path.split(":"), "", "")[:3]
    split = split or "train"
    if Path(name).is_dir():  # the library takes a folder for a name otherwise, such as `.`
        name = str(Path(name).resolve())
    try:
        if streaming is None:
            builder = datasets.load_dataset_builder(name, config or None)
            files = builder.config.data_files
            return repr([builder.hash, files[split].origin_metadata if files and split in files else None])
        rows = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # the library's own errors are among these
        raise DataError(
            f"data: cannot load {PREFIX}{path} ({str(error).strip().partition(chr(10))[0]:.200})"
        ) from error
    columns = rows.column_names  # a stream may not know them
    if columns is not None and text_key not in columns:
        raise DataError(
            f"data: {PREFIX}{path} has no column {text_key!r}; it has {', '.join(columns)}: name one (text_key)"
        )
    return rows


def numbered_texts_of(
    rows: Iterable[dict[str, Any]], *, path: str, text_key: str, start: int
) -> Iterator[tuple[int, str]]:
    """The texts of rows that have one, with the rows' numbers."""
    for number, row in enumerate(rows, start=start):
        text = row.get(text_key)
        if text is not None and not isinstance(text, str):
            raise DataError(f"data: {PREFIX}{path} row {number}: {text_key} is {text!r:.100}, wanted text")
        if text is not None and text.strip():
            yield number, text
