"""The stage cache: a folder a stage, named by its cache key."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestlm.utils.checksums import CHECKSUMS, hash_file, hash_files, list_files, read_valid_checksums, write_checksums
from nestlm.utils.console import console, track
from nestlm.utils.json_files import read_json, to_json, write_json
from nestlm.utils.locks import LOCK, lock_folder

MARKER = "stage.json"


def file_identity(path: Path) -> str:
    """Hash the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents_identity(files: list[Path], *, known: Path) -> str:
    """Hash the contents of files, whatever their names, places and times.

    Gigabytes are hashed once: a JSON file keeps the hash of every path at one size, time and inode.

    Args:
        files: files, in an order that counts.
        known: the JSON file; it is written anew where it is absent or damaged.
    """
    try:
        content = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    remembered: dict[str, Any] = content if isinstance(content, dict) else {}
    digests, before = [], dict(remembered)
    for path in track(files, "hash weights", total=len(files)):
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = remembered.get(str(path.resolve()))
        if not (isinstance(entry, dict) and entry.get("state") == state and isinstance(entry.get("sha256"), str)):
            entry = remembered[str(path.resolve())] = {"state": state, "sha256": hash_file(path)}
        digests.append(entry["sha256"])
    if remembered != before:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, remembered)
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


class StageFolder:
    """Folder of a stage. `stage.json` holds the result; it is written last, and marks the stage finished.

    SHA256SUMS lists `stage.json` and the other files.
    """

    def __init__(self, root: Path, name: str, key: str) -> None:
        self.name, self.key = name, key
        self.path = root / f"{name}-{key[:16]}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder: one process works in it at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.path, f"{self.name:>9}"):
            yield

    def result(self) -> dict[str, Any] | None:
        """Read the result of a finished stage; None where it is not finished, or is damaged, and is then cleared."""
        marker = self.path / MARKER
        if not marker.exists():
            return None
        try:
            self.check()
            kept = read_json(marker, cure="the stage is done again")
            if kept.get("key") != self.key:
                raise ValueError(f"{marker} is of another run's stage")
            return kept["result"]
        except ValueError as error:
            reason = str(error).partition(";")[0]
            console.print(
                f"{self.name:>9} in the cache is damaged ({reason}): it is done again", highlight=False, markup=False
            )
            self.clear()
            return None

    def check(self) -> None:
        """Compare all files but shards of tokens with their hashes, since runs link files that nothing reads again.

        Raises:
            ValueError: a file is absent, or not the one that the stage wrote.
        """
        wanted = read_valid_checksums(self.path)
        if MARKER not in wanted:
            raise ValueError(f"{self.path / CHECKSUMS} is absent or damaged")
        for name in wanted:
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path / name} does not exist")
        for name, digest in hash_files(self.path, wanted).items():
            if digest != wanted[name]:
                raise ValueError(f"{self.path / name} is not the file that the stage wrote")

    def clear(self) -> None:
        """Remove all files but the lock, `stage.json` first."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name != MARKER):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def finish(self, result: dict[str, Any]) -> None:
        """Write the hashes of the stage's files, except shards, whose manifest has them; then write `stage.json`."""
        content = to_json({"key": self.key, "result": result})
        names = [
            name
            for name in list_files(self.path)
            if not name.startswith((".", "checkpoints/")) and not name.endswith(".bin")
        ]
        known = read_valid_checksums(self.path)
        sums = known | hash_files(self.path, [name for name in names if name not in known])
        sums = {name: digest for name, digest in sums.items() if name in names}
        write_checksums(self.path, sums | {MARKER: hashlib.sha256(content.encode()).hexdigest()})
        partial = self.path / f".{MARKER}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(self.path / MARKER)
