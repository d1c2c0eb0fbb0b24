"""Finished runs, as they lie in their folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nestlm.errors import DataError
from nestlm.report.record import CURE, PROVENANCE, check_record, is_finished
from nestlm.report.tables import Row, read_csv
from nestlm.utils.json_files import damaged_file_errors, read_json


def read_provenance(folder: Path) -> dict[str, Any]:
    """Where the numbers of a run come from. Raises DataError for a folder that is no finished run."""
    if not is_finished(folder):
        check_record(folder)
    content = read_json(folder / PROVENANCE, cure=CURE)
    for name in ("commit", "threads", "data_fingerprint"):
        if name not in content:
            raise DataError(f"{folder / PROVENANCE} is damaged: it lacks {name}; {CURE}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings of a run, as plain values. Raises DataError where they cannot be read."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: no YAML ({' '.join(str(error).split())[:100]}); {CURE}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: got a {type(config).__name__}, wanted the settings of a run; {CURE}")
    return config


@dataclass(frozen=True)
class RunResults:
    """What a run left behind.

    Attributes:
        folder: where.
        config: its resolved settings.
        results: a row a (router, budget); `time` is that of a forward pass over the whole model's, `find` the seconds
            that the answer took.
        metrics: what its stages measured.
        specs: what its own router chose, a mapping a budget.
        provenance: where its numbers come from.
        stages: whether each stage came from the cache, by name.
    """

    folder: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    specs: list[dict[str, Any]]
    provenance: dict[str, Any]
    stages: dict[str, bool]

    @classmethod
    def read(cls, folder: Path) -> RunResults:
        """The run of a folder.

        Raises:
            DataError: the folder is no finished run, its files are not those that the run wrote, or hold other values.
        """
        check_record(folder)
        with damaged_file_errors(folder, cure=CURE):
            return cls.from_files(folder)

    @classmethod
    def from_files(cls, folder: Path) -> RunResults:
        """Read the files of a run, whose record has been checked."""
        provenance = read_provenance(folder)
        results = read_csv(folder / "results.csv")
        timings = read_csv(folder / "timings.csv")
        seconds = {row["what"]: row["seconds"] for row in timings}
        for row in results:
            row["time"] = seconds[f"forward {row['router']} {row['budget']}"] / seconds["forward full"]
            row["find"] = seconds[f"find {row['router']} {row['budget']}"]
        metrics = read_json(folder / "metrics.json", cure=CURE)
        return cls(
            folder,
            read_config(folder),
            results,
            metrics,
            [read_json(path, cure=CURE) for path in sorted((folder / "specs").glob("*.json"))],
            provenance,
            {row["what"]: row["cached"] for row in timings if row["what"] in metrics},
        )

    @property
    def seed(self) -> int:
        """The seed that all its draws follow from."""
        return self.config["seed"]

    @property
    def own_rows(self) -> list[Row]:
        """The results of the router that was asked for, without the baseline's."""
        return [row for row in self.results if row["router"] == self.specs[0]["router"]]


def find_runs(places: Iterable[Path]) -> list[RunResults]:
    """All finished runs in or below some folders, or linked from them as a sweep's are, each once, sorted by path.

    Raises:
        DataError: a folder that does not exist, or holds no finished run.
    """
    folders: dict[Path, Path] = {}  # by what a link leads to
    for place in places:
        found = {path.parent for pattern in (f"**/{PROVENANCE}", f"*/{PROVENANCE}") for path in place.glob(pattern)}
        if not found:
            raise DataError(f"{place}: holds no finished run; wanted a run's folder, or one with runs in it")
        for folder in sorted(found):
            folders.setdefault(folder.resolve(), folder)
    return [RunResults.read(folder) for folder in sorted(folders.values())]
