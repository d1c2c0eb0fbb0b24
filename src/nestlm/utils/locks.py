"""Locks on folders between processes."""

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
    """Hold an exclusive lock on a folder; wait, with a notice, while another process holds it.

    The operating system releases the lock when the process ends, also when it is killed.

    Args:
        folder: an existing folder; its lock file is `.lock`.
        what: how the notice names the work that waits.

    Raises:
        ConfigError: `.lock` is a link or a folder.
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
