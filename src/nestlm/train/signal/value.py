"""The value signal (our choice): learn by plain regression what a narrower choice costs a token.

Choices are drawn, the model runs once with them and once whole, and the sum of the predicted values is fitted to the KL
between the two, token by token. No gradient passes through the LLM. Some sequences draw at random, the others choose by
the values so far at a random price of cost: what the router would take is then seen to be as good as it thinks, or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.nn.loss import HeadInputs, LossReader
from nestlm.nn.policy import WHOLE, Decision, Mixed, Policy, Stream
from nestlm.router.base import Router
from nestlm.router.dynamic.base import features
from nestlm.router.dynamic.value import DynamicValueRouter
from nestlm.router.static.value import StaticValueRouter
from nestlm.spec import Site
from nestlm.train.objective.base import Signal, StageModels, Term, check_router
from nestlm.train.objective.elastic_values import load_values, part_of
from nestlm.train.signal.exploration import random_choices, rank_correlation
from nestlm.utils.seeding import torch_generator

HELD_OUT_ROUNDS = 4  # of choices on the calibration text, to tell how well values predict
PRICES_OF_COST = (0.02, 2.0)  # nats for the cost of the whole model, evenly in the logarithm
STRAY_SHARE = 0.1  # of the choices of a sequence that chooses


class ValueSignal(Signal):
    """Fits a value router."""

    lr = 0.0  # it has no network of its own

    def __init__(self, router: Router, *, skew: float, random_share: float, warm_start: bool, seed: int) -> None:
        """Set up the draws.

        Args:
            router: a value router.
            skew: how much sequences differ in the widths that are drawn for them.
            random_share: share of the sequences that draw at random rather than by the values so far.
            warm_start: begin with the values that elastic training learned, where it did.
            seed: seed of all draws.
        """
        super().__init__()
        check_router(router, (StaticValueRouter, DynamicValueRouter), signal="value")
        self.space, self.skew, self.random_share = router.prices.space, skew, random_share
        self.warm_start, self.seed = warm_start, seed

    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Take over the values of elastic training (our choice).

        Raises:
            ConfigError: they were learned by networks of another width.
        """
        assert isinstance(router, StaticValueRouter | DynamicValueRouter), "checked"
        prefix = "dynamic." if router.per_token else "static."
        known = part_of(record, prefix)
        if self.warm_start and known:
            cure = "router.signal.warm_start"
            load_values(router.networks, known, width="router.network.hidden_width", cure=cure)

    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        predicted, target = self.observe(models, batch, key=step)
        loss = (predicted - target).square().mean()
        spread = batch.row_shard.gather(target).var(correction=0).clamp_min(1e-12)
        yield Term(loss, {"value_error": batch.row_shard.mean(loss.detach()) / spread, "kl": target.mean()})

    def observe(self, models: StageModels, batch: Batch, *, key: int | str) -> tuple[Tensor, Tensor]:
        """Predicted and real growth of the KL under random choices: of tokens (B, L), or of sequences (B,)."""
        router = models.router
        assert isinstance(router, StaticValueRouter | DynamicValueRouter), "values are learned by a value router"
        tokens_BL, generator = batch.tokens_BL, torch_generator(self.seed, "value", key)
        rows = batch.row_shard.total(len(tokens_BL))
        shape = (rows, tokens_BL.shape[1])
        indices = random_choices(self.space, shape, per_token=router.per_token, skew=self.skew, generator=generator)
        # a price of cost for sequences that choose, 0 for those that draw, and the few draws of those that choose
        low, high = (math.log(price) for price in PRICES_OF_COST)
        price_B = (low + (high - low) * torch.rand(rows, generator=generator)).exp()
        price_B[torch.rand(rows, generator=generator) < self.random_share] = 0.0
        strays = torch.rand(indices.shape, generator=generator) < STRAY_SHARE
        parts_of_step = (
            batch.row_shard.own(indices, dim=1),
            batch.row_shard.own(strays, dim=1),
            batch.row_shard.own(price_B),
        )
        drawn = Drawn(*(part.to(tokens_BL.device) for part in parts_of_step))
        values: list[Tensor] = []
        with torch.no_grad():
            whole = models.decoder(tokens_BL, documents_BL=batch.documents_BL, read=HeadInputs.read).read
            policy, read = observing(router, drawn, values), LossReader(batch.targets_BL, teacher=whole)
            kl_BL = models.decoder(tokens_BL, policy, documents_BL=batch.documents_BL, read=read).read.distance_BL
        total = torch.stack(values).sum(0)
        return (total, kl_BL) if router.per_token else (total[:, 0], kl_BL.mean(1))

    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Error relative to the variance, and rank correlation, of predictions on held-out text."""
        if not held_out:
            return {}
        with torch.no_grad():
            pairs = [
                self.observe(models, batch, key=f"held out/{number}/{round_}")
                for round_ in range(HELD_OUT_ROUNDS)
                for number, batch in enumerate(held_out)
            ]
        predicted, real = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        error = (predicted - real).square().mean() / real.var(correction=0).clamp_min(1e-12)
        return {"value_error": float(error), "rank_correlation": rank_correlation(predicted, real)}

    def forward_passes(self, mean_share: float) -> float:
        """The whole model and one random choice."""
        return 1.0 + mean_share


@dataclass(frozen=True)
class Drawn:
    """Choices drawn for a batch, and who takes them.

    Attributes:
        indices: drawn choices, (sites, B, L) or (sites, B).
        strays: where a sequence that chooses takes the draw all the same, of the same shape.
        price_B: price of cost by which a sequence chooses; 0 draws.
    """

    indices: Tensor
    strays: Tensor
    price_B: Tensor

    def taken(self, row: int, values_BLK: Tensor, cost_K: Tensor) -> Tensor:
        """The choices at a site, by what the values are there: (B, L) or (B,)."""
        index, price_B = self.indices[row], self.price_B
        chosen_BL = (values_BLK.detach() + price_B[:, None, None] * cost_K.to(values_BLK)).argmin(-1)
        chosen = chosen_BL.expand(index.shape) if index.ndim == 2 else chosen_BL[:, 0]
        draws = self.strays[row] | (price_B == 0.0).view(-1, *[1] * (index.ndim - 1))
        return torch.where(draws, index, chosen)


def observing(router: StaticValueRouter | DynamicValueRouter, drawn: Drawn, values: list[Tensor]) -> Policy:
    """Run drawn choices, and note what the router's networks predict of them, with gradients to the networks."""
    rows = {site: row for row, site in enumerate(router.prices.space.sites)}
    shares = router.prices.main.shares

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        del stream
        row = rows.get(site)
        if row is None:
            return WHOLE
        widths = router.prices.space.choices[site]
        with torch.enable_grad():
            value_BLK = router.values(row, features(hidden_BLD.detach()))
            index = drawn.taken(row, value_BLK, shares[row, : len(widths)])
            index_BL = index if index.ndim == 2 else index[:, None]
            values.append(value_BLK.expand(*index_BL.shape, -1).gather(-1, index_BL[..., None]).squeeze(-1))
        return Decision(Mixed(widths, index))

    return policy
