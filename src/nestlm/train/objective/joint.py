"""The objective of joint tuning: the model learns at its router's sub-networks, the router from the model's loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.nn.policy import Policy, full
from nestlm.router.relaxed import budget_loss, mean_probabilities
from nestlm.spec import Budget
from nestlm.train.objective.base import Objective, StageModels, Term
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.utils.seeding import torch_generator


class JointObjective(Objective):
    """The mean loss of the full model and `budgets_per_step` routed policies, plus their distance from the budgets.

    Flextron (arXiv 2406.10260) tunes model and routers jointly; how the loss reaches the routers (straight-through
    prefix gates, ADR 6) is our choice.
    """

    def __init__(
        self,
        distillation: DistillationLoss,
        *,
        budgets_per_step: int,
        cost_weight: float,
        dead_zone: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self.budgets_per_step, self.cost_weight, self.dead_zone = budgets_per_step, cost_weight, dead_zone
        self.seed = seed

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        assert models.router is not None, "joint tuning needs a router"
        table = models.router.prices.main
        floor = models.router.floor
        policies: list[tuple[Policy, bool]] = [(full, True)]
        targets = []
        for sample in range(self.budgets_per_step):
            generator = torch_generator(self.seed, "joint", step, sample)
            # just above the floor at least, where rounding could make the smallest sub-network too dear
            above = max(1e-6, float(torch.rand((), generator=generator)))
            targets.append(floor + (1.0 - floor) * above)
            budget = Budget.from_share(targets[-1])
            policies.append((models.router.draw(budget, generator=generator, row_shard=batch.row_shard), False))
        policy_losses = self.distillation.policy_losses(models, batch, policies=tuple(policies))
        loss_full = next(policy_losses).losses.loss
        yield Term(loss_full / len(policies), {"loss_full": loss_full.detach()}, is_last=False)
        for number, (policy_loss, target) in enumerate(zip(policy_losses, targets, strict=True), start=1):
            loss = policy_loss.losses.loss
            logs = dict[str, Tensor | float](loss_subnet=loss.detach())
            probabilities = mean_probabilities(table.space, policy_loss.decisions)
            if probabilities is not None:
                # over the sequences of all ranks, where they differ
                expected = batch.row_shard.all_reduce_mean(table.expected_share(probabilities).mean())
                distance = budget_loss(expected, torch.full_like(expected, target), dead_zone=self.dead_zone)
                logs["budget_distance"] = distance.detach()
                loss = loss + self.cost_weight * distance
            yield Term(loss / len(policies), logs, is_last=number == len(targets))
