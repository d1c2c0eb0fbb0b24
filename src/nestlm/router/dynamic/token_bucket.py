"""The ledger: per sequence and site an allowance that earlier tokens left, so that no sequence ends above its budget.

Every token brings an income, its site's share of the budget; a choice that the balance does not cover becomes a cheaper
one. Tokens are taken in order and never look ahead. All amounts are integers, so that a prompt in one call and the same
tokens one by one give the same balances, bit for bit. (Our choice; the paper gives no guarantee.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def steps(self) -> Tensor:
        """What the next wider choice costs more, (K - 1,)."""
        return self.prices.diff()

    def grant(self, wanted_BL: Tensor, *, real_BL: Tensor | None, account_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Choices that the sequences can pay: none wider than wanted, and each prefix within its income.

        First amounts: a token pays what it wants, or all that there is. Then steps: an amount between two prices is
        saved up until it has paid a step, so that on average the amounts are spent. Both have closed forms.

        Args:
            wanted_BL: choice indices.
            real_BL: False for padding, which neither earns nor spends; its choice is the cheapest.
            account_BK: what earlier tokens left: the balance, and what is saved up towards each wider choice; zeros at
                the start.

        Returns:
            Choice indices (B, L), and the account afterwards.
        """
        price_BL = self.prices.take(wanted_BL)
        beyond_BL = price_BL - self.income
        if real_BL is not None:
            price_BL, beyond_BL = price_BL * real_BL, beyond_BL * real_BL
        # the most by which any prefix so far would have overdrawn is forgone
        overdraft_BL = beyond_BL.cumsum(1) - account_BK[:, :1]
        forgone_BL = overdraft_BL.clamp_min(0).cummax(1).values
        paid_BL = price_BL - since(forgone_BL)
        towards_BLK = (paid_BL[..., None] - self.prices[:-1]).clamp(torch.zeros_like(self.steps), self.steps)
        saved_BLK = towards_BLK.cumsum(1) + account_BK[:, None, 1:]
        bought_BLK = saved_BLK // self.steps
        granted_BL = since(bought_BLK.sum(-1))
        left_B1 = forgone_BL[:, -1:] - overdraft_BL[:, -1:]
        return granted_BL, torch.cat((left_B1, saved_BLK[:, -1] - bought_BLK[:, -1] * self.steps), dim=1)


def since(running_BL: Tensor) -> Tensor:
    """What each token added to a running total that was 0 before the first: the inverse of `cumsum(1)`."""
    return running_BL.diff(dim=1, prepend=running_BL.new_zeros(len(running_BL), 1))
