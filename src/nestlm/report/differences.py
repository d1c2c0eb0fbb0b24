"""List differences between a run and its repetition: cells of results.csv, specs, and provenance."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from nestlm.report.tables import parse_number, read_csv
from nestlm.utils.nested_dict import flat_items

# Keys of provenance.json that can explain different numbers. Of hashes, only the first digits are shown.
ORIGINS = ("commit", "python", "packages", "device", "threads", "data_fingerprint", "tokenizer")
HASHES, SHOWN_DIGITS = {"commit", "data_fingerprint", "tokenizer"}, 10


class ChangedCell(NamedTuple):
    """A cell of results.csv that differs between a run (`then`) and its repetition (`now`), as text."""

    router: str
    budget: str
    column: str
    then: str
    now: str

    @property
    def difference(self) -> float | None:
        """`now` minus `then`; None if one of them is not a number."""
        then, now = parse_number(self.then), parse_number(self.now)
        return None if then is None or now is None else now - then

    def is_within(self, tolerance: float) -> bool:
        """Tell whether both are numbers and differ by at most `tolerance`."""
        return self.difference is not None and abs(self.difference) <= tolerance


def changed_cells(then: Path, now: Path) -> list[ChangedCell]:
    """Compare the results.csv of two run folders. Rows are matched by their order, which follows from the config."""
    found = []
    for old, new in zip_longest(read_text_rows(then), read_text_rows(now), fillvalue={}):
        row = new or old
        for column in dict.fromkeys([*new, *old]):
            before, after = old.get(column, ""), new.get(column, "")
            if before != after:
                found.append(ChangedCell(row.get("router", ""), row.get("budget", ""), column, before, after))
    return found


def read_text_rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a run's results.csv without parsing their cells."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return [{str(key): str(cell) for key, cell in row.items()} for row in csv.DictReader(file, restval="")]


def changed_specs(then: Path, now: Path) -> list[str]:
    """List the names of files in specs/ that differ between two run folders, or that only one of them has."""
    old, new = ({path.name: path.read_bytes() for path in (run / "specs").glob("*.json")} for run in (then, now))
    return sorted(name for name in old | new if old.get(name) != new.get(name))


def changed_origins(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List differences between two provenances, one line per key. Keys that only one of them has are left out."""
    old, new = dict(flat_items(dict(then))), dict(flat_items(dict(now)))
    lines = []
    for name in old:
        if name.partition(".")[0] in ORIGINS and name != "packages" and name in new and old[name] != new[name]:
            texts = [str(known[name])[: SHOWN_DIGITS if name in HASHES else None] for known in (old, new)]
            lines.append(f"{name}: {texts[0]} then, {texts[1]} now")
    changed = [when for when, known in (("then", then), ("now", now)) if known["dirty"]]
    return [*lines, *([f"code that was not committed: {' and '.join(changed)}"] if changed else [])]


def cached_stages(folder: Path) -> list[str]:
    """Return a line that names the stages of a run that came from the cache; no line if there are none.

    Cache keys contain neither the number of threads nor the processor, so such stages can explain a difference.
    """
    names = [row["what"] for row in read_csv(folder / "timings.csv") if row["cached"] and " " not in row["what"]]
    return [f"from the cache then, perhaps of other threads or another processor: {', '.join(names)}"] if names else []


def differences_table(cells: Sequence[ChangedCell]) -> Table:
    """Lay out differing cells as a table for the terminal."""
    table = Table()
    for index, heading in enumerate(("router", "budget", "column", "then", "now", "difference")):
        table.add_column(heading, justify="left" if index < 3 else "right")
    for cell in cells:
        table.add_row(*cell, "" if cell.difference is None else f"{cell.difference:+.3g}")
    return table
