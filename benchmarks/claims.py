"""Write docs/results/claims.md: what the ablations measure for each claim of the paper, and a verdict.

python benchmarks/claims.py runs/ablation > docs/results/claims.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy.stats import t as student

from nestlm.report.comparison import Comparison, RunGroup, compare, format_difference
from nestlm.report.runs import find_runs
from nestlm.report.tables import markdown_table

TEACHER = "the teacher"
UNDECIDED = "undecided at this scale"
AT = 0.005  # "at" a loss is within this share of it
NARROW = ("0.78", "0.67", "0.56", "0.45")  # budgets that ask for less than the full model


class Contrast(NamedTuple):
    """One comparison that a claim rests on: the loss of `row` minus that of `than`, both labels of an ablation group.

    Attributes:
        slack: how far above it may lie, as a share of `than`'s loss; 0 where it has to be better.
        budgets: those that are averaged.
        adaptive: whether the row only counts where its router decides for each token.
    """

    group: str
    row: str
    than: str
    slack: float = 0.0
    budgets: tuple[str, ...] = NARROW
    adaptive: bool = False


NESTED, NESTED_UNIFORM = "one elastic run, knapsack", "one elastic run, uniform"
CLAIMS: Mapping[str, tuple[Contrast, ...]] = {
    "Sorting helps": (Contrast("ranking", "activation", "none"), Contrast("ranking", "activation", "random")),
    "One run serves all budgets, at or below sizes pruned and distilled one by one on its tokens": (
        Contrast("baseline", NESTED_UNIFORM, "pruned and distilled one by one", AT),
        Contrast("baseline", NESTED, "pruned and distilled one by one", AT),
    ),
    "The full model keeps its quality": (
        Contrast("baseline", NESTED, TEACHER, AT, ("1",)),
        Contrast("baseline", NESTED, "from scratch", AT, ("1",)),  # as many tokens as teacher and elastic training
        Contrast("rate", "nested, 1e-3", "the full model alone, 1e-3", AT, ("1",)),
    ),
    "Sub-networks are at or below the same size from scratch": (
        Contrast("baseline", NESTED_UNIFORM, "from scratch", AT),
        Contrast("baseline", NESTED, "from scratch", AT),
    ),
    "A learned router is better than uniform": (Contrast("router", "surrogate, static", "uniform"),),
    "A surrogate is better than end-to-end gradients": (
        Contrast("signal", "surrogate", "gumbel"),
        Contrast("signal", "surrogate, cold start", "gumbel"),
    ),
    "Input-adaptive is better than static": (
        Contrast("policy", "surrogate, dynamic", "surrogate, static", adaptive=True),
        Contrast("policy", "value, dynamic", "value, static", adaptive=True),
        Contrast("policy", "surrogate, dynamic", "knapsack, static", adaptive=True),
        Contrast("policy", "value, dynamic", "knapsack, static", adaptive=True),
    ),
    "Joint tuning helps": (
        Contrast("joint", "joint tuning", "no joint tuning"),
        Contrast("joint", "joint tuning", "its tokens in elastic training"),
        Contrast("joint", "joint tuning", "its FLOPs in elastic training"),
    ),
    "7.63 % of the tokens are enough: twice as many gain little": (
        Contrast("tokens", "7.63 %", "15.26 % (twice the paper's share)", AT),
    ),
}


@dataclass(frozen=True)
class Finding:
    """The measured result of a contrast.

    Attributes:
        by_budget: differences of losses, indexed by seed.
        mean: their means over budgets, indexed by seed.
        slack: how far above 0 they may lie.
        decided: of an adaptive row, how many of its answers decide for each token; None of others.
    """

    by_budget: Mapping[str, pd.Series]
    mean: pd.Series
    slack: float
    decided: int | None = None

    @property
    def margin(self) -> float:
        """Half the width of the mean's 95 % confidence interval (Student's t over seeds)."""
        if len(self.mean) < 2:
            return float("inf")
        return float(student.ppf(0.975, len(self.mean) - 1) * self.mean.sem())

    @property
    def verdict(self) -> str:
        """Judge a finding: decided where the whole interval lies on one side of the limit."""
        if self.decided == 0:
            return UNDECIDED
        if self.mean.mean() + self.margin < self.slack:
            return "holds"
        if self.mean.mean() - self.margin > self.slack:
            return "does not hold"
        return UNDECIDED


def examine(contrast: Contrast, tables: Mapping[str, Comparison]) -> Finding:
    """Compute a contrast seed by seed: teachers of two seeds differ more than two rows of one seed."""
    table = tables[contrast.group]
    row = group_of(table, contrast.row)
    reference = {budget: losses_of(table, contrast.than, budget, row=row) for budget in contrast.budgets}
    by_budget = {budget: (table.by_seed(row, budget) - reference[budget]).dropna() for budget in contrast.budgets}
    mean = pd.DataFrame(by_budget).mean(axis=1)
    slack = contrast.slack * float(pd.concat(list(reference.values())).mean())
    return Finding(by_budget, mean, slack, decisions(row, contrast.budgets) if contrast.adaptive else None)


def decisions(row: RunGroup, budgets: tuple[str, ...]) -> int:
    """Count a dynamic router's results that decide for each token; the others are one sub-network for all tokens."""
    return sum("plan" in spec for run in row.runs for spec in run.specs if spec["budget"] in budgets)


