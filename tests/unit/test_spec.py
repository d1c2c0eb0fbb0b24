import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlm.errors import BudgetError
from nestlm.spec import Budget, SearchSpace, Site, SubnetSpec

SPACE = SearchSpace({Site("mlp_width", 0): (2, 4, 8), Site("mlp_width", 1): (2, 8), Site("attn_heads", 0): (1, 2)})


def test_space_names_its_ends():
    assert SPACE.size == 12
    assert SPACE.max_choices == 3
    assert SPACE.full().widths == (8, 8, 2)
    assert SPACE.smallest().widths == (2, 2, 1)
    assert SPACE.axes["mlp_width"] == (Site("mlp_width", 0), Site("mlp_width", 1))


@given(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)))
def test_indices_and_specs_are_inverse(indices):
    spec = SPACE.spec(dict(zip(SPACE.sites, indices, strict=True)))
    assert SPACE.indices(spec) == indices
    assert hash(spec) == hash(SubnetSpec(spec.sites, spec.widths))


def test_a_width_that_is_no_choice_is_refused():
    with pytest.raises(ValueError, match="not in tuple"):
        SPACE.indices(SubnetSpec(SPACE.sites, (3, 8, 2)))


def test_spec_by_axis_and_by_site():
    spec = SPACE.full()
    assert spec.by_axis() == {"mlp_width": [8, 8], "attn_heads": [2]}
    assert spec.get(Site("depth", 0)) is None


@pytest.mark.parametrize("value", [0, -0.5, 1.01, "12ms", None, True, float("nan"), "inf", [], [0.5, 2]])
def test_no_budget(value):
    with pytest.raises(BudgetError, match=r"got .*wanted"):
        Budget.parse_all(value)


def test_budgets_are_sorted_without_repeats():
    assert [budget.share for budget in Budget.parse_all([0.5, 1.0, "0.7", 0.5])] == [1.0, 0.7, 0.5]
    assert [str(budget) for budget in Budget.parse_all(0.6)] == ["0.6"]
