"""Sources that read datasets of the Hugging Face hub, or local folders that its library `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from nestlm.data.optional_imports import import_optional
from nestlm.data.sources.base import Document, Source, StreamSource
from nestlm.errors import DataError

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset(Source):
    """A split of a dataset, downloaded once into the cache of `datasets`.

    Attributes:
        path: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; CONFIG may be empty, and SPLIT defaults to `train`.
        text_key: the column that holds the text.
    """

    path: str
    text_key: str = "text"

    @override
    def documents(self) -> Iterator[Document]:
        rows = load_rows(self.path, text_key=self.text_key, streaming=False)
        for number, text in iter_texts(rows, path=self.path, text_key=self.text_key, start=0):
            yield Document(f"{self.path.partition(':')[2]}:{number}", text)


@dataclass(frozen=True)
class HubStream(StreamSource):
    """A split of a dataset that is read over the network while training, unshuffled.

    Every rank reads all rows, so the order is the same for any number of ranks. Resuming skips rows and is exact on any
    number of ranks. Loader processes (`data.num_workers`) are refused.

    Attributes:
        path: see `HubDataset`.
        heldout_documents: number of first documents for calibration and validation, and for training a tokenizer if
            none is given.
        text_key: the column that holds the text.
    """

    path: str
    heldout_documents: int
    text_key: str = "text"

    @override
    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        rows = load_rows(self.path, text_key=self.text_key, streaming=True)
        yield from iter_texts(rows.skip(start), path=self.path, text_key=self.text_key, start=start)

    @override
    def identity(self) -> str:
        datasets = import_optional("datasets", wanted_for=f"{PREFIX}{self.path}")
        name, config, split = parse_path(self.path)
        with loading_errors(self.path):
            builder = datasets.load_dataset_builder(name, config)
            files = builder.config.data_files
            return repr([builder.hash, files[split].origin_metadata if files and split in files else None])


def parse_path(path: str) -> tuple[str, str | None, str]:
    """Split NAME[:CONFIG][:SPLIT] into the dataset's name, its config (None for the default one) and the split."""
    name, config, split = (*path.split(":"), "", "")[:3]
    if Path(name).is_dir():  # `datasets` looks up relative folders such as `.` on the hub
        name = str(Path(name).resolve())
    return name, config or None, split or "train"


@contextmanager
def loading_errors(path: str) -> Iterator[None]:
    """Turn the errors that `datasets` raises while it loads a dataset into a DataError that names the dataset."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # base classes of the library's own errors
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"data: cannot load {PREFIX}{path} ({reason:.200})") from error


def load_rows(path: str, *, text_key: str, streaming: bool) -> Any:
    """Load the rows of a split.

    Args:
        path: see `HubDataset`.
        text_key: a column that the split must have.
        streaming: whether rows are read over the network while the caller iterates.

    Raises:
        DataError: there is no such dataset, split or column.
    """
    datasets = import_optional("datasets", wanted_for=f"{PREFIX}{path}")
    name, config, split = parse_path(path)
    with loading_errors(path):
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    columns = rows.column_names  # None for some streams
    if columns is not None and text_key not in columns:
        raise DataError(
            f"data: {PREFIX}{path} has no column {text_key!r}; it has {', '.join(columns)}: name one (text_key)"
        )
    return rows


def iter_texts(rows: Iterable[dict[str, Any]], *, path: str, text_key: str, start: int) -> Iterator[tuple[int, str]]:
    """Yield number and text of each row whose text is not empty. Raises DataError for a value that is not text."""
    for number, row in enumerate(rows, start=start):
        text = row.get(text_key)
        if text is not None and not isinstance(text, str):
            raise DataError(f"data: {PREFIX}{path} row {number}: {text_key} is {text!r:.100}, wanted text")
        if text is not None and text.strip():
            yield number, text
