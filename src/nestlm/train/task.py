"""What a training stage trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nestlm.train.objective.base import Objective, StageModels


@dataclass(frozen=True)
class Task:
    """What a stage trains.

    Attributes:
        models: the model, and its teacher and router where the objective needs them.
        objective: yields the loss terms of a step.
        trained: name, module and peak learning rate of what is trained.
        steps: of the stage.
    """

    models: StageModels
    objective: Objective
    trained: dict[str, tuple[nn.Module, float]]
    steps: int
