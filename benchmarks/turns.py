"""Time several functions that take turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nestlm.utils.malloc import keep_freed_blocks

Way = Callable[[], Any]
REPEATS, WARM_UP = 9, 2


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute median and quartiles of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __truediv__(self, other: float) -> Spread:
        return Spread(*(value / other for value in self))

    def __format__(self, digits: str) -> str:
        low, middle, high = (format(value, digits) for value in self)
        return f"{middle} ({low} to {high})"


def take_turns(ways: Mapping[str, Way], *, repeats: int = REPEATS, warm_up: int = WARM_UP) -> dict[str, list[float]]:
    """Return the seconds of each function in each round, without the warm-up rounds."""
    keep_freed_blocks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # as runs do
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + repeats):
        for name, way in ways.items():
            synchronize()
            started = time.perf_counter()
            way()
            synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the ratio of two functions' seconds, round by round."""
    return Spread.of([one / other for one, other in zip(mine, theirs, strict=True)])


def added(total: Sequence[int], one: Sequence[int], other: Sequence[int], *rest: Any, **named: Any) -> int:
    """Count the FLOPs of a product that is added to a tensor."""
    del total, rest, named
    return 2 * one[0] * one[1] * other[1]


UNCOUNTED = {torch.ops.aten.addmm_: added}  # by torch


def flops(way: Way) -> int:
    """Return the FLOPs of products, as torch counts them; attention counts full squares, not triangles."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, sdpa_kernel(SDPBackend.MATH):
        way()
    return counter.get_total_flops()


def peak(way: Way) -> int:
    """Return the peak bytes that a function takes on top of what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        way()
    return highest(profiler)


def highest(profiler: profile) -> int:
    """Return the peak of allocated bytes since the profiler began."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most
