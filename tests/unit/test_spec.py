import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlm.errors import BudgetError
from nestlm.spec import Budget, Limit, SearchSpace, Site, SubnetSpec

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
    assert spec.widths_by_axis() == {"mlp_width": [8, 8], "attn_heads": [2]}
    assert spec.get(Site("depth", 0)) is None


NO_BUDGETS = [
    0, -0.5, 1.01, "12", "12 miles", "12MS", "ms", "1e999ms", "-3ms", "0GiB", "140%", "0%", "0.6+3MB", None, True,
    float("nan"), float("inf"), "inf", "", [], [[]], [0.5, 2], [[0.5, "x"]], [[[0.5]]], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", NO_BUDGETS)
def test_no_budget(value):
    with pytest.raises(BudgetError, match=r"got .*wanted.*"):
        Budget.parse_all(value)


def test_an_unknown_unit_is_named_with_the_known_ones():
    with pytest.raises(BudgetError, match=r"'3TB' with the unit 'TB', wanted one of .*params.*ms.*GiB; try "):
        Budget.parse("3TB")


@pytest.mark.parametrize(
    ("value", "written", "kind", "is_share"),
    [
        ("0.6", "0.6", None, True), (1, "1", None, True), ("60%", "0.6", None, True), (" 60 % ", "0.6", None, True),
        ("12ms", "12ms", "latency", False), ("1us", "1us", "latency", False), ("0.5 s", "0.5s", "latency", False),
        ("3.4e9params", "3400000000params", "params", False), ("2e6flops", "2000000flops", "flops", False),
        ("8GiB", "8GiB", "memory", False), ("0.6memory", "0.6memory", "memory", True),
        ("1 active_params", "1active_params", "active_params", True), (".5KB", "0.5KB", "memory", False),
        ("0.7latency", "0.7latency", "latency", True),
    ],
)  # fmt: skip
def test_a_limit_is_read_and_written(value, written, kind, is_share):
    budget = Budget.parse(value)
    (limit,) = budget.limits
    assert str(budget) == written
    assert (limit.kind, limit.is_share) == (kind, is_share)
    assert Budget.parse(written) == budget


def test_units_count_the_kinds_own_units():
    factors = {unit: Budget.parse(f"3{unit}").limits[0].factor for unit in ("us", "ms", "s", "KB", "KiB", "MB", "GiB")}
    assert factors == {"us": 1e-3, "ms": 1, "s": 1000, "KB": 1000, "KiB": 1024, "MB": 10**6, "GiB": 2**30}


@given(st.floats(1e-9, 1.0), st.sampled_from(["", "memory", "ms", "GiB", "params"]))
def test_written_budgets_read_back_the_same(amount, unit):
    budget = Budget((Limit(amount, unit or None),))
    assert Budget.parse(str(budget)) == budget
    assert not set(str(budget)) & set("/\\ ,\n"), "a file name and a cell"


def test_several_limits_are_one_budget():
    several, single = Budget.parse_all([[0.6, "4GiB"], 0.5])[::-1]
    assert str(several) == "0.6+4GiB"
    assert several == Budget.parse((0.6, "4GiB"))
    assert single == Budget.from_share(0.5)


def test_budgets_are_sorted_without_repeats():
    assert [str(budget) for budget in Budget.parse_all([0.5, 1.0, "0.7", 0.5])] == ["1", "0.7", "0.5"]
    mixed = Budget.parse_all(["3MB", 0.5, [0.9, "3MB"], "80%", "3MB", "0.9memory"])
    assert [str(budget) for budget in mixed] == ["0.8", "0.5", "3MB", "0.9+3MB", "0.9memory"]
    assert [str(budget) for budget in Budget.parse_all(0.6)] == ["0.6"]
