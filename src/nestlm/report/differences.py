"""Where a run and its repetition differ: in cells of results.csv, in specs, and in what their numbers come from."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from nestlm.report.tables import parse_number, read_csv
from nestlm.utils.nested_dict import flat_items

# What can explain that numbers differ, as in provenance.json; hashes are shown by their beginnings.
ORIGINS = ("commit", "python", "packages", "device", "threads", "data_fingerprint", "tokenizer")
HASHES, SHOWN_DIGITS = {"commit", "data_fingerprint", "tokenizer"}, 10


class ChangedCell(NamedTuple):
    """A cell of results.csv that is not what it was, as text."""

    router: str
    budget: str
    column: str
    then: str
    now: str

    @property
    def difference(self) -> float | None:
        """What was added; None where one of them is no number."""
        then, now = parse_number(self.then), parse_number(self.now)
        return None if then is None or now is None else now - then

    def is_within(self, tolerance: float) -> bool:
        """Whether the numbers differ by no more than that."""
        return self.difference is not None and abs(self.difference) <= tolerance


def changed_cells(then: Path, now: Path) -> list[ChangedCell]:
    """Cells of two runs' results that differ. Rows are matched by their order, which follows from the config."""
    found = []
    for old, new in zip_longest(read_text_rows(then), read_text_rows(now), fillvalue={}):
        row = new or old
        for column in dict.fromkeys([*new, *old]):
            before, after = old.get(column, ""), new.get(column, "")
            if before != after:
                found.append(ChangedCell(row.get("router", ""), row.get("budget", ""), column, before, after))
    return found


def read_text_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's results as they are written."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return [{str(key): str(cell) for key, cell in row.items()} for row in csv.DictReader(file, restval="")]


def changed_specs(then: Path, now: Path) -> list[str]:
    """Names of the files in specs/ that differ, or that only one of two runs has."""
    old, new = ({path.name: path.read_bytes() for path in (run / "specs").glob("*.json")} for run in (then, now))
    return sorted(name for name in old | new if old.get(name) != new.get(name))


def changed_origins(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two provenances, of that which both know, a line each."""
    old, new = dict(flat_items(dict(then))), dict(flat_items(dict(now)))
    lines = []
    for name in old:
        if name.partition(".")[0] in ORIGINS and name != "packages" and name in new and old[name] != new[name]:
            texts = [str(known[name])[: SHOWN_DIGITS if name in HASHES else None] for known in (old, new)]
            lines.append(f"{name}: {texts[0]} then, {texts[1]} now")
    changed = [when for when, known in (("then", then), ("now", now)) if known["dirty"]]
    return [*lines, *([f"code that was not committed: {' and '.join(changed)}"] if changed else [])]


def cached_stages(folder: Path) -> list[str]:
    """A line where stages of a run came from the cache, which does not know threads nor processors."""
    names = [row["what"] for row in read_csv(folder / "timings.csv") if row["cached"] and " " not in row["what"]]
    return [f"from the cache then, perhaps of other threads or another processor: {', '.join(names)}"] if names else []


def differences_table(cells: Sequence[ChangedCell]) -> Table:
    """Differing cells for the terminal."""
    table = Table()
    for index, heading in enumerate(("router", "budget", "column", "then", "now", "difference")):
        table.add_column(heading, justify="left" if index < 3 else "right")
    for cell in cells:
        table.add_row(*cell, "" if cell.difference is None else f"{cell.difference:+.3g}")
    return table
