"""Errors about disk space, permissions, open files and memory, as one line with what, where and the cure."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestlm.errors import ConfigError, NestlmError, ResourceError

SPACE = "free some space, or choose another folder"
PLACE = "change its permissions, or choose another place"
MEMORY = "free some memory, raise its limit (ulimit -v), or take a smaller model or batch"
FILES = "raise the limit of open files (ulimit -n)"
CURES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another folder",
    errno.EROFS: PLACE,
    errno.EACCES: PLACE,
    errno.EPERM: PLACE,
    errno.EISDIR: "remove the folder, a file belongs there",
    errno.EIO: "look at the disk, or choose another folder",
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: "raise the limits of processes (ulimit -u) and memory (ulimit -v)",
    errno.ENOSYS: "mount /dev/shm, through which processes share memory, or set data.num_workers=0",
}
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# Parts of messages of libraries that raise such errors without an errno.
TEXTS = {
    "can't allocate memory": errno.ENOMEM,
    "not enough memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
    "PytorchStreamWriter failed": errno.ENOSPC,
    "unable to open shared memory": errno.ENOSYS,
} | {os.strerror(number): number for number in CURES if number not in (errno.EIO, errno.EAGAIN, errno.EPERM)}


@contextmanager
def resource_errors(place: Path | None = None) -> Iterator[None]:
    """Re-raise errors about missing resources as ResourceError; other errors pass through.

    Args:
        place: the path that the message names when the error names none.
    """
    try:
        yield
    except NestlmError:
        raise
    except Exception as error:
        lacking = resource_error(error, place=place)
        if lacking is None:
            raise
        raise lacking from error


def resource_error(error: BaseException, *, place: Path | None = None) -> ResourceError | None:
    """Translate an error about a missing resource, or one that such an error caused, into a ResourceError.

    Args:
        error: any exception.
        place: the path that the message names when the error names none.

    Returns:
        The ResourceError, or None when the error has another reason, such as a bug.
    """
    for each in iter_causes(error):
        if isinstance(each, OSError) and raised_by_semaphores(each):
            return ResourceError(f"cannot share memory between processes ({each.strerror}); {CURES[errno.ENOSYS]}")
        if isinstance(each, OSError) and each.errno in CURES:
            doing = "write" if each.errno in WRITING else "read or write"
            where = shorten(each.filename or place or "a file")
            return ResourceError(f"cannot {doing} {where} ({each.strerror}); {CURES[each.errno]}")
        if isinstance(each, MemoryError):
            return ResourceError(f"out of memory; {MEMORY}")
        if isinstance(each, RuntimeError | ImportError | OSError) or type(each).__name__ == "SafetensorError":
            number = next((number for text, number in TEXTS.items() if text in str(each)), None)
            if number is not None:
                return ResourceError(f"{os.strerror(number)}: {shorten(first_line(each))}; {CURES[number]}")
    return None


def iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, then its causes and contexts, from the last raised to the first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def raised_by_semaphores(error: OSError) -> bool:
    """Return whether an error comes from multiprocessing's semaphores, which need /dev/shm and name no file."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).match("multiprocessing/synchronize.py")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).splitlines()), "")


def shorten(text: object, *, longest: int = 200) -> str:
    """Convert to text and keep the last `longest` characters, with `...` in place of the rest."""
    shown = os.fsdecode(text) if isinstance(text, bytes) else str(text)
    return shown if len(shown) <= longest else f"...{shown[-longest:]}"


def check_writable(folder: Path, *, setting: str) -> None:
    """Check that files can be created in a folder, or, when it does not exist, in its nearest existing parent.

    Args:
        folder: where a command will write.
        setting: the config key or option that named the folder, for the message.

    Raises:
        ConfigError: the path is not a folder, or is read-only.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    reason = None
    if not place.is_dir():
        reason = os.strerror(errno.ENOTDIR)
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = "it is read-only"
    if reason is not None:
        raise ConfigError(f"{setting}: cannot write to {shorten(place)} ({reason}); {PLACE}")
