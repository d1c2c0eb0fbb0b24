"""Hashes of files, in the form of `sha256sum *`: they show a flipped bit that every reader would miss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
THREADS = 4  # each hashes a file: hashlib lets other threads run


def sha256(path: Path) -> str:
    """Hash of a file's content, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Names of all files of a folder but its SHA256SUMS, relative and sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != CHECKSUMS)


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hashes of files of a folder, by name."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write a folder's SHA256SUMS, whole or not at all."""
    partial = folder / f".{CHECKSUMS}.partial"
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    partial.replace(folder / CHECKSUMS)


def read_sums(path: Path) -> dict[str, str]:
    """Hashes by file name. Raises ValueError where the file is something else."""
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 or len(line[0]) != 64 for line in lines):
        raise ValueError(f"{path} is damaged: wanted lines of a hash and a name")
    return {name: digest for digest, name in lines}


def write_listed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and list its hash in the SHA256SUMS of its folder."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    digest = sha256(partial)
    partial.replace(path)
    write_sums(path.parent, known_sums(path.parent) | {path.name: digest})


def is_listed(path: Path) -> bool:
    """Whether a file is there as it was written."""
    return path.is_file() and known_sums(path.parent).get(path.name) == sha256(path)


def known_sums(folder: Path) -> dict[str, str]:
    """Hashes of a folder's files that are known; none where its SHA256SUMS is absent or damaged."""
    try:
        return read_sums(folder / CHECKSUMS)
    except (FileNotFoundError, ValueError):
        return {}


def check_folder(folder: Path) -> None:
    """Compare all files of a folder with its SHA256SUMS.

    Raises:
        ValueError: a file is absent, not listed, or not the one that was written.
        OSError: one cannot be read.
    """
    sums = folder / CHECKSUMS
    if not sums.is_file():
        raise ValueError(f"it has no {CHECKSUMS}")
    wanted = read_sums(sums)
    strangers = sorted(set(wanted) ^ set(files_below(folder)))
    if strangers:
        reason = "is absent" if strangers[0] in wanted else f"is not listed in {CHECKSUMS}"
        raise ValueError(f"{strangers[0]} {reason}")
    for name, digest in hashes(folder, wanted).items():
        if digest != wanted[name]:
            raise ValueError(f"{name} is not the file that {CHECKSUMS} lists")
