"""Where a checkpoint's files are: a folder on disk, or a copy of a hub's repository, fetched when it is needed."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from nestlm.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # sizes, tokenizer, generation settings
LARGE = ["*.safetensors", "SHA256SUMS"]


def fetch_small_files(weights: str) -> Path:
    """The folder with a checkpoint's config.json and tokenizer; of a hub's repository, nothing larger is fetched."""
    return fetch_files(weights, tuple(SMALL))


def fetch_all_files(weights: str) -> Path:
    """The folder with all of a checkpoint."""
    return fetch_files(weights, (*SMALL, *LARGE))


@lru_cache(maxsize=8)
def fetch_files(weights: str, patterns: tuple[str, ...]) -> Path:
    """A folder as it is, or the local copy of OWNER/NAME or OWNER/NAME@REVISION, as the hub's library caches it.

    Raises:
        CheckpointError: neither is there.
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
