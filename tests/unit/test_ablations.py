"""The ablations' rows say what they are, compose, and hold what their tables and the page of claims rest on."""

from collections import Counter

import pytest

from claims import AT, CLAIMS, NARROW, TEACHER, Contrast, Finding, examine
from nestlm.compose import CONF, build, compose
from nestlm.report.comparison import Cell, compare
from nestlm.settings import check
from runs import run

ABLATION = CONF / "experiment" / "ablation"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(ABLATION.iterdir())
    if folder.name != "shared"
}
ROWS = [(group, row) for group, rows in GROUPS.items() for row in rows]
SIZES = ("100", "80", "70", "60", "50")


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
    nested = row_of("baseline", "nested")
    for size in SIZES:
        scratch = row_of("baseline", f"scratch_{size}")
        settings = build(scratch)
        (budget,) = settings.budgets
        spec = settings.make_router().find(budget, trial=None).spec  # type: ignore[arg-type]
        assert spec == settings.space().smallest(), "the size that is trained is the size that is scored"
        assert int(size) / 100 - 0.012 < settings.prices().main.share(spec) <= int(size) / 100
        assert scratch["elastic"]["steps"] == nested["pretrain"]["steps"] + nested["elastic"]["steps"]
    pruned = [row_of("baseline", f"pruned_{size}") for size in SIZES[1:]]
    total = sum(config["elastic"]["steps"] for config in pruned)
    assert abs(total - nested["elastic"]["steps"]) < len(pruned)
    assert nested["elastic"]["steps"] / nested["pretrain"]["steps"] == pytest.approx(0.0763, abs=1e-4)
    for row, config in zip(SIZES[1:], pruned, strict=True):
        assert config["axes"] == row_of("baseline", f"scratch_{row}")["axes"]


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
    mean = Cell(dict(enumerate(differences)))
    assert Finding({}, mean, slack).verdict == verdict


def test_rows_are_subtracted_seed_by_seed():
    """Seeds' teachers differ by 1.0; the rows by 0.1 alone."""
    runs = [
        run(name, seed, {"1": 3.0 + seed, **dict.fromkeys(NARROW, 3.0 + seed + worse)})
        for seed in (0, 1, 2)
        for name, worse in (("knapsack", 0.0), ("value", 0.1))
    ]
    tables = {"router": compare(runs)}
    finding = examine(Contrast("router", "knapsack", "value"), tables)
    assert finding.mean.mean == pytest.approx(-0.1)
    assert finding.mean.deviation == pytest.approx(0.0)
    assert finding.slack == 0
    against_teacher = examine(Contrast("router", "value", TEACHER, AT, ("1",)), tables)
    assert against_teacher.by_budget["1"].by_seed == {0: 0.0, 1: 1.0, 2: 2.0}, "its teachers' losses are 3"
    assert against_teacher.slack == pytest.approx(0.015)
