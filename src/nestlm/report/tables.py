"""A run's results as rows, a terminal table and Markdown."""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nestlm.errors import DataError
from nestlm.report.record import CURE

Row = Mapping[str, Any]

# Shown columns: heading, key, format. `spread` is over sequences, `worst` is of the dearest one; `time` is that of a
# forward pass, measured end to end, over the whole model's.
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
    """Write rows under the keys of the first; floats in full."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows as `write_csv` wrote them, numbers and truth values as such. Raises DataError for a damaged file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: parse(cell) for key, cell in row.items()} for row in csv.DictReader(file, strict=True)]
    except (ValueError, TypeError, csv.Error, RecursionError, MemoryError) as error:
        raise DataError(f"{path} is damaged: no table ({str(error)[:100]}); {CURE}") from error


def parse(cell: str) -> Any:
    """A cell's value: a literal of Python, or else text."""
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return cell


def cells(row: Row) -> list[str]:
    """The shown cells of a result."""
    return [pattern.format(row[key]) for _, key, pattern in SHOWN]


def terminal_table(rows: Sequence[Row], *, cost: str) -> Table:
    """The table that a run ends with."""
    table = Table(title=f"Costs as shares of the full model's {cost}", title_justify="left")
    kept = [index for index, heading in enumerate(HEADINGS) if heading not in PAGE_ONLY]
    for index in kept:
        table.add_column(HEADINGS[index], justify="right" if index else "left")
    for row in rows:
        shown = cells(row)
        table.add_row(*(shown[index] for index in kept))
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
