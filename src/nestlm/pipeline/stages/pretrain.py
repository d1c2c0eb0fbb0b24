"""Stage `pretrain`: read the weights that were given, or else train the model before conversion, the teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from typing_extensions import override

from nestlm.distributed import collectives
from nestlm.distributed.fsdp import copy_full_tensor
from nestlm.model.checkpoint import shard_files
from nestlm.nn.policy import full
from nestlm.pipeline.cache import contents_identity
from nestlm.pipeline.flops import BACKWARD
from nestlm.pipeline.runtime import MODEL, StageRuntime
from nestlm.pipeline.stages.base import Readings
from nestlm.pipeline.stages.training import TrainingResult, TrainingStage
from nestlm.train.objective.base import StageModels
from nestlm.train.objective.pretrain import PretrainObjective
from nestlm.train.stage_settings import StageSettings
from nestlm.train.task import Task

HASHES = "weights.json"  # file of the cache that keeps the hashes of given weights


@dataclass(frozen=True, kw_only=True)
class PretrainResult(Readings, TrainingResult):
    """Result of the pretrain stage: steps and tokens, and the teacher's loss on the validation text."""


@dataclass(frozen=True, kw_only=True)
class PretrainStage(TrainingStage[PretrainResult]):
    """Leaves the model before conversion."""

    name = "pretrain"
    after = ("data",)

    pretrain: StageSettings

    @property
    @override
    def num_steps(self) -> int:
        return 0 if self.model.weights is not None or self.model.init is None else self.pretrain.steps

    @override
    def load_models(self, runtime: StageRuntime) -> StageModels:
        decoder = self.new_decoder(runtime)
        if self.model.weights is not None:
            self.model.load_weights(decoder)
        else:
            decoder.init_weights(seed=self.seed, assign=copy_full_tensor)
        return StageModels(decoder)

    @override
    def task(self, models: StageModels) -> Task:
        trained: dict[str, tuple[nn.Module, float]] = {"decoder": (models.decoder, self.pretrain.lr)}
        return Task(models, PretrainObjective(), trained, self.num_steps)

    @override
    def forward_passes(self) -> float:
        return BACKWARD

    @override
    def outside_identity(self, cache: Path) -> str:
        """Identify the weights that were given by their contents."""
        if self.model.weights is None:
            return ""
        files, is_first = shard_files(self.model.weights_folder), collectives.rank() == 0
        return collectives.broadcast_from_rank_zero(contents_identity(files, known=cache / HASHES) if is_first else "")

    @override
    def run(self, runtime: StageRuntime) -> PretrainResult:
        models = self.load_models(runtime)
        if self.model.weights is not None:
            trained = TrainingResult(tokens=self.model.pretraining_tokens)
        else:
            trained = self.train(self.task(models), runtime)
        runtime.save_module(models.decoder, MODEL)
        scores = self.score(models.decoder, {"full": full}, runtime)["full"]
        return PretrainResult(**vars(trained), **asdict(self.readings(scores, runtime)))
