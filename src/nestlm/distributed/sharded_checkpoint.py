"""Sharded checkpoints: each rank writes its part in the background, and any number of ranks reads them."""

from __future__ import annotations

import io
import pickle
import warnings
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from nestlm.errors import CheckpointError
from nestlm.utils.checksums import XXH128, check_checksums

INDEX = ".metadata"  # as torch calls it: which tensor lies where
LOOPS = "loops.pt"  # what is not in shards: steps, schedules, the loader's place
# Frozen weights, such as a teacher's, are there already, where the stage began.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
INDEX_CLASSES = {
    *((metadata.__name__, name) for name in dir(metadata) if isinstance(getattr(metadata, name), type)),
    (filesystem.__name__, "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class IndexUnpickler(pickle.Unpickler):
    """Unpickler for the index of a sharded checkpoint, which refuses every class that no index contains."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that an index may contain. Raises UnpicklingError for any other."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
        return super().find_class(module, name)


class SafeReader(filesystem.FileSystemReader):
    """torch's reader of sharded checkpoints, with an index read by `IndexUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Read the index. Raises CheckpointError where it is damaged, or contains code."""
        del args, kwargs
        found = read_index(Path(self.path))
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class SafePlanner(DefaultLoadPlanner):
    """torch's load planner, which reads values with `weights_only`: torch's own would run code in them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is no tensor. Raises CheckpointError where it is no plain value."""
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{read_item.dest_index.fqn} holds no plain values and is not loaded") from error
        put = io.BytesIO()
        torch.save(plain, put)
        put.seek(0)
        super().load_bytes(read_item, put)


def read_index(folder: Path) -> metadata.Metadata:
    """Read the index of a sharded checkpoint: which tensor lies in which bytes of which file.

    Raises:
        CheckpointError: the index contains code, or names a file outside the folder.
        OSError, EOFError, RuntimeError: the index is absent or cut, or names bytes that its files do not have.
    """
    try:
        found = cast(metadata.Metadata, IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load())
    except pickle.UnpicklingError as error:
        if "is no part of an index" in str(error):
            raise CheckpointError(f"checkpoint {folder}: {error} and is not loaded; remove it") from error
        raise RuntimeError(f"its index is damaged: {error}") from error
    for stored in (found.storage_data or {}).values():
        name = str(stored.relative_path)
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"checkpoint {folder}: its index names {name[:100]!r} and is not loaded; remove it")
        path = folder / name
        if not path.is_file() or path.stat().st_size < stored.offset + stored.length:
            raise RuntimeError(f"{path.name} is cut or absent")
    return found


def state_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Collect this rank's shards of the trained parameters, and of the optimizer's states where one is given."""
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=TRAINED)}
    return (
        state
        if optimizer is None
        else state | {"optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED)}
    )


def save(folder: Path, model: nn.Module, optimizer: Optimizer, *, loops: dict[str, Any]) -> Future[Any]:
    """Copy the state, and write it in the background; the future of rank 0 ends when all ranks have written."""
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        torch.save(loops, folder / LOOPS)
    saving = async_save(state_of(model, optimizer), checkpoint_id=folder, process_group=writers())
    return cast(Future[Any], saving)


@lru_cache(maxsize=1)
def writers() -> dist.ProcessGroup | None:
    """Make a process group for the writing threads, apart from the collectives of training."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load model and optimizer from a checkpoint; return the state of the loops, which is not in shards."""
    state = state_of(model, optimizer)
    load_state(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    set_model_state_dict(model, state["model"], options=TRAINED)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)
    return torch.load(folder / LOOPS, weights_only=True, map_location="cpu")


def check(folder: Path) -> None:
    """Raise an error of `read_index` or of `torch.load` unless index and loops of a checkpoint can be read."""
    read_index(folder)
    torch.load(folder / LOOPS, weights_only=True, map_location="cpu", mmap=True)


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    """Read the trained weights of a sharded checkpoint, whole, by name, in a single process.

    Raises:
        CheckpointError: the folder holds no checkpoint, or more than tensors and plain values.
    """
    try:
        check_checksums(folder, XXH128)
        index = read_index(folder)
    except CheckpointError:
        raise
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}; wanted a checkpoint that several ranks wrote") from error
    state: dict[str, Any] = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in index.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(stored, metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        load_state(state, storage_reader=SafeReader(folder), planner=SafePlanner(), no_dist=True)
    return {name.removeprefix("model."): value for name, value in state.items()}


def consolidate(folder: Path, out: Path) -> list[Path]:
    """Write what a checkpoint has of model and router as safetensors, whole, in our names; returns the files.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    weights = read_model(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for part, name in (("decoder.", "model.safetensors"), ("router.", "router.safetensors")):
        own = {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        if own:
            save_file(own, out / name)
            written.append(out / name)
    return written
