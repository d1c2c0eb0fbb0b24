"""Reads a Hugging Face checkpoint folder, and says what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestlm.checksums import CHECKSUMS, sha256
from nestlm.errors import CheckpointError
from nestlm.parallel.sharding import fill
from nestlm.progress import track

BUFFERS = ".rotary_emb.inv_freq"  # old checkpoints hold what follows from config.json


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises CheckpointError where there is none, or it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"model.weights: {folder} holds no config.json; wanted a Hugging Face checkpoint folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"model.weights: {path} is no JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"model.weights: {path} holds a {type(config).__name__}, wanted an object; fetch it again"
        )
    return config


def read_tensors(
    folder: Path, parameters: Mapping[str, Tensor], *, names: Mapping[str, str], ignored: Set[str]
) -> None:
    """Fill parameters from a folder's safetensors, a shard at a time, a tensor in each of torch's threads.

    Beside the parameters only the shard's file is in memory, as mapped pages.

    Args:
        folder: with one file or the shards that its index names, and perhaps SHA256SUMS.
        parameters: ours.
        names: theirs to ours; each has to be there, once.
        ignored: theirs that may be there besides.

    Raises:
        CheckpointError: a damaged or absent file, or a tensor that is absent, left over, of another shape, no float, or
            not finite.
    """
    shards = shard_files(folder)
    check_sums(folder)
    filled: dict[str, Path] = {}
    with workers() as pool:
        for shard in track(shards, "read weights", total=len(shards)):
            jobs = []
            for theirs, value in tensors_of(shard):
                if theirs in ignored or theirs.endswith(BUFFERS):
                    continue
                if theirs not in names:
                    raise CheckpointError(f"model.weights: {shard.name} has {theirs}, which this family or size lacks")
                if theirs in filled:
                    raise CheckpointError(f"model.weights: {theirs} is in {filled[theirs].name} and in {shard.name}")
                jobs.append(pool.submit(fill_checked, parameters[names[theirs]], value, name=theirs))
                filled[theirs] = shard
            for job in jobs:
                job.result()
    missing = sorted(set(names) - set(filled))
    if missing:
        raise CheckpointError(f"model.weights: {folder} lacks {missing[0]} and {len(missing) - 1} more")


@contextmanager
def workers() -> Iterator[Executor]:
    """As many threads as torch uses for one operation, each of which uses one.

    Most of the time goes into the pages of new memory. Threads within one operation wait for each other by spinning: on
    a machine that is busy otherwise, reading took two to three times as long.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # a worker's setting is that of all threads to come


def shard_files(folder: Path) -> list[Path]:
    """The files that the checkpoint's index names, or its one file; other files of the folder are not ours to read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"model.weights: {index} is no index of shards ({error!r}); fetch it again"
            ) from error
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"model.weights: {folder} holds no model.safetensors and no index of several")
    return [single]


def tensors_of(shard: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one at a time. Raises CheckpointError when it is absent or damaged."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.weights: {shard} is absent or damaged ({error}); fetch it again") from error


@torch.no_grad()
def fill_checked(parameter: Tensor, value: Tensor, *, name: str) -> None:
    """Copy a tensor in. Raises CheckpointError when shapes differ, or it holds no finite floats."""
    if parameter.shape != value.shape:
        raise CheckpointError(f"model.weights: {name} has shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}")
    if not value.is_floating_point():
        raise CheckpointError(f"model.weights: {name} holds {value.dtype}; wanted floats, not quantized weights")
    fill(parameter, value)
    # a sum is not finite where a term is not, and takes no memory
    if not value.sum().isfinite() and not value.isfinite().all():
        raise CheckpointError(f"model.weights: {name} holds numbers that are not finite; fetch it again")


def check_sums(folder: Path) -> None:
    """Compare files with the folder's SHA256SUMS, where it has one: it alone shows a flipped bit in a weight.

    Raises:
        CheckpointError: a file is absent or another, or a shard is not listed.
    """
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 for line in lines):
        raise CheckpointError(f"model.weights: {sums} is damaged; wanted lines of a hash and a name; fetch it again")
    known = {name.removeprefix("*"): digest for digest, name in lines}
    for shard in shard_files(folder):
        if shard.name not in known:
            raise CheckpointError(f"model.weights: {sums} does not list {shard.name}; fetch it again")
    for name, digest in track(known.items(), "check weights", total=len(known)):
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise CheckpointError(f"model.weights: {path} is not the file that {CHECKSUMS} lists; fetch it again")
