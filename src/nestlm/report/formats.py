"""Format a comparison as Markdown, CSV and LaTeX."""

from __future__ import annotations

from typing import Any

import pandas as pd

from nestlm.report.comparison import METRICS, Comparison
from nestlm.report.tables import markdown_table


def caption(comparison: Comparison) -> str:
    """Describe what the cells, columns and bold type of the table mean."""
    costs = " or ".join(dict.fromkeys(group.cost for group in comparison.groups))
    total = len(comparison.seeds)
    return (
        f"Cells: {METRICS[comparison.metric].heading}, mean ± standard deviation over seeds, (n of {total}) where some "
        f"are missing. Columns: budgets, of the full model's {costs} where no unit is given. Bold: best of a column."
    )


def is_bold(comparison: Comparison) -> pd.DataFrame:
    """Tell which cells of `Comparison.texts` are bold: the best of each budget's column, never keys and seeds."""
    best = comparison.best.reindex(columns=comparison.headings, fill_value=False)
    best.iloc[:, : len(comparison.keys)] = False  # a key may have the name of a budget
    return best


def to_markdown(comparison: Comparison) -> str:
    """Return the table, its caption and its notes as Markdown text."""
    texts, bold = comparison.texts.replace(r"\|", r"\\|", regex=True), is_bold(comparison)
    table = texts.mask(bold, "**" + texts + "**")
    parts = [markdown_table(list(table.columns), table.to_numpy().tolist()), caption(comparison), *comparison.notes]
    return "\n\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Return the cells as CSV text, one line for each cell, with numbers in full precision."""
    cells = comparison.cells.reset_index()
    labels = pd.DataFrame([comparison.groups[row].label for row in cells["row"]], columns=list(comparison.keys))
    seeds = comparison.answers.groupby(["row", "budget"], sort=False)["seed"]
    missing = [" ".join(map(str, sorted(comparison.seeds - set(each)))) for _, each in seeds]
    numbers = cells.drop(columns="row").rename(columns={"is_marked": "marked"})
    numbers.insert(4, "missing_seeds", missing)
    return pd.concat([labels, numbers], axis=1).to_csv(index=False, lineterminator="\n")


def to_latex(comparison: Comparison) -> str:
    r"""Return the table as LaTeX text for `\usepackage{booktabs}`, with caption and notes as comments."""
    bold = is_bold(comparison).replace({True: r"textbf:--rwrap;", False: ""})
    style: Any = comparison.texts.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    columns = "l" * len(comparison.keys) + "r" * (len(comparison.budgets) + 1)
    table = style.apply(lambda _: bold, axis=None).to_latex(hrules=True, column_format=columns)
    comments = "".join(f"% {note}\n" for note in (caption(comparison), *comparison.notes))
    return comments + table.replace("±", r"$\pm$")
