"""Record where a result comes from: code, packages, machine, data and seed."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nestlm.utils.devices import cpu_name

PACKAGES = ("nestlm", "torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "tokenizers", "numpy", "scipy")


def git(*arguments: str) -> str | None:
    """Run a git command on nestlm's source, and return its output; None if the source is not a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # an installed package may lie inside another project's checkout, which does not track it
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        return subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Describe the commit of the code, the versions of packages, and the machine of this process."""
    status = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def provenance(
    *, seed: int, data_fingerprint: str, tokenizer_hash: str, tokens: dict[str, float | None], seconds: float
) -> dict[str, Any]:
    """Return the content of provenance.json: what is needed to get the same numbers again.

    Args:
        seed: the run's seed.
        data_fingerprint: fingerprint of the text.
        tokenizer_hash: hash of the tokenizer.
        tokens: number of training tokens by stage; None where the stage does not count them.
        seconds: time of all stages together.
    """
    return environment() | {
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "tokenizer": tokenizer_hash,
        "tokens": tokens,
        "wall_seconds": seconds,
    }
