"""File checksums, in the formats that `sha256sum --check` and `xxhsum --check` read.

Runs, exports and caches use SHA-256, because users compare them with tools of their own. Training checkpoints use XXH3
with 128 bits: it is ten times faster, and checkpoints are read on the machine that wrote them.
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
    """A hash function and the name of the checksum file that lists its results for a folder.

    Attributes:
        file_name: name of the checksum file inside the folder.
        new: creates a hash object with the interface of hashlib's.
        digits: number of hexadecimal digits of a hash.
    """

    file_name: str
    new: Callable[[], Any]
    digits: int


SHA256 = HashAlgorithm("SHA256SUMS", hashlib.sha256, 64)
XXH128 = HashAlgorithm("XXH128SUMS", xxhash.xxh3_128, 32)
CHECKSUMS = SHA256.file_name
THREADS = 4  # hashlib releases the GIL while it hashes, so threads run in parallel


def hash_file(path: Path, algorithm: HashAlgorithm = SHA256) -> str:
    """Compute the hexadecimal hash of a file without reading all of it into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm.new).hexdigest()


def list_files(folder: Path, algorithm: HashAlgorithm = SHA256) -> list[str]:
    """List all files below a folder except its checksum file, as sorted relative paths."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != algorithm.file_name)


def hash_files(folder: Path, names: Iterable[str], algorithm: HashAlgorithm = SHA256) -> dict[str, str]:
    """Hash several files of a folder in parallel; returns hexadecimal hashes by file name."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, algorithm), names), strict=True))


def write_checksums(folder: Path, sums: dict[str, str], algorithm: HashAlgorithm = SHA256) -> None:
    """Write the checksum file of a folder atomically. `sums` maps file names to hexadecimal hashes."""
    partial = folder / f".{algorithm.file_name}.partial"
    partial.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    partial.replace(folder / algorithm.file_name)


def read_checksums(path: Path, algorithm: HashAlgorithm = SHA256) -> dict[str, str]:
    """Read a checksum file; returns hashes by file name. Raises ValueError for any other format."""
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 or len(line[0]) != algorithm.digits for line in lines):
        raise ValueError(f"{path} is damaged: wanted lines of a hash and a name")
    return {name: digest for digest, name in lines}


def write_with_checksum(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically and record its hash in the SHA256SUMS of its folder.

    Args:
        path: the file to write.
        write: writes the content to the path that it is given.
    """
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    digest = hash_file(partial)
    partial.replace(path)
    write_checksums(path.parent, read_valid_checksums(path.parent) | {path.name: digest})


def matches_checksum(path: Path) -> bool:
    """Return whether a file exists and has the hash that the SHA256SUMS of its folder lists."""
    return path.is_file() and read_valid_checksums(path.parent).get(path.name) == hash_file(path)


def read_valid_checksums(folder: Path) -> dict[str, str]:
    """Read the SHA256SUMS of a folder; returns an empty dictionary when it is absent or damaged."""
    try:
        return read_checksums(folder / CHECKSUMS)
    except (FileNotFoundError, ValueError):
        return {}


def check_checksums(folder: Path, algorithm: HashAlgorithm = SHA256) -> None:
    """Compare all files below a folder with its checksum file.

    Raises:
        ValueError: a file is missing, is not listed, or has another hash.
        OSError: a file cannot be read.
    """
    sums = folder / algorithm.file_name
    if not sums.is_file():
        raise ValueError(f"it has no {sums.name}")
    wanted = read_checksums(sums, algorithm)
    unmatched = sorted(set(wanted) ^ set(list_files(folder, algorithm)))
    if unmatched:
        reason = "is absent" if unmatched[0] in wanted else f"is not listed in {sums.name}"
        raise ValueError(f"{unmatched[0]} {reason}")
    for name, digest in hash_files(folder, wanted, algorithm).items():
        if digest != wanted[name]:
            raise ValueError(f"{name} is not the file that {sums.name} lists")
