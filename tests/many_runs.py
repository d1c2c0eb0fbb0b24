"""Several runs in the same ranks, one after the other: to be started by `launch`, which needs a module's function."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestlm.api.run_and_report import run_and_report
from nestlm.config.compose import build, compose
from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.train import trainer as training
from nestlm.train.lightning_module import NestedLM
from nestlm.train.objective.base import StageModels, Term
from nestlm.train.objective.pretrain import PretrainObjective

CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]


def work(runs: list[list[str]]) -> list[Path]:
    """Do runs as their command lines say, with every step logged; returns their folders."""
    with pytest.MonkeyPatch.context() as patch:  # a test's own process goes on to other tests
        patch.setattr(training, "LOG_EVERY_STEPS", 1)
        return [one(overrides).folder for overrides in runs]


def one(overrides: list[str]) -> Any:
    """Do one run."""
    config = compose(overrides)
    return run_and_report(build(config), config=config)


LOGGED = 100  # numbers that ranks reduce beside gradients are fewer


class Reductions(TorchDispatchMode):
    """Counts how often gradients are reduced over ranks."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(name in str(func) for name in ("reduce_scatter", "allreduce")):
            tensors = [part for part in tree_leaves(args) if isinstance(part, Tensor)]
            self.number += max(part.numel() for part in tensors) > LOGGED
        return func(*args, **(kwargs or {}))


def reductions(runs: list[list[str]]) -> list[int]:
    """How often a step of each run's elastic stage reduces the gradients of a block or of the root."""
    counts: list[int] = []
    step = NestedLM.training_step

    def counted(self: NestedLM, batch: Batch, batch_idx: int) -> Tensor:
        with Reductions() as counting:
            loss = step(self, batch, batch_idx)
        if self.stage == "elastic" and batch_idx == 1:
            counts.append(counting.number)
        return loss

    NestedLM.training_step = counted
    work(runs)
    return counts


def in_trouble(what: tuple[str, list[str]]) -> None:
    """A run in which rank 1 has a loss that is no number, or no memory, at step 2 of its first stage."""
    trouble, overrides = what
    terms = PretrainObjective.terms

    def troubled(self: PretrainObjective, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        for term in terms(self, models, batch, step=step):
            is_there = collectives.rank() == 1 and step == 2
            if is_there and trouble == "memory":
                torch.empty(2**60)
            yield Term(term.loss * torch.nan, term.logs) if is_there else term

    PretrainObjective.terms = troubled
    one(overrides)


def results(run: Path) -> list[dict[str, str]]:
    """The rows of its table."""
    with (run / "results.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_results(one: Path, other: Path) -> None:
    """Tables of two runs agree, up to the order of sums."""
    for mine, theirs in zip(results(one), results(other), strict=True):
        assert (mine["router"], mine["budget"]) == (theirs["router"], theirs["budget"])
        for column in ("achieved", "val_loss", "accuracy"):
            assert float(theirs[column]) == pytest.approx(float(mine[column]), abs=2e-5), column
