"""The source of datasets in the format of the library litdata, in a folder or at a URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override

from nestlm.data.optional_imports import import_optional
from nestlm.data.sources.base import StreamSource
from nestlm.errors import DataError

CURE = "pip install 'nestlm[litdata]', or without torchvision as docs/howto/prepare-data.md says"
INDEX = "index.json"
# Item formats that hold plain values. Some of litdata's other formats run code when they are read.
FORMATS = frozenset({"str", "text", "string", "bool", "int", "float", "bytes", "json"})
LOCAL = "local:"  # litdata's prefix for a folder that it reads like a URL, from copies of its chunks


@dataclass(frozen=True)
class LitdataStream(StreamSource):
    """A litdata dataset with one text per item, read while training, in the order in which the items were written.

    Every rank reads all items, so the order is the same for any number of ranks. Resuming seeks to the next item and is
    exact on any number of ranks. Loader processes (`data.num_workers`) are refused. Each rank copies the chunks of a
    URL into a temporary folder of its own: ranks that share one cache wait for each other forever once it is full.
    litdata stores no checksums, so a chunk that was changed in place goes unnoticed as long as it yields text.

    Attributes:
        path: a folder, or a URL that litdata accepts.
        heldout_documents: number of first documents for calibration and validation, and for training a tokenizer if
            none is given.
        cache_size: limit for the copied chunks of one rank, such as 25GB.
        text_key: the key of the text when items are dictionaries.
    """

    path: str
    heldout_documents: int
    cache_size: str
    text_key: str

    @override
    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        # a file that cannot be deleted must not end the run
        with TemporaryDirectory(prefix="litdata-", ignore_cleanup_errors=True) as cache:
            dataset = self.open_dataset(cache)
            num_items = sum(end - first for first, end in dataset.region_of_interest)
            if start >= num_items:
                return
            dataset.load_state_dict(dataset.state_dict(start, 1, 1))  # one worker, one item a batch
            try:
                yield from self.read_texts(dataset, range(start, num_items))
            finally:
                stop_prefetching(dataset)

    def read_texts(self, dataset: Any, numbers: range) -> Iterator[tuple[int, str]]:
        """Yield number and text of the items that are not empty.

        Args:
            dataset: the dataset, positioned at the first of the items.
            numbers: the numbers of the items.

        Raises:
            DataError: an item is not text, or cannot be read.
        """
        with self.wrap_errors("read"):
            items = iter(dataset)
        for number in numbers:
            with self.wrap_errors(f"read item {number} of"):
                item = next(items)
            text = item.get(self.text_key) if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise DataError(
                    f"data: {self.path} item {number} is {describe_item(item)}; wanted text, or a dictionary with text "
                    f"under {self.text_key!r} (text_key)"
                )
            if text.strip():
                yield number, text

    @override
    def identity(self) -> str:
        with TemporaryDirectory(prefix="litdata-") as cache, self.wrap_errors("read the index of"):
            return hashlib.sha256(self.index_file(self.open_dataset(cache)).read_bytes()).hexdigest()

    @staticmethod
    def index_file(dataset: Any) -> Path:
        """Return the path of an open dataset's index; for a URL, that of litdata's copy."""
        return Path(dataset.input_dir.path) / INDEX

    def open_dataset(self, cache: str) -> Any:
        """Open the whole dataset for this process; litdata would divide the items among the ranks.

        Args:
            cache: the folder for copies of chunks.

        Raises:
            DataError: there is no such dataset, or it may not be read.
        """
        litdata = import_optional("litdata", wanted_for=self.path, cure=CURE)
        with self.wrap_errors("open"):
            dataset = litdata.StreamingDataset(self.address(), cache_dir=cache, max_cache_size=self.cache_size)
            check_index(self.index_file(dataset), path=self.path)
        ranks = dataset.distributed_env
        ranks.world_size, ranks.global_rank, ranks.num_nodes = 1, 0, 1
        dataset.set_drop_last(False)
        return dataset

    def address(self) -> str:
        """Return the path in the form that litdata takes. Raises DataError for a folder without a dataset."""
        if self.path.startswith(LOCAL) or "://" in self.path:
            return self.path
        index = Path(self.path) / INDEX
        if not index.is_file():
            raise DataError(f"data.path: {self.path} holds no {INDEX}; wanted a folder that litdata.optimize wrote")
        with self.wrap_errors("read the index of"):
            compressed = json.loads(index.read_text(encoding="utf-8"))["config"]["compression"]
        # litdata decompresses the chunks of a plain path in place
        return f"{LOCAL}{Path(self.path).resolve()}" if compressed else self.path

    @contextmanager
    def wrap_errors(self, doing: str) -> Iterator[None]:
        """Turn any exception into a DataError that names the dataset and the action that failed.

        Args:
            doing: the action, such as `open`.
        """
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"data: cannot {doing} {self.path} ({type(error).__name__}: {reason})") from error


def check_index(index: Path, *, path: str) -> None:
    """Check the index of a dataset before any item is read.

    Args:
        index: path of the index.json.
        path: the dataset's path, for the message.

    Raises:
        DataError: an item format could run code, or a chunk lies outside the dataset's folder.
    """
    content = json.loads(index.read_text(encoding="utf-8"))
    formats = [str(each).partition(":")[0] for each in content["config"]["data_format"]]
    others = sorted(set(formats) - FORMATS)
    if others:
        raise DataError(f"data: {path} holds items of format {others[0]!r}; wanted one of {', '.join(sorted(FORMATS))}")
    for chunk in content["chunks"]:
        name = str(chunk["filename"])
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise DataError(f"data: {path} names the chunk {name[:100]!r}; wanted a file of its own folder")


def stop_prefetching(dataset: Any) -> None:
    """End litdata's prefetching thread, which would outlive a dataset that is not read to its end."""
    reader = None if dataset.cache is None else dataset.cache._reader
    thread = None if reader is None else reader._prepare_thread
    if thread is not None:
        thread.force_stop()
        thread.join()


def describe_item(item: Any) -> str:
    """Describe the type of an item, and the keys of a dictionary, for an error message."""
    kind = type(item).__name__
    return f"a {kind} with {', '.join(map(repr, item))}" if isinstance(item, dict) else f"a {kind}"
