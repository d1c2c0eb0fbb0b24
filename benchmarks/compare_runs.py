"""Put runs that differ in a few settings and in the seed into one Markdown table: mean and spread over seeds.

python benchmarks/compare_runs.py runs/routers router.name router.policy
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from nestlm.report.tables import markdown_table, read_csv


def setting(config: dict[str, Any], key: str) -> str:
    """The value of a dotted key; the last part of a class's path; empty where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def table(folder: Path, keys: list[str]) -> str:
    """Rows by the keys, columns by budget: validation loss as mean ± standard deviation, and the number of seeds.

    A cell ends in * where a sequence of some seed ended above its budget, which is a share of the run's cost.
    """
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for results in sorted(folder.glob("*/results.csv")):
        config = yaml.safe_load((results.parent / "config.yaml").read_text())
        label = tuple(setting(config, key) for key in keys)
        for row in read_csv(results):
            own = row["router"] != "uniform" or config["router"]["name"] == "uniform"
            group = label if own else (*["uniform"] * min(1, len(label)), *[""] * (len(label) - 1))
            if not any(seen["seed"] == row["seed"] for seen in cells[group][str(row["budget"])]):
                cells[group][str(row["budget"])].append(row)
    budgets = sorted({budget for row in cells.values() for budget in row}, key=lambda text: (len(text) > 4, text))[::-1]
    rows = []
    for label, found in sorted(cells.items()):
        seeds = max(len(runs) for runs in found.values())
        rows.append([*label, *(cell(found[budget], budget) for budget in budgets), str(seeds)])
    return markdown_table([*keys, *budgets, "seeds"], rows)


def cell(runs: list[dict[str, Any]], budget: str) -> str:
    """One budget of one row."""
    if not runs:
        return ""
    losses = [run["val_loss"] for run in runs]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    achieved = statistics.mean(run["achieved"] for run in runs)
    over = any(run["worst"] > float(budget) for run in runs) if budget.replace(".", "").isdigit() else False
    return f"{statistics.mean(losses):.4f}{spread} ({achieved:.3f}){'*' if over else ''}"


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), sys.argv[2:]))
