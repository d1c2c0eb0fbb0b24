"""The record of a run: hashes of its files, written last. What differs from them is refused by name."""

from __future__ import annotations

from pathlib import Path

from nestlm.errors import DataError
from nestlm.utils.checksums import CHECKSUMS, hash_files, read_checksums, write_checksums

PROVENANCE = "provenance.json"
FILES = ("config.yaml", "metrics.json", "results.csv", "timings.csv", "latency_table.json", PROVENANCE)
FOLDERS = ("specs", "checkpoints")
# Large files, which are checked when they are read, against hashes in files that are recorded.
CHECKED_WHEN_READ = {".safetensors", ".bin"}
CURE = "copy the run again, or do it again"


def is_finished(folder: Path) -> bool:
    """Whether a folder is that of a finished run, by its record and its provenance."""
    return (folder / CHECKSUMS).is_file() and (folder / PROVENANCE).is_file()


def begin(folder: Path) -> None:
    """Mark a run's folder unfinished while its files are written."""
    for name in (CHECKSUMS, PROVENANCE):
        (folder / name).unlink(missing_ok=True)


def write_record(folder: Path) -> None:
    """Mark a run's folder finished: write the hashes of its files."""
    write_checksums(folder, hash_files(folder, recorded_names(folder)))


def recorded_names(folder: Path) -> list[str]:
    """Names of the files that are recorded, relative and sorted; hidden files are left out."""
    below = (path for name in FOLDERS for path in (folder / name).rglob("*"))
    paths = [*(folder / name for name in FILES), *(path for path in below if path.suffix not in CHECKED_WHEN_READ)]
    return sorted(
        path.relative_to(folder).as_posix() for path in paths if path.is_file() and not path.name.startswith(".")
    )


def check_record(folder: Path) -> None:
    """Compare the files of a finished run with its record; of large ones only that they lie in the folder.

    Raises:
        DataError: the folder is no finished run; or a file is absent, not recorded, not the one that was written, or
            outside the folder.
    """
    if not is_finished(folder):
        lacks = f", for it lacks {CHECKSUMS}" if (folder / PROVENANCE).is_file() else ""
        raise DataError(f"{folder} is no finished run{lacks}; wanted the folder that a run printed at its end")
    try:
        wanted = read_checksums(folder / CHECKSUMS)
    except ValueError as error:
        raise DataError(f"{error}; {CURE}") from error
    check_places(folder, wanted)
    found = recorded_names(folder)
    for name in sorted(set(wanted) ^ set(found)):
        what = "does not exist" if name in wanted else f"is not listed in the run's {CHECKSUMS}"
        raise DataError(f"{folder / name} {what}; {CURE}")
    for name, digest in hash_files(folder, found).items():
        if digest != wanted[name]:
            raise DataError(f"{folder / name} is not the file that the run wrote; {CURE}")


def check_places(folder: Path, names: dict[str, str]) -> None:
    """Raise DataError where a recorded name, or a file of a recorded folder, leads out of the run's folder."""
    root = folder.resolve()
    below = (path for name in FOLDERS for path in (folder / name, *(folder / name).rglob("*")))
    for path in (*(folder / name for name in names), *below):
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path} leads out of the run's folder; copy the run with its files, as cp -rL does")
