"""What each training stage trains."""

from __future__ import annotations

from torch import nn

from nestlm.nn.decoder import Decoder
from nestlm.pipeline.settings import Settings, View
from nestlm.router.base import Router
from nestlm.train.objective.base import Signal, StageModels
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.joint import JointObjective
from nestlm.train.objective.pretrain import PretrainObjective
from nestlm.train.task import Task


def pretrain_task(settings: Settings | View, decoder: Decoder) -> Task:
    """The teacher's own training."""
    stage = settings.pretrain
    return Task(StageModels(decoder), PretrainObjective(), {"decoder": (decoder, stage.lr)}, stage.steps)


def elastic_task(settings: Settings | View, decoder: Decoder, *, teacher: Decoder | None) -> Task:
    """Training of the sub-networks that the sampler draws."""
    stage, values = settings.elastic, settings.make_elastic_values()
    trained: dict[str, tuple[nn.Module, float]] = {"decoder": (decoder, stage.lr)}
    if values is not None and stage.values is not None:
        trained["values"] = (values, stage.values.lr)
    objective = ElasticObjective(
        settings.space(), sampler=settings.sampler, distillation=settings.teacher, values=values, seed=settings.seed
    )
    return Task(StageModels(decoder, teacher), objective, trained, stage.steps)


def router_task(settings: Settings | View, decoder: Decoder, *, router: Router, signal: Signal) -> Task:
    """The router's training on its signal."""
    trained: dict[str, tuple[nn.Module, float]] = {"router": (router, settings.router.lr)}
    if list(signal.parameters()):
        trained["signal"] = (signal, signal.lr)
    return Task(StageModels(decoder, router=router), signal, trained, settings.router.steps)


def joint_task(settings: Settings | View, decoder: Decoder, *, teacher: Decoder | None, router: Router) -> Task:
    """Tuning of model and router together."""
    stage = settings.joint
    trained: dict[str, tuple[nn.Module, float]] = {"decoder": (decoder, stage.lr)}
    if list(router.parameters()):
        trained["router"] = (router, settings.router.joint_lr)
    objective = JointObjective(
        settings.teacher,
        budgets_per_step=stage.budgets_per_step,
        cost_weight=stage.cost_weight,
        dead_zone=stage.dead_zone,
        seed=settings.seed,
    )
    return Task(StageModels(decoder, teacher, router), objective, trained, stage.steps)
