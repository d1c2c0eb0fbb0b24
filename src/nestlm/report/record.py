"""Write and check the record of a run: SHA256SUMS, the hashes of its files, which is written last."""

from __future__ import annotations

from pathlib import Path

from nestlm.errors import DataError
from nestlm.utils.checksums import CHECKSUMS, hash_files, read_checksums, write_checksums

PROVENANCE = "provenance.json"
FILES = ("config.yaml", "metrics.json", "results.csv", "timings.csv", "latency_table.json", PROVENANCE)
FOLDERS = ("specs", "checkpoints")
# Suffixes of large files. They are not in the record; recorded files hold their hashes, which readers check.
CHECKED_WHEN_READ = {".safetensors", ".bin"}
CURE = "copy the run again, or do it again"


def is_finished(folder: Path) -> bool:
    """Tell whether a folder holds a finished run, that is, a record and a provenance."""
    return (folder / CHECKSUMS).is_file() and (folder / PROVENANCE).is_file()


def begin(folder: Path) -> None:
    """Mark a run's folder as unfinished, by removing its record and provenance, before its files are written."""
    for name in (CHECKSUMS, PROVENANCE):
        (folder / name).unlink(missing_ok=True)


def write_record(folder: Path) -> None:
    """Mark a run's folder as finished, by writing the hashes of its files."""
    write_checksums(folder, hash_files(folder, recorded_names(folder)))


def recorded_names(folder: Path) -> list[str]:
    """List the files of a run's folder that its record covers, by sorted relative path. Hidden files are left out."""
    below = (path for name in FOLDERS for path in (folder / name).rglob("*"))
    paths = [*(folder / name for name in FILES), *(path for path in below if path.suffix not in CHECKED_WHEN_READ)]
    return sorted(
        path.relative_to(folder).as_posix() for path in paths if path.is_file() and not path.name.startswith(".")
    )


def check_record(folder: Path) -> None:
    """Compare the files of a finished run with its record. The content of large files is not read.

    Raises:
        DataError: the folder holds no finished run; or a file is missing, not recorded, changed, or leads out of the
            folder.
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
    """Raise DataError if a recorded name, or a file in a recorded folder, leads out of the run's folder."""
    root = folder.resolve()
    below = (path for name in FOLDERS for path in (folder / name, *(folder / name).rglob("*")))
    for path in (*(folder / name for name in names), *below):
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path} leads out of the run's folder; copy the run with its files, as cp -rL does")
