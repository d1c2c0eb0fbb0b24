"""Log losses of sub-networks during elastic training, for sweeps that stop runs early."""

from __future__ import annotations

from typing import Any

import lightning as L

from nestlm.nn.policy import Policy, full
from nestlm.router.calibration_data import CalibrationData


class Probe(L.Callback):
    """Logs every few steps the losses of fixed sub-networks, and `STAGE/gap`: their mean above the model before it.

    It runs forward passes on calibration text, so it changes neither weights nor draws, and nothing that is reported.
    """

    def __init__(self, stage: str, *, calibration: CalibrationData, policies: dict[str, Policy], every: int) -> None:
        """Score the model before the stage.

        Args:
            stage: name of the stage, for the logs.
            calibration: the model as the stage begins, and calibration text.
            policies: policies of the sub-networks, by name.
            every: steps between two measurements.
        """
        self.stage, self.calibration, self.policies, self.every = stage, calibration, policies, every
        self.before = calibration.loss(full)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log the losses every `every` steps."""
        if trainer.logger is None or (batch_idx + 1) % self.every:
            return
        losses = {name: self.calibration.loss(policy) for name, policy in self.policies.items()}
        logged = {f"{self.stage}/loss_{name}": loss for name, loss in losses.items()}
        logged[f"{self.stage}/gap"] = sum(losses.values()) / len(losses) - self.before
        trainer.logger.log_metrics(logged, step=batch_idx)
