"""One GPU for each of several jobs on a machine, by file locks."""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nestlm.utils.console import console

POLL_SECONDS = 0.5


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, as indices or UUIDs: CUDA_VISIBLE_DEVICES, else the machine's."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in map(str.strip, listed.split(",")) if name not in ("", "-1")]
    import torch

    return list(map(str, range(torch.cuda.device_count())))  # by NVML: CUDA is not initialised


@contextmanager
def lock_gpu(names: Sequence[str], *, folder: Path | None = None) -> Iterator[None]:
    """Hold a GPU that no other process holds, as the only one that this process sees; wait while none is free.

    CUDA_VISIBLE_DEVICES stays set: CUDA, once initialised, keeps its device, so that the next job of the same process
    must take the same one, and does, since it sees no other. The lock of a killed process is free at once.

    Args:
        names: as `visible_gpus` gives them; none: there is nothing to hold.
        folder: of the locks; default: the user's own in the system's folder for temporary files.
    """
    if not names:
        yield
        return
    # numbers where there are some: a container's user need not have a name
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = folder or Path(tempfile.gettempdir()) / f"nestlm-gpus-{user}"
    folder.mkdir(parents=True, exist_ok=True)
    name, lock = first_free({name: FileLock(folder / f"{name.replace('/', '_')}.lock") for name in names})
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        yield
    finally:
        lock.release()


def first_free(locks: dict[str, FileLock]) -> tuple[str, FileLock]:
    """Acquire the first lock that is free; says once that it waits."""
    waits = False
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            return name, lock
        if not waits:
            console.print(f"waiting for a free GPU of {', '.join(locks)}", highlight=False)
            waits = True
        time.sleep(POLL_SECONDS)
