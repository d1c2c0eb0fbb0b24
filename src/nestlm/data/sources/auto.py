"""The choice of a source by the form of `data.path`."""

from __future__ import annotations

from pathlib import Path

from nestlm.data.manifest import JOURNAL, MANIFEST
from nestlm.data.sources.base import PreparedSource, Source
from nestlm.data.sources.hub import PREFIX, HubDataset
from nestlm.data.sources.shards import Shards
from nestlm.data.sources.stdlib import Stdlib
from nestlm.data.sources.text import TextFolder
from nestlm.errors import DataError


def source_from_path(path: str | None, text_key: str = "text") -> Source | PreparedSource:
    """Choose a source by the form of a path.

    Args:
        path: None for the source code of the standard library; `hf:NAME` for a Hugging Face dataset; else a prepared
            folder, a folder of text files, or a text file.
        text_key: key or column that holds the text in datasets and structured files.

    Raises:
        DataError: the path cannot be read.
    """
    if path is None:
        return Stdlib()
    if path.startswith(PREFIX):
        return HubDataset(path.removeprefix(PREFIX), text_key)
    try:
        prepared = any((Path(path) / name).is_file() for name in (MANIFEST, JOURNAL))
    except OSError as error:
        raise DataError(f"data.path: cannot read {path:.100} ({error.strerror}); wanted a folder of text") from error
    return Shards(path) if prepared else TextFolder(path, text_key)
