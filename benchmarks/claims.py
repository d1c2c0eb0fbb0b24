"""docs/results/claims.md from the ablations' runs: what each claim of the paper measures here, and a verdict.

python benchmarks/claims.py runs/ablation > docs/results/claims.md
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from nestlm.report.comparison import Cell, Comparison, Line, compare
from nestlm.report.runs import find_runs
from nestlm.report.tables import markdown_table

TEACHER = "the teacher"
AT = 0.005  # "at" a loss is within this share of it
NARROW = ("0.78", "0.67", "0.56", "0.45")  # budgets that ask for less than the full model


class Contrast(NamedTuple):
    """One comparison that a claim rests on: `row` less `than`, labels of rows of an ablation group.

    Attributes:
        slack: how far above it may lie, as a share of `than`'s loss; 0 where it has to be better.
    """

    group: str
    row: str
    than: str
    slack: float = 0.0
    budgets: tuple[str, ...] = NARROW


CLAIMS: Mapping[str, tuple[Contrast, ...]] = {
    "Sorting helps": (Contrast("ranking", "activation", "none"), Contrast("ranking", "activation", "random")),
    "One run serves all budgets, at or below sizes pruned and distilled one by one on its tokens": (
        Contrast("baseline", "one elastic run, knapsack", "pruned and distilled one by one", AT),
        Contrast("baseline", "one elastic run, uniform", "pruned and distilled one by one", AT),
    ),
    "The full model keeps its quality": (Contrast("baseline", "one elastic run, knapsack", TEACHER, AT, ("1",)),),
    "Sub-networks are at or below the same size from scratch": (
        Contrast("baseline", "one elastic run, knapsack", "from scratch", AT),
        Contrast("baseline", "one elastic run, uniform", "from scratch", AT),
    ),
    "A learned router is better than uniform": (
        Contrast("router", "surrogate, static", "uniform"),
        Contrast("router", "surrogate, dynamic", "uniform"),
    ),
    "A surrogate is better than end-to-end gradients": (
        Contrast("router", "surrogate, static", "gumbel, static"),
        Contrast("router", "surrogate, dynamic", "gumbel, dynamic"),
    ),
    "Input-adaptive is better than static": (
        Contrast("policy", "surrogate, dynamic", "surrogate, static"),
        Contrast("policy", "value, dynamic", "value, static"),
    ),
    "Joint tuning helps": (
        Contrast("joint", "joint tuning", "no joint tuning"),
        Contrast("joint", "joint tuning", "no joint tuning, its tokens in elastic training"),
    ),
    "7.63 % of the tokens are enough: twice as many gain little": (
        Contrast("tokens", "7.63 %", "15.26 % (twice the paper's share)", AT),
    ),
}


@dataclass(frozen=True)
class Finding:
    """What a contrast came to: differences of losses by budget over seeds, their means, and the allowed slack."""

    by_budget: Mapping[str, Cell]
    mean: Cell
    slack: float

    @property
    def margin(self) -> float:
        """Half the width of the mean's 95 % confidence interval (Student's t over seeds)."""
        seeds = len(self.mean.by_seed)
        if self.mean.deviation is None:
            return float("inf")
        return float(student.ppf(0.975, seeds - 1)) * self.mean.deviation / seeds**0.5

    @property
    def verdict(self) -> str:
        """Whether the whole interval lies on one side of what is allowed."""
        if self.mean.mean + self.margin < self.slack:
            return "holds"
        if self.mean.mean - self.margin > self.slack:
            return "does not hold"
        return "undecided at this scale"


def examine(contrast: Contrast, tables: Mapping[str, Comparison]) -> Finding:
    """Losses of one row less those of the other, seed by seed: teachers differ from seed to seed, this less."""
    row = line_of(tables[contrast.group], contrast.row)
    reference = {
        budget: losses_of(tables[contrast.group], contrast.than, budget, row=row) for budget in contrast.budgets
    }
    by_budget = {
        budget: Cell({seed: loss - reference[budget][seed] for seed, loss in row.cells[budget].by_seed.items()})
        for budget in contrast.budgets
    }
    seeds = by_budget[contrast.budgets[0]].by_seed
    mean = Cell({seed: statistics.fmean(cell.by_seed[seed] for cell in by_budget.values()) for seed in seeds})
    losses = [loss for known in reference.values() for loss in known.values()]
    return Finding(by_budget, mean, contrast.slack * statistics.fmean(losses))


def line_of(table: Comparison, label: str) -> Line:
    """A row by its label."""
    return next(line for line in table.lines if line.label == (label,))


def losses_of(table: Comparison, label: str, budget: str, *, row: Line) -> Mapping[int, float]:
    """The losses by seed that a row is held against: another row's, or those of its own runs' teachers."""
    if label == TEACHER:
        return {run.seed: run.metrics["pretrain"]["val_loss"] for run in row.runs}
    return line_of(table, label).cells[budget].by_seed


def signed(cell: Cell) -> str:
    """A difference and its spread."""
    return f"{cell.mean:+.4f}" + ("" if cell.deviation is None else f" ± {cell.deviation:.4f}")


def page(folder: Path) -> str:
    """The whole page."""
    groups = dict.fromkeys(contrast.group for contrasts in CLAIMS.values() for contrast in contrasts)
    tables = {group: compare(find_runs([folder / group])) for group in groups}
    rows, details = [], []
    for claim, contrasts in CLAIMS.items():
        for contrast in contrasts:
            finding = examine(contrast, tables)
            allowed = f"{finding.slack:+.4f}" if contrast.slack else "0"
            interval = f"{finding.mean.mean - finding.margin:+.4f} to {finding.mean.mean + finding.margin:+.4f}"
            pair = f"{contrast.group}: {contrast.row} less {contrast.than}"
            rows.append([claim, pair, signed(finding.mean), interval, allowed, finding.verdict])
            cells = [signed(finding.by_budget[b]) if b in finding.by_budget else "" for b in ("1", *NARROW)]
            details.append([pair, *cells])
    seeds = sorted(set().union(*(table.seeds for table in tables.values())))
    commits = {
        str(run.provenance["commit"])[:8] for table in tables.values() for line in table.lines for run in line.runs
    }
    return PAGE.format(
        claims=markdown_table(("claim", "measured as", "mean over budgets", "95 %", "holds below", "verdict"), rows),
        details=markdown_table(("difference of losses", "1", *NARROW), details),
        seeds=", ".join(map(str, seeds)),
        commits=", ".join(sorted(commits)),
        share=f"{AT:.1%}",
    )


PAGE = """# The paper's claims, at the scale of a laptop

Generated by `python benchmarks/claims.py runs/ablation` from the runs of [the ablations](ablations.md):
`model=nano` on the default text, seeds {seeds}, commit {commits}. A model of 0.2M parameters refutes
nothing that was seen at 7B; it shows what these methods do here, and anyone can repeat it.

A figure is a difference of validation losses, nats a token, mean ± standard deviation over seeds. Each
seed has a teacher of its own, so rows are subtracted seed by seed. Of several budgets it is the mean
over those below the full model. A claim holds where the 95 % interval of that mean (Student's t over
seeds) lies below what is allowed: 0 where a row has to be better, {share} of the loss where it has to
be at the other. It does not hold where the interval lies above.

{claims}

By budget, a share of the full model's FLOPs:

{details}
"""

if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
