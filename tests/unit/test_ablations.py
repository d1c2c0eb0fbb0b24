"""The ablations' rows say what they are, compose, and hold what their tables and the page of claims rest on."""

from collections import Counter

import pandas as pd
import pytest

import ablations
from claims import AT, CLAIMS, NARROW, TEACHER, Contrast, Finding, examine
from nestlm.config.compose import build, compose
from nestlm.config.groups import CONF
from nestlm.pipeline.checks import check
from nestlm.pipeline.settings import Settings
from nestlm.report.comparison import compare
from nestlm.spec import Budget
from runs import run

ABLATION = CONF / "experiment" / "ablation"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(ABLATION.iterdir())
    if folder.name != "shared"
}
ROWS = [(group, row) for group, rows in GROUPS.items() for row in rows]
SIZES = ("100", "78", "67", "56", "45")


def row_of(group: str, row: str) -> dict:
    return compose([f"+experiment/ablation/{group}={row}"])


@pytest.mark.parametrize(("group", "row"), ROWS, ids="/".join)
def test_a_row_is_sound(group, row):
    config = row_of(group, row)
    assert config["experiment_name"] == f"ablation/{group}", "its table lies in the group's folder"
    assert config["label"]
    assert config["model"]["hidden_size"] == 64, "all rows train one model"
    check(build(config))


@pytest.mark.parametrize("group", GROUPS)
def test_rows_of_a_group_can_stand_in_one_table(group):
    """No two rows answer one budget under one label."""
    configs = [row_of(group, row) for row in GROUPS[group]]
    cells = Counter(
        (config["label"], budget)
        for config in configs
        for budget in (config["budget"] if isinstance(config["budget"], list) else [config["budget"]])
    )
    assert set(cells.values()) == {1}


def test_baselines_have_the_sizes_and_tokens_that_they_are_held_against():
    nested = build(row_of("baseline", "nested_uniform"))
    assert [str(budget) for budget in nested.budgets] == ["1", *NARROW]
    for size, budget in zip(SIZES, nested.budgets, strict=True):
        widths = chosen(nested, budget)
        for kind in ("scratch", "pruned"):
            if (kind, size) == ("pruned", "100"):
                continue
            single = build(row_of("baseline", f"{kind}_{size}"))
            assert single.budgets == (budget,)
            assert chosen(single, budget) == widths, "the nested model's sub-network has the same size"
            assert single.space().smallest().widths_by_axis() == widths, (
                "the size that is trained is the size that is scored"
            )
        if size != "100":
            share = nested.prices().main.share(nested.make_router().find(budget, calibration=None).spec)
            assert 0 < float(str(budget)) - share < 0.01, "who may choose freely spends hardly more"
    tokens = {kind: row_of("baseline", f"{kind}_78")["elastic"]["steps"] for kind in ("scratch", "pruned")}
    assert tokens["scratch"] == nested.pretrain.steps + nested.elastic.steps
    assert abs(4 * tokens["pruned"] - nested.elastic.steps) <= 2
    assert nested.elastic.steps / nested.pretrain.steps == pytest.approx(0.0763, abs=1e-4)


def chosen(settings: Settings, budget: Budget) -> dict[str, list[int]]:
    """The widths of the sub-network that equal fractions give for a budget."""
    spec = settings.make_router().find(budget, calibration=None).spec
    assert spec is not None
    return spec.widths_by_axis()


# What the rows of a group may differ in from what all rows share, besides what they are called.
MAY_DIFFER = {
    "axes": {"axes", "budget"},
    "ranking": {"ranking"},
    "teacher": {"teacher"},
    "sampler": {"sampler"},
    "router": {"router"},
    "signal": {"router"},
    "policy": {"router"},
    "surrogate": {"router"},
    "joint": {"router", "joint", "elastic"},
    "tokens": {"elastic"},
    "rate": {"elastic", "sampler"},
}
# An option that the row's name begins with, and the section whose option it is.
NAMED = {"ranking": "ranking", "sampler": "sampler", "router": "router", "signal": "router", "policy": "router"}


@pytest.mark.parametrize(("group", "row"), [each for each in ROWS if each[0] != "baseline"], ids="/".join)
def test_a_row_changes_what_its_group_is_about(group, row):
    config, base = row_of(group, row), row_of("baseline", "nested")
    differing = {name for name in config if config[name] != base[name]}
    assert differing <= MAY_DIFFER[group] | {"label", "experiment_name"}
    if group in NAMED:
        option = row.split("_")[0]
        expected = compose([f"{NAMED[group]}={option}"])[NAMED[group]]
        for key in {"_target_", "name"} & set(expected):
            assert config[NAMED[group]][key] == expected[key]


def test_every_group_is_run():
    assert set(ablations.GROUPS) == set(GROUPS)


def test_every_claim_names_rows_that_exist():
    labels = {group: {row_of(group, row)["label"] for row in rows} for group, rows in GROUPS.items()}
    for contrast in (contrast for contrasts in CLAIMS.values() for contrast in contrasts):
        assert contrast.row in labels[contrast.group]
        assert contrast.than in labels[contrast.group] | {TEACHER}


@pytest.mark.parametrize(
    ("differences", "slack", "verdict"),
    [
        ((-0.010, -0.012, -0.011), 0.0, "holds"),
        ((0.010, 0.012, 0.011), 0.0, "does not hold"),
        ((0.010, 0.012, 0.011), 0.02, "holds"),
        ((-0.010, 0.012, -0.011), 0.0, "undecided at this scale"),
        ((-0.010, -0.050, -0.011), 0.0, "undecided at this scale"),  # all below, but too far apart for three seeds
        ((-0.010,), 0.0, "undecided at this scale"),
    ],
)
def test_verdicts(differences, slack, verdict):
    mean = pd.Series(differences)
    assert Finding({}, mean, slack).verdict == verdict


def test_an_adaptive_row_that_never_decides_shows_nothing():
    runs = [
        run(name, seed, dict.fromkeys(NARROW, loss))
        for seed in (0, 1, 2)
        for name, loss in (("value", 2.0), ("knapsack", 3.0))
    ]
    contrast = Contrast("policy", "value", "knapsack", adaptive=True)
    assert examine(contrast, {"policy": compare(runs)}).verdict == "undecided at this scale"
    for spec in runs[0].specs:
        spec["plan"] = {"price": 1.0}
    finding = examine(contrast, {"policy": compare(runs)})
    assert (finding.decided, finding.verdict) == (len(NARROW), "holds")


def test_rows_are_subtracted_seed_by_seed():
    """Seeds' teachers differ by 1.0; the rows by 0.1 alone."""
    runs = [
        run(name, seed, {"1": 3.0 + seed, **dict.fromkeys(NARROW, 3.0 + seed + worse)})
        for seed in (0, 1, 2)
        for name, worse in (("knapsack", 0.0), ("value", 0.1))
    ]
    tables = {"router": compare(runs)}
    finding = examine(Contrast("router", "knapsack", "value"), tables)
    assert finding.mean.mean() == pytest.approx(-0.1)
    assert finding.mean.std() == pytest.approx(0.0)
    assert finding.slack == 0
    against_teacher = examine(Contrast("router", "value", TEACHER, AT, ("1",)), tables)
    assert against_teacher.by_budget["1"].to_dict() == {0: 0.0, 1: 1.0, 2: 2.0}, "its teachers' losses are 3"
    assert against_teacher.slack == pytest.approx(0.015)
