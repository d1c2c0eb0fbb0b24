"""The Gumbel signal: the loss itself, end to end, through soft prefix masks over the whole model.

The rival of the surrogate (LLaMaFlex, Nemotron Elastic): temperature falls, the logits' gain rises, and each site has
noise of its own. Every step costs a forward and a backward pass of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.loss import HeadInputs, LossReader
from nestlm.router.base import Router
from nestlm.router.dynamic.logits import DynamicLogitsRouter
from nestlm.router.relaxed import budget_loss, mean_probabilities
from nestlm.router.static.logits import StaticLogitsRouter
from nestlm.train.objective.base import Signal, StageModels, Term, check_router
from nestlm.utils.seeding import torch_generator


class GumbelSignal(Signal):
    """KL to the whole model under soft masks, plus the distance from the budget."""

    lr = 0.0  # it has no network of its own

    def __init__(
        self,
        router: Router,
        *,
        temperature: tuple[float, float],
        gain: tuple[float, float],
        anneal_steps: int,
        cost_weight: float,
        dead_zone: float,
        seed: int,
    ) -> None:
        """Set up the schedule.

        Args:
            router: one that turns budgets into logits.
            temperature: of the draw, at the start and at the end.
            gain: of the logits, at the start and at the end.
            anneal_steps: steps from start to end, geometrically.
            cost_weight: lambda of the cost loss.
            dead_zone: relative distance from the budget that costs nothing.
            seed: seed of all draws.
        """
        super().__init__()
        check_router(router, (StaticLogitsRouter, DynamicLogitsRouter), signal="gumbel")
        if min(*temperature, *gain) <= 0 or anneal_steps < 0:
            raise ConfigError(
                f"router.signal: got temperature={temperature}, gain={gain}, anneal_steps={anneal_steps}, wanted "
                "positive numbers"
            )
        self.temperature, self.gain, self.anneal_steps = temperature, gain, anneal_steps
        self.cost_weight, self.dead_zone, self.seed = cost_weight, dead_zone, seed

    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        router = models.router
        assert isinstance(router, StaticLogitsRouter | DynamicLogitsRouter), (
            "relaxed draws are those of a budget's logits"
        )
        table = router.prices.main
        done = min(1.0, step / max(1, self.anneal_steps))
        temperature, gain = (start * (end / start) ** done for start, end in (self.temperature, self.gain))
        with torch.no_grad():
            whole = models.decoder(batch.tokens_BL, documents_BL=batch.documents_BL, read=HeadInputs.read).read
        floor = router.floor
        rows = batch.row_shard.total(len(batch.tokens_BL))
        uniform_B = torch.rand(rows, generator=torch_generator(self.seed, "gumbel budgets", step))
        if isinstance(router, StaticLogitsRouter):  # one budget for all
            uniform_B = uniform_B[:1].expand(rows)
        uniform_B = batch.row_shard.own(uniform_B)
        shares_B = (floor + (1.0 - floor) * uniform_B).to(batch.tokens_BL.device)
        policy = router.relaxed(
            shares_B,
            generator=torch_generator(self.seed, "gumbel", step),
            temperature=temperature,
            gain=gain,
            row_shard=batch.row_shard,
        )
        read = LossReader(batch.targets_BL, teacher=whole)
        output = models.decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, read=read)
        probabilities = mean_probabilities(table.space, output.decisions)
        assert probabilities is not None, "a relaxed draw has probabilities"
        kl = output.read.loss
        expected = table.expected_share(probabilities)
        distance = budget_loss(
            expected, shares_B.expand_as(expected) if expected.ndim else shares_B[0], dead_zone=self.dead_zone
        ).mean()
        yield Term(kl + self.cost_weight * distance, {"kl": kl.detach(), "budget_distance": distance.detach()})

    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Nothing was predicted."""
        del models, held_out
        return {}

    def forward_passes(self, mean_share: float) -> float:
        """The whole model twice, and one backward pass."""
        del mean_share
        return 4.0
