"""The Gumbel signal: trains a router end to end on the model's loss, through soft prefix masks over the whole model.

This is how LLaMaFlex and Nemotron Elastic train routers: the temperature falls, the gain of the logits rises, and each
site has noise of its own. Every step takes a forward and a backward pass of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.loss import HeadInputs, LossFn
from nestlm.router.base import Router
from nestlm.router.protocols import RelaxedPolicies, check_router, narrow
from nestlm.router.relaxed import budget_loss, mean_probabilities
from nestlm.train.objective.base import Signal, StageModels, Term
from nestlm.utils.seeding import torch_generator


class GumbelSignal(Signal):
    """KL from the whole model under soft masks, plus the distance of the expected cost from the budget."""

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
            router: a router that can run every choice at once.
            temperature: of the Gumbel-softmax, at the start and at the end.
            gain: factor of the logits, at the start and at the end.
            anneal_steps: steps from start to end, geometrically.
            cost_weight: lambda of the cost loss.
            dead_zone: relative distance from the budget that costs nothing.
            seed: seed of all draws.
        """
        super().__init__()
        check_router(router, RelaxedPolicies, signal="gumbel")
        if min(*temperature, *gain) <= 0 or anneal_steps < 0:
            raise ConfigError(
                f"router.signal: got temperature={temperature}, gain={gain}, anneal_steps={anneal_steps}, wanted "
                "positive numbers"
            )
        self.temperature, self.gain, self.anneal_steps = temperature, gain, anneal_steps
        self.cost_weight, self.dead_zone, self.seed = cost_weight, dead_zone, seed

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        router = narrow(models.router, RelaxedPolicies)
        table = router.prices.main
        done = min(1.0, step / max(1, self.anneal_steps))
        temperature, gain = (start * (end / start) ** done for start, end in (self.temperature, self.gain))
        with torch.no_grad():
            whole = models.decoder(
                batch.tokens_BL, documents_BL=batch.documents_BL, output_fn=HeadInputs.detached
            ).output
        floor = router.floor
        rows = batch.row_shard.global_rows(len(batch.tokens_BL))
        uniform_B = torch.rand(rows, generator=torch_generator(self.seed, "gumbel budgets", step))
        if not router.per_token:  # one budget for all sequences
            uniform_B = uniform_B[:1].expand(rows)
        uniform_B = batch.row_shard.local_rows(uniform_B)
        shares_B = (floor + (1.0 - floor) * uniform_B).to(batch.tokens_BL.device)
        policy = router.relaxed(
            shares_B,
            generator=torch_generator(self.seed, "gumbel", step),
            temperature=temperature,
            gain=gain,
            row_shard=batch.row_shard,
        )
        output_fn = LossFn(batch.targets_BL, teacher=whole)
        output = models.decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, output_fn=output_fn)
        probabilities = mean_probabilities(table.space, output.decisions)
        assert probabilities is not None, "a relaxed draw has probabilities"
        kl = output.output.loss
        expected = table.expected_share(probabilities)
        distance = budget_loss(
            expected, shares_B.expand_as(expected) if expected.ndim else shares_B[0], dead_zone=self.dead_zone
        ).mean()
        yield Term(kl + self.cost_weight * distance, {"kl": kl.detach(), "budget_distance": distance.detach()})

    @override
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        del models, held_out
        return {}

    @override
    def forward_passes(self, mean_share: float) -> float:
        del mean_share
        return 4.0  # the whole model twice, and one backward pass
