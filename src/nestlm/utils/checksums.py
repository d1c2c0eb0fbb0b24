"""Hashes of files, in the form that `sha256sum --check` and `xxhsum --check` read: they show a flipped bit.

Runs, exports and caches have SHA-256, since people compare them elsewhere. Training checkpoints have XXH3 of 128 bits:
it is computed ten times faster, and they are read where they were written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash


@dataclass(frozen=True)
class HashAlgorithm:
    """A hash, and the file of a folder that lists the hashes of the folder's other files.

    Attributes:
        file_name: of that list.
        new: makes a hash object, as those of hashlib.
        digits: of a hash in hexadecimal.
    """

    file_name: str
    new: Callable[[], Any]
    digits: int


SHA256 = HashAlgorithm("SHA256SUMS", hashlib.sha256, 64)
XXH128 = HashAlgorithm("XXH128SUMS", xxhash.xxh3_128, 32)
CHECKSUMS = SHA256.file_name
THREADS = 4  # each hashes a file: hashlib lets other threads run


def hash_file(path: Path, algorithm: HashAlgorithm = SHA256) -> str:
    """Hash of a file's content, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm.new).hexdigest()


def list_files(folder: Path, algorithm: HashAlgorithm = SHA256) -> list[str]:
    """Names of all files of a folder but its list of hashes, relative and sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != algorithm.file_name)


def hash_files(folder: Path, names: Iterable[str], algorithm: HashAlgorithm = SHA256) -> dict[str, str]:
    """Hashes of files of a folder, by name."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, algorithm), names), strict=True))


def write_checksums(folder: Path, sums: dict[str, str], algorithm: HashAlgorithm = SHA256) -> None:
    """Write a folder's list of hashes, whole or not at all."""
    partial = folder / f".{algorithm.file_name}.partial"
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    partial.replace(folder / algorithm.file_name)


def read_checksums(path: Path, algorithm: HashAlgorithm = SHA256) -> dict[str, str]:
    """Hashes by file name. Raises ValueError where the file is something else."""
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 or len(line[0]) != algorithm.digits for line in lines):
        raise ValueError(f"{path} is damaged: wanted lines of a hash and a name")
    return {name: digest for digest, name in lines}


def write_with_checksum(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and list its hash in the SHA256SUMS of its folder."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    digest = hash_file(partial)
    partial.replace(path)
    write_checksums(path.parent, read_valid_checksums(path.parent) | {path.name: digest})


def matches_checksum(path: Path) -> bool:
    """Whether a file is there as it was written."""
    return path.is_file() and read_valid_checksums(path.parent).get(path.name) == hash_file(path)


def read_valid_checksums(folder: Path) -> dict[str, str]:
    """Hashes of a folder's files that are known; none where its SHA256SUMS is absent or damaged."""
    try:
        return read_checksums(folder / CHECKSUMS)
    except (FileNotFoundError, ValueError):
        return {}


def check_checksums(folder: Path, algorithm: HashAlgorithm = SHA256) -> None:
    """Compare all files of a folder with its list of hashes.

    Raises:
        ValueError: a file is absent, not listed, or not the one that was written.
        OSError: one cannot be read.
    """
    sums = folder / algorithm.file_name
    if not sums.is_file():
        raise ValueError(f"it has no {sums.name}")
    wanted = read_checksums(sums, algorithm)
    strangers = sorted(set(wanted) ^ set(list_files(folder, algorithm)))
    if strangers:
        reason = "is absent" if strangers[0] in wanted else f"is not listed in {sums.name}"
        raise ValueError(f"{strangers[0]} {reason}")
    for name, digest in hash_files(folder, wanted, algorithm).items():
        if digest != wanted[name]:
            raise ValueError(f"{name} is not the file that {sums.name} lists")
