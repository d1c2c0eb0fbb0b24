"""Placement of a model's weights: on one device, or in shards over ranks (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# It warns that a block's or decoder's output must not be changed in place, which we never do.
warnings.filterwarnings("ignore", message=r".*returned a view tensor.*")


@dataclass(frozen=True)
class ModelPlacement:
    """Device of this rank, and the mesh of ranks that holds the shards of a model.

    Attributes:
        device: where this rank computes.
        mesh: (copies, shards) of ranks, or (shards) of one copy; None where one process holds the whole model.
        compute_dtype: that weights are gathered and matrices multiplied in; gradients are reduced in float32. None
            leaves weights as they are.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    compute_dtype: torch.dtype | None = None

    def place(self, model: nn.Module, *, blocks: nn.ModuleList) -> None:
        """Give a model on the meta device its memory, unfilled; its blocks are gathered one at a time."""
        if self.mesh is not None:
            precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
            for block in blocks:
                fully_shard(block, mesh=self.mesh, mp_policy=precision)
            fully_shard(model, mesh=self.mesh, mp_policy=precision)
        model.to_empty(device=self.device)


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one only this rank's part."""
    if isinstance(parameter, DTensor):
        part = distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(value)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor. A sharded one is gathered, so all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and whole tensors of a module's state, one at a time. All ranks must iterate."""
    for name, tensor in module.state_dict().items():
        yield name, full_tensor(tensor)


def load_full_state(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file of its own state, one tensor at a time.

    Raises:
        ValueError: the file has other names.
    """
    state = module.state_dict()
    with safe_open(path, framework="pt") as tensors:
        names = set(tensors.keys())
        if names != set(state):
            raise ValueError(f"{path} is of another model: {sorted(names ^ set(state))[0]} is in one of both only")
        for name in state:
            copy_full_tensor(state[name], tensors.get_tensor(name))


@contextmanager
def gradient_sync_paused(model: nn.Module, *, paused: bool) -> Iterator[None]:
    """Keep gradients on the rank while paused; the next backward pass outside reduces them all."""
    if isinstance(model, FSDPModule) and paused:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield
