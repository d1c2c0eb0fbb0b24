"""Many runs as one table: rows by settings, columns by budget, cells over seeds."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nestlm.errors import ConfigError, DataError
from nestlm.report.runs import RunResults
from nestlm.utils.nested_dict import flat_items


class Metric(NamedTuple):
    """What is compared: how it is called, how a number of it is printed, and whether more is better."""

    heading: str
    pattern: str = "{:.4f}"
    more_is_better: bool = False


METRICS = {
    "val_loss": Metric("validation loss, nats a token"),
    "loss_vs_full": Metric("loss above the full model's, nats a token", "{:+.4f}"),
    "perplexity": Metric("perplexity", "{:.3f}"),
    "bits_per_byte": Metric("bits per byte"),
    "accuracy": Metric("accuracy of the next token", more_is_better=True),
    "achieved": Metric("achieved cost, share of the full model's", more_is_better=True),
    "worst": Metric("cost of the dearest sequence, share of the full model's"),
    "time": Metric("time of a forward pass, share of the full model's", "{:.2f}"),
    "find": Metric("seconds to find the answer", "{:.3g}"),
}
# Settings that tell no method from another.
SILENT = {"run_dir", "cache_dir", "experiment_name", "checkpoint_seconds", "traceback", "budget", "logger"}


class Shown(NamedTuple):
    """What people see of a table's cell, what it is sorted by, and whether it is the best of its column."""

    text: str
    value: float | str
    is_best: bool = False


@dataclass(frozen=True)
class Cell:
    """One number over seeds.

    Attributes:
        by_seed: the number of each seed.
        is_marked: its runs should not be averaged, and were.
    """

    by_seed: Mapping[int, float]
    is_marked: bool = False

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None of one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def less(self, other: Mapping[int, float]) -> Cell:
        """What is left when another's numbers are subtracted seed by seed, of the seeds that both have."""
        return Cell({seed: number - other[seed] for seed, number in self.by_seed.items() if seed in other})

    @property
    def signed(self) -> str:
        """A difference and its spread, as people read it."""
        return f"{self.mean:+.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seeds alone, or answer different budgets.

    Attributes:
        label: the values of the keys.
        runs: all of them.
        cells: by budget.
        achieved: likewise, the cost that was reached.
    """

    label: tuple[str, ...]
    runs: tuple[RunResults, ...]
    cells: Mapping[str, Cell]
    achieved: Mapping[str, Cell]

    @property
    def name(self) -> str:
        """The label in one piece."""
        return ", ".join(part for part in self.label if part)

    @property
    def seeds(self) -> set[int]:
        """Of all its runs."""
        return {run.seed for run in self.runs}

    @property
    def cost(self) -> str:
        """What its budgets count."""
        return self.runs[0].results[0]["cost"]


@dataclass(frozen=True)
class Comparison:
    """A table over runs.

    Attributes:
        keys: the settings that lines differ in.
        metric: what cells hold, a key of METRICS.
        budgets: the columns.
        lines: the rows.
        notes: what a reader must know: runs that do not belong together, and were put together all the same.
    """

    keys: tuple[str, ...]
    metric: str
    budgets: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def seeds(self) -> set[int]:
        """Of all runs: a cell that lacks one is marked."""
        return set().union(*(line.seeds for line in self.lines))

    def best(self, budget: str) -> float:
        """The best mean of a column."""
        means = [line.cells[budget].mean for line in self.lines if budget in line.cells]
        return max(means) if METRICS[self.metric].more_is_better else min(means)

    def text(self, line: Line, budget: str) -> str:
        """A cell as people read it: mean, standard deviation, and marks."""
        cell = line.cells.get(budget)
        if cell is None:
            return ""
        pattern = METRICS[self.metric].pattern
        parts = [pattern.format(cell.mean)]
        if cell.deviation is not None:
            parts.append(f"± {pattern.replace('+', '').format(cell.deviation)}")
        if len(cell.by_seed) < len(self.seeds):
            parts.append(f"({len(cell.by_seed)} of {len(self.seeds)})")
        return " ".join([*parts, "!"] if cell.is_marked else parts)

    def is_best(self, line: Line, budget: str) -> bool:
        """Whether a cell is printed in bold."""
        cell = line.cells.get(budget)
        return cell is not None and len(self.lines) > 1 and cell.mean == self.best(budget)

    def headings(self) -> list[str]:
        """Keys, budgets, and the number of seeds. A key is its last part, where that tells it from the others."""
        last = [key.removesuffix("._target_").rpartition(".")[2] for key in self.keys]
        keys = [short if last.count(short) == 1 else key for short, key in zip(last, self.keys, strict=True)]
        return [*keys, *self.budgets, "seeds"]

    def shown(self, line: Line) -> list[Shown]:
        """A row under the headings."""
        cells = [
            Shown(
                self.text(line, budget),
                line.cells[budget].mean if budget in line.cells else "",
                self.is_best(line, budget),
            )
            for budget in self.budgets
        ]
        seeds = len(line.seeds)
        return [*(Shown(part, part) for part in line.label), *cells, Shown(str(seeds), seeds)]


def compare(
    runs: Sequence[RunResults], *, keys: Sequence[str] = (), metric: str = "val_loss", force: bool = False
) -> Comparison:
    """Put runs into one table.

    Args:
        runs: finished ones.
        keys: dotted settings whose values name the rows; none takes those that tell the runs apart.
        metric: a key of METRICS.
        force: put runs together that do not belong together, and mark their cells.

    Raises:
        ConfigError: an unknown metric, a key that no run has, or two runs for one cell and seed.
        DataError: runs of different text or tokenizers, or of uncommitted code.
    """
    if metric not in METRICS:
        raise ConfigError(f"--metric: got {metric!r}, wanted one of {', '.join(METRICS)}")
    settings = [leaves(run.config) for run in runs]
    for key in keys:
        if not any(key in each for each in settings):
            raise ConfigError(f"--by: no run has a setting {key!r}; wanted dotted names as in config.yaml")
    problems = differences(runs)
    if problems and not force:
        raise DataError(f"{'; '.join(problems)}: such runs are not put into one table, unless with --force")
    chosen = tuple(keys) or telling_keys(settings)
    groups: dict[tuple[str, ...], list[RunResults]] = defaultdict(list)
    for run, each in zip(runs, settings, strict=True):
        groups[tuple(named(key, each.get(key)) for key in chosen)].append(run)
    lines = tuple(make_line(label, group, metric=metric) for label, group in sorted(groups.items(), key=by_label))
    budgets = dict.fromkeys(budget for line in lines for budget in line.cells)
    notes = [f"! {problem}" for problem in problems]
    commits = Counter(str(run.provenance["commit"])[:8] for run in runs)
    if len(commits) > 1:
        notes.append("commits: " + ", ".join(f"{commit} ({count} runs)" for commit, count in commits.most_common()))
    return Comparison(chosen, metric, tuple(sorted(budgets, key=by_size)), lines, tuple(notes))


def make_line(label: tuple[str, ...], runs: Sequence[RunResults], *, metric: str) -> Line:
    """One row of a table."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    achieved: dict[str, dict[int, float]] = defaultdict(dict)
    by_budget: dict[str, list[RunResults]] = defaultdict(list)
    for run in runs:
        for row in run.own_rows:
            budget = str(row["budget"])
            if run.seed in values[budget]:
                other = next(each for each in by_budget[budget] if each.seed == run.seed)
                raise ConfigError(
                    f"{other.folder} and {run.folder} both answer budget {budget} with seed {run.seed}; "
                    "tell them apart with --by KEY, or name fewer runs"
                )
            values[budget][run.seed], achieved[budget][run.seed] = row[metric], row["achieved"]
            by_budget[budget].append(run)
    return Line(
        label,
        tuple(runs),
        {budget: Cell(cell, bool(differences(by_budget[budget]))) for budget, cell in values.items()},
        {budget: Cell(cell) for budget, cell in achieved.items()},
    )


