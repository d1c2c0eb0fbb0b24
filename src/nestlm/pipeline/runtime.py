"""Folder, logger and devices of a stage. None of these settings changes a result or is part of a cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from nestlm.distributed import collectives
from nestlm.distributed.fsdp import full_state
from nestlm.model.weights_io import save_weights
from nestlm.pipeline.settings import Settings

# Files that stages leave in their folders.
MODEL, ROUTER, RECORD = "model.safetensors", "router.safetensors", "record.safetensors"
LATENCY_TABLE = "latency_table.json"


@dataclass(frozen=True)
class StageRuntime:
    """Folders and logger of a stage that runs, and the settings that change how it runs but not its result.

    Attributes:
        folder: folder that the stage writes to.
        inputs: folders of the stages that it builds on, by name.
        logger: receives training logs.
        checkpoint_seconds: time between two training checkpoints.
        activation_checkpointing: whether backward passes recompute the blocks instead of keeping their activations.
        probe_steps: steps between two probes of elastic training; 0 probes never.
    """

    folder: Path
    inputs: Mapping[str, Path]
    logger: Logger
    checkpoint_seconds: float
    activation_checkpointing: bool
    probe_steps: int

    @classmethod
    def of(cls, settings: Settings, *, folder: Path, inputs: Mapping[str, Path], logger: Logger) -> StageRuntime:
        """Take the runtime settings out of the settings of a run."""
        return cls(
            folder,
            inputs,
            logger,
            settings.checkpoint_seconds,
            settings.activation_checkpointing,
            settings.elastic_probe_steps,
        )

    def save_module(self, module: nn.Module, name: str) -> None:
        """Write the weights of a module to a file of the stage's folder; rank 0 gathers the shards of all ranks."""
        state = {}
        for key, value in full_state(module):
            if collectives.rank() == 0:
                state[key] = value.contiguous().cpu()
        self.save_tensors(state, name)

    def save_tensors(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Write the tensors of rank 0 to a file of the stage's folder; all ranks return once the file is there."""
        if collectives.rank() == 0:
            save_weights(dict(tensors), self.folder / name)
        collectives.barrier()
