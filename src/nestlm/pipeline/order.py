"""The stages of a run, in the order in which they run."""

from __future__ import annotations

from typing import Any

from nestlm.pipeline.stages.base import Stage
from nestlm.pipeline.stages.data import DataStage
from nestlm.pipeline.stages.elastic import ElasticStage
from nestlm.pipeline.stages.evaluate import EvaluateStage
from nestlm.pipeline.stages.joint import JointStage
from nestlm.pipeline.stages.pretrain import PretrainStage
from nestlm.pipeline.stages.profile import ProfileStage
from nestlm.pipeline.stages.rank import RankStage
from nestlm.pipeline.stages.router import RouterStage

STAGES: tuple[type[Stage[Any]], ...] = (
    ProfileStage,
    DataStage,
    PretrainStage,
    RankStage,
    ElasticStage,
    RouterStage,
    JointStage,
    EvaluateStage,
)
