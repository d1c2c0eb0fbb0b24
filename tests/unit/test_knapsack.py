from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlm.cost.knapsack import cheapest_loss
from nestlm.cost.table import CostTable
from nestlm.errors import BudgetError
from nestlm.spec import Budget, SearchSpace, Site

SPACE = SearchSpace({Site("mlp_width", layer): (1, 2, 3) for layer in range(3)} | {Site("attn_heads", 0): (1, 2)})
numbers = st.floats(0.0, 10.0, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.floats(0.01, 5.0), min_size=11, max_size=11),
    losses=st.lists(st.tuples(numbers, numbers, numbers), min_size=4, max_size=4),
    share=st.floats(0.05, 1.0),
    constant=st.floats(0.0, 3.0),
)
def test_equals_brute_force_and_keeps_the_budget(steps, losses, share, constant):
    prices, rest = [], list(steps)
    for site in SPACE.sites:
        total, row = 0.0, []
        for _ in SPACE.choices[site]:
            total += rest.pop()
            row.append(total)
        prices.append(tuple(row))
    table = CostTable("cost", "units", SPACE, constant=constant, prices=tuple(prices))
    budget = Budget(share)
    choices = [range(len(SPACE.choices[site])) for site in SPACE.sites]
    specs = [SPACE.spec(dict(zip(SPACE.sites, indices, strict=True))) for indices in product(*choices)]
    fitting = [spec for spec in specs if table.fits(spec, budget)]
    if not table.fits(SPACE.smallest(), budget):
        with pytest.raises(BudgetError, match="smallest"):
            cheapest_loss(losses, table=table, budget=budget)
        return
    found = cheapest_loss(losses, table=table, budget=budget)
    assert table.fits(found, budget)

    def loss(spec):
        return sum(row[index] for row, index in zip(losses, SPACE.indices(spec), strict=True))

    if SPACE.full() in fitting:
        assert found == SPACE.full(), "the whole model is taken where it fits"
    else:
        # within the solver's tolerance: a spec that fits by less than 1e-6 of the budget may be passed over
        roomy = [spec for spec in fitting if table.share(spec) <= budget.share * (1 - 1e-5)]
        assert loss(found) <= min((loss(spec) for spec in roomy), default=float("inf")) + 1e-6


def test_a_spec_over_the_budget_by_less_than_the_solvers_tolerance_is_refused():
    space = SearchSpace({Site("mlp_width", layer): (1, 2, 3) for layer in range(2)})
    table = CostTable("cost", "units", space, constant=0.0, prices=((1.0, 2.0, 10.0),) * 2)
    losses = [(3.0, 1.0, 0.0)] * 2
    assert cheapest_loss(losses, table=table, budget=Budget(4 / 20)).widths == (2, 2)
    found = cheapest_loss(losses, table=table, budget=Budget(4 / 20 * (1 - 1e-9)))
    assert table.cost(found) == 3.0
