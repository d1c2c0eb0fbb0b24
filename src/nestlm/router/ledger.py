"""The ledger: per sequence and site an allowance that earlier tokens left, so that no sequence ends above its budget.

Every token brings an income, its site's share of the budget; a choice that the balance does not cover becomes a cheaper
one. Tokens are taken in order and never look ahead. All amounts are integers, so that a prompt in one call and the same
tokens one by one give the same balances, bit for bit. (Our choice; the paper gives no guarantee.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNITS = 2**40  # of a ledger, in the cost of the whole model


@dataclass(frozen=True)
class Ledger:
    """One site under one limit.

    Attributes:
        prices: of the choices, strictly ascending integers, (K,).
        income: of each token, at least the cheapest price.
    """

    prices: Tensor
    income: int

    def opening(self, batch_size: int) -> Tensor:
        """What a sequence starts with, (B, K): its balance, and what it has saved up towards each wider choice."""
        return torch.zeros(batch_size, len(self.prices), dtype=torch.long, device=self.prices.device)

    def grant(self, wanted_BL: Tensor, *, real_BL: Tensor | None, account_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Choices that the sequences can pay: none wider than wanted, and each prefix within its income.

        First amounts: a token pays what it wants, or all that there is. Then steps: an amount between two prices is
        saved up until it has paid a step, so that on average the amounts are spent. Both have closed forms.

        Args:
            wanted_BL: choice indices.
            real_BL: False for padding, which neither earns nor spends; its choice is the cheapest.
            account_BK: what earlier tokens left.

        Returns:
            Choice indices (B, L), and the account afterwards.
        """
        counted_BL = torch.ones_like(wanted_BL) if real_BL is None else real_BL.long()
        wanted_BL = wanted_BL * counted_BL
        price_BL = self.prices[wanted_BL] * counted_BL
        # the most by which any prefix so far would have overdrawn is forgone
        overdraft_BL = (price_BL - self.income * counted_BL).cumsum(1) - account_BK[:, :1]
        forgone_BL = overdraft_BL.clamp_min(0).cummax(1).values
        paid_BL = price_BL - forgone_BL.diff(dim=1, prepend=torch.zeros_like(account_BK[:, :1]))
        steps_K = self.prices.diff()
        towards_BLK = (paid_BL[..., None] - self.prices[:-1]).clamp_min(0).minimum(steps_K)
        saved_BLK = towards_BLK.cumsum(1) + account_BK[:, None, 1:]
        bought_BLK = saved_BLK // steps_K
        granted_BL = bought_BLK.diff(dim=1, prepend=torch.zeros_like(bought_BLK[:, :1])).sum(-1)
        left_B1 = forgone_BL[:, -1:] - overdraft_BL[:, -1:]
        return granted_BL, torch.cat((left_B1, saved_BLK[:, -1] - bought_BLK[:, -1] * steps_K), dim=1)
