"""Pacing: each sequence finds the multiplier at which its own tokens spend their income.

Sequences differ in what they want. One multiplier for all would leave income unspent in easy ones, and in hard ones
hand the choice to the ledger, which takes what comes first and not what is worth most. So every site keeps count of
what the tokens so far would have spent at each of a few multipliers, and the next token uses the smallest one that
would have been affordable. Counts are integers and look back only. (Our choice.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = (2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)  # demand at the multipliers, in incomes
PATIENCE = 32  # tokens of calibration text that a sequence's count starts with
HALVINGS = 30
SAMPLE = 4096  # tokens from which multipliers are found
LARGEST = 1e6


@dataclass(frozen=True)
class Pace:
    """One site's multipliers, ascending, and what they are known to spend.

    Attributes:
        multipliers: (J,).
        demands: of each bound, mean price that tokens of calibration text want at each multiplier, integers (J,).
    """

    multipliers: Tensor
    demands: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores_NK: Tensor, cost_K: Tensor, *, prices: tuple[Tensor, ...], incomes: tuple[int, ...]) -> Pace:
        """The multipliers at which demand is the LEVELS' multiple of the income, in the bound that is tightest.

        Args:
            scores_NK: of tokens of calibration text.
            cost_K: what a multiplier is multiplied with.
            prices: of each bound, in a ledger's units, (K,).
            incomes: of each bound.
        """
        scores_NK = scores_NK[:: max(1, len(scores_NK) // SAMPLE)]
        low = scores_NK.new_full((len(LEVELS),), -LARGEST, dtype=torch.float64)
        high = -low
        levels = torch.tensor(LEVELS, dtype=torch.float64, device=low.device)
        for _ in range(HALVINGS):
            middle = torch.sinh((torch.asinh(low * 1e3) + torch.asinh(high * 1e3)) / 2) / 1e3
            demands = demand(scores_NK, middle, cost_K, prices)
            ratios = [mean.double() / income for mean, income in zip(demands, incomes, strict=True)]
            dear = torch.stack(ratios).amax(0) > levels
            low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
        return cls(high, demand(scores_NK, high, cost_K, prices))

    def wanted(self, scores_BLK: Tensor, cost_K: Tensor) -> Tensor:
        """What each token would choose at each multiplier, (J, B, L)."""
        return wanted_at(scores_BLK, self.multipliers, cost_K)

    def follow(
        self, wanted_JBL: Tensor, *, number: int, prices_K: Tensor, income: int, real_BL: Tensor, count_BJ: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which multipliers each token can afford under one bound.

        Args:
            wanted_JBL: what tokens would choose.
            number: of the bound.
            prices_K: its prices.
            income: what a token brings.
            real_BL: 1 for real tokens, 0 for padding.
            count_BJ: what the tokens before would have spent beyond their income, zeros at the start.

        Returns:
            Affordable or not, (J, B, L), and the count afterwards.
        """
        start_J = PATIENCE * (self.demands[number].to(count_BJ.device) - income)
        beyond_JBL = (prices_K[wanted_JBL] - income) * real_BL
        counts_JBL = beyond_JBL.cumsum(2) + count_BJ.T[..., None]
        before_JBL = counts_JBL - beyond_JBL
        return before_JBL + start_J[:, None, None] <= 0, counts_JBL[..., -1].T


def wanted_at(scores: Tensor, multipliers_J: Tensor, cost_K: Tensor) -> Tensor:
    """Choices of highest score less priced cost: (..., K) to (J, ...)."""
    priced_JK = (multipliers_J[:, None] * cost_K.to(multipliers_J)).to(scores.dtype)
    return torch.stack([(scores - priced_K).argmax(-1) for priced_K in priced_JK])


def demand(scores_NK: Tensor, multipliers_J: Tensor, cost_K: Tensor, prices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Mean price of what tokens want at each multiplier, rounded, one tensor (J,) a bound."""
    wanted_JN = wanted_at(scores_NK, multipliers_J, cost_K)
    return tuple(row.to(wanted_JN.device)[wanted_JN].double().mean(1).round().long() for row in prices)


def first_affordable(affordable_JBL: Tensor) -> Tensor:
    """The smallest multiplier that is affordable, or the largest: (B, L)."""
    last = affordable_JBL.new_ones(1, *affordable_JBL.shape[1:])
    return torch.cat((affordable_JBL[:-1], last)).to(torch.uint8).argmax(0)
