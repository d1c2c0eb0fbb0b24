"""A task: what a stage trains. Training, FLOPs and memory estimates share it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nestlm.train.objective.base import Objective, StageModels


@dataclass(frozen=True)
class Task:
    """Models, objective and trained parts of a training stage.

    Attributes:
        models: the model, and its teacher and router where the objective needs them.
        objective: yields the loss terms of a step.
        trained: module and peak learning rate of each trained part, by name.
        steps: optimizer steps.
    """

    models: StageModels
    objective: Objective
    trained: dict[str, tuple[nn.Module, float]]
    steps: int

    def trains(self, module: nn.Module) -> bool:
        """Whether a module is one of the trained parts."""
        return any(part is module for part, _ in self.trained.values())
