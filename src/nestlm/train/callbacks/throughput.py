"""Log tokens a second of a training stage, and its MFU where the device's peak is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype


class StageThroughput(L.Callback):
    """Logs `STAGE/tokens_per_second` and `STAGE/mfu` whenever Lightning logs, each over the steps since the last time.

    MFU (model FLOPs utilization, arXiv 2204.02311) is FLOPs a second over the device's peak at the trainer's precision,
    as Lightning lists it; without a listed peak, as for CPUs, there is no MFU. The FLOPs are the expected ones of the
    stage, as `dry_run=true` prints them (`TrainingStage.flops_per_token`), not those of the sub-networks that a step
    happened to run. The clock does not wait for the device: a step has waited for its loss already.
    """

    def __init__(self, stage: str, *, tokens_per_step: int, flops_per_token: Callable[[], float]) -> None:
        """Take what is needed to convert steps to tokens and FLOPs.

        Args:
            stage: name of the stage, for the logs.
            tokens_per_step: tokens of a step over all ranks.
            flops_per_token: expected FLOPs of a training step a token; asked only where the peak is known.
        """
        self.stage, self.tokens_per_step, self.flops_per_token = stage, tokens_per_step, flops_per_token

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed stage counts its own steps only."""
        dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
        peak = get_available_flops(trainer.strategy.root_device, dtype)
        self.flops_per_step = None if peak is None else self.tokens_per_step * self.flops_per_token()
        self.window = Throughput(available_flops=peak, window_size=2)  # what the last two updates enclose
        self.first_step, self.counted, self.started = trainer.global_step, 0, time.perf_counter()
        self.update(0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log rates whenever Lightning logs, under the same step."""
        if trainer.logger is None or not trainer._logger_connector.should_update_logs:
            return
        self.update(batch_idx + 1 - self.first_step)
        rates = self.window.compute()
        logged = {f"{self.stage}/tokens_per_second": rates["device/items_per_sec"]}
        if "device/mfu" in rates:
            logged[f"{self.stage}/mfu"] = rates["device/mfu"]
        trainer.logger.log_metrics(logged, step=batch_idx)

    def update(self, steps: int) -> None:
        """Record the time at which a number of steps since the start is done."""
        flops = None if self.flops_per_step is None else int((steps - self.counted) * self.flops_per_step)
        self.counted, tokens = steps, steps * self.tokens_per_step
        elapsed = time.perf_counter() - self.started
        self.window.update(time=elapsed, batches=steps, samples=steps, lengths=tokens, flops=flops)
