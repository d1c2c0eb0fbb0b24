"""The ledger keeps every prefix of every sequence within its income, whatever is wanted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlm.router.dynamic.token_bucket import Ledger

PRICES = torch.tensor([10, 25, 60, 100])


OPENING = torch.zeros(3, len(PRICES), dtype=torch.long)


def wants(seed: int, batch: int = 3, length: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(4, generator=generator)
    return torch.multinomial(likely, batch * length, replacement=True, generator=generator).view(batch, length)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), income=st.integers(10, 110), cut=st.integers(0, 59), padded=st.booleans())
def test_every_prefix_is_within_its_income(seed, income, cut, padded):
    wanted = wants(seed)
    real = torch.arange(60) >= torch.tensor([0, 7, 20])[:, None] if padded else None
    ledger = Ledger(PRICES, income)
    granted, balance = ledger.grant(wanted, real_BL=real, account_BK=OPENING)
    counted = torch.ones_like(wanted) if real is None else real.long()
    assert torch.all((granted <= wanted) | (counted == 0))
    spent = (PRICES[granted] * counted).cumsum(1)
    assert torch.all(spent <= income * counted.cumsum(1))
    assert torch.all(balance >= 0)
    if income >= 100:
        assert torch.equal(granted * counted, wanted * counted), "who can pay gets what is wanted"
    # what comes later changes nothing, and the same tokens in pieces get the same
    later = wanted.clone()
    later[:, cut:] = 3 - later[:, cut:]
    changed, _ = ledger.grant(later, real_BL=real, account_BK=OPENING)
    assert torch.equal(changed[:, :cut], granted[:, :cut])
    pieces, carried = [], OPENING
    for piece in (slice(0, cut), *(slice(position, position + 1) for position in range(cut, 60))):
        if wanted[:, piece].shape[1]:
            part, carried = ledger.grant(
                wanted[:, piece], real_BL=None if real is None else real[:, piece], account_BK=carried
            )
            pieces.append(part)
    assert torch.equal(torch.cat(pieces, dim=1), granted)
    assert torch.equal(carried, balance)


def test_what_is_forgone_is_little():
    """Where all want the widest, the income is spent: prices in steps leave less than a step over."""
    wanted = torch.full((1, 400), 3)
    for income in (12, 40, 59, 61, 99):
        granted, _ = Ledger(PRICES, income).grant(wanted, real_BL=None, account_BK=OPENING[:1])
        assert PRICES[granted].sum() >= 400 * income - 100