def group_of(table: Comparison, label: str) -> RunGroup:
    """Return the row of a table with a given label."""
    return next(group for group in table.groups if group.label == (label,))


def losses_of(table: Comparison, label: str, budget: str, *, row: RunGroup) -> pd.Series:
    """Return, by seed, the losses that a row is compared with: those of another row, or of its runs' teachers."""
    if label == TEACHER:
        return pd.Series({run.seed: run.metrics["pretrain"]["val_loss"] for run in row.runs})
    return table.by_seed(group_of(table, label), budget)


def page(folder: Path) -> str:
    """Return the whole page in Markdown."""
    groups = dict.fromkeys(contrast.group for contrasts in CLAIMS.values() for contrast in contrasts)
    tables = {group: compare(find_runs([folder / group])) for group in groups}
    findings = [
        (claim, contrast, examine(contrast, tables)) for claim, contrasts in CLAIMS.items() for contrast in contrasts
    ]
    runs = [run for table in tables.values() for group in table.groups for run in group.runs]
    return PAGE.format(
        claims=markdown_table(
            ("claim", "measured as", "mean over budgets", "95 % interval", "allowed", "verdict"),
            [[claim, called(contrast), *judged(finding)] for claim, contrast, finding in findings],
        ),
        details=markdown_table(
            ("difference of losses", "1", *NARROW, "answers that decide"),
            [[called(contrast), *detailed(contrast, finding)] for _, contrast, finding in findings],
        ),
        seeds=", ".join(map(str, sorted({run.seed for run in runs}))),
        commits=", ".join(sorted({str(run.provenance["commit"])[:8] for run in runs})),
        share=f"{AT:.1%}",
    )


def called(contrast: Contrast) -> str:
    """Describe a contrast in words."""
    return f"{contrast.group}: {contrast.row} less {contrast.than}"


def judged(finding: Finding) -> list[str]:
    """Return the verdict on a finding."""
    mean, margin = float(finding.mean.mean()), finding.margin
    allowed = f"below {finding.slack:+.4f}" if finding.slack else "below 0"
    return [format_difference(finding.mean), f"{mean - margin:+.4f} to {mean + margin:+.4f}", allowed, finding.verdict]


def detailed(contrast: Contrast, finding: Finding) -> list[str]:
    """Return the contrast's table, budget by budget."""
    cells = [format_difference(finding.by_budget[name]) if name in finding.by_budget else "" for name in ("1", *NARROW)]
    answers = len(contrast.budgets) * len(finding.mean)
    return [*cells, "" if finding.decided is None else f"{finding.decided} of {answers}"]


PAGE = """# The paper's claims, at the scale of a laptop

Generated by `python benchmarks/claims.py runs/ablation` from the runs of [the ablations](ablations.md):
`model=nano` on the default text, seeds {seeds}, commit {commits}. A model of 0.2M parameters refutes
nothing that was seen at 7B; it shows what these methods do here, and anyone can repeat it.

A figure is a difference of validation losses, nats a token, mean ± standard deviation over seeds. Each
seed has a teacher of its own, so rows are subtracted seed by seed. Of several budgets it is the mean
over those below the full model. A claim holds where the 95 % interval of that mean (Student's t over
seeds) lies below what is allowed: 0 where a row has to be better, {share} of the loss where it has to
be at the other. It does not hold where the interval lies above. What a row of the ablations sees and
spends stands [there](ablations.md); where a claim does not hold, [reasons were looked for](failed-claims.md).

{claims}

By budget, a share of the full model's FLOPs. A dynamic router that finds nothing to gain by deciding for
each token answers with one sub-network; where it never decides, nothing adaptive was measured:

{details}
"""

if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
