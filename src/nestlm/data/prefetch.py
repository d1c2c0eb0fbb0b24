"""Items that a thread fetches while the last one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, up to `depth` of them fetched by a thread in advance. An error is raised where it belongs."""
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
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread that asked)
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
