"""Checkpoints by the clock, so that a killed run loses seconds, however long a step takes."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from nestlm.errors import CheckpointError
from nestlm.progress import console

KEPT = 2  # so that the one before is there when the last one is damaged


class TimedCheckpoint(L.Callback):
    """Saves the trainer's whole state every `seconds`, atomically, and keeps the newest two.

    Lightning's ModelCheckpoint ignores its time interval under manual optimization, which our stages use.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; rank 0's clock decides for all."""
        if not trainer.strategy.broadcast(time.monotonic() - self.saved_at >= self.seconds):
            return
        # Lightning writes to the temporary folder and moves; across file systems the move can be cut short.
        partial = self.folder / ".partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.folder / f"step={batch_idx + 1:08d}.ckpt")
            for old in sorted(self.folder.glob("*.ckpt"))[:-KEPT]:
                old.unlink()
        self.saved_at = time.monotonic()


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; a damaged one is named and the one before it is used.

    Raises:
        CheckpointError: a file that would run code when loaded.
    """
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        try:
            torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path} holds more than tensors and is not loaded; remove it") from error
        except (RuntimeError, EOFError, OSError) as error:
            console.print(f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); using the one before it")
            path.unlink()
        else:
            return path
    return None
