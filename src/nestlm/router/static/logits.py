"""The static router of Flextron (arXiv 2406.10260): sees the budget only, chooses one sub-network for all tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.cost.knapsack import cheapest_loss, use_up
from nestlm.cost.table import PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Decision, Policy, constant
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.networks import BUDGET_FEATURES, SiteNetworks, embed_share
from nestlm.router.relaxed import gated_policy, gumbel_noise, sample_choices, soft_mask
from nestlm.spec import Budget, Site, SubnetSpec


class StaticLogitsRouter(Router):
    """One small network a site from the budget to a logit for each choice (Flextron).

    An exact knapsack over log-probabilities makes the choices keep the budget (our choice).
    """

    def __init__(self, *, prices: PriceList, hidden_width: int, init_std: float, seed: int) -> None:
        super().__init__(prices)
        self.networks = SiteNetworks(
            prices.space, num_inputs=BUDGET_FEATURES, hidden_width=hidden_width, init_std=init_std
        )
        self.networks.init_weights(seed=seed)

    def budget_logits(self, shares_N: Tensor) -> Tensor:
        """Return logits (N, sites, max choices) for N budgets as shares; -inf where a site has fewer choices."""
        return self.networks(embed_share(shares_N))

    @override
    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        del row_shard
        logits = self._logits(budget)
        probabilities = logits.softmax(-1)
        choices = sample_choices(logits.detach(), generator=generator)
        return gated_policy(self.prices.space, probabilities, choices)

    def relaxed(
        self,
        shares_B: Tensor,
        *,
        generator: torch.Generator,
        temperature: float,
        gain: float,
        row_shard: RowShard = ALL_ROWS,
    ) -> Policy:
        """Return a policy of soft masks for one budget, the first of the shares, with gradients to the router."""
        del row_shard
        decisions: dict[Site, Decision] = {}
        for row, (site, widths) in enumerate(self.prices.space.choices.items()):
            logits = self.budget_logits(shares_B[:1])[0, row, : len(widths)]
            noise = gumbel_noise(logits.shape, generator=generator).to(logits)
            decisions[site] = soft_mask(widths, logits, noise=noise, temperature=temperature, gain=gain)
        return constant(decisions)

    @override
    @torch.no_grad()
    def spec(self, budget: Budget, *, calibration: CalibrationData | None = None) -> SubnetSpec:
        del calibration
        losses = (-self._logits(budget).log_softmax(-1)).tolist()
        spec = cheapest_loss(losses, prices=self.prices, budget=budget)
        return use_up(spec, losses, space=self.prices.space, bounds=self.prices.bounds(budget))

    def _logits(self, budget: Budget) -> Tensor:
        share = self.prices.tightest(budget)
        return self.budget_logits(torch.tensor([share], device=self.networks.input.device))[0]
