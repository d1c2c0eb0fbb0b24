"""The output of `nestlm generate` and `nestlm evaluate`: on the terminal, and in files."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nestlm.api.nested_model import NestedModel
from nestlm.generation.sampling import GREEDY, Sampling
from nestlm.generation.text import TextStream
from nestlm.report.tables import markdown_table, write_csv
from nestlm.router.at_budget import AtBudget
from nestlm.spec import Budget
from nestlm.utils.console import console, output

# Printed columns of an evaluation, without those of tasks: heading, key, format.
SHOWN = (
    ("router", "router", "{}"),
    ("budget", "budget", "{}"),
    ("achieved", "achieved", "{:.4f}"),
    ("loss", "val_loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("accuracy", "accuracy", "{:.4f}"),
)
SCORES = ("router", "budget", "achieved", "val_loss", "perplexity", "bits_per_byte", "accuracy")
STDERR = " stderr"
WIDEST = 10_000  # columns of a terminal: no table is cut, a narrow terminal wraps its lines


@dataclass(frozen=True)
class Continuation:
    """A continuation of a prompt.

    Attributes:
        found: the sub-network or policy that generated it.
        text: the continuation.
        tokens: how many tokens it has.
        speed: tokens a second after the first token; None for a single token.
    """

    found: AtBudget
    text: str
    tokens: int
    speed: float | None

    @property
    def facts(self) -> list[str]:
        """Router, share of the cost, number of tokens, and speed, as texts to print."""
        share = "for each token" if self.found.achieved is None else f"{self.found.achieved:.4f} of the cost"
        speed = "" if self.speed is None else f"{self.speed:.1f} tokens/s"
        return [self.found.router, share, f"{self.tokens} tokens", speed]


def print_continuation(
    model: NestedModel,
    prompt: str,
    *,
    budget: Budget,
    router: str | None,
    max_tokens: int,
    sampling: Sampling,
    special_tokens: bool,
) -> None:
    """Continue a prompt at one budget. Tokens go to standard output as they come, the speed to standard error."""
    found, ids = model.at(budget, router=router), model.encode(prompt, special_tokens=special_tokens)
    written = generate_text(model, ids, found, max_tokens=max_tokens, sampling=sampling, shown=True)
    sys.stdout.write("\n")
    console.print(f"budget {budget}: {', '.join(filter(None, written.facts))}", highlight=False, markup=False)


def generate_text(
    model: NestedModel,
    ids: list[int],
    found: AtBudget,
    *,
    max_tokens: int,
    sampling: Sampling,
    shown: bool = False,
) -> Continuation:
    """Continue the tokens of a prompt.

    Args:
        model: the nested model.
        ids: tokens of the prompt.
        found: the sub-network or policy to generate with.
        max_tokens: the most tokens to generate.
        sampling: how tokens are drawn.
        shown: print tokens to standard output as they come.
    """
    text, pieces, times = TextStream(model.tokenizer, ids), list[str](), list[float]()

    def take(piece: str) -> None:
        pieces.append(piece)
        if shown:
            sys.stdout.write(piece)
            sys.stdout.flush()

    for (token,) in model.tokens([ids], [found], max_tokens=max_tokens, sampling=sampling):
        assert token is not None, "the one row goes on"
        times.append(time.perf_counter())
        take(text.add(token))
    take(text.rest())
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Continuation(found, "".join(pieces), len(times), speed)


def print_comparison(
    model: NestedModel,
    prompt: str,
    *,
    budgets: Sequence[Budget],
    router: str | None,
    max_tokens: int,
    sampling: Sampling,
    special_tokens: bool,
) -> None:
    """Print continuations of one prompt at several budgets side by side. Each is generated alone, after a warm-up."""
    table = Table(show_lines=True, expand=True)
    columns, ids = list[Continuation](), model.encode(prompt, special_tokens=special_tokens)
    for budget in budgets:
        found = model.at(budget, router=router)
        generate_text(model, ids, found, max_tokens=2, sampling=GREEDY)
        columns.append(generate_text(model, ids, found, max_tokens=max_tokens, sampling=sampling))
        table.add_column(f"budget {budget}", ratio=1, overflow="fold")
    table.add_row(*(Text("\n".join(filter(None, column.facts))) for column in columns))
    table.add_row(*(Text(column.text) for column in columns))
    output.print(table)


def print_scores(rows: Sequence[Mapping[str, Any]], *, out: Path, title: str) -> None:
    """Print an evaluation, and write it to OUT.csv with all digits, and to OUT.md.

    Args:
        rows: a row for each budget: columns of SCORES, and metrics of tasks.
        out: path of both files without their endings.
        title: heading of the table.
    """
    text, tasks = heldout_lines(rows), task_lines(rows)
    print_table(text, title)
    if len(tasks[0]) > 1:
        print_table(tasks, "tasks")
    paths = [out.with_name(out.name + ending) for ending in (".csv", ".md")]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(paths[0], rows)
    headings, *cells = [[*left, *right[1:]] for left, right in zip(text, tasks, strict=True)]
    paths[1].write_text(f"{title}\n\n{markdown_table(headings, cells)}\n", encoding="utf-8")
    output.print(f"written: {', '.join(map(str, paths))}", markup=False)


def print_table(lines: list[list[str]], title: str) -> None:
    """Print a table whose first line holds the headings, without cutting any cell."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in lines[1:]:
        table.add_row(*row)
    natural = Measurement.get(output, output.options.update(max_width=WIDEST), table).maximum
    Console(width=max(output.width, natural), soft_wrap=True).print(table)


def heldout_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return headings and cells of the scores on held-out text, as `print_table` takes them."""
    return [[heading for heading, _, _ in SHOWN]] + [
        [pattern.format(row[key]) for _, key, pattern in SHOWN] for row in rows
    ]


def task_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return headings and cells of task metrics, each with its standard error if it has one."""
    metrics = [key for key in rows[0] if key not in SCORES and not key.endswith(STDERR)]
    lines = [["budget", *metrics]]
    for row in rows:
        errors = [row.get(name + STDERR) for name in metrics]
        shown = ["" if error is None else f" ± {format_score(error)}" for error in errors]
        cells = [format_score(row[name]) + error for name, error in zip(metrics, shown, strict=True)]
        lines.append([row["budget"], *cells])
    return lines


def format_score(number: float) -> str:
    """Format a number with four digits after the point, or with four digits in all from 1000 on."""
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.4g}"
