"""The LightningModule of every training stage: it runs the steps of a task, and logs."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.distributed.fsdp import full_tensor, gradient_sync_paused
from nestlm.errors import DeviceMemoryError, DivergenceError
from nestlm.train.objective.base import StageModels
from nestlm.train.optim import OptimSettings
from nestlm.train.task import Task


class NestedLM(L.LightningModule):
    """The LightningModule of every stage that trains: it back-propagates the terms of a task's objective."""

    def __init__(self, task: Task, *, stage: str, optim: OptimSettings) -> None:
        """Freeze everything but the parts that the task trains.

        Args:
            task: models, objective, trained parts and number of steps.
            stage: name of the stage, for the logs.
            optim: optimizer and schedule.
        """
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave out what is not trained
        self.decoder, self.teacher, self.router = task.models.decoder, task.models.teacher, task.models.router
        self.stage, self.objective = stage, task.objective
        self.trained, self.optim, self.num_steps = task.trained, optim, task.steps
        self.requires_grad_(False)
        for module, _ in task.trained.values():
            module.requires_grad_(True)

    def configure_model(self) -> None:
        """Do nothing: stages place their models before, so that ranking and search can use them, too."""

    def on_fit_start(self) -> None:
        """Broadcast the weights of rank 0: all ranks start with the same."""
        collectives.broadcast_module(self)

    def configure_optimizers(self) -> Any:
        """Make optimizer and schedule. Only the model's matrices decay; norms, biases and routers do not."""
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
        """Do one optimizer step over all terms of the objective; each frees its graph before the next is built.

        Raises:
            DivergenceError: the loss or its gradient is not finite; no weight has changed.
            DeviceMemoryError: the step does not fit the device.
        """
        try:
            return self.step(batch, batch_idx)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                collectives.prefix_rank(
                    f"{self.stage}: out of memory at step {batch_idx} ({str(error).splitlines()[0]}); lower "
                    "data.batch_size, set activation_checkpointing=true, or take more ranks (trainer=fsdp)"
                )
            ) from error

    def step(self, batch: Batch, number: int) -> Tensor:
        """Do the step with a number; returns the sum of the terms' losses on this rank."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer), "configure_optimizers makes one"
        assert isinstance(scheduler, LambdaLR), "configure_optimizers makes one"
        optimizer.zero_grad()
        models = StageModels(self.decoder, self.teacher, self.router)
        total = torch.zeros((), device=self.device)
        logs: dict[str, list[Tensor | float]] = defaultdict(list)
        for term in self.objective.terms(models, batch, step=number):
            with gradient_sync_paused(self.decoder, paused=not term.is_last):
                self.manual_backward(term.loss)
            total += term.loss.detach()
            for name, value in term.logs.items():
                logs[name].append(value)
        norms: list[Tensor] = []
        for module, _ in self.trained.values():  # each by itself: a router's errors must not slow the model
            collectives.average_gradients(module.parameters())
            norms.append(full_tensor(clip_grad_norm_(module.parameters(), self.optim.clip_norm)))
        logged = {f"{self.stage}/{name}": sum(values) / len(values) for name, values in logs.items()}
        means = dict(collectives.all_reduce_means({"": total, **logged}, device=self.device))
        if not all(math.isfinite(float(value)) for value in (means.pop(""), *norms)):  # on all ranks, or on none
            self.diverged(float(total), norms, batch, number)
        optimizer.step()
        scheduler.step()
        self.log_dict(means)
        return total

    def diverged(self, total: float, norms: list[Tensor], batch: Batch, step: int) -> None:
        """Raise the same DivergenceError on all ranks; it names a rank whose loss is not finite, where there is one."""
        found = collectives.all_gather_object([(total, fingerprint(batch))])
        bad = next((rank for rank, (loss, _) in enumerate(found) if not math.isfinite(loss)), None)
        norm = next((float(norm) for norm in norms if not math.isfinite(float(norm))), 0.0)
        what = f"the gradient's norm is {norm}" if bad is None else f"the loss is {found[bad][0]}"
        where = f"rank {bad}: " if bad is not None and len(found) > 1 else ""
        raise DivergenceError(
            f"{where}{self.stage}: {what} at step {step}, batch {found[bad or 0][1]}; lower the stage's lr, or look at "
            "the data"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen teacher out of the checkpoint: the stage that made it keeps it."""
        for name in [name for name in checkpoint["state_dict"] if name.startswith("teacher.")]:
            del checkpoint["state_dict"][name]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def fingerprint(batch: Batch) -> str:
    """Hash the tokens of a batch, so that the batch can be found again; 12 hex digits."""
    return hashlib.sha256(batch.tokens_BL.cpu().numpy().tobytes()).hexdigest()[:12]
