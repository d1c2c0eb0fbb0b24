"""The default source, which needs no download: the source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from nestlm.data.sources.base import Document, Source
from nestlm.errors import DataError

# Tests are absent from some distributions; site-packages is not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Stdlib(Source):
    """The Python source code of the standard library, about 11 MB. It differs between Python versions."""

    @override
    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*.py")
            if not LEFT_OUT.intersection(path.relative_to(root).parts)
        )
        if not names:
            raise DataError(f"data=stdlib: no source code in {root}; use data=text data.path=FOLDER")
        for name in names:
            # A few files have another encoding; their bytes that are not UTF-8 become U+FFFD.
            text = (root / name).read_bytes().decode("utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)
