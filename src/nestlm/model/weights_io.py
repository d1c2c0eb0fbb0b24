"""Writing and reading of a stage's weights, with their SHA-256 in the folder's SHA256SUMS."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nestlm.distributed import collectives
from nestlm.distributed.fsdp import load_full_state
from nestlm.errors import CheckpointError, ResourceError
from nestlm.utils.checksums import CHECKSUMS, matches_checksum, write_with_checksum
from nestlm.utils.resources import resource_errors

CURE = "copy its folder again, or remove it and do the run again"


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file atomically, and its hash to the SHA256SUMS of the folder."""
    write_with_checksum(path, lambda partial: save_file(tensors, partial))


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file that `save_weights` wrote into a module. With several ranks, rank 0 checks the hash.

    Raises:
        CheckpointError: the file is missing, has another hash, or belongs to another model.
    """
    if collectives.rank() == 0:
        check_weights(path)
    try:
        with resource_errors(path):
            load_full_state(module, path)
    except ResourceError:
        raise
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds the weights of another model ({reason}); {CURE}") from error


def check_weights(path: Path) -> None:
    """Check that a file has the hash that SHA256SUMS lists. Raises CheckpointError otherwise."""
    sums = path.with_name(CHECKSUMS)
    for file in (path, sums):
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist; {CURE}")
    if not matches_checksum(path):
        raise CheckpointError(f"{path} is damaged: it is not the file that {CHECKSUMS} lists; {CURE}")
