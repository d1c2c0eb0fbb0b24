"""Stage `router`: train the router on its signal, while the model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file
from torch import nn
from typing_extensions import override

from nestlm.pipeline.flops import mean_share
from nestlm.pipeline.runtime import RECORD, StageRuntime
from nestlm.pipeline.settings import RoutingSettings
from nestlm.pipeline.stages.base import prepare_router, save_router
from nestlm.pipeline.stages.training import TrainingResult, TrainingStage
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.train.objective.base import Signal, StageModels
from nestlm.train.task import Task


@dataclass(frozen=True, kw_only=True)
class RouterResult(TrainingResult):
    """Result of the router stage: steps and tokens, and the measurements of the signal.

    Attributes:
        signal: what the router's signal measured on calibration text once training had ended, by name.
    """

    signal: Mapping[str, int | float | None] = field(default_factory=dict)

    @override
    def metrics(self) -> dict[str, Any]:
        """Return the measurements of the signal beside the other fields."""
        metrics = super().metrics()
        measured = metrics.pop("signal")
        return metrics | measured


@dataclass(frozen=True, kw_only=True)
class RouterStage(RoutingSettings, TrainingStage[RouterResult]):
    """Leaves the trained router; the network of its signal is thrown away."""

    name = "router"
    after = ("elastic", "profile")

    @property
    @override
    def learns(self) -> bool:
        return self.router.signal is not None

    @property
    @override
    def num_steps(self) -> int:
        return self.router.steps

    @override
    def new_router(self) -> Router:
        return self.make_router()

    @override
    def load_models(self, runtime: StageRuntime) -> StageModels:
        return StageModels(self.load_decoder(runtime, "elastic"), router=self.new_router())

    @override
    def task(self, models: StageModels) -> Task:
        assert models.router is not None, "the stage trains a router"
        signal = self.make_signal(models.router)
        assert signal is not None, "a router that learns has a signal"
        trained: dict[str, tuple[nn.Module, float]] = {"router": (models.router, self.router.lr)}
        if list(signal.parameters()):
            trained["signal"] = (signal, signal.lr)
        return Task(models, signal, trained, self.num_steps)

    @override
    def forward_passes(self) -> float:
        signal = self.make_signal(self.make_router())
        return 0.0 if signal is None else signal.forward_passes(mean_share(self, self.data.sequence_length))

    @override
    def run(self, runtime: StageRuntime) -> RouterResult:
        models = self.load_models(runtime)
        assert models.router is not None, "the stage trains a router"
        task = self.task(models) if self.learns else None
        trained = TrainingResult()
        if task is not None:
            assert isinstance(task.objective, Signal), "a router learns from a signal"
            pairs = load_file(runtime.inputs["elastic"] / RECORD)  # a mapped file, in which tensors lie anywhere
            task.objective.warm_up(models.router, {name: value.clone() for name, value in pairs.items()})
            trained = self.train(task, runtime)
        num_sequences = self.router.num_sequences
        calibration = self.calibration_data(models.decoder.eval(), runtime, num_sequences=num_sequences)
        prepare_router(models.router, calibration)
        measured = {} if task is None else measure_signal(task, calibration)
        save_router(models.router, runtime)
        return RouterResult(**vars(trained), signal=measured)


def measure_signal(task: Task, calibration: CalibrationData) -> dict[str, float | None]:
    """Let the signal of a trained router measure, on calibration text, what it has to report; by name."""
    assert isinstance(task.objective, Signal), "a router learns from a signal"
    models = StageModels(calibration.decoder, router=task.models.router)
    with calibration.precision():
        return task.objective.to(calibration.device).summary(models, list(calibration.batches))
