"""Budgets against price lists: what each limit comes to, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlm.cost.table import CostTable, PriceList
from nestlm.errors import BudgetError
from nestlm.spec import Budget, SearchSpace, Site

SPACE = SearchSpace({Site("mlp_width", layer): (1, 2, 3) for layer in range(2)})


def table(name, *, constant, step):
    prices = ((step, 2 * step, 3 * step),) * 2
    return CostTable(name, "units", SPACE, constant=constant, prices=prices, whole=constant + 6 * step)


PRICES = PriceList(
    table("flops", constant=4e6, step=1e6),  # 6e6 to 10e6
    {"memory": table("memory", constant=2.0**30, step=2.0**29), "params": table("params", constant=0.0, step=1.5e9)},
)


def test_each_limit_is_a_share_of_its_table():
    def shares(value):
        return [(bound.table.name, bound.share) for bound in PRICES.bounds(Budget.parse(value))]

    assert shares([0.8, "0.9memory", "3GiB", "6e9params", "8e6flops"]) == [
        ("flops", 0.8), ("memory", 0.9), ("memory", 0.75), ("params", pytest.approx(2 / 3)), ("flops", 0.8),
    ]  # fmt: skip
    assert PRICES.tightest(Budget.parse([0.8, "3GiB"])) == 0.75
    assert PRICES.tightest(Budget.parse(["1memory", 0.8])) == 0.8


def test_all_limits_hold_together():
    middle = SPACE.spec({SPACE.sites[0]: 1, SPACE.sites[1]: 0})  # 7e6 flops, 2.5 GiB
    assert PRICES.fits(middle, Budget.parse([0.7, "2.5GiB"]))
    assert not PRICES.fits(middle, Budget.parse([0.69, "2.5GiB"]))
    assert not PRICES.fits(middle, Budget.parse([0.7, "2.49GiB"]))
    assert PRICES.fits(SPACE.full(), Budget.parse(["1memory", 1.0, "4GiB", "10e6flops"]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("12ms", "12ms, a limit of latency.*wanted one of flops, memory, params; try cost=latency"),
        ("0.5active_params", "wanted one of flops, memory, params; try cost=active_params"),
        ("5GiB", "5GiB, but the full model's memory is 4GiB; ask for at most that"),
        ("1e10params", "full model's params is 9000000000params"),
        ("1900MiB", "1900MiB .*smallest sub-network costs 2048MiB; ask for at least that"),
        ("2e9params", "smallest sub-network costs 3000000000params"),
        (0.5, r"0.5 \(flops\), but the smallest sub-network costs 0.6; "),
        ([0.9, "0.4memory"], r"0.4memory .*smallest sub-network costs 0.5memory"),
    ],
)
def test_what_cannot_be_met_is_refused_with_its_cure(value, expected):
    for ask in (PRICES.check, lambda budget: PRICES.fits(SPACE.full(), budget), PRICES.tightest):
        with pytest.raises(BudgetError, match=expected):
            ask(Budget.parse(value))


@given(st.floats(1.0, 1e12), st.floats(1e-3, 1e12), st.sampled_from(["", "memory", "B", "KiB", "GB", "GiB"]))
def test_the_values_that_a_refusal_names_can_be_asked_for(constant, step, unit):
    prices = PriceList(table("memory", constant=constant, step=step), {})
    smallest = prices.main.cost(SPACE.smallest())
    low = 1e-15 if unit in ("", "memory") else smallest / 1e15
    for amount, word in ((low, "costs "), (1e25, "memory is ")):
        if amount > 1 and unit in ("", "memory"):
            continue
        with pytest.raises(BudgetError, match=r"full model's|smallest") as refused:
            prices.check(Budget.parse(f"{amount}{unit}"))
        named = re.search(rf"{word}(\S+);", str(refused.value))
        assert named is not None
        prices.check(Budget.parse(named.group(1)))
