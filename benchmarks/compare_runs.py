"""Make the tables of docs/results: losses over seeds with their costs, and their differences to the knapsack's losses.

python benchmarks/compare_runs.py runs/routers cost._target_ router.name router.policy
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from nestlm.report.comparison import Comparison, RunGroup, compare, format_difference
from nestlm.report.runs import RunResults, find_runs
from nestlm.report.tables import markdown_table, parse_number

AGAINST = "knapsack"  # the router whose losses are subtracted in the second table


def table(runs: list[RunResults], keys: list[str]) -> str:
    """Return a table with a row for each combination of the keys and a column for each budget.

    A cell is the validation loss, mean ± standard deviation over seeds, then what was used of the budget's cost and of
    the whole model's time. It ends in * where a sequence of some seed ended above its budget.
    """
    losses, times, worsts, finds = (
        compare(runs, keys=keys, metric=metric, force=True) for metric in ("val_loss", "time", "worst", "find")
    )
    texts, searched = losses.texts, finds.answers[finds.answers["achieved"] < 1.0].groupby("row")["value"].median()
    for row in range(len(losses.groups)):
        for column, budget in enumerate(losses.budgets, start=len(losses.keys)):
            if budget in losses.cells.loc[row].index:
                loss, time = losses.cells.loc[(row, budget)], times.cells.loc[(row, budget)]
                texts.iloc[row, column] += f" ({loss['achieved']:.3f}, {time['mean']:.2f})"
                texts.iloc[row, column] += "*" if is_above(worsts.by_seed(worsts.groups[row], budget), budget) else ""
    found = [f"{1e3 * searched[row]:.3g} ms" if row in searched else "" for row in range(len(losses.groups))]
    texts.insert(len(texts.columns) - 1, "find", found)
    return "\n\n".join([markdown_table(list(texts.columns), texts.to_numpy().tolist()), *losses.notes])


def is_above(worst: pd.Series, budget: str) -> bool:
    """Tell whether any sequence cost more than the budget, where the budget is a share of the run's cost."""
    share = parse_number(budget)
    return share is not None and bool(worst.max() > share)


def differences(losses: Comparison) -> str:
    """Return mean ± standard deviation over seeds of the loss minus another router's loss at the same seed."""
    others = [place for place, key in enumerate(losses.keys) if not key.startswith("router.")]
    rows = [
        [*group.label, *(difference(losses, group, base, budget) for budget in losses.budgets)]
        for group in losses.groups
        for base in losses.groups
        if AGAINST in base.label and base != group and all(base.label[place] == group.label[place] for place in others)
    ]
    return markdown_table(losses.headings[:-1], rows) if rows else ""


def difference(losses: Comparison, group: RunGroup, base: RunGroup, budget: str) -> str:
    """Return that difference for one budget of one row."""
    by_seed = (losses.by_seed(group, budget) - losses.by_seed(base, budget)).dropna()
    return format_difference(by_seed) if len(by_seed) else ""


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    found = find_runs([Path(folder)])
    print(table(found, names))
    print("\n" + differences(compare(found, keys=names, force=True)))
