"""The dynamic router of Flextron (arXiv 2406.10260): sees budget and hidden state, chooses for each token and site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.cost.table import PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import FULL, Decision, Policy, Stream
from nestlm.router.dynamic.base import DynamicRouter, Granularity, Scorer, features, with_router
from nestlm.router.dynamic.plan import Plan
from nestlm.router.networks import BUDGET_FEATURES, SiteNetworks, SiteWeights, embed_share
from nestlm.router.relaxed import gated_tokens, gumbel_noise, sample_choices, soft_mask
from nestlm.spec import Budget, Site
from nestlm.utils.seeding import torch_generator

PARALLEL = 1e-20  # squared sine of the angle between two columns that are rounded multiples of each other


class DynamicLogitsRouter(DynamicRouter):
    """One small network a site from (hidden state, budget) to a logit for each choice."""

    output_kind: ClassVar[Literal["logits"]] = "logits"

    def __init__(
        self,
        *,
        prices: PriceList,
        hidden_size: int,
        granularity: Granularity,
        hidden_width: int,
        init_std: float,
        seed: int,
    ) -> None:
        super().__init__(with_router(prices, hidden_width), hidden_size=hidden_size, granularity=granularity)
        self.networks = SiteNetworks(
            prices.space, num_inputs=hidden_size + BUDGET_FEATURES, hidden_width=hidden_width, init_std=init_std
        )
        self.networks.init_weights(seed=seed)

    def token_logits(self, row: int, features_BLD: Tensor, shares_B: Tensor) -> Tensor:
        """Return logits (B, L, K) of one site's choices, for budgets as shares (B,), or (1,) for all sequences."""
        budget = self.networks.part(row, embed_share(shares_B))[:, None]
        return self.networks.at(row, features_BLD, more=budget)

    @override
    def scorer(self, share: float) -> Scorer:
        budget = embed_share(self.networks.input.new_tensor([share]))
        parts = [self.networks.part(row, budget)[:, None] for row in range(len(self.rows))]  # once for all tokens
        return lambda row, features_BLD: self.networks.at(row, features_BLD, more=parts[row]).log_softmax(-1)

    def site_weights(self, row: int, share: float) -> SiteWeights:
        """Return the network of one site for a budget as a share."""
        budget = self.networks.part(row, embed_share(self.networks.input.new_tensor([share])))[0]
        return self.networks.site_weights(row, num_inputs=self.hidden_size, budget=budget)

    @override
    def implicit_multiplier(self, plan: Plan, losses: list[list[float]]) -> float:
        """Estimate by least squares the price of cost that logits contain, since they were trained to save cost.

        Minus the mean scores are taken as `multiple * measured loss + price * cost`, with one multiple and one price
        for all sites and choices (our choice). Returns the price, 0 where the fit has no positive multiple.
        """
        known, wanted = [], []
        for row, (predicted, measured) in enumerate(zip(losses, self.measured_losses(), strict=True)):
            prices = plan.costs[row].tolist()
            known += [(max(0.0, loss), price - prices[-1]) for loss, price in zip(measured, prices, strict=True)]
            wanted += [loss - predicted[-1] for loss in predicted]
        multiple, price = least_squares(known, wanted)
        return max(0.0, price) if multiple > 0.0 else 0.0

    @override
    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        budget_share = self.prices.tightest(budget)
        seed = int(torch.randint(2**62, (), generator=generator))

        def decide(row: int, logits_BLK: Tensor) -> Decision:
            choices = sample_choices(logits_BLK.detach(), generator=torch_generator(seed, row), row_shard=row_shard)
            return gated_tokens(
                self.prices.space.choices[self.prices.space.sites[row]], logits_BLK.softmax(-1), choices
            )

        return self.logit_policy(self.networks.input.new_tensor([budget_share]), decide)

    def relaxed(
        self,
        shares_B: Tensor,
        *,
        generator: torch.Generator,
        temperature: float,
        gain: float,
        row_shard: RowShard = ALL_ROWS,
    ) -> Policy:
        """Return a policy of soft masks for budgets as shares (B,), with gradients to the router."""
        seed = int(torch.randint(2**62, (), generator=generator))

        def decide(row: int, logits_BLK: Tensor) -> Decision:
            widths = self.prices.space.choices[self.prices.space.sites[row]]
            noise = gumbel_noise(logits_BLK.shape, generator=torch_generator(seed, row), row_shard=row_shard).to(
                logits_BLK
            )
            return soft_mask(widths, logits_BLK, noise=noise, temperature=temperature, gain=gain)

        return self.logit_policy(shares_B, decide)

    def logit_policy(self, shares_B: Tensor, decide: Callable[[int, Tensor], Decision]) -> Policy:
        """Return the policy that calls `decide` with the row and the logits (B, L, K) of each site.

        Random draws are keyed by the site, so a pass that activation checkpointing repeats draws the same.
        """

        def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            del stream
            row = self.rows.get(site)
            return FULL if row is None else decide(row, self.token_logits(row, features(hidden_BLD), shares_B))

        return policy


def least_squares(known: Sequence[tuple[float, float]], wanted: Sequence[float]) -> tuple[float, float]:
    """Return the factors (a, b) of least squared error of `a * first + b * second`; the smallest if several fit.

    The normal equations are solved in rational numbers: LAPACK's result depends on where in memory its input lies.

    Args:
        known: pairs (first, second).
        wanted: one target a pair.
    """
    rows = [
        (Fraction(first), Fraction(second), Fraction(target))
        for (first, second), target in zip(known, wanted, strict=True)
    ]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    at, bt = (sum(row[i] * row[2] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant > PARALLEL * aa * bb:
        return float((at * bb - bt * ab) / determinant), float((bt * aa - at * ab) / determinant)
    scale = aa + bb
    return (float(at / scale), float(bt / scale)) if scale else (0.0, 0.0)
