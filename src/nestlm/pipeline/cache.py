"""The stage cache: each stage has a folder, named by its cache key."""

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
    """Hash the contents of files, without their names, folders and times.

    A JSON file keeps the hash of each path with its size, times and inode, so that unchanged files are hashed once.

    Args:
        files: the files; their order changes the hash.
        known: the JSON file, created if it is missing or damaged.
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
        """Create the folder, and hold its file lock while the context is open."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.path, f"{self.name:>9}"):
            yield

    def result(self) -> dict[str, Any] | None:
        """Return the result of the stage; None if the stage is not finished.

        None too if its files are damaged; they are then deleted.
        """
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
        """Compare the files of a finished stage with the hashes in SHA256SUMS.

        This includes files that later stages do not read, because they become part of the run's folder. Shards of
        tokens are left out; their manifest has their hashes.

        Raises:
            ValueError: a file is missing or differs from its hash.
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
        """Delete all files except the lock, `stage.json` first."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name != MARKER):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the stage as finished: write SHA256SUMS, then `stage.json` with the result.

        Shards of tokens are not in SHA256SUMS; their manifest has their hashes.
        """
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
