"""Rich consoles: results go to standard output, progress and notices to standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

output = Console(soft_wrap=True, highlight=False)  # results
output.width = max(output.width, 100)  # in narrower tables Rich truncates names
console = Console(stderr=True, soft_wrap=True)  # progress


@lru_cache(maxsize=256)
def print_once(line: str) -> None:
    """Print a line on standard error unless this process has printed the same line before."""
    console.print(line, highlight=False, markup=False)


def progress_bar(*columns: str) -> Progress:
    """Create a progress bar with a description, a counter and the remaining time.

    The bar prints nothing when standard error is not a terminal.

    Args:
        columns: templates of extra text columns, such as `"{task.fields[speed]} tokens/s"`.
    """
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate over items while a progress bar counts them. `total` is needed when `items` has no length."""
    with progress_bar() as progress:
        yield from progress.track(items, description=description, total=total)
