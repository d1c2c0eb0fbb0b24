"""A Rich bar over a training stage: stage, loss, tokens a second, time left."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.progress import Progress, TaskID

from nestlm.utils.console import progress_bar


class StageProgress(L.Callback):
    """Shows a stage on a terminal. Reads the loss rarely, since that waits for the device."""

    REFRESH_SECONDS = 0.5

    def __init__(self, stage: str, *, num_steps: int, tokens_per_step: int) -> None:
        self.stage, self.num_steps, self.tokens_per_step = stage, num_steps, tokens_per_step
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step from which the stage goes on."""
        self.first_step, self.started, self.refreshed = trainer.global_step, time.monotonic(), 0.0
        if trainer.is_global_zero:
            self.bar = progress_bar("loss {task.fields[loss]:.3f}", "{task.fields[rate]:,.0f} tokens/s")
            self.bar.start()
            self.task = self.bar.add_task(
                self.stage, total=self.num_steps, completed=self.first_step, loss=float("nan"), rate=0.0
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, at most every `REFRESH_SECONDS`."""
        now = time.monotonic()
        if self.bar is None or self.task is None or self.bar.disable or now - self.refreshed < self.REFRESH_SECONDS:
            return
        self.refreshed = now
        rate = (batch_idx + 1 - self.first_step) * self.tokens_per_step / (now - self.started)
        self.bar.update(self.task, completed=batch_idx + 1, loss=float(outputs["loss"]), rate=rate)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before the message is printed."""
        self.close()

    def close(self) -> None:
        """Stop drawing the bar."""
        if self.bar is not None:
            self.bar.stop()
