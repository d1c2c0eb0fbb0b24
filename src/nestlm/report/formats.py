"""A comparison in the forms that people take away: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable

from nestlm.report.comparison import METRICS, Comparison, Line
from nestlm.report.tables import markdown_table

LATEX_SPECIAL = re.compile(r"([&%$#_{}])")


def headings(comparison: Comparison) -> list[str]:
    """Of the keys, the budgets and the number of seeds. A key is its last part, where that tells it from the others."""
    last = [key.removesuffix("._target_").rpartition(".")[2] for key in comparison.keys]
    keys = [short if last.count(short) == 1 else key for short, key in zip(last, comparison.keys, strict=True)]
    return [*keys, *comparison.budgets, "seeds"]


def caption(comparison: Comparison) -> str:
    """What the cells hold."""
    costs = " or ".join(dict.fromkeys(line.cost for line in comparison.lines))
    total = len(comparison.seeds)
    return (
        f"Cells: {METRICS[comparison.metric].heading}, mean ± standard deviation over seeds, (n of {total}) where some "
        f"are missing. Columns: budgets, of the full model's {costs} where no unit is given. Bold: best of a column."
    )


def texts(comparison: Comparison, line: Line, *, bold: Callable[[str], str]) -> list[str]:
    """The cells of a row."""
    cells = []
    for budget in comparison.budgets:
        text = comparison.text(line, budget)
        cells.append(bold(text) if comparison.is_best(line, budget) else text)
    return [*line.label, *cells, str(len(line.seeds))]


def to_markdown(comparison: Comparison) -> str:
    """The table, what it holds, and what a reader must know."""
    rows = [
        [cell.replace("|", "\\|") for cell in texts(comparison, line, bold="**{}**".format)]
        for line in comparison.lines
    ]
    parts = [markdown_table(headings(comparison), rows), caption(comparison), *comparison.notes]
    return "\n\n".join(parts) + "\n"


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
    width = len(comparison.keys)
    rows = [
        r"\begin{tabular}{" + "l" * width + "r" * (len(comparison.budgets) + 1) + "}",
        r"\toprule",
        " & ".join(map(latex, headings(comparison))) + r" \\",
        r"\midrule",
        *(
            " & ".join(map(latex, texts(comparison, line, bold="\\textbf{{{}}}".format))) + r" \\"
            for line in comparison.lines
        ),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(f"% {note}" for note in (caption(comparison), *comparison.notes)) + "\n" + "\n".join(rows) + "\n"


def latex(text: str) -> str:
    """Text as LaTeX prints it; a cell in bold stays one."""
    inner = re.fullmatch(r"\\textbf\{(.*)\}", text)
    if inner:
        return rf"\textbf{{{latex(inner.group(1))}}}"
    return LATEX_SPECIAL.sub(r"\\\1", text).replace("±", r"$\pm$")
