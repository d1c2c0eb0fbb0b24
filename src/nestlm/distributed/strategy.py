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
    """Train with FSDP2 on a mesh (copies, shards): each copy of the model is split over `shards` ranks.

    The process group outlives the trainers of a run's stages. Stages place models on the mesh
    before they pass them to a trainer, because they also read, rank and search weights without a trainer.
    """

    def __init__(self, *, shards: int | None, timeout_hours: float) -> None:
        """Store the layout; `start` starts the process group.

        Args:
            shards: number of ranks over which one copy is split; None: all ranks; 1: every rank holds a copy.
            timeout_hours: how long a collective waits for other ranks, such as for rank 0, which prepares data alone.
                When a rank dies, the others end at once.
        """
        # checkpoints are gathered and written by the CPU, also where GPUs train
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
        super().__init__(process_group_backend=backend, timeout=timedelta(hours=timeout_hours))
        self.shards = shards
        self.saving: Future[Any] | None = None  # ends when the last checkpoint is written

    def start(self) -> DeviceMesh:
        """Start the process group, unless it runs; return the mesh (copies, shards).

        Raises:
            ConfigError: `shards` does not divide the number of ranks.
        """
        self._setup_distributed()
        shards = self.world_size if self.shards is None else self.shards
        if shards <= 0 or self.world_size % shards:
            raise ConfigError(
                f"trainer.strategy.shards: got {shards}, wanted a divisor of the {self.world_size} ranks, or null"
            )
        return make_mesh(self.root_device.type, self.world_size // shards, shards)

    def setup_environment(self) -> None:
        """Set the device mesh (a hook of Lightning); all trainers of the process share it."""
        self._device_mesh = self.start()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return an empty dict, because `save_checkpoint` reads the shards from the model."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an empty dict, because `save_checkpoint` reads the shards from the optimizer."""
        del optimizer
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Start to write a checkpoint folder in the background; the future `saving` completes when it is written."""
        del storage_options
        assert self.model is not None, "there is something to save"
        self.saving = sharded.save(Path(filepath), self.model, self.optimizers[0], loops=checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint folder into model and optimizer; return what else `save_checkpoint` was given.

        The folder may come from another number of ranks.
        """
        del weights_only
        assert self.model is not None, "there is something to fill"
        return sharded.load(Path(checkpoint_path), self.model, self.optimizers[0])


@lru_cache
def make_mesh(device_type: str, copies: int, shards: int) -> DeviceMesh:
    """Return the mesh (copies, shards). Calls with equal arguments return the same mesh."""
    return init_device_mesh(device_type, (copies, shards), mesh_dim_names=("copies", "shards"))


def placement_for(trainer: L.Trainer) -> ModelPlacement:
    """Return the device and mesh on which a trainer's models are placed. All ranks have to call it together."""
    strategy = trainer.strategy
    if not isinstance(strategy, ShardedStrategy):
        return ModelPlacement(strategy.root_device)
    mesh = strategy.start()
    if mesh.size(0) == 1:  # nothing to reduce between copies
        mesh = mesh["shards"]
    return ModelPlacement(strategy.root_device, mesh, COMPUTE.get(str(trainer.precision)))


def count_ranks_to_start(trainer: L.Trainer) -> int:
    """Return how many ranks this process has to start on its machine.

    0 means none: this process is a rank already, or the only one.
    """
    environment = trainer.strategy.cluster_environment if isinstance(trainer.strategy, ShardedStrategy) else None
    if environment is None or environment.creates_processes_externally or trainer.world_size == 1:
        return 0
    return trainer.num_devices