def differences(runs: Sequence[RunResults]) -> list[str]:
    """Why the numbers of runs should not stand in one table."""
    found = []
    for name, called in (("data_fingerprint", "texts"), ("tokenizer", "tokenizers")):
        values = {run.provenance[name] for run in runs}
        if len(values) > 1:
            found.append(f"runs of {len(values)} different {called} ({', '.join(sorted(str(v)[:8] for v in values))})")
    dirty = [run.folder.name for run in runs if run.provenance["dirty"]]
    if dirty:
        others = f" and {len(dirty) - 1} others" if len(dirty) > 1 else ""
        found.append(f"{dirty[0]}{others} ran code that was not committed")
    return found


def leaves(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config by their dotted names."""
    return {key: value for key, value in flat_items(config) if not isinstance(value, dict)}


def telling_keys(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The fewest settings that tell runs apart, seeds aside: each divides what those before it left together.

    A label is all that is needed where every run has one.
    """
    if all(each.get("label") for each in settings):
        return ("label",)
    names = dict.fromkeys(
        key for each in settings for key in each if key.split(".")[0] not in SILENT and key.split(".")[-1] != "seed"
    )
    candidates = sorted(names, key=lambda key: (key.count("."), "_target_" in key))
    chosen: list[str] = []
    parts: list[tuple[str, ...]] = [()] * len(settings)
    for key in candidates:
        finer = [(*part, repr(each.get(key))) for part, each in zip(parts, settings, strict=True)]
        if len(set(finer)) > len(set(parts)):
            chosen.append(key)
            parts = finer
    return tuple(chosen) or ("router.name",)


def named(key: str, value: Any) -> str:
    """A setting's value as a row's name: of a class its own name; empty where there is none."""
    if value is None:
        return ""
    return str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def by_label(item: tuple[tuple[str, ...], Any]) -> list[tuple[bool, float, str]]:
    """Sorts labels as people do: numbers by size, before names."""
    return [(number(part) is None, number(part) or 0.0, part) for part in item[0]]


def by_size(budget: str) -> tuple[bool, float]:
    """Sorts budgets: shares first, the largest first, as a run does."""
    return (number(budget) is None, -(number(budget) or 0.0))


def number(text: str) -> float | None:
    """A text's value; None where it is no number."""
    try:
        return float(text)
    except ValueError:
        return None
