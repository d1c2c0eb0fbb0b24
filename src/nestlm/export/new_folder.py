"""Create a folder that appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from nestlm.errors import ExportError
from nestlm.utils.checksums import hash_files, list_files, write_checksums

LOCK = ".nestlm-export"  # lock file in the folder of a running export; free once the export has been killed


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill. It is renamed to `out` when the block ends, and removed if the block raises.

    Before the renaming, SHA256SUMS of all files is added. Hidden folders that killed exports to `out` left are removed.

    Args:
        out: a folder that does not exist yet, or is empty.

    Raises:
        ExportError: `out` is not empty, or cannot be written.
    """
    check_is_free(out)
    place = out.absolute()
    with naming_write_errors(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
        beside = TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent)
    with beside as partial, FileLock(Path(partial, LOCK)):
        folder = Path(partial) / "model"
        with naming_write_errors(out):
            folder.mkdir()
        yield folder
        with naming_write_errors(out):
            write_checksums(folder, hash_files(folder, list_files(folder)))
            if place.exists():
                place.rmdir()
            folder.rename(place)


def remove_leftovers(place: Path) -> None:
    """Remove hidden folders that killed exports to `place` left beside it. A running export holds its folder's lock."""
    for left in place.parent.iterdir():
        lock = left / LOCK
        if left.name.startswith(f".{place.name}-") and lock.is_file() and not left.is_symlink():
            try:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            except Timeout:
                continue


@contextmanager
def naming_write_errors(out: Path) -> Iterator[None]:
    """Turn errors from writing files in the block, such as a full disk, into an ExportError that names `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise ExportError(
            f"export: cannot write {out} ({said or f'not all was taken: {error}'}); nothing is left of it; "
            "free some space, or choose another folder"
        ) from error


def check_is_free(out: Path) -> None:
    """Raise ExportError unless `out` does not exist, or is an empty folder and no link."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ExportError(f"export: {out} is there already; wanted a new folder")


def check_can_be_made(out: Path, *, run: Path) -> None:
    """Check that a folder can be made, before anything is computed for it.

    Args:
        out: the folder to make.
        run: the run's folder; an export must not lie in it.

    Raises:
        ExportError: `out` is not empty, is a mount point, lies in the run's folder, or cannot be written.
    """
    try:
        check_is_free(out)
        if out.is_mount():
            raise ExportError(f"export: {out} is a mount point, which cannot be replaced; wanted a folder below it")
        if out.resolve().is_relative_to(run.resolve()):
            raise ExportError(f"export: {out} lies in the run's folder; wanted a place outside of {run}")
        above = next(path for path in out.absolute().parents if path.exists())
        with TemporaryDirectory(prefix=f".{out.name}-", dir=above):
            pass
    except OSError as error:
        raise ExportError(
            f"export: cannot write {out} ({error.strerror}); wanted a new folder in a place that can be written to"
        ) from error
