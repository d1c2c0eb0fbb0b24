"""A token bucket per sequence and site: choices that would overdraw a sequence's balance become cheaper ones.

Each token refills the bucket by its site's share of the budget, and each choice takes its price. Tokens are taken in
order, so no choice depends on a later token. All amounts are integers: a prompt in one call and the same tokens one by
one give the same balances, bit for bit. The bucket is our choice; the paper (arXiv 2406.10260) guarantees no budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

UNITS = 2**40  # fixed-point units in the cost of the whole model


@dataclass(frozen=True)
class TokenBucket:
    """The bucket of one site under one limit of the budget.

    Attributes:
        prices: of the choices in fixed-point units, strictly ascending integers, (K,).
        refill_rate: units that each token adds, at least the cheapest price.
    """

    prices: Tensor
    refill_rate: int

    @cached_property
    def steps(self) -> Tensor:
        """Price of each choice beyond that of the next cheaper one, (K - 1,)."""
        return self.prices.diff()

    def spend(self, wanted_BL: Tensor, *, real_BL: Tensor | None, balances_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choices that sequences can pay: none wider than wanted, and every prefix within its refills.

        Amounts come first: a token pays the price of its wanted choice, or the whole balance. Choices follow: an amount
        between two prices is saved until it pays for a wider choice, so that on average the amounts are spent. Both
        have closed forms in cumulative sums and maxima.

        Args:
            wanted_BL: choice indices.
            real_BL: False for padding, which neither refills nor spends and gets the cheapest choice.
            balances_BK: left by earlier tokens: the balance, then what is saved towards each wider choice; zeros for
                new sequences.

        Returns:
            Choice indices (B, L), and the balances (B, K) after the last token.
        """
        price_BL = self.prices.take(wanted_BL)
        beyond_BL = price_BL - self.refill_rate
        if real_BL is not None:
            price_BL, beyond_BL = price_BL * real_BL, beyond_BL * real_BL
        # tokens pay less by the largest amount by which any prefix so far would have overdrawn the balance
        overdraft_BL = beyond_BL.cumsum(1) - balances_BK[:, :1]
        unpaid_BL = overdraft_BL.clamp_min(0).cummax(1).values
        paid_BL = price_BL - increments(unpaid_BL)
        towards_BLK = (paid_BL[..., None] - self.prices[:-1]).clamp(torch.zeros_like(self.steps), self.steps)
        saved_BLK = towards_BLK.cumsum(1) + balances_BK[:, None, 1:]
        bought_BLK = saved_BLK // self.steps
        index_BL = increments(bought_BLK.sum(-1))
        balance_B1 = unpaid_BL[:, -1:] - overdraft_BL[:, -1:]
        return index_BL, torch.cat((balance_B1, saved_BLK[:, -1] - bought_BLK[:, -1] * self.steps), dim=1)


def increments(running_BL: Tensor) -> Tensor:
    """Invert `cumsum(1)`: return what each token added to a running total that starts at 0."""
    return running_BL.diff(dim=1, prepend=running_BL.new_zeros(len(running_BL), 1))
