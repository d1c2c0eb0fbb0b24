"""Lightning's strategy of every multi-device trainer: FSDP2, from a shard on each rank to a copy on each rank."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from nestlm.distributed import sharded_checkpoint as sharded
from nestlm.distributed.fsdp import ModelPlacement
from nestlm.errors import ConfigError

COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class ShardedStrategy(ModelParallelStrategy):
    """Hold copies of a model, each in shards.

    The process group outlives the trainers of a run's stages. Models are placed before a trainer sees them, so that
    stages can read weights, rank and search with them, too.
    """

    def __init__(self, *, shards: int | None, timeout_hours: float) -> None:
        """Set the layout; no process group is started yet.

        Args:
            shards: ranks that hold one copy between them; null: all ranks; 1: every rank holds a copy.
            timeout_hours: that ranks wait for each other, such as for rank 0, which prepares data alone. A rank that
                died ends the others at once.
        """
        # checkpoints are gathered and written by the CPU, also where GPUs train
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
        super().__init__(process_group_backend=backend, timeout=timedelta(hours=timeout_hours))
        self.shards = shards
        self.saving: Future[Any] | None = None  # ends when the last checkpoint is written

    def start(self) -> DeviceMesh:
        """Start the process group, unless it runs; return the mesh (copies, shards).

        Raises:
            ConfigError: the ranks cannot be divided so.
        """
        self._setup_distributed()
        shards = self.world_size if self.shards is None else self.shards
        if shards <= 0 or self.world_size % shards:
            raise ConfigError(
                f"trainer.strategy.shards: got {shards}, wanted a divisor of the {self.world_size} ranks, or null"
            )
        return make_mesh(self.root_device.type, self.world_size // shards, shards)

    def setup_environment(self) -> None:
        """Lightning's hook: the same mesh for every trainer of the process."""
        self._device_mesh = self.start()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` takes it from the model, in shards."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: `save_checkpoint` takes it from the optimizer, in shards."""
        del optimizer
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Begin to write a folder; `saving` ends when it is whole."""
        del storage_options
        assert self.model is not None, "there is something to save"
        self.saving = sharded.save(Path(filepath), self.model, self.optimizers[0], loops=checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizer from a folder that any number of ranks wrote."""
        del weights_only
        assert self.model is not None, "there is something to fill"
        return sharded.load(Path(checkpoint_path), self.model, self.optimizers[0])


@lru_cache
def make_mesh(device_type: str, copies: int, shards: int) -> DeviceMesh:
    """Make the mesh of a shape; each process has one mesh a shape."""
    return init_device_mesh(device_type, (copies, shards), mesh_dim_names=("copies", "shards"))


def placement_for(trainer: L.Trainer) -> ModelPlacement:
    """Where a trainer's models are held; ranks meet here."""
    strategy = trainer.strategy
    if not isinstance(strategy, ShardedStrategy):
        return ModelPlacement(strategy.root_device)
    mesh = strategy.start()
    if mesh.size(0) == 1:  # nothing to reduce between copies
        mesh = mesh["shards"]
    return ModelPlacement(strategy.root_device, mesh, COMPUTE.get(str(trainer.precision)))


def count_ranks_to_start(trainer: L.Trainer) -> int:
    """How many ranks this process has to start on its machine; 0 where it is one itself, or works alone."""
    environment = trainer.strategy.cluster_environment if isinstance(trainer.strategy, ShardedStrategy) else None
    if environment is None or environment.creates_processes_externally or trainer.world_size == 1:
        return 0
    return trainer.num_devices
