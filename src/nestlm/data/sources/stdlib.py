"""The default source: the source code of the running interpreter's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nestlm.data.sources.base import Document
from nestlm.errors import DataError

# Tests are absent from some distributions; site-packages is not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Stdlib:
    """Real text that is on every machine: about 11 MB of Python. It differs between Python versions."""

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
            # A few files are in another encoding; what is not UTF-8 in them becomes U+FFFD.
            text = (root / name).read_bytes().decode("utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)
