"""The LightningModule of every training stage: it holds model, teacher and router, wires them and logs."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from nestlm.data.batch import Batch
from nestlm.errors import DivergenceError
from nestlm.objective.base import Objective, Parts
from nestlm.optim import OptimSettings


class NestedLM(L.LightningModule):
    """A stage is an objective and the parts that it trains, each with its learning rate."""

    def __init__(
        self,
        parts: Parts,
        *,
        stage: str,
        objective: Objective,
        trained: dict[str, tuple[nn.Module, float]],
        optim: OptimSettings,
        num_steps: int,
    ) -> None:
        """Freeze everything but the trained parts.

        Args:
            parts: the nested model, its teacher and router where the objective needs them.
            stage: name of the stage, for the logs.
            objective: yields the loss terms of a step.
            trained: name, module and peak learning rate of what is trained.
            optim: optimizer and schedule.
            num_steps: steps of the stage.
        """
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave the teacher out
        self.decoder, self.teacher, self.router = parts.decoder, parts.teacher, parts.router
        self.stage, self.objective = stage, objective
        self.trained, self.optim, self.num_steps = trained, optim, num_steps
        self.requires_grad_(False)
        for module, _ in trained.values():
            module.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """Parameter groups of the trained parts. Only the model's matrices decay; norms, biases and routers don't."""
        groups = []
        for name, (module, lr) in self.trained.items():
            decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1 and module is self.decoder]
            rest = [parameter for parameter in module.parameters() if parameter.ndim <= 1 or module is not self.decoder]
            groups.append({"params": rest, "lr": lr, "name": name, "weight_decay": 0.0})
            if decayed:
                groups.append({"params": decayed, "lr": lr, "name": f"{name}-decayed"})
        optimizer = self.optim.optimizer(groups)
        scheduler = LambdaLR(optimizer, lambda step: self.optim.rate(step, num_steps=self.num_steps))
        return [optimizer], [scheduler]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimizer step over all terms of the objective; each frees its graph before the next is built.

        Raises:
            DivergenceError: the loss or its gradient is not finite; no weight has changed.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer), "configure_optimizers makes one"
        assert isinstance(scheduler, LambdaLR), "configure_optimizers makes one"
        optimizer.zero_grad()
        parts = Parts(self.decoder, self.teacher, self.router)
        total = torch.zeros((), device=self.device)
        logs: dict[str, list[Tensor | float]] = defaultdict(list)
        for term in self.objective.terms(parts, batch, step=batch_idx):
            self.manual_backward(term.loss)
            total += term.loss.detach()
            for name, value in term.logs.items():
                logs[name].append(value)
        grads = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        for name, value in (("loss", total), ("gradient's norm", get_total_norm(grads))):
            if not math.isfinite(float(value)):
                raise DivergenceError(
                    f"{self.stage}: the {name} is {float(value)} at step {batch_idx}, batch {fingerprint(batch)}; "
                    "lower the stage's lr, or look at the data"
                )
        for module, _ in self.trained.values():  # each by itself: a router's errors must not slow the model
            clip_grad_norm_(module.parameters(), self.optim.clip_norm)
        optimizer.step()
        scheduler.step()
        self.log_dict({f"{self.stage}/{name}": sum(values) / len(values) for name, values in logs.items()})
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen teacher out: the stage that made it has it."""
        for name in [name for name in checkpoint["state_dict"] if name.startswith("teacher.")]:
            del checkpoint["state_dict"][name]


def fingerprint(batch: Batch) -> str:
    """A short hash of a batch's tokens, by which it can be found again."""
    return hashlib.sha256(batch.tokens_BL.cpu().numpy().tobytes()).hexdigest()[:12]
