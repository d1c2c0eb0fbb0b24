"""Access to checkpoints by path or hub name; repositories of the Hugging Face hub are downloaded when needed."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from nestlm.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # patterns of sizes, tokenizer and generation settings
LARGE = ["*.safetensors", "SHA256SUMS"]


def fetch_small_files(weights: str) -> Path:
    """Return the folder of a checkpoint's config.json and tokenizer files, without downloading weights.

    Args:
        weights: a folder, or a hub's OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return fetch_files(weights, tuple(SMALL))


def fetch_all_files(weights: str) -> Path:
    """Return the folder of a complete checkpoint, downloading weights if necessary; see `fetch_small_files`."""
    return fetch_files(weights, (*SMALL, *LARGE))


@lru_cache(maxsize=8)
def fetch_files(weights: str, patterns: tuple[str, ...]) -> Path:
    """Return a folder unchanged, or the cached copy of a hub repository with the files that match the patterns.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    folder = Path(weights)
    if folder.is_dir():
        return folder
    named = HUB_ID.fullmatch(weights)
    if named is None:
        raise CheckpointError(f"model.weights: {weights} is no folder; wanted a Hugging Face checkpoint folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        found = snapshot_download(
            named["repository"], revision=named["revision"], allow_patterns=list(patterns), tqdm_class=None
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model.weights: {weights} is no folder, and the hub gave no such repository ({reason}); "
            "check the name, the network and your access"
        ) from error
    return Path(found)
