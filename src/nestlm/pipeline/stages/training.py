"""What stages that train have in common: one task, which training, FLOPs and memory estimates share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import lightning as L
import torch

from nestlm.cost.static import Flops
from nestlm.distributed.device_layout import ComputePrecision
from nestlm.nn.decoder import Decoder
from nestlm.nn.linear import cast_linear_weights
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.stages.base import NOT_A_METRIC, ModelStage, Result, StageResult
from nestlm.router.base import Router
from nestlm.train.callbacks.throughput import StageThroughput
from nestlm.train.lightning_module import NestedLM
from nestlm.train.objective.base import StageModels
from nestlm.train.optim import OptimSettings
from nestlm.train.task import Task
from nestlm.train.trainer import fit


@dataclass(frozen=True, kw_only=True)
class TrainingResult(StageResult):
    """Result of a training stage: steps and tokens. Subclasses add what a stage measures.

    Attributes:
        steps: optimizer steps.
        tokens: tokens that the stage was trained on; None where weights were given, and their tokens are not known.
        resumed_at_step: step of the checkpoint from which the stage went on; 0: it ran from the start.
        peak_bytes: most memory that tensors took on a GPU; None on other devices.
    """

    steps: int = 0
    tokens: int | float | None = 0
    resumed_at_step: int = field(default=0, metadata=NOT_A_METRIC)
    peak_bytes: int | None = field(default=None, metadata=NOT_A_METRIC)


@dataclass(frozen=True, kw_only=True)
class TrainingStage(ModelStage[Result]):
    """A stage that trains a task."""

    optim: OptimSettings

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return True

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Optimizer steps of the stage; 0 leaves the training out."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the task learns from the model before conversion."""
        return False

    def new_router(self) -> Router | None:
        """Build the untrained router that the task works with; None where there is none."""
        return None

    @abstractmethod
    def load_models(self, runtime: StageRuntime) -> StageModels:
        """Build the models that the task works with, as earlier stages left them."""

    @abstractmethod
    def task(self, models: StageModels) -> Task:
        """Say what the stage trains. Nothing is loaded: estimates call it with models without storage."""

    @abstractmethod
    def forward_passes(self) -> float:
        """Forward passes of the full model that a token is expected to cost, the teacher's included.

        Budgets count as drawn evenly between the smallest and the full model; the draws of a sampler are averaged.
        Routers' networks and what activation checkpointing recomputes are not counted.
        """

    def flops_per_token(self) -> float:
        """FLOPs that a token of the stage is expected to cost: `forward_passes` times those of the full model."""
        return self.forward_passes() * Flops(self.data.sequence_length).whole(self.model.decoder_config())

    def load_teacher(self, runtime: StageRuntime) -> Decoder | None:
        """Build the model before conversion; None where the task needs no teacher.

        Under mixed precision, a device that holds the teacher alone holds its linear maps in the dtype of products:
        the results are the same, in half the memory. A teacher in shards is gathered in that dtype.
        """
        if not self.needs_teacher:
            return None
        decoder, precision = self.decoder_on_meta(runtime), ComputePrecision.from_trainer(self.trainer)
        if precision is not None and precision.mixed and self.placement().mesh is None:
            cast_linear_weights(decoder, precision.dtype)
        return self.fill(self.place(decoder), runtime, "pretrain")

    def train(
        self,
        task: Task,
        runtime: StageRuntime,
        *,
        callbacks: Sequence[L.Callback] = (),
        data: L.LightningDataModule | None = None,
    ) -> TrainingResult:
        """Train a task to its last step, from the newest checkpoint where there is one.

        Args:
            task: what is trained.
            runtime: folder, logger and inputs of the stage.
            callbacks: may read what they like, and change nothing.
            data: token batches; None: those of the data stage.
        """
        device = self.device()
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        tokens_per_step = self.data.batch_size * self.data.sequence_length
        resumed = 0
        if task.steps:
            module = NestedLM(task, stage=self.name, optim=self.optim)
            throughput = StageThroughput(
                self.name, tokens_per_step=tokens_per_step, flops_per_token=self.flops_per_token
            )
            resumed = fit(
                module,
                self.packed_tokens(runtime, stream=self.name, num_steps=task.steps) if data is None else data,
                stage=self.name,
                folder=runtime.folder,
                tokens_per_step=tokens_per_step,
                trainer_factory=self.trainer,
                logger=runtime.logger,
                checkpoint_seconds=runtime.checkpoint_seconds,
                callbacks=[throughput, *callbacks],
            )
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
        return TrainingResult(
            steps=task.steps, tokens=task.steps * tokens_per_step, resumed_at_step=resumed, peak_bytes=peak
        )
