"""The token bucket keeps every prefix of every sequence within its refills, whatever is wanted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlm.router.dynamic.token_bucket import TokenBucket

PRICES = torch.tensor([10, 25, 60, 100])


EMPTY = torch.zeros(3, len(PRICES), dtype=torch.long)


def wants(seed: int, batch: int = 3, length: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(4, generator=generator)
    return torch.multinomial(likely, batch * length, replacement=True, generator=generator).view(batch, length)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), refill_rate=st.integers(10, 110), cut=st.integers(0, 59), padded=st.booleans())
def test_every_prefix_is_within_its_refills(seed, refill_rate, cut, padded):
    wanted = wants(seed)
    real = torch.arange(60) >= torch.tensor([0, 7, 20])[:, None] if padded else None
    bucket = TokenBucket(PRICES, refill_rate)
    paid, balance = bucket.spend(wanted, real_BL=real, balances_BK=EMPTY)
    counted = torch.ones_like(wanted) if real is None else real.long()
    assert torch.all((paid <= wanted) | (counted == 0))
    spent = (PRICES[paid] * counted).cumsum(1)
    assert torch.all(spent <= refill_rate * counted.cumsum(1))
    assert torch.all(balance >= 0)
    if refill_rate >= 100:
        assert torch.equal(paid * counted, wanted * counted), "who can pay gets what is wanted"
    # what comes later changes nothing, and the same tokens in pieces get the same
    later = wanted.clone()
    later[:, cut:] = 3 - later[:, cut:]
    changed, _ = bucket.spend(later, real_BL=real, balances_BK=EMPTY)
    assert torch.equal(changed[:, :cut], paid[:, :cut])
    pieces, carried = [], EMPTY
    for piece in (slice(0, cut), *(slice(position, position + 1) for position in range(cut, 60))):
        if wanted[:, piece].shape[1]:
            part, carried = bucket.spend(
                wanted[:, piece], real_BL=None if real is None else real[:, piece], balances_BK=carried
            )
            pieces.append(part)
    assert torch.equal(torch.cat(pieces, dim=1), paid)
    assert torch.equal(carried, balance)


def test_little_is_left_unspent():
    """Where all want the widest, the refills are spent: prices in steps leave less than a step over."""
    wanted = torch.full((1, 400), 3)
    for refill_rate in (12, 40, 59, 61, 99):
        paid, _ = TokenBucket(PRICES, refill_rate).spend(wanted, real_BL=None, balances_BK=EMPTY[:1])
        assert PRICES[paid].sum() >= 400 * refill_rate - 100
