"""Reading and checking of Hugging Face checkpoint folders: config.json, tensor headers, weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestlm.distributed.fsdp import copy_full_tensor
from nestlm.errors import CheckpointError
from nestlm.model.config_json import quote
from nestlm.utils.checksums import CHECKSUMS, hash_file
from nestlm.utils.console import track

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("F32", "F16", "BF16", "F64")
BUFFERS = ".rotary_emb.inv_freq"  # in old checkpoints; config.json determines them


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in the header of a safetensors file; `dtype` is safetensors' name, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def path_in_checkpoint(folder: Path, name: str) -> Path:
    """Return the path of a file of a checkpoint folder; the file may be missing.

    Raises:
        CheckpointError: it is a link out of the folder. Links from `snapshots/REVISION` into `blobs` beside `snapshots`
            are allowed, because the hub's cache consists of them.
    """
    path, home = folder / name, folder.resolve()
    roots = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if path.exists() and not any(path.resolve().is_relative_to(root) for root in roots):
        raise CheckpointError(f"model.weights: {path} is a link out of its folder; put a copy of the file in its place")
    return path


def read_checkpoint_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises CheckpointError for other content, or a link out of the folder."""
    path = path_in_checkpoint(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise CheckpointError(f"model.weights: {path} is no JSON ({reason}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"model.weights: {path} holds a {type(content).__name__}, wanted an object; fetch it again"
        )
    return content


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python's parser accepts although JSON lacks them."""
    raise ValueError(f"it holds {name}, which is no number of JSON")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder. Raises CheckpointError if it is missing or damaged."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"model.weights: {folder} holds no config.json; wanted a Hugging Face checkpoint folder")
    config = read_checkpoint_json(folder, CONFIG)
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"model.weights: {folder / CONFIG} names its weights by transformers_weights, which is not read; name the "
            f"file {SINGLE} and remove that key"
        )
    return config


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a checkpoint's files, without any weight; returns entries by tensor name.

    Raises:
        CheckpointError: there are no safetensors, a file is missing or truncated, or two files hold the same tensor.
    """
    found: dict[str, TensorHeader] = {}
    for shard in shard_files(folder):
        with open_shard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in found and not name.endswith(BUFFERS):
                    raise CheckpointError(f"model.weights: {name} is in {found[name].file.name} and in {shard.name}")
                part = tensors.get_slice(name)
                found[name] = TensorHeader(shard, tuple(part.get_shape()), part.get_dtype())
    return found


def tensors_equal(stored: Mapping[str, TensorHeader], one: str, other: str) -> bool:
    """Return whether two tensors of a checkpoint have equal shape, dtype and values.

    Args:
        stored: the headers from `read_headers`.
        one: name of a tensor.
        other: name of another tensor.
    """
    if (stored[one].shape, stored[one].dtype) != (stored[other].shape, stored[other].dtype):
        return False
    values = []
    for name in (one, other):
        with open_shard(stored[name].file) as tensors:
            values.append(tensors.get_tensor(name))
    return torch.equal(*values)


def check_tensors(
    stored: Mapping[str, TensorHeader], shapes: Mapping[str, torch.Size], *, names: Mapping[str, str], ignored: Set[str]
) -> None:
    """Compare the headers of a checkpoint with a decoder's parameters.

    Args:
        stored: the headers from `read_headers`.
        shapes: shapes of the parameters, by nestlm's names.
        names: nestlm's name for each tensor that the checkpoint must hold, by Hugging Face name.
        ignored: Hugging Face names that the checkpoint may hold besides.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or of a dtype that is not read.
    """
    for theirs, tensor in stored.items():
        if is_ignored(theirs, ignored):
            continue
        if theirs not in names:
            raise CheckpointError(f"model.weights: {tensor.file.name} has {theirs}, which this family or size lacks")
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"model.weights: {theirs} holds {tensor.dtype}, wanted {', '.join(FLOATS)}: quantized weights are not "
                "read; bring the checkpoint that they were made from"
            )
        wanted = tuple(shapes[names[theirs]])
        if tensor.shape != wanted:
            raise CheckpointError(f"model.weights: {theirs} has shape {tensor.shape}, wanted {wanted}")
    missing = sorted(set(names) - set(stored))
    if missing:
        raise CheckpointError(
            f"model.weights: the checkpoint lacks {missing[0]} and {len(missing) - 1} more tensors; fetch it again"
        )


def is_ignored(name: str, ignored: Set[str]) -> bool:
    """Return whether a tensor of a checkpoint is skipped: it is listed in `ignored`, or a rotary buffer."""
    return name in ignored or name.endswith(BUFFERS)


def read_tensors(
    folder: Path, parameters: Mapping[str, Tensor], *, names: Mapping[str, str], ignored: Set[str]
) -> None:
    """Copy the weights of a checkpoint into parameters, one shard at a time, tensors in parallel.

    Besides the parameters, only the mapped pages of one shard are in memory.

    Args:
        folder: the checkpoint: one file or an index of shards, and perhaps SHA256SUMS.
        parameters: the parameters to fill, by nestlm's names.
        names: nestlm's name for each tensor that the checkpoint must hold, by Hugging Face name.
        ignored: Hugging Face names that the checkpoint may hold besides.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected, of another shape, not a
            float, or not finite.
    """
    stored = read_headers(folder)
    check_tensors(stored, {name: value.shape for name, value in parameters.items()}, names=names, ignored=ignored)
    check_sha256sums(folder)
    shards = list(dict.fromkeys(tensor.file for tensor in stored.values()))
    with reader_threads() as pool:
        for shard in track(shards, "read weights", total=len(shards)):
            jobs = []
            with open_shard(shard) as tensors:
                for theirs in tensors.keys():  # noqa: SIM118 (not a dict)
                    if not is_ignored(theirs, ignored):
                        value = tensors.get_tensor(theirs)
                        jobs.append(pool.submit(fill_checked, parameters[names[theirs]], value, name=theirs))
            for job in jobs:
                job.result()


@contextmanager
def reader_threads() -> Iterator[Executor]:
    """Create a pool of as many threads as torch uses for an operation, each with single-threaded operations.

    Reading is bound by page faults. torch's own threads wait for each other by spinning: with them, reading on a busy
    machine took two to three times as long.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # a worker's setting also applies to threads that start later


