"""A folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from nestlm.errors import ExportError
from nestlm.model.checkpoint import CHECKSUMS, sha256


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`; it becomes `out` when the block ends well, and is gone when it does not.

    Raises:
        ExportError: `out` holds something, or nothing can be written there.
    """
    check_free(out)
    place = out.absolute()
    with writing(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent)
    with beside as partial:
        folder = Path(partial) / "model"
        with writing(out):
            folder.mkdir()
        yield folder
        with writing(out):
            sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
            (folder / CHECKSUMS).write_text(sums, encoding="utf-8")
            if place.exists():
                place.rmdir()
            folder.rename(place)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Name what keeps a file from being written, a full disk above all, as an ExportError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise ExportError(
            f"export: cannot write {out} ({said or f'not all was taken: {error}'}); nothing is left of it; "
            "free some space, or choose another folder"
        ) from error


def check_free(out: Path) -> None:
    """Raise ExportError unless a folder is not there yet, or is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"export: {out} is there already; wanted a new folder")
