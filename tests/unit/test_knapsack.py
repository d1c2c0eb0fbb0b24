from itertools import product
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlm.cost import knapsack
from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import CostTable, PriceList
from nestlm.errors import BudgetError
from nestlm.spec import Budget, SearchSpace, Site

SPACE = SearchSpace({Site("mlp_width", layer): (1, 2, 3) for layer in range(3)} | {Site("attn_heads", 0): (1, 2)})
CHOICES = [range(len(SPACE.choices[site])) for site in SPACE.sites]
SPECS = [SPACE.spec(dict(zip(SPACE.sites, indices, strict=True))) for indices in product(*CHOICES)]
numbers = st.floats(0.0, 10.0, allow_subnormal=False)
steps = st.lists(st.one_of(st.floats(0.01, 5.0), st.sampled_from([0.0, 1.0, 2.0])), min_size=11, max_size=11)
loss_rows = st.lists(st.tuples(numbers, numbers, numbers), min_size=4, max_size=4)


def table_of(steps, *, constant, name="flops"):
    prices, rest = [], list(steps)
    for site in SPACE.sites:
        total, row = 0.0, []
        for _ in SPACE.choices[site]:
            total += rest.pop()
            row.append(total)
        prices.append(tuple(row))
    return CostTable(
        name, "units", SPACE, constant=constant, prices=tuple(prices), whole=constant + sum(row[-1] for row in prices)
    )


def loss_of(spec, losses):
    return sum(row[index] for row, index in zip(losses, SPACE.indices(spec), strict=True))


@pytest.mark.parametrize("most_partial", [20_000, 0], ids=["programme", "solver"])
@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(steps, min_size=1, max_size=3),
    losses=loss_rows,
    shares=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3),
    constant=st.floats(0.0, 3.0),
)
def test_equals_brute_force_and_keeps_every_limit(most_partial, steps, losses, shares, constant):
    names = ["flops", "memory", "params"]
    tables = [table_of(row, constant=constant, name=name) for name, row in zip(names, steps, strict=False)]
    prices = PriceList(tables[0], {table.name: table for table in tables[1:]})
    budget = Budget.parse([f"{share}{table.name}" for share, table in zip(shares, tables, strict=False)])
    fitting = [
        spec for spec in SPECS if all(table.share(spec) <= share for table, share in zip(tables, shares, strict=False))
    ]
    if not fitting:
        with pytest.raises(BudgetError, match="smallest"):
            cheapest_loss(losses, prices=prices, budget=budget)
        return
    with mock.patch.object(knapsack, "MOST_PARTIAL", most_partial):
        found = cheapest_loss(losses, prices=prices, budget=budget)
    assert found in fitting
    if SPACE.full() in fitting:
        assert found == SPACE.full(), "the whole model is taken where it fits"
    else:
        # the integer solver may pass over a spec that fits by less than its tolerance
        room = 1.0 if most_partial else 1 - 1e-5
        roomy = [
            spec for spec in fitting if all(t.share(spec) <= s * room for t, s in zip(tables, shares, strict=False))
        ]
        best = min((loss_of(spec, losses) for spec in roomy), default=float("inf"))
        assert loss_of(found, losses) <= best + (1e-9 if most_partial else 1e-5)


def test_two_limits_are_stricter_than_each_alone():
    losses = [(3.0, 1.0, 0.0)] * 3 + [(2.0, 0.0, 0.0)]
    flops = table_of([1.0] * 11, constant=1.0)
    memory = table_of([3.0] + [1.0] * 10, constant=1.0, name="memory")
    prices = PriceList(flops, {"memory": memory})
    loss = {
        budget: loss_of(cheapest_loss(losses, prices=prices, budget=Budget.parse(budget)), losses)
        for budget in (0.75, "0.75memory", (0.75, "0.75memory"), (0.75, "0.5memory"))
    }
    assert loss[0.75, "0.75memory"] >= max(loss[0.75], loss["0.75memory"])
    assert loss[0.75, "0.5memory"] > loss[0.75, "0.75memory"]


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_losses_scale_does_not_matter(scale):
    losses = [(3.0, 1.0, 0.0), (4.0, 2.5, 0.0), (1.0, 0.9, 0.5), (2.0, 0.0, 0.0)]
    prices = PriceList(table_of([1.0, 1.3, 0.7] * 3 + [1.0, 1.0], constant=1.0), {})
    budget = Budget.from_share(0.7)
    scaled = [tuple(scale * loss for loss in row) for row in losses]
    assert cheapest_loss(scaled, prices=prices, budget=budget) == cheapest_loss(losses, prices=prices, budget=budget)


def test_a_spec_over_the_budget_by_less_than_a_solvers_tolerance_is_refused():
    space = SearchSpace({Site("mlp_width", layer): (1, 2, 3) for layer in range(2)})
    table = CostTable("flops", "units", space, constant=0.0, prices=((1.0, 2.0, 10.0),) * 2, whole=20.0)
    prices = PriceList(table, {})
    losses = [(3.0, 1.0, 0.0)] * 2
    assert cheapest_loss(losses, prices=prices, budget=Budget.from_share(4 / 20)).widths == (2, 2)
    for below in (1e-9, 1e-12):
        found = cheapest_loss(losses, prices=prices, budget=Budget.from_share(4 / 20 * (1 - below)))
        assert table.cost(found) == 3.0
