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
        ExportError: `out` holds something, or what is written does not fit the disk.
    """
    check_free(out)
    place = out.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as partial:
            folder = Path(partial) / "model"
            folder.mkdir()
            yield folder
            sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
            (folder / CHECKSUMS).write_text(sums, encoding="utf-8")
            if place.exists():
                place.rmdir()
            folder.rename(place)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExportError(
            f"export: cannot write {out} ({reason}); nothing is left of it; free some space, or choose another folder"
        ) from error


def check_free(out: Path) -> None:
    """Raise ExportError unless a folder is not there yet, or is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"export: {out} is there already; wanted a new folder")
