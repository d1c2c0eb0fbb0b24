"""Put runs that differ in a few settings and in the seed into Markdown tables: mean and spread over seeds.

python benchmarks/compare_runs.py runs/routers cost._target_ router.name router.policy
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nestlm.report.tables import markdown_table, read_csv

AGAINST = "knapsack"  # the router whose losses are subtracted in the second table


@dataclass(frozen=True)
class Outcome:
    """One router's answer to one budget in one run."""

    seed: int
    loss: float
    achieved: float
    worst: float
    find_seconds: float
    time: float

    def is_above(self, budget: str) -> bool:
        """Whether a sequence cost more than the budget, where that is a share of the run's cost."""
        return budget.replace(".", "").isdigit() and self.worst > float(budget)


def setting(config: dict[str, Any], key: str) -> str:
    """The value of a dotted key; the last part of a class's path; empty where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def outcomes(run: Path, *, router: str) -> dict[str, Outcome]:
    """What a router of a run reached, by budget. Times are shares of the whole model's, measured end to end."""
    seconds = {row["what"]: row["seconds"] for row in read_csv(run / "timings.csv")}
    return {
        str(row["budget"]): Outcome(
            row["seed"],
            row["val_loss"],
            row["achieved"],
            row["worst"],
            seconds[f"find {row['router']} {row['budget']}"],
            seconds[f"forward {row['router']} {row['budget']}"] / seconds["forward full"],
        )
        for row in read_csv(run / "results.csv")
        if row["router"] == router
    }


Cells = dict[tuple[str, ...], dict[str, list[Outcome]]]


def gather(folder: Path, keys: list[str]) -> Cells:
    """Outcomes of all runs in a folder, by the values of the keys and by budget."""
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for results in sorted(folder.glob("*/results.csv")):
        config = yaml.safe_load((results.parent / "config.yaml").read_text())
        asked = read_csv(results)[-1]["router"]  # the run's own comes last, after the uniform baseline
        label = tuple(setting(config, key) for key in keys)
        for budget, outcome in outcomes(results.parent, router=asked).items():
            cells[label][budget].append(outcome)
    return cells


def table(cells: Cells, keys: list[str]) -> str:
    """Rows by the keys, columns by budget.

    A cell is the validation loss, mean ± standard deviation over seeds, then what was used of the budget's cost and of
    the whole model's time. It ends in * where a sequence of some seed ended above its budget.
    """
    budgets = budgets_of(cells)
    rows = []
    for label, found in sorted(cells.items()):
        seeds = {outcome.seed for runs in found.values() for outcome in runs}
        searched = [run.find_seconds for runs in found.values() for run in runs if run.achieved < 1.0]
        find = f"{1e3 * statistics.median(searched):.3g} ms" if searched else ""
        rows.append([*label, *(cell(found[budget], budget) for budget in budgets), find, str(len(seeds))])
    return markdown_table([*keys, *budgets, "find", "seeds"], rows)


def differences(cells: Cells, keys: list[str], *, against: str) -> str:
    """Loss less that of a router at the same seed, mean ± standard deviation over seeds: teachers differ, this less."""
    budgets, rows = budgets_of(cells), []
    others = [number for number, key in enumerate(keys) if not key.startswith("router.")]
    for label, found in sorted(cells.items()):
        same = [
            base
            for base in cells
            if against in base and all(base[number] == label[number] for number in others) and base != label
        ]
        for base in same:
            rows.append([*label, *(difference(found[budget], cells[base][budget]) for budget in budgets)])
    return markdown_table([*keys, *budgets], rows)


def difference(runs: list[Outcome], base: list[Outcome]) -> str:
    """One budget of one row."""
    losses = {run.seed: run.loss for run in base}
    found = [run.loss - losses[run.seed] for run in runs if run.seed in losses]
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.4f}{spread}" if found else ""


def budgets_of(cells: Cells) -> list[str]:
    """All budgets, in the order of the runs."""
    return list(dict.fromkeys(budget for row in cells.values() for budget in row))


def cell(runs: list[Outcome], budget: str) -> str:
    """One budget of one row."""
    if not runs:
        return ""
    losses = [run.loss for run in runs]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    achieved, time = (
        statistics.mean(values) for values in zip(*((run.achieved, run.time) for run in runs), strict=True)
    )
    above = "*" if any(run.is_above(budget) for run in runs) else ""
    return f"{statistics.mean(losses):.4f}{spread} ({achieved:.3f}, {time:.2f}){above}"


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    compared = gather(Path(folder), names)
    print(table(compared, names))
    if any(AGAINST in label for label in compared):
        print("\n" + differences(compared, names, against=AGAINST))
