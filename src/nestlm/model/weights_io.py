"""Weights that a stage leaves: written whole, with their hash beside them, and checked when they are read again."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nestlm.distributed import collectives
from nestlm.distributed.fsdp import read_state
from nestlm.errors import CheckpointError, ResourceError
from nestlm.utils.checksums import CHECKSUMS, matches_checksum, write_with_checksum
from nestlm.utils.resources import resource_errors

CURE = "copy its folder again, or remove it and do the run again"


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, and their file's hash to the folder's SHA256SUMS."""
    write_with_checksum(path, lambda partial: save_file(tensors, partial))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a file that `save_weights` wrote; of several ranks, rank 0 checks it.

    Raises:
        CheckpointError: the file is absent, not the one that was written, or of another model.
    """
    if collectives.rank() == 0:
        check_weights(path)
    try:
        with resource_errors(path):
            read_state(module, path)
    except ResourceError:
        raise
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds the weights of another model ({reason}); {CURE}") from error


def check_weights(path: Path) -> None:
    """Raise CheckpointError unless a file is there as it was written."""
    sums = path.with_name(CHECKSUMS)
    for file in (path, sums):
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; {CURE}")
    if not matches_checksum(path):
        raise CheckpointError(f"{path} is damaged: it is not the file that {CHECKSUMS} lists; {CURE}")
