"""A comparison in the forms that people take away: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re

from nestlm.report.comparison import METRICS, Comparison, Shown
from nestlm.report.tables import markdown_table

LATEX_SPECIAL = re.compile(r"([&%$#_{}])")


def caption(comparison: Comparison) -> str:
    """What the cells hold."""
    costs = " or ".join(dict.fromkeys(line.cost for line in comparison.lines))
    total = len(comparison.seeds)
    return (
        f"Cells: {METRICS[comparison.metric].heading}, mean ± standard deviation over seeds, (n of {total}) where some "
        f"are missing. Columns: budgets, of the full model's {costs} where no unit is given. Bold: best of a column."
    )


def to_markdown(comparison: Comparison) -> str:
    """The table, what it holds, and what a reader must know."""
    rows = [[markdown(cell) for cell in comparison.shown(line)] for line in comparison.lines]
    parts = [markdown_table(comparison.headings(), rows), caption(comparison), *comparison.notes]
    return "\n\n".join(parts) + "\n"


def markdown(cell: Shown) -> str:
    """A cell as Markdown shows it."""
    text = cell.text.replace("|", "\\|")
    return f"**{text}**" if cell.is_best else text


def to_csv(comparison: Comparison) -> str:
    """A line a cell, numbers in full: as programs like it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*comparison.keys, "budget", "mean", "std", "seeds", "missing_seeds", "achieved", "marked"])
    for line in comparison.lines:
        for budget, cell in line.cells.items():
            missing = " ".join(map(str, sorted(comparison.seeds - set(cell.by_seed))))
            deviation = "" if cell.deviation is None else cell.deviation
            seeds = len(cell.by_seed)
            achieved = line.achieved[budget].mean
            writer.writerow([*line.label, budget, cell.mean, deviation, seeds, missing, achieved, cell.is_marked])
    return file.getvalue()


def to_latex(comparison: Comparison) -> str:
    r"""A table for `\usepackage{booktabs}`."""
    columns = "l" * len(comparison.keys) + "r" * (len(comparison.budgets) + 1)
    headings = [latex(Shown(heading, heading)) for heading in comparison.headings()]
    rows = [[latex(cell) for cell in comparison.shown(line)] for line in comparison.lines]
    lines = [
        *(f"% {note}" for note in (caption(comparison), *comparison.notes)),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(headings) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex(cell: Shown) -> str:
    """A cell as LaTeX shows it."""
    text = LATEX_SPECIAL.sub(r"\\\1", cell.text).replace("±", r"$\pm$")
    return rf"\textbf{{{text}}}" if cell.is_best else text
