"""Compare many runs in one table: a row for each setting, a column for each budget, cells averaged over seeds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from nestlm.errors import ConfigError, DataError
from nestlm.report.runs import RunResults
from nestlm.report.tables import parse_number
from nestlm.utils.nested_dict import flat_items


class Metric(NamedTuple):
    """A column of results.csv that can be compared: its heading, its number format, and which direction is better."""

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
# Settings that never distinguish one method from another.
IRRELEVANT = {"run_dir", "cache_dir", "experiment_name", "checkpoint_seconds", "traceback", "budget", "logger"}


@dataclass(frozen=True)
class RunGroup:
    """Runs in one row of the table: they differ only in their seeds, or answer different budgets.

    Attributes:
        label: the values of the comparison's keys.
        runs: all runs of the row.
    """

    label: tuple[str, ...]
    runs: tuple[RunResults, ...]

    @property
    def name(self) -> str:
        """The label as one string."""
        return ", ".join(part for part in self.label if part)

    @property
    def seeds(self) -> set[int]:
        """The seeds of all runs."""
        return {run.seed for run in self.runs}

    @property
    def cost(self) -> str:
        """The kind of cost that the runs' budgets limit."""
        return self.runs[0].results[0]["cost"]


@dataclass(frozen=True)
class Comparison:
    """A table over runs: a row for each combination of settings, a column for each budget.

    Attributes:
        keys: the settings that distinguish the rows.
        metric: the compared metric, a key of METRICS.
        budgets: the columns.
        groups: the rows.
        answers: one record for each row, budget and seed: `row` is an index of `groups`, `value` the metric,
            `achieved` the cost that was reached, `is_marked` whether its cell mixes runs that should not be mixed.
        notes: warnings to print below the table.
    """

    keys: tuple[str, ...]
    metric: str
    budgets: tuple[str, ...]
    groups: tuple[RunGroup, ...]
    answers: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> set[int]:
        """The seeds of all runs. A cell that lacks one of them is marked in the table."""
        return set().union(*(group.seeds for group in self.groups))

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A record for each (row, budget), averaged over seeds.

        Columns: mean and sample standard deviation of the metric (NaN for one seed), number of seeds, mean achieved
        cost, and whether the cell is marked.
        """
        return self.answers.groupby(["row", "budget"], sort=False).agg(
            mean=("value", "mean"),
            std=("value", "std"),
            seeds=("seed", "nunique"),
            achieved=("achieved", "mean"),
            is_marked=("is_marked", "any"),
        )

    @cached_property
    def means(self) -> pd.DataFrame:
        """Mean of each cell: rows by budgets, NaN where a row has no answer."""
        means: Any = self.cells["mean"].unstack("budget")
        return means[list(self.budgets)]

    @property
    def best(self) -> pd.DataFrame:
        """Whether a cell is the best of its column: rows by budgets. All False where there is only one row."""
        extremes = self.means.max() if METRICS[self.metric].more_is_better else self.means.min()
        return self.means.eq(extremes) & (len(self.groups) > 1)

    @property
    def texts(self) -> pd.DataFrame:
        """The table as it is printed, under `headings`: cells hold the mean, the deviation and marks."""
        cells: Any = self.cells.apply(self.cell_text, axis=1).unstack("budget", fill_value="")
        table = pd.DataFrame([group.label for group in self.groups]).join(cells[list(self.budgets)])
        return table.assign(seeds=[str(len(group.seeds)) for group in self.groups]).set_axis(self.headings, axis=1)

    def cell_text(self, cell: Any) -> str:
        """Format one record of `cells`."""
        pattern = METRICS[self.metric].pattern
        parts = [pattern.format(cell["mean"])]
        if pd.notna(cell["std"]):
            parts.append(f"± {pattern.replace('+', '').format(cell['std'])}")
        if cell["seeds"] < len(self.seeds):
            parts.append(f"({cell['seeds']} of {len(self.seeds)})")
        return " ".join([*parts, "!"] if cell["is_marked"] else parts)

    @property
    def headings(self) -> list[str]:
        """Keys, budgets and "seeds". A key is shortened to its last part where that is unambiguous."""
        last = [key.removesuffix("._target_").rpartition(".")[2] for key in self.keys]
        keys = [short if last.count(short) == 1 else key for short, key in zip(last, self.keys, strict=True)]
        return [*keys, *self.budgets, "seeds"]

    def by_seed(self, group: RunGroup, budget: str, column: str = "value") -> pd.Series:
        """Return a column of `answers` for one row and budget, indexed by seed; empty if the row lacks the budget."""
        chosen = (self.answers["row"] == self.groups.index(group)) & (self.answers["budget"] == budget)
        answers: Any = self.answers[chosen]
        return answers.set_index("seed")[column]


def format_difference(by_seed: pd.Series) -> str:
    """Format differences over seeds as their signed mean ± sample deviation."""
    deviation: Any = by_seed.std()
    return f"{by_seed.mean():+.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


def compare(
    runs: Sequence[RunResults], *, keys: Sequence[str] = (), metric: str = "val_loss", force: bool = False
) -> Comparison:
    """Put finished runs into one table.

    Args:
        runs: the runs.
        keys: dotted settings whose values name the rows; without any, the fewest settings that tell the runs apart.
        metric: a key of METRICS.
        force: also mix runs of different texts, tokenizers or uncommitted code, and mark their cells.

    Raises:
        ConfigError: an unknown metric, a key that no run has, or two runs for one cell and seed.
        DataError: runs of different texts or tokenizers, or of uncommitted code.
    """
    if metric not in METRICS:
        raise ConfigError(f"--metric: got {metric!r}, wanted one of {', '.join(METRICS)}")
    settings = [flat_settings(run.config) for run in runs]
    for key in keys:
        if not any(key in each for each in settings):
            raise ConfigError(f"--by: no run has a setting {key!r}; wanted dotted names as in config.yaml")
    problems = find_mixing_problems(runs)
    if problems and not force:
        raise DataError(f"{'; '.join(problems)}: such runs are not put into one table, unless with --force")
    chosen = tuple(keys) or distinguishing_keys(settings)
    by_label: dict[tuple[str, ...], list[RunResults]] = defaultdict(list)
    for run, each in zip(runs, settings, strict=True):
        by_label[tuple(setting_name(key, each.get(key)) for key in chosen)].append(run)
    groups = tuple(RunGroup(label, tuple(by_label[label])) for label in sorted(by_label, key=label_order))
    answers = collect_answers(groups, metric=metric)
    notes = [f"! {problem}" for problem in problems]
    commits = Counter(str(run.provenance["commit"])[:8] for run in runs)
    if len(commits) > 1:
        notes.append("commits: " + ", ".join(f"{commit} ({count} runs)" for commit, count in commits.most_common()))
    budgets = sorted(answers["budget"].unique(), key=budget_order)
    return Comparison(chosen, metric, tuple(budgets), groups, answers, tuple(notes))


def collect_answers(groups: Sequence[RunGroup], *, metric: str) -> pd.DataFrame:
    """Collect the records of `Comparison.answers`.

    Raises:
        ConfigError: two runs of a row answer one budget with one seed.
    """
    runs = [(row, run) for row, group in enumerate(groups) for run in group.runs]
    answers = pd.DataFrame(
        [
            {
                "row": row,
                "budget": str(each["budget"]),
                "seed": run.seed,
                "value": each[metric],
                "achieved": each["achieved"],
                "run": number,
            }
            for number, (row, run) in enumerate(runs)
            for each in run.own_rows
        ]
    )
    cell = ["row", "budget"]
    repeated = answers[answers.duplicated([*cell, "seed"], keep=False)]
    if len(repeated):
        _, same = next(iter(repeated.groupby([*cell, "seed"], sort=False)))
        one, other = (runs[number][1].folder for number in same["run"][:2])
        budget, seed = same.iloc[0][["budget", "seed"]]
        raise ConfigError(
            f"{one} and {other} both answer budget {budget} with seed {seed}; "
            "tell them apart with --by KEY, or name fewer runs"
        )
    is_mixed = answers.groupby(cell)["run"].transform(lambda numbers: mixes(runs[each][1] for each in numbers))
    return answers.assign(is_marked=is_mixed.astype(bool)).drop(columns="run")


def mixes(runs: Any) -> bool:
    """Tell whether the numbers of these runs should not be averaged."""
    return bool(find_mixing_problems(list(runs)))


def find_mixing_problems(runs: Sequence[RunResults]) -> list[str]:
    """List reasons why the numbers of these runs should not stand in one table."""
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


def flat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a config into its settings by dotted name."""
    return {key: value for key, value in flat_items(config) if not isinstance(value, dict)}


def distinguishing_keys(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Choose settings, seeds excepted, whose values tell runs apart.

    Settings are tried from the outermost to the innermost; one is chosen if it separates runs that the chosen ones do
    not. If every run has a `label`, the label alone is chosen.
    """
    if all(each.get("label") for each in settings):
        return ("label",)
    names = dict.fromkeys(
        key for each in settings for key in each if key.split(".")[0] not in IRRELEVANT and key.split(".")[-1] != "seed"
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


def setting_name(key: str, value: Any) -> str:
    """Format a setting's value for a row label: a class by its own name, None as an empty string."""
    if value is None:
        return ""
    return str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def label_order(label: tuple[str, ...]) -> list[tuple[bool, float, str]]:
    """Return a sort key for labels: numbers by size, before names."""
    return [(parse_number(part) is None, parse_number(part) or 0.0, part) for part in label]


def budget_order(budget: str) -> tuple[bool, float]:
    """Return a sort key for budgets: shares first, the largest first, as in a run's own table."""
    return (parse_number(budget) is None, -(parse_number(budget) or 0.0))
