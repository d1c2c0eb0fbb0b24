"""Standard output for results, standard error for progress: bars on a terminal only, lines everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

output = Console(soft_wrap=True, highlight=False)  # results
output.width = max(output.width, 100)  # a narrow table would cut names off
console = Console(stderr=True, soft_wrap=True)  # progress


@lru_cache(maxsize=256)
def print_once(line: str) -> None:
    """Print a line on standard error, the first time that it is given."""
    console.print(line, highlight=False, markup=False)


def progress_bar(*columns: str) -> Progress:
    """A bar with a name, extra text columns and the time left; silent and free where there is no terminal."""
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
    """Go through items under a bar."""
    with progress_bar() as progress:
        yield from progress.track(items, description=description, total=total)
