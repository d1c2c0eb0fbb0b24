"""Write training checkpoints by the clock, so that a killed run loses seconds, however long a step takes."""

from __future__ import annotations

import pickle
import shutil
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.serialization import get_crc32_options, set_crc32_options

from nestlm.distributed import collectives
from nestlm.distributed import sharded_checkpoint as sharded
from nestlm.distributed.strategy import ShardedStrategy
from nestlm.errors import CheckpointError, Preempted
from nestlm.utils.checksums import XXH128, check_checksums, hash_files, list_files, write_checksums
from nestlm.utils.console import console
from nestlm.utils.resources import resource_error

KEPT = 2  # so that the one before is there when the last one is damaged
STATE = "state.pt"  # in a checkpoint of one process
GO_ON, SAVE, STOP = range(3)


class CheckpointFile(TorchCheckpointIO):
    """Lightning's checkpoint IO for a folder that holds one file, which is loaded to the CPU.

    Lightning maps devices by a function, which fails on tensors that are made of other tensors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the file in its final folder: Lightning would write it to the temporary folder first."""
        del storage_options
        Path(path).mkdir(parents=True, exist_ok=True)
        has_checksums = get_crc32_options()
        set_crc32_options(False)  # XXH128SUMS covers the file, and is computed while training goes on
        try:
            with Path(path, STATE).open("wb") as file:
                torch.save(checkpoint, file)
        finally:
            set_crc32_options(has_checksums)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of tensors and plain values. Optimizers move their states to the device themselves."""
        del map_location, weights_only
        return torch.load(Path(path, STATE), map_location="cpu", weights_only=True)


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
        self.background = ThreadPoolExecutor(1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and handle SIGTERM; `fit` puts the former handler back."""
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.end)

    def end(self, signum: int, frame: Any) -> None:
        """Remember that the process is told to end; it ends after this step."""
        del signum, frame
        self.is_told_to_end = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when `seconds` have passed on rank 0, or any rank is told to end.

        Raises:
            Preempted: after the last checkpoint.
        """
        is_time = trainer.is_global_zero and time.monotonic() - self.saved_at >= self.seconds
        wish = collectives.all_reduce_max(
            STOP if self.is_told_to_end else SAVE if is_time else GO_ON, device=pl_module.device
        )
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
        """Write a checkpoint; shards are written, and files hashed, in the background."""
        self.finish()
        self.partial = self.folder / f".step={step:08d}.partial"
        if trainer.is_global_zero:
            shutil.rmtree(self.partial, ignore_errors=True)  # of a killed run
        collectives.barrier()
        trainer.save_checkpoint(self.partial)
        writing = trainer.strategy.saving if isinstance(trainer.strategy, ShardedStrategy) else None
        self.saving = self.background.submit(complete, self.partial, writing)
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, give it its final name, and remove all but the newest two."""
        if self.saving is not None:
            self.saving.result()
        if self.partial is not None and collectives.rank() == 0:
            finished = self.folder / f"{self.partial.stem.removeprefix('.')}.ckpt"
            shutil.rmtree(finished, ignore_errors=True)  # what was damaged, or is of another number of ranks
            self.partial.replace(finished)
            for old in sorted(self.folder.glob("*.ckpt"))[:-KEPT]:
                shutil.rmtree(old)
        self.partial = self.saving = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the checkpoint in the background."""
        self.finish()


def complete(checkpoint: Path, writing: Future[Any] | None) -> None:
    """Wait until a checkpoint is written; rank 0 then leaves the hashes of all its files."""
    if writing is not None:
        writing.result()
    if collectives.rank() == 0:
        write_checksums(checkpoint, hash_files(checkpoint, list_files(checkpoint, XXH128), XXH128), XXH128)


def last_good_checkpoint(folder: Path, *, is_sharded: bool) -> Path | None:
    """Find the newest checkpoint with intact files; a damaged one is reported, removed, and the one before is tried.

    Args:
        folder: of the stage's checkpoints.
        is_sharded: which kind is wanted: of several ranks, or of one process.

    Raises:
        CheckpointError: one that would run code when loaded.
    """
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        if not path.is_dir() or (path / STATE).exists() == is_sharded:
            continue
        try:
            check_checksums(path, XXH128)
            if is_sharded:
                sharded.check(path)
            else:
                torch.load(path / STATE, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path} holds more than tensors and is not loaded; remove it") from error
        except CheckpointError:
            raise
        except (ValueError, RuntimeError, EOFError, OSError) as error:
            if resource_error(error) is not None:  # the checkpoint may be well
                raise
            console.print(
                f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); using the one before it",
                highlight=False,
                markup=False,
            )
            shutil.rmtree(path)
        else:
            return path
    return None
