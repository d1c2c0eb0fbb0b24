"""The value router (our choice): what does a narrower choice cost this token?"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlm.cost.table import Bound, PriceList
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Policy
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.base import DynamicRouter, Granularity, Scorer, mean_losses, with_router
from nestlm.router.dynamic.plan import Plan, Tariff, settle
from nestlm.router.networks import SiteNetworks, growth
from nestlm.spec import Budget

LEAST = 1e-4  # nats, so that nothing is divided by 0
CURVE = 12  # budgets at which the multiplier is known before anything is asked


class DynamicValueRouter(DynamicRouter):
    """One small network a site from the hidden state to the growth of the token's KL by each choice.

    The choice is `argmin value + multiplier * cost`: any budget by one multiplier, and no network is told the budget.
    """

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
        """Growth of the KL by each choice of a site, (B, L, K); that of the widest is 0."""
        return growth(self.networks.at(row, features_BLD))

    def scorer(self, share: float) -> Scorer:
        del share
        rows = [
            scale[: len(widths)] for scale, widths in zip(self.scale, self.prices.space.choices.values(), strict=True)
        ]
        return lambda row, features_BLD: -self.values(row, features_BLD) * rows[row]

    @torch.no_grad()
    def prepare(self, calibration: CalibrationData) -> None:
        """Bring values to scale, and learn the multipliers and fixed sites of some budgets, to draw policies at any.

        A token's own loss does not show what its choices do to later tokens, which attend to it. What a choice adds to
        the loss of all text does, but only beside sites that run whole. So the values of a choice are multiplied by one
        number, with which their mean is the geometric mean of both.
        """
        super().prepare(calibration)
        unpriced = Plan(1.0, self.bound_at(1.0))
        self.scale.fill_(1.0)
        for row, losses in enumerate(mean_losses(self.record(unpriced, calibration))):
            learned_K, added_K = torch.tensor(losses), self.measured[row, : len(losses)].cpu().clamp_min(0.0)
            self.scale[row, : len(losses)] = ((added_K + LEAST) / (learned_K + LEAST)).sqrt()
        scores = self.record(unpriced, calibration)
        heard = {row: self.heard(part) for row, part in scores.items()}
        shares = torch.linspace(self.planned.main.cheapest / self.planned.main.whole, 1.0, CURVE + 1)[1:].tolist()
        for number, share in enumerate(shares):
            plan = settle(Plan(share, self.bound_at(share)), heard)
            fixed = [plan.fixed.get(row, -1) for row in range(len(self.rows))]
            self.curve[number] = torch.tensor([share, plan.multiplier, *fixed], dtype=torch.float64)

    def bound_at(self, share: float) -> tuple[Tariff, ...]:
        """A share of the run's cost as a ledger counts it."""
        return self.tariffs((Bound(self.planned.main, share),))

    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        """The choices at the next smaller budget that `prepare` knows, without ledgers."""
        del generator, row_shard
        least = min(bound.share for bound in self.planned.bounds(budget))
        known = self.curve.cpu()
        number = max(0, int((known[:, 0] <= least).sum()) - 1)
        _, multiplier, *fixed = known[number].tolist()
        chosen = {row: int(index) for row, index in enumerate(fixed) if index >= 0}
        return self.policy(Plan(least, self.bound_at(least), multiplier, chosen))
