"""Make the tables of docs/results: losses over seeds with their costs, and their differences to the knapsack's losses.

python benchmarks/compare_runs.py runs/routers cost._target_ router.name router.policy
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from nestlm.report.comparison import Cell, Comparison, Line, compare, number
from nestlm.report.runs import RunResults, find_runs
from nestlm.report.tables import markdown_table

AGAINST = "knapsack"  # the router whose losses are subtracted in the second table


def table(runs: list[RunResults], keys: list[str]) -> str:
    """Return a table with a row for each combination of the keys and a column for each budget.

    A cell is the validation loss, mean ± standard deviation over seeds, then what was used of the budget's cost and of
    the whole model's time. It ends in * where a sequence of some seed ended above its budget.
    """
    losses, times, worsts, finds = (
        compare(runs, keys=keys, metric=metric, force=True) for metric in ("val_loss", "time", "worst", "find")
    )
    rows = []
    for loss, time, worst, find in zip(losses.lines, times.lines, worsts.lines, finds.lines, strict=True):
        cells = []
        for budget in losses.budgets:
            text = losses.text(loss, budget)
            if text:
                text += f" ({loss.achieved[budget].mean:.3f}, {time.cells[budget].mean:.2f})"
                text += "*" if is_above(worst.cells[budget], budget) else ""
            cells.append(text)
        searched = [
            seconds
            for budget, cell in find.cells.items()
            for seed, seconds in cell.by_seed.items()
            if loss.achieved[budget].by_seed[seed] < 1.0
        ]
        found = f"{1e3 * statistics.median(searched):.3g} ms" if searched else ""
        rows.append([*loss.label, *cells, found, str(len(loss.seeds))])
    headings = losses.headings()
    return "\n\n".join([markdown_table([*headings[:-1], "find", headings[-1]], rows), *losses.notes])


def is_above(worst: Cell, budget: str) -> bool:
    """Tell whether any sequence cost more than the budget, where the budget is a share of the run's cost."""
    share = number(budget)
    return share is not None and max(worst.by_seed.values()) > share


def differences(losses: Comparison) -> str:
    """Return mean ± standard deviation over seeds of the loss minus another router's loss at the same seed."""
    others = [place for place, key in enumerate(losses.keys) if not key.startswith("router.")]
    rows = [
        [*line.label, *(difference(line, base, budget) for budget in losses.budgets)]
        for line in losses.lines
        for base in losses.lines
        if AGAINST in base.label and base != line and all(base.label[place] == line.label[place] for place in others)
    ]
    return markdown_table(losses.headings()[:-1], rows) if rows else ""


def difference(line: Line, base: Line, budget: str) -> str:
    """Return that difference for one budget of one row."""
    if budget not in line.cells or budget not in base.cells:
        return ""
    return line.cells[budget].less(base.cells[budget].by_seed).signed


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    found = find_runs([Path(folder)])
    print(table(found, names))
    print("\n" + differences(compare(found, keys=names, force=True)))
