"""The stage cache: a stage's result lies under the hash of everything that determines it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nestlm.progress import console

# Packages whose version decides numbers.
DETERMINING = ("torch", "lightning", "tokenizers", "numpy", "scipy")
# What is written from results, after them: a change there makes no cached result stale.
AFTER_RESULTS = (
    "report", "generation", "export", "exporting.py", "harness.py", "nested.py", "scoring.py", "terminal.py", "cli.py",
)  # fmt: skip


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hash of this package's source, so that an edited method never meets its old results."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] not in AFTER_RESULTS:
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def stage_key(name: str, *, sections: dict[str, Any], previous: list[str], extra: str) -> str:
    """Hash of a stage: its name, resolved config sections, the stages before, data, source code and versions."""
    content = [name, sections, previous, extra, code_digest(), platform.python_version(), *map(version, DETERMINING)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_identity(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_identity(folder: Path) -> str:
    """Names, sizes and times of a folder's files: tells whether weights changed, without reading gigabytes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """One process at a time works in a folder; another says that it waits. The lock of a killed one is free at once."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(f"{what} waits for another process that works on it", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class StageFolder:
    """Where a stage works and leaves its result; `stage.json` is written last and marks it finished."""

    def __init__(self, root: Path, name: str, key: str) -> None:
        self.name, self.key = name, key
        self.path = root / f"{name}-{key[:16]}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, f"{self.name:>9}"):
            yield

    def result(self) -> dict[str, Any] | None:
        """What a finished stage reported, or None."""
        marker = self.path / "stage.json"
        return json.loads(marker.read_text()) if marker.is_file() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the stage finished."""
        write_json(self.path / "stage.json", result)
