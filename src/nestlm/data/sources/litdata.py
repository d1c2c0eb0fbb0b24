"""Datasets that the library litdata optimised, in a folder or at a URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nestlm.data.optional_imports import import_optional
from nestlm.data.sources.base import StreamSource
from nestlm.errors import DataError

CURE = "pip install 'nestlm[litdata]', or without torchvision as docs/howto/prepare-data.md says"
INDEX = "index.json"
# Formats of an item's parts that hold values alone; litdata has others, some of which run code when they are read.
FORMATS = frozenset({"str", "text", "string", "bool", "int", "float", "bytes", "json"})
LOCAL = "local:"  # litdata's prefix of a folder that is read as a URL is: chunk by chunk, from copies


@dataclass(frozen=True)
class LitdataStream(StreamSource):
    """A text an item, read while it trains, in the order in which the items were written.

    The order is the same for any number of ranks, each of which reads all of it, and a resume is exact on any number:
    it goes straight to its item. Loader processes are refused. Chunks of a URL are copied to the temporary folder while
    they are needed, by each rank for itself: ranks that read everything from one cache wait for each other without end
    once it is full. litdata keeps no checksums: a chunk that was changed in place goes unnoticed while it yields text.

    Attributes:
        path: a folder, or a URL as litdata takes it.
        heldout_documents: the first ones, for calibration and validation, and to train a tokenizer where none is given.
        cache_size: a rank's chunks of a URL on disk, such as 25GB.
        text_key: the key of the text where items are dictionaries.
    """

    path: str
    heldout_documents: int
    cache_size: str
    text_key: str

    def numbered_texts(self, start: int) -> Iterator[tuple[int, str]]:
        # a file that stays behind is no reason to end a run
        with TemporaryDirectory(prefix="litdata-", ignore_cleanup_errors=True) as cache:
            dataset = self.opened(cache)
            num_items = sum(end - first for first, end in dataset.region_of_interest)
            if start >= num_items:
                return
            dataset.load_state_dict(dataset.state_dict(start, 1, 1))  # one worker, one item a batch
            try:
                yield from self.texts(dataset, range(start, num_items))
            finally:
                stop_prefetching(dataset)

    def texts(self, dataset: Any, numbers: range) -> Iterator[tuple[int, str]]:
        """The texts of the items that are not empty. Raises DataError where one is no text, or cannot be read."""
        with self.named("read"):
            items = iter(dataset)
        for number in numbers:
            with self.named(f"read item {number} of"):
                item = next(items)
            text = item.get(self.text_key) if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise DataError(
                    f"data: {self.path} item {number} is {describe_item(item)}; wanted text, or a dictionary with text "
                    f"under {self.text_key!r} (text_key)"
                )
            if text.strip():
                yield number, text

    def identity(self) -> str:
        with TemporaryDirectory(prefix="litdata-") as cache, self.named("read the index of"):
            return hashlib.sha256(self.index(self.opened(cache)).read_bytes()).hexdigest()

    @staticmethod
    def index(dataset: Any) -> Path:
        """The index of an opened dataset; of a URL, the copy that litdata reads."""
        return Path(dataset.input_dir.path) / INDEX

    def opened(self, cache: str) -> Any:
        """The dataset, all of it for this process, whatever its rank."""
        litdata = import_optional("litdata", wanted_for=self.path, cure=CURE)
        with self.named("open"):
            dataset = litdata.StreamingDataset(self.address(), cache_dir=cache, max_cache_size=self.cache_size)
            check_index(self.index(dataset), path=self.path)
        ranks = dataset.distributed_env
        ranks.world_size, ranks.global_rank, ranks.num_nodes = 1, 0, 1
        dataset.set_drop_last(False)
        return dataset

    def address(self) -> str:
        """The path as litdata is to see it. Raises DataError where a folder holds no optimised dataset."""
        if self.path.startswith(LOCAL) or "://" in self.path:
            return self.path
        index = Path(self.path) / INDEX
        if not index.is_file():
            raise DataError(f"data.path: {self.path} holds no {INDEX}; wanted a folder that litdata.optimize wrote")
        with self.named("read the index of"):
            compressed = json.loads(index.read_text(encoding="utf-8"))["config"]["compression"]
        return f"{LOCAL}{Path(self.path).resolve()}" if compressed else self.path  # it would be unpacked in place

    @contextmanager
    def named(self, doing: str) -> Iterator[None]:
        """Raises whatever goes wrong as a DataError that says what was being done."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"data: cannot {doing} {self.path} ({type(error).__name__}: {reason})") from error


def check_index(index: Path, *, path: str) -> None:
    """Raise DataError for items that would run code when they are read, and for chunks outside the dataset."""
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
    """End the library's thread that fetches chunks: it outlives a dataset that is not read to its end."""
    reader = None if dataset.cache is None else dataset.cache._reader
    thread = None if reader is None else reader._prepare_thread
    if thread is not None:
        thread.force_stop()
        thread.join()


def describe_item(item: Any) -> str:
    """An item as a message shows it."""
    kind = type(item).__name__
    return f"a {kind} with {', '.join(map(repr, item))}" if isinstance(item, dict) else f"a {kind}"
