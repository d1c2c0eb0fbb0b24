"""Write a comparison of runs to files, and print it."""

from __future__ import annotations

from pathlib import Path

from nestlm.report.comparison import Comparison
from nestlm.report.formats import to_csv, to_latex, to_markdown
from nestlm.report.page import to_html
from nestlm.utils.console import output


def write_comparison(comparison: Comparison, *, folder: Path, title: str) -> None:
    """Write comparison.md, .csv, .tex and .html into a folder, and print the table as Markdown.

    Args:
        comparison: the comparison.
        folder: the folder, created if it does not exist.
        title: title of the HTML page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    markdown = to_markdown(comparison)
    written = {
        "md": markdown,
        "csv": to_csv(comparison),
        "tex": to_latex(comparison),
        "html": to_html(comparison, title=title),
    }
    for ending, text in written.items():
        (folder / f"comparison.{ending}").write_text(text, encoding="utf-8")
    print(markdown)
    runs = [run for group in comparison.groups for run in group.runs]
    cached = [flag for run in runs for flag in run.stages.values()]
    output.print(f"{len(cached)} stages of {len(runs)} runs, {sum(cached)} of them from the cache")
    output.print(f"written: {folder}/comparison.{{{','.join(written)}}}", markup=False)
