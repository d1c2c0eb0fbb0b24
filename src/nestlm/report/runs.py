"""Read finished runs from their folders."""

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
    """Read a run's provenance.json. Raises DataError if the folder holds no finished run, or the file is damaged."""
    if not is_finished(folder):
        check_record(folder)
    content = read_json(folder / PROVENANCE, cure=CURE)
    for name in ("commit", "threads", "data_fingerprint"):
        if name not in content:
            raise DataError(f"{folder / PROVENANCE} is damaged: it lacks {name}; {CURE}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Read the resolved settings of a run as plain values. Raises DataError if the file is damaged."""
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
    """The content of a finished run's folder.

    Attributes:
        folder: the folder.
        config: the resolved settings.
        results: a row for each router and budget, as in results.csv. In addition, `time` is the time of a forward pass
            divided by that of the whole model, and `find` the seconds that the router took to find its answer.
        metrics: content of metrics.json, by stage.
        specs: the sub-network or plan that the run's own router chose, a mapping for each budget.
        provenance: content of provenance.json.
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
        """Check the files of a run's folder against its record, and read them.

        Raises:
            DataError: the folder holds no finished run, or its files were changed or are damaged.
        """
        check_record(folder)
        with damaged_file_errors(folder, cure=CURE):
            return cls.from_files(folder)

    @classmethod
    def from_files(cls, folder: Path) -> RunResults:
        """Read the files of a run's folder without checking its record."""
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
        """The seed of all random draws of the run."""
        return self.config["seed"]

    @property
    def own_rows(self) -> list[Row]:
        """The results of the run's own router, without those of the baseline `uniform`."""
        return [row for row in self.results if row["router"] == self.specs[0]["router"]]


def find_runs(places: Iterable[Path]) -> list[RunResults]:
    """Read all finished runs in some folders, below them, or linked from them as in a sweep's folder.

    Returns:
        Each run once, sorted by path.

    Raises:
        DataError: a folder does not exist or holds no finished run, or a run is damaged.
    """
    folders: dict[Path, Path] = {}  # paths as found, by the path that links lead to
    for place in places:
        found = {path.parent for pattern in (f"**/{PROVENANCE}", f"*/{PROVENANCE}") for path in place.glob(pattern)}
        if not found:
            raise DataError(f"{place}: holds no finished run; wanted a run's folder, or one with runs in it")
        for folder in sorted(found):
            folders.setdefault(folder.resolve(), folder)
    return [RunResults.read(folder) for folder in sorted(folders.values())]
