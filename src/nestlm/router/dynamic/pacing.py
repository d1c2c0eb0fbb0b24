"""Pacing: each sequence finds the multiplier at which its own tokens spend their income.

Sequences differ in what they want. One multiplier for all would leave income unspent in easy ones, and in hard ones
hand the choice to the ledger, which takes what comes first and not what is worth most. So every site keeps count of
what the tokens so far would have spent at each of a few multipliers, and the next token uses the smallest one that
would have been affordable. Counts are integers and look back only. (Our choice.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestlm.router.dynamic.token_bucket import Ledger

LEVELS = (2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)  # demand at the multipliers, in incomes
PATIENCE = 32  # tokens of calibration text that a sequence's count starts with
HALVINGS = 30
SAMPLE = 4096  # tokens from which multipliers are found
LARGEST = 1e6


@dataclass(frozen=True)
class Pace:
    """One site's multipliers, ascending, and what they are known to spend.

    Attributes:
        priced_JK: what each choice costs at each multiplier, in units of score.
        demands: of each bound, mean price that tokens of calibration text want at each multiplier, integers (J,).
    """

    priced_JK: Tensor
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
            demands = demand(scores_NK, middle[:, None] * cost_K, prices)
            ratios = [mean.double() / income for mean, income in zip(demands, incomes, strict=True)]
            dear = torch.stack(ratios).amax(0) > levels
            low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
        priced_JK = high[:, None] * cost_K
        return cls(priced_JK, demand(scores_NK, priced_JK, prices))

    def to_json(self) -> dict[str, Any]:
        """As plain values, in full."""
        return {"priced": self.priced_JK.tolist(), "demands": [demands_J.tolist() for demands_J in self.demands]}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any], *, device: torch.device) -> Pace:
        """As `to_json` wrote it."""
        priced_JK = torch.tensor(kept["priced"], dtype=torch.float64, device=device)
        return cls(priced_JK, tuple(torch.tensor(demands, device=device) for demands in kept["demands"]))


@dataclass(frozen=True)
class PacedSite:
    """How a site decides for tokens: what they want at their sequence's pace, or less where a ledger does not allow it.

    Attributes:
        pace: the multipliers.
        ledgers: one a bound.
        aim: the income that the pace aims at, relative to the ledger's.
    """

    pace: Pace
    ledgers: tuple[Ledger, ...]
    aim: float

    @cached_property
    def opening(self) -> Tensor:
        """What a sequence starts with: of each bound the ledger's account (K), then the beyond (J) the income that each
        multiplier would have spent.
        """  # noqa: D205
        rows = []
        for ledger, demands_J in zip(self.ledgers, self.pace.demands, strict=True):
            beyond_J = PATIENCE * (demands_J - self.aimed(ledger))
            rows.append(torch.cat((torch.zeros_like(ledger.prices), beyond_J)))
        return torch.stack(rows)

    def aimed(self, ledger: Ledger) -> int:
        """The income that the pace aims at under a bound."""
        return int(ledger.income * self.aim)

    def decide(self, scores_BLK: Tensor, *, real_BL: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choice indices (B, L), and what the sequences' next tokens need to know, (B, bounds, K + J).

        Args:
            scores_BLK: of the choices.
            real_BL: False for padding.
            kept: what the tokens before left; None at the start of the sequences.
        """
        batch, _, choices = scores_BLK.shape
        if kept is None:
            kept = self.opening.expand(batch, -1, -1)
        wanted_JBL = wanted_at(scores_BLK, self.pace.priced_JK)
        over, counts = [], []
        for ledger, count_BJ in zip(self.ledgers, kept[:, :, choices:].unbind(1), strict=True):
            beyond_JBL = (ledger.prices - self.aimed(ledger)).take(wanted_JBL)
            if real_BL is not None:
                beyond_JBL = beyond_JBL * real_BL
            after_JBL = beyond_JBL.cumsum(2) + count_BJ.T[..., None]
            over.append(after_JBL > beyond_JBL)  # the tokens before spent beyond the income
            counts.append(after_JBL[..., -1].T)
        # a larger multiplier spends less, so those that are over come first
        level_BL = torch.stack(over).any(0).sum(0).clamp_max(len(wanted_JBL) - 1)
        index_BL = wanted_JBL.gather(0, level_BL[None])[0]
        left = []
        for number, ledger in enumerate(self.ledgers):
            index_BL, account_BK = ledger.grant(index_BL, real_BL=real_BL, account_BK=kept[:, number, :choices])
            left.append(torch.cat((account_BK, counts[number]), dim=1))
        return index_BL, torch.stack(left, dim=1)


def wanted_at(scores: Tensor, priced_JK: Tensor) -> Tensor:
    """Choices of highest score less priced cost: (..., K) to (J, ...)."""
    return (scores - priced_JK.to(scores.dtype).view(len(priced_JK), *[1] * (scores.ndim - 1), -1)).argmax(-1)


def demand(scores_NK: Tensor, priced_JK: Tensor, prices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Mean price of what tokens want at each multiplier, rounded, one tensor (J,) a bound."""
    wanted_JN = wanted_at(scores_NK, priced_JK)
    return tuple(row.take(wanted_JN).double().mean(1).round().long() for row in prices)
