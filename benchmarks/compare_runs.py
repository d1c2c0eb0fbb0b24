"""Put runs that differ in a few settings and in the seed into one Markdown table: mean and spread over seeds.

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


def table(folder: Path, keys: list[str]) -> str:
    """Rows by the keys, columns by budget.

    A cell is the validation loss, mean ± standard deviation over seeds, then what was used of the budget's cost and of
    the whole model's time. It ends in * where a sequence of some seed ended above its budget.
    """
    cells: dict[tuple[str, ...], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for results in sorted(folder.glob("*/results.csv")):
        config = yaml.safe_load((results.parent / "config.yaml").read_text())
        asked = read_csv(results)[-1]["router"]  # the run's own comes last, after the uniform baseline
        label = tuple(setting(config, key) for key in keys)
        for budget, outcome in outcomes(results.parent, router=asked).items():
            cells[label][budget].append(outcome)
    budgets = list(dict.fromkeys(budget for row in cells.values() for budget in row))
    rows = []
    for label, found in sorted(cells.items()):
        seeds = {outcome.seed for runs in found.values() for outcome in runs}
        searched = [run.find_seconds for runs in found.values() for run in runs if run.achieved < 1.0]
        find = f"{1e3 * statistics.median(searched):.3g} ms" if searched else ""
        rows.append([*label, *(cell(found[budget], budget) for budget in budgets), find, str(len(seeds))])
    return markdown_table([*keys, *budgets, "find", "seeds"], rows)


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
    print(table(Path(sys.argv[1]), sys.argv[2:]))
