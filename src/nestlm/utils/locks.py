"""Locks of folders between processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nestlm.errors import ConfigError
from nestlm.utils.console import console

LOCK = ".lock"


@contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """One process at a time works in a folder; another says that it waits. The lock of a killed one is free at once.

    Raises:
        ConfigError: something else than a file is in the lock's place.
    """
    path = folder / LOCK
    if path.is_symlink() or path.is_dir():
        raise ConfigError(f"{path}: got a {'link' if path.is_symlink() else 'folder'}, wanted a file; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(f"{what} waits for another process that works on it", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
