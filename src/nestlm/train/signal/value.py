"""The value signal (our choice): learns by regression how much a narrower choice costs a token.

Choices are drawn, the model runs once with them and once whole, and the sum of the predicted values is fitted to the KL
between the two, token by token. No gradient passes through the LLM. Some sequences draw at random; the others choose by
the values so far at a random price of cost, so that values which the router overrates are corrected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.nn.loss import HeadInputs, LossFn
from nestlm.nn.policy import FULL, Decision, Policy, Stream, Width
from nestlm.router.base import Router
from nestlm.router.dynamic.base import features
from nestlm.router.protocols import ChoiceValues, check_router, narrow
from nestlm.spec import Site
from nestlm.train.objective.base import Signal, StageModels, Term
from nestlm.train.objective.elastic_values import load_values, select_prefix
from nestlm.train.signal.exploration import random_choices, rank_correlation
from nestlm.utils.seeding import torch_generator

HELD_OUT_ROUNDS = 4  # draws of choices on calibration text, by which predictions are measured
PRICES_OF_COST = (0.02, 2.0)  # range in nats for the cost of the whole model, uniform in the logarithm
STRAY_SHARE = 0.1  # share of choices that are drawn at random in sequences that choose by values


class ValueSignal(Signal):
    """Squared error of predicting the KL of drawn choices from the values of a value router."""

    lr = 0.0  # it has no network of its own

    def __init__(self, router: Router, *, skew: float, random_share: float, warm_start: bool, seed: int) -> None:
        """Set up the draws.

        Args:
            router: a value router.
            skew: how much sequences differ in the widths that are drawn for them; see `random_choices`.
            random_share: share of the sequences that draw at random rather than by the values so far.
            warm_start: begin with the values that elastic training learned, where it did.
            seed: seed of all draws.
        """
        super().__init__()
        check_router(router, ChoiceValues, signal="value")
        self.space, self.skew, self.random_share = router.prices.space, skew, random_share
        self.warm_start, self.seed = warm_start, seed

    @override
    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Take over the values of elastic training (our choice).

        Raises:
            ConfigError: they were learned by networks of another width.
        """
        prefix = "dynamic." if router.per_token else "static."
        known = select_prefix(record, prefix)
        if self.warm_start and known:
            cure = "router.signal.warm_start"
            load_values(narrow(router, ChoiceValues).networks, known, width="router.network.hidden_width", cure=cure)

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        predicted, target = self.observe(models, batch, key=step)
        loss = (predicted - target).square().mean()
        spread = batch.row_shard.all_gather(target).var(correction=0).clamp_min(1e-12)
        yield Term(loss, {"value_error": batch.row_shard.all_reduce_mean(loss.detach()) / spread, "kl": target.mean()})

    def observe(self, models: StageModels, batch: Batch, *, key: int | str) -> tuple[Tensor, Tensor]:
        """Return predicted and measured KL from the whole model under drawn choices, in nats.

        Args:
            models: the nested model, and a value router.
            batch: the rows to measure on.
            key: of the random draws.

        Returns:
            Two tensors (B, L) for a dynamic router, or means over sequences (B,) for a static one.
        """
        router = narrow(models.router, ChoiceValues)
        tokens_BL, generator = batch.tokens_BL, torch_generator(self.seed, "value", key)
        rows = batch.row_shard.global_rows(len(tokens_BL))
        shape = (rows, tokens_BL.shape[1])
        indices = random_choices(self.space, shape, per_token=router.per_token, skew=self.skew, generator=generator)
        # a price of cost for sequences that choose, 0 for those that draw, and the few draws of those that choose
        low, high = (math.log(price) for price in PRICES_OF_COST)
        price_B = (low + (high - low) * torch.rand(rows, generator=generator)).exp()
        price_B[torch.rand(rows, generator=generator) < self.random_share] = 0.0
        strays = torch.rand(indices.shape, generator=generator) < STRAY_SHARE
        parts_of_step = (
            batch.row_shard.local_rows(indices, dim=1),
            batch.row_shard.local_rows(strays, dim=1),
            batch.row_shard.local_rows(price_B),
        )
        drawn = DrawnChoices(*(part.to(tokens_BL.device) for part in parts_of_step))
        values: list[Tensor] = []
        with torch.no_grad():
            whole = models.decoder(tokens_BL, documents_BL=batch.documents_BL, output_fn=HeadInputs.detached).output
            policy, output_fn = observing_policy(router, drawn, values), LossFn(batch.targets_BL, teacher=whole)
            kl_BL = models.decoder(tokens_BL, policy, documents_BL=batch.documents_BL, output_fn=output_fn).output.kl_BL
        total = torch.stack(values).sum(0)
        return (total, kl_BL) if router.per_token else (total[:, 0], kl_BL.mean(1))

    @override
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Return squared error relative to the variance, and rank correlation, of predictions on calibration text."""
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

    @override
    def forward_passes(self, mean_share: float) -> float:
        # the whole model and one random choice
        return 1.0 + mean_share


@dataclass(frozen=True)
class DrawnChoices:
    """Random choices for a batch, some of which sequences replace by the best choice of the values so far.

    Attributes:
        indices: drawn choices, (sites, B, L) or (sites, B).
        strays: True where a sequence that chooses by values keeps the drawn choice, of the same shape.
        price_B: price of cost by which a sequence chooses; 0 keeps all drawn choices.
    """

    indices: Tensor
    strays: Tensor
    price_B: Tensor

    def at_site(self, row: int, values_BLK: Tensor, cost_K: Tensor) -> Tensor:
        """Return the choices at one site, (B, L) or (B,).

        Args:
            row: number of the site.
            values_BLK: values of its choices, or (1, 1, K).
            cost_K: cost of its choices as shares.
        """
        index, price_B = self.indices[row], self.price_B
        chosen_BL = (values_BLK.detach() + price_B[:, None, None] * cost_K.to(values_BLK)).argmin(-1)
        chosen = chosen_BL.expand(index.shape) if index.ndim == 2 else chosen_BL[:, 0]
        draws = self.strays[row] | (price_B == 0.0).view(-1, *[1] * (index.ndim - 1))
        return torch.where(draws, index, chosen)


def observing_policy(router: ChoiceValues, drawn: DrawnChoices, values: list[Tensor]) -> Policy:
    """Return the policy that runs drawn choices and appends their predicted values (B, L) to a list, site by site.

    Args:
        router: its values have gradients to its networks.
        drawn: the choices.
        values: filled while the decoder runs.
    """
    rows = {site: row for row, site in enumerate(router.prices.space.sites)}
    shares = router.prices.main.shares

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        del stream
        row = rows.get(site)
        if row is None:
            return FULL
        widths = router.prices.space.choices[site]
        with torch.enable_grad():
            value_BLK = router.values(row, features(hidden_BLD.detach()))
            index = drawn.at_site(row, value_BLK, shares[row, : len(widths)])
            index_BL = index if index.ndim == 2 else index[:, None]
            values.append(value_BLK.expand(*index_BL.shape, -1).gather(-1, index_BL[..., None]).squeeze(-1))
        return Decision(Width.per_row(widths, index))

    return policy
