"""Checkpoints by the clock, so that a killed run loses seconds, however long a step takes."""

from __future__ import annotations

import pickle
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from nestlm.errors import CheckpointError, Preempted
from nestlm.parallel import checkpoint as sharded
from nestlm.parallel import ranks
from nestlm.parallel.strategy import Sharded
from nestlm.progress import console

KEPT = 2  # so that the one before is there when the last one is damaged
GO_ON, SAVE, STOP = range(3)


class CheckpointFile(TorchCheckpointIO):
    """Lightning's, but to the CPU by name: a function, its default, cannot map tensors that are made of others."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was saved: tensors and plain values only. Optimizers move their states themselves."""
        del map_location, weights_only
        return torch.load(path, map_location="cpu", weights_only=True)


class TimedCheckpoint(L.Callback):
    """Saves the trainer's whole state every `seconds`, atomically, and keeps the newest two.

    Lightning's ModelCheckpoint ignores its time interval under manual optimization, which our stages use. Told to end
    (SIGTERM), a stage saves once more and stops.
    """

    def __init__(self, folder: Path, *, stage: str, seconds: float) -> None:
        self.folder, self.stage, self.seconds = folder, stage, seconds
        self.is_told_to_end = False
        self.partial: Path | None = None  # what is being written
        self.saving: Future[Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and listen. Lightning's own listener has ranks talk wherever they are, which can hang."""
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.end)  # Lightning puts back what was there

    def end(self, signum: int, frame: Any) -> None:
        """After this step."""
        del signum, frame
        self.is_told_to_end = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; rank 0's clock decides for all, and any rank can be told to end.

        Raises:
            Preempted: after the last checkpoint.
        """
        is_time = trainer.is_global_zero and time.monotonic() - self.saved_at >= self.seconds
        wish = ranks.highest(STOP if self.is_told_to_end else SAVE if is_time else GO_ON, device=pl_module.device)
        if wish != GO_ON:
            self.save(trainer, step=batch_idx + 1)
        elif self.saving is not None and self.saving.done():
            self.finish()
        if wish == STOP:
            self.finish()
            raise Preempted(
                f"{self.stage}: told to end after step {batch_idx + 1}, whose checkpoint is in {self.folder}; "
                "the same command goes on from there"
            )

    def save(self, trainer: L.Trainer, *, step: int) -> None:
        """Write a checkpoint; of a sharded model in the background."""
        self.finish()
        # Lightning writes to the temporary folder and moves; across file systems the move can be cut short.
        self.partial = self.folder / f".step={step:08d}.partial"
        trainer.save_checkpoint(self.partial)
        if isinstance(trainer.strategy, Sharded):
            self.saving = trainer.strategy.saving
        else:
            self.finish()
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Give the checkpoint that was being written its name, once it is whole."""
        if self.saving is not None:
            self.saving.result()
        if self.partial is not None and ranks.rank() == 0:
            self.partial.replace(self.folder / f"{self.partial.stem.removeprefix('.')}.ckpt")
            for old in sorted(self.folder.glob("*.ckpt"))[:-KEPT]:
                remove(old)
        self.partial = self.saving = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for what is being written."""
        self.finish()


def remove(checkpoint: Path) -> None:
    """A file, or a folder of shards."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()


def last_good_checkpoint(folder: Path, *, is_sharded: bool) -> Path | None:
    """The newest checkpoint that can be read; a damaged one is named and the one before it is used.

    Args:
        folder: of the stage's checkpoints.
        is_sharded: which kind is wanted: folders of shards, or single files.

    Raises:
        CheckpointError: one that would run code when loaded.
    """
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        if path.is_dir() != is_sharded:
            continue
        try:
            if is_sharded:
                sharded.check(path)
            else:
                torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path} holds more than tensors and is not loaded; remove it") from error
        except (RuntimeError, EOFError, OSError) as error:
            console.print(f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); using the one before it")
            remove(path)
        else:
            return path
    return None
