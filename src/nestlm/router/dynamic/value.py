"""The dynamic value router (our choice): predicts how much each narrower choice costs a token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.cost.table import Bound, PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Policy
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.base import DynamicRouter, Granularity, Scorer, mean_losses, with_router
from nestlm.router.dynamic.plan import FixedPointPrices, Plan, solve_multiplier
from nestlm.router.networks import SiteNetworks, SiteWeights, added_losses
from nestlm.spec import Budget

LEAST = 1e-4  # nats, so that nothing is divided by 0
CURVE = 12  # budgets at which `prepare` solves for the multiplier


class DynamicValueRouter(DynamicRouter):
    """One small network a site from the hidden state to the growth of the token's KL by each choice.

    The choice is `argmin value + multiplier * cost`: one multiplier serves any budget, and no network sees the budget.

    Attributes:
        curve: for CURVE budgets the share, the multiplier, and the fixed choice of each site (-1 where it decides).
        scale: factor of each predicted value, (sites, max choices).
    """

    output_kind: ClassVar[Literal["values"]] = "values"
    curve: Tensor
    scale: Tensor

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
        self.networks = SiteNetworks(prices.space, num_inputs=hidden_size, hidden_width=hidden_width, init_std=init_std)
        self.networks.init_weights(seed=seed)
        self.register_buffer("scale", torch.ones(len(self.rows), prices.space.max_choices))
        self.register_buffer("curve", torch.zeros(CURVE, 2 + len(self.rows), dtype=torch.float64))

    def values(self, row: int, features_BLD: Tensor) -> Tensor:
        """Return what each choice of a site adds to the tokens' KL, in nats, (B, L, K); 0 for the widest."""
        return added_losses(self.networks.at(row, features_BLD))

    @override
    def scorer(self, share: float) -> Scorer:
        del share
        rows = [
            scale[: len(widths)] for scale, widths in zip(self.scale, self.prices.space.choices.values(), strict=True)
        ]
        return lambda row, features_BLD: -self.values(row, features_BLD) * rows[row]

    def site_weights(self, row: int, share: float) -> SiteWeights:
        """Return the network of one site, which is the same for all budgets."""
        del share
        scale = self.scale[row, : self.networks.counts[row]]
        return self.networks.site_weights(row, num_inputs=self.hidden_size, scale=scale)

    @override
    @torch.no_grad()
    def prepare(self, calibration: CalibrationData) -> None:
        """Scale the values, and solve for multiplier and fixed sites at CURVE budgets, which `draw` uses.

        A token's own loss does not show what its choices do to later tokens, which attend to it. What a choice adds to
        the loss of all text does, but only beside sites that run whole. So the values of a choice are multiplied by the
        factor that makes their mean the geometric mean of both (our choice).
        """
        super().prepare(calibration)
        whole = Plan(1.0, self.limits_at(1.0))
        self.scale.fill_(1.0)
        for row, losses in enumerate(mean_losses(self.record(whole, calibration))):
            learned_K, added_K = torch.tensor(losses), self.measured[row, : len(losses)].cpu().clamp_min(0.0)
            self.scale[row, : len(losses)] = ((added_K + LEAST) / (learned_K + LEAST)).sqrt()
        scores = self.record(whole, calibration)
        scores = {row: self.decision_scores(part) for row, part in scores.items()}
        shares = torch.linspace(self.planned.main.cheapest / self.planned.main.whole, 1.0, CURVE + 1)[1:].tolist()
        for number, share in enumerate(shares):
            plan = solve_multiplier(Plan(share, self.limits_at(share)), scores)
            fixed = [plan.fixed.get(row, -1) for row in range(len(self.rows))]
            self.curve[number] = torch.tensor([share, plan.multiplier, *fixed], dtype=torch.float64)

    def limits_at(self, share: float) -> tuple[FixedPointPrices, ...]:
        """Return the limit of a budget that is a share of the run's cost."""
        return self.fixed_point_prices((Bound(self.planned.main, share),))

    @override
    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        """Return the policy of the next smaller budget at which `prepare` solved, without token buckets."""
        del generator, row_shard
        least = min(bound.share for bound in self.planned.bounds(budget))
        known = self.curve.cpu()
        number = max(0, int((known[:, 0] <= least).sum()) - 1)
        _, multiplier, *fixed = known[number].tolist()
        chosen = {row: int(index) for row, index in enumerate(fixed) if index >= 0}
        return self.policy(Plan(least, self.limits_at(least), multiplier, chosen))
