"""Read and write tables of results, and lay them out for terminals and Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nestlm.errors import DataError
from nestlm.report.record import CURE

Row = Mapping[str, Any]

# Shown columns: heading, key, format. `spread` is the standard deviation of the cost over sequences, `worst` the cost
# of the most expensive sequence, `time` the time of a forward pass, measured end to end, divided by the full model's.
SHOWN = (
    ("router", "router", "{}"),
    ("budget", "budget", "{}"),
    ("achieved", "achieved", "{:.4f}"),
    ("spread", "spread", "{:.4f}"),
    ("worst", "worst", "{:.4f}"),
    ("loss", "val_loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("accuracy", "accuracy", "{:.4f}"),
    ("vs full", "loss_vs_full", "{:+.4f}"),
    ("time", "time", "{:.2f}"),
)
HEADINGS = tuple(heading for heading, _, _ in SHOWN)
PAGE_ONLY = {"spread"}  # a terminal of 80 columns has no room for it


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV under the keys of the first row, with floats in full precision."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file that `write_csv` wrote.

    A column of numbers or truth values yields int, float or bool; an empty cell yields "", and a budget stays text.

    Raises:
        DataError: the file is damaged.
    """
    import pandas as pd  # takes 0.4 s, which training and start-up need not pay

    options = {"dtype_backend": "numpy_nullable", "index_col": False}
    try:
        frame = pd.read_csv(path, dtype={"budget": "string"}, keep_default_na=False, na_values=[""], **options)
    except ValueError as error:
        raise DataError(f"{path} is damaged: no table ({str(error)[:100]}); {CURE}") from error
    rows = frame.astype(object).where(frame.notna(), "").to_dict("records")
    return [{str(key): cell for key, cell in row.items()} for row in rows]


def parse_number(text: str) -> float | None:
    """Parse a number; None where the text is not one."""
    try:
        return float(text)
    except ValueError:
        return None


def format_cells(row: Row) -> list[str]:
    """Format the columns in SHOWN of one row of results, under HEADINGS."""
    return [pattern.format(row[key]) for _, key, pattern in SHOWN]


def terminal_table(rows: Sequence[Row], *, cost: str) -> Table:
    """Lay out a run's results as the table that the run prints at its end; `cost` is the kind of cost in its title."""
    table = Table(title=f"Costs as shares of the full model's {cost}", title_justify="left")
    kept = [index for index, heading in enumerate(HEADINGS) if heading not in PAGE_ONLY]
    for index in kept:
        table.add_column(HEADINGS[index], justify="right" if index else "left")
    for row in rows:
        shown = format_cells(row)
        table.add_row(*(shown[index] for index in kept))
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of formatted cells as a Markdown table."""
    from tabulate import tabulate

    return tabulate(rows, headers=headings, tablefmt="pipe", disable_numparse=True)