def shard_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint by transformers' rule: model.safetensors, else those of the index.

    Raises:
        CheckpointError: there is neither, the index is damaged or names a file elsewhere, or a file is missing.
    """
    single = folder / SINGLE
    if single.is_file():
        return [single]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f" ({pickles[0]} is not read: such a file can run code)" if pickles else ""
        raise CheckpointError(
            f"model.weights: {folder} holds no {SINGLE} and no index of several{found}; wanted safetensors, as "
            "transformers' save_pretrained writes them"
        )
    names = read_checkpoint_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"model.weights: {folder / INDEX} is no index of shards; fetch it again")
    shards = []
    for name in sorted(set(names.values())):
        check_plain_name(name, INDEX)
        if not (folder / name).is_file():
            raise CheckpointError(f"model.weights: {INDEX} names {name}, which is not in {folder}; fetch the shard")
        shards.append(folder / name)
    return shards


def check_plain_name(name: str, where: str) -> None:
    """Check that a name in a checkpoint's file is a plain file name, without folders. Raises CheckpointError otherwise.

    Args:
        name: the name.
        where: the file that holds it, for the message.
    """
    if name in ("", ".", "..") or any(sign in name for sign in ("/", "\\", "\0")):
        raise CheckpointError(f"model.weights: {where} names {quote(name)}, wanted the plain name of a file beside it")


@contextmanager
def open_shard(shard: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises CheckpointError if it is missing or damaged, also from within the block."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = str(error)[:100]
        raise CheckpointError(f"model.weights: {shard} is absent or damaged ({reason}); fetch it again") from error


@torch.no_grad()
def fill_checked(parameter: Tensor, value: Tensor, *, name: str) -> None:
    """Copy a value into a parameter. Raises CheckpointError, with the tensor's name, for infinite or NaN entries."""
    copy_full_tensor(parameter, value)
    # the sum is not finite if an entry is not, and needs no memory; it can overflow, hence the second test
    if not value.sum().isfinite() and not value.isfinite().all():
        raise CheckpointError(f"model.weights: {name} holds numbers that are not finite; fetch it again")


def check_sha256sums(folder: Path) -> None:
    """Compare the files of a checkpoint with its SHA256SUMS; do nothing if it has none.

    Only checksums reveal a flipped bit in a weight.

    Raises:
        CheckpointError: a listed file is missing or has another hash, or a shard is not listed.
    """
    sums = path_in_checkpoint(folder, CHECKSUMS)
    if not sums.is_file():
        return
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 for line in lines):
        raise CheckpointError(f"model.weights: {sums} is damaged; wanted lines of a hash and a name; fetch it again")
    known = {name.removeprefix("*").removeprefix("./"): digest for digest, name in lines}
    for name in known:
        check_relative_name(name)
    for shard in shard_files(folder):
        if shard.name not in known:
            raise CheckpointError(f"model.weights: {sums} does not list {shard.name}; fetch it again")
    for name, digest in track(known.items(), "check weights", total=len(known)):
        path = folder / name
        if not path.is_file() or hash_file(path) != digest:
            raise CheckpointError(f"model.weights: {path} is not the file that {CHECKSUMS} lists; fetch it again")


def check_relative_name(name: str) -> None:
    """Check that a name in SHA256SUMS stays inside its folder. Raises CheckpointError otherwise."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise CheckpointError(f"model.weights: {CHECKSUMS} names {quote(name)}, wanted a file of the same folder")
