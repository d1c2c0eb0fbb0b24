"""Stage `joint`: tune model and router together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from nestlm.pipeline.flops import BACKWARD, mean_share
from nestlm.pipeline.runtime import MODEL, StageRuntime
from nestlm.pipeline.settings import RoutingSettings
from nestlm.pipeline.stages.base import load_router, prepare_router, save_router
from nestlm.pipeline.stages.training import TrainingResult, TrainingStage
from nestlm.router.base import Router
from nestlm.train.objective.base import StageModels
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.objective.joint import JointObjective
from nestlm.train.stage_settings import JointSettings
from nestlm.train.task import Task


@dataclass(frozen=True, kw_only=True)
class JointStage(RoutingSettings, TrainingStage[TrainingResult]):
    """Leaves the final model and router."""

    name = "joint"
    after = ("router",)

    joint: JointSettings
    teacher: DistillationLoss

    @property
    @override
    def num_steps(self) -> int:
        return self.joint.steps

    @property
    @override
    def needs_teacher(self) -> bool:
        return self.teacher.needs_teacher

    @override
    def new_router(self) -> Router:
        return self.make_router()

    @override
    def load_models(self, runtime: StageRuntime) -> StageModels:
        decoder, router = self.load_decoder(runtime, "elastic"), self.new_router()
        return StageModels(decoder, self.load_teacher(runtime), load_router(router, runtime.inputs["router"]))

    @override
    def task(self, models: StageModels) -> Task:
        assert models.router is not None, "the stage tunes a router"
        trained: dict[str, tuple[nn.Module, float]] = {"decoder": (models.decoder, self.joint.lr)}
        if list(models.router.parameters()):
            trained["router"] = (models.router, self.router.joint_lr)
        objective = JointObjective(
            self.teacher,
            budgets_per_step=self.joint.budgets_per_step,
            cost_weight=self.joint.cost_weight,
            dead_zone=self.joint.dead_zone,
            seed=self.seed,
        )
        return Task(models, objective, trained, self.num_steps)

    @override
    def forward_passes(self) -> float:
        routed = self.joint.budgets_per_step * mean_share(self, self.data.sequence_length)
        return BACKWARD * (1 + routed) + self.teacher.extra_passes(runs_full=True)

    @override
    def run(self, runtime: StageRuntime) -> TrainingResult:
        models = self.load_models(runtime)
        assert models.router is not None, "the stage tunes a router"
        trained = self.train(self.task(models), runtime)
        runtime.save_module(models.decoder, MODEL)
        if self.num_steps:
            num_sequences = self.router.num_sequences
            calibration = self.calibration_data(models.decoder.eval(), runtime, num_sequences=num_sequences)
            prepare_router(models.router, calibration)
        save_router(models.router, runtime)
        return trained
