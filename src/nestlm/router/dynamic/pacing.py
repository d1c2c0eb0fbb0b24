"""Pacing: each sequence finds the multiplier at which its own tokens spend their refills.

Sequences differ in what their tokens prefer. One multiplier for all would leave refills unspent in easy sequences; in
hard ones the token bucket would decide, which serves the first tokens rather than those that gain most. So every site
counts what the tokens so far would have spent at each of a few multipliers, and the next token uses the smallest
multiplier that the sequence could have afforded. Counts are integers and depend on earlier tokens only. (Our choice.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestlm.router.dynamic.token_bucket import TokenBucket

DEMAND_LEVELS = (2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)  # mean demand at each multiplier, in refill rates
PATIENCE = 32  # weight of calibration text in a sequence's counts, in tokens
HALVINGS = 30
SAMPLE = 4096  # tokens from which multipliers are found
LARGEST = 1e6


@dataclass(frozen=True)
class Pace:
    """The multipliers of one site, in ascending order, and their mean spending on calibration text.

    Attributes:
        priced_JK: cost of each choice at each multiplier, in units of score.
        demands: one tensor a limit: mean price of the preferred choices at each multiplier, integers (J,).
    """

    priced_JK: Tensor
    demands: tuple[Tensor, ...]

    @classmethod
    def fit(cls, scores_NK: Tensor, cost_K: Tensor, *, prices: tuple[Tensor, ...], rates: tuple[int, ...]) -> Pace:
        """Find by bisection the multipliers at which demand is DEMAND_LEVELS times the tightest limit's refill rate.

        Args:
            scores_NK: scores of N tokens of calibration text.
            cost_K: cost of the choices as shares, which multipliers multiply.
            prices: one tensor a limit, in fixed-point units, (K,).
            rates: one refill rate a limit.
        """
        scores_NK = scores_NK[:: max(1, len(scores_NK) // SAMPLE)]
        low = scores_NK.new_full((len(DEMAND_LEVELS),), -LARGEST, dtype=torch.float64)
        high = -low
        levels = torch.tensor(DEMAND_LEVELS, dtype=torch.float64, device=low.device)
        for _ in range(HALVINGS):
            middle = torch.sinh((torch.asinh(low * 1e3) + torch.asinh(high * 1e3)) / 2) / 1e3
            demands = mean_demand(scores_NK, middle[:, None] * cost_K, prices)
            ratios = [mean.double() / rate for mean, rate in zip(demands, rates, strict=True)]
            dear = torch.stack(ratios).amax(0) > levels
            low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
        priced_JK = high[:, None] * cost_K
        return cls(priced_JK, mean_demand(scores_NK, priced_JK, prices))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without loss of precision."""
        return {"priced": self.priced_JK.tolist(), "demands": [demands_J.tolist() for demands_J in self.demands]}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any], *, device: torch.device) -> Pace:
        """Read what `to_json` returned."""
        priced_JK = torch.tensor(kept["priced"], dtype=torch.float64, device=device)
        return cls(priced_JK, tuple(torch.tensor(demands, device=device) for demands in kept["demands"]))


@dataclass(frozen=True)
class PacedSite:
    """How one site chooses for tokens: the preferred choice at the sequence's pace, limited by its token buckets.

    Attributes:
        pace: the multipliers.
        buckets: one a limit.
        target_ratio: spending that the pace aims at, relative to the refill rate.
    """

    pace: Pace
    buckets: tuple[TokenBucket, ...]
    target_ratio: float

    @cached_property
    def initial_state(self) -> Tensor:
        """State of a new sequence, (limits, K + J): K balances, then J counts of spending beyond the target rate."""
        rows = []
        for bucket, demands_J in zip(self.buckets, self.pace.demands, strict=True):
            beyond_J = PATIENCE * (demands_J - self.target_rate(bucket))
            rows.append(torch.cat((torch.zeros_like(bucket.prices), beyond_J)))
        return torch.stack(rows)

    def target_rate(self, bucket: TokenBucket) -> int:
        """Return the mean spending of a token that the pace aims at, in fixed-point units."""
        return int(bucket.refill_rate * self.target_ratio)

    def decide(self, scores_BLK: Tensor, *, real_BL: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose for every token of a batch.

        Args:
            scores_BLK: scores of the choices.
            real_BL: False for padding.
            kept: state after the tokens before; None at the start of the sequences.

        Returns:
            Choice indices (B, L), and the state (B, limits, K + J) after the last token.
        """
        batch, _, choices = scores_BLK.shape
        if kept is None:
            kept = self.initial_state.expand(batch, -1, -1)
        preferred_JBL = best_choices(scores_BLK, self.pace.priced_JK)
        over, counts = [], []
        for bucket, count_BJ in zip(self.buckets, kept[:, :, choices:].unbind(1), strict=True):
            beyond_JBL = (bucket.prices - self.target_rate(bucket)).take(preferred_JBL)
            if real_BL is not None:
                beyond_JBL = beyond_JBL * real_BL
            after_JBL = beyond_JBL.cumsum(2) + count_BJ.T[..., None]
            over.append(after_JBL > beyond_JBL)  # the tokens before spent beyond the target rate
            counts.append(after_JBL[..., -1].T)
        # a larger multiplier spends less, so those that are over come first
        level_BL = torch.stack(over).any(0).sum(0).clamp_max(len(preferred_JBL) - 1)
        index_BL = preferred_JBL.gather(0, level_BL[None])[0]
        left = []
        for number, bucket in enumerate(self.buckets):
            index_BL, balances_BK = bucket.spend(index_BL, real_BL=real_BL, balances_BK=kept[:, number, :choices])
            left.append(torch.cat((balances_BK, counts[number]), dim=1))
        return index_BL, torch.stack(left, dim=1)


def best_choices(scores: Tensor, priced_JK: Tensor) -> Tensor:
    """Return the choices of highest score minus priced cost at each of J multipliers: (..., K) to (J, ...)."""
    return (scores - priced_JK.to(scores.dtype).view(len(priced_JK), *[1] * (scores.ndim - 1), -1)).argmax(-1)


def mean_demand(scores_NK: Tensor, priced_JK: Tensor, prices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the mean price of the best choices at each multiplier, rounded to integers: one tensor (J,) a limit."""
    best_JN = best_choices(scores_NK, priced_JK)
    return tuple(row.take(best_JN).double().mean(1).round().long() for row in prices)
