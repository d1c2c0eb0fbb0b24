"""Many runs as one table: what tells them apart, what is averaged, what is refused, and what comes out."""

import csv
import io
import re

import pandas as pd
import pytest

from nestlm.errors import ConfigError, DataError
from nestlm.report.comparison import compare, distinguishing_keys
from nestlm.report.formats import to_csv, to_latex, to_markdown
from nestlm.report.page import to_html
from nestlm.report.runs import RunResults
from runs import run

LOSSES = {
    ("knapsack", 0): {"0.8": 3.0, "0.5": 3.5},
    ("knapsack", 1): {"0.8": 3.2, "0.5": 3.7},
    ("a|b_c", 0): {"0.8": 3.3, "0.5": 3.1, "4GiB": 2.5},
}


@pytest.fixture
def runs() -> list[RunResults]:
    return [run(name, seed, losses) for (name, seed), losses in LOSSES.items()]


def test_cells_are_means_over_seeds(runs):
    comparison = compare(runs)
    assert comparison.keys == ("router.name",)
    assert comparison.budgets == ("0.8", "0.5", "4GiB")
    other, knapsack = 0, 1
    assert [group.label for group in comparison.groups] == [("a|b_c",), ("knapsack",)]
    assert comparison.cells.loc[(knapsack, "0.8"), "mean"] == pytest.approx(3.1)
    assert comparison.cells.loc[(knapsack, "0.8"), "std"] == pytest.approx(0.02**0.5)
    assert pd.isna(comparison.cells.loc[(other, "0.8"), "std"])
    assert comparison.texts.loc[knapsack, "0.8"] == "3.1000 ± 0.1414"
    assert comparison.texts.loc[knapsack, "4GiB"] == ""
    assert comparison.texts.loc[other, "0.8"] == "3.3000 (1 of 2)", "a cell that lacks a seed is marked"
    assert comparison.best.loc[knapsack].tolist() == [True, False, False]


def test_more_is_better_where_it_is(runs):
    for each in runs:
        for row in each.results:
            row["accuracy"] = 1.0 / row["val_loss"]
    comparison = compare(runs, metric="accuracy")
    assert comparison.best.loc[1, "0.8"]
    with pytest.raises(ConfigError, match="--metric: got 'los'"):
        compare(runs, metric="los")


def test_what_does_not_belong_together_is_refused_or_marked():
    one = run("knapsack", 0, {"0.8": 3.0})
    for name, value, named in (
        ("data_fingerprint", "other", "2 different texts"),
        ("tokenizer", "other", "2 different tokenizers"),
        ("dirty", True, "knapsack-1 ran code that was not committed"),
    ):
        mixed = [one, run("knapsack", 1, {"0.8": 3.4}, **{name: value})]
        with pytest.raises(DataError, match=named):
            compare(mixed)
        comparison = compare(mixed, force=True)
        assert comparison.texts.loc[0, "0.8"].endswith(" !")
        assert any(note.startswith("! ") for note in comparison.notes)
    assert compare([one, run("knapsack", 1, {"0.8": 3.4}, commit="fedcba")]).notes == (
        "commits: 12345678 (1 runs), fedcba (1 runs)",
    )


def test_one_cell_takes_one_run_a_seed(runs):
    with pytest.raises(ConfigError, match=r"both answer budget 0\.8 with seed 0"):
        compare([*runs, run("knapsack", 0, {"0.8": 9.0})])
    with pytest.raises(ConfigError, match=r"no run has a setting 'router\.nam'"):
        compare(runs, keys=["router.nam"])
    split = [run("knapsack", 0, {"0.8": 3.0}), run("knapsack", 0, {"0.5": 3.5})]
    assert set(compare(split).cells.loc[0].index) == {"0.8", "0.5"}, "budgets may come from runs of their own"


def test_the_fewest_settings_tell_runs_apart():
    configs = [
        {
            "seed": seed,
            "router.name": name,
            "router.network.seed": seed,
            "router.signal._target_": f"x.{name}",
            "a.b": b,
        }
        for seed in (0, 1)
        for name in ("value", "gumbel")
        for b in (1, 2)
    ]
    assert distinguishing_keys(configs) == ("router.name", "a.b")
    assert distinguishing_keys([config | {"label": "row"} for config in configs]) == ("label",)


def test_forms(runs):
    comparison = compare(runs)
    markdown = re.sub(" +", " ", to_markdown(comparison))  # columns are padded
    assert "| name | 0.8 | 0.5 | 4GiB | seeds |" in markdown
    assert "| knapsack | **3.1000 ± 0.1414** | 3.6000 ± 0.1414 | | 2 |" in markdown
    assert "| a\\|b_c | 3.3000 (1 of 2) | **3.1000 (1 of 2)** | **2.5000 (1 of 2)** | 1 |" in markdown
    latex = to_latex(comparison)
    assert r"knapsack & \textbf{3.1000 $\pm$ 0.1414} & 3.6000 $\pm$ 0.1414 &  & 2 \\" in latex
    assert r"a|b\_c" in latex
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    (cell,) = (row for row in rows if row["router.name"] == "knapsack" and row["budget"] == "0.5")
    assert (float(cell["mean"]), cell["seeds"], cell["missing_seeds"]) == (pytest.approx(3.6), "2", "")
    assert {row["missing_seeds"] for row in rows if row["router.name"] == "a|b_c"} == {"1"}


def test_the_page_needs_nothing_else(runs):
    page = to_html(compare(runs), title="<routers>")
    assert "&lt;routers&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/svg+xml") == 1
    assert page.count("data:image/png") == 2
    assert 'class=" best">3.1000 ± 0.1414' in page
    assert page.count("train.py seed=") == len(runs)


def test_nothing_is_held_against_an_untrained_teacher(runs):
    assert to_html(compare(runs), title="t").count("+0.1000") == len(runs)
    for each in runs:
        each.metrics["pretrain"]["tokens"] = 0
    assert "+0.1000" not in to_html(compare(runs), title="t")
