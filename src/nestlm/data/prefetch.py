"""Prefetching of iterables in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Iterate over items that a thread fetches ahead of the caller.

    An exception of the iterable is raised after the items that came before it.

    Args:
        items: the iterable; only the thread uses it.
        depth: number of items that are fetched ahead.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(more: bool, value: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put((more, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def fetch() -> None:
        try:
            for item in items:
                offer(True, item)
                if stopped.is_set():
                    return
            offer(False, None)
        except BaseException as error:  # noqa: BLE001 (raised again below, in the caller's thread)
            offer(False, error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value  # pyright: ignore[reportReturnType]
            elif isinstance(value, BaseException):
                raise value
            else:
                return
    finally:
        stopped.set()
        thread.join()
