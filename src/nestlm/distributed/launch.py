"""Start the ranks of one machine, each a process, and end all when one fails (torchrun's agent does both)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nestlm import errors
from nestlm.errors import NestlmError, Preempted
from nestlm.utils.interrupts import SIGNALS, exit_by_signal, exit_on_signals
from nestlm.utils.resources import resource_errors

T = TypeVar("T")
GRACE_SECONDS = 600  # for a last checkpoint, when the ranks are told to end


def launch(work: Callable[[Any], T], argument: Any, *, num_ranks: int) -> T:
    """Call a function in several processes at once; return the result of rank 0.

    Args:
        work: a function of a module, called with the argument on every rank.
        argument: a plain value.
        num_ranks: how many, all on this machine.

    Raises:
        NestlmError: a rank raised one, which names the rank; the others were ended.
        RuntimeError: a rank died, or has a bug.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        shutdown_timeout=GRACE_SECONDS,
    )
    with quiet_agent(), shared_cores(num_ranks), same_handlers():
        try:
            return elastic_launch(config, as_rank)(work, argument)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise translated(rank, failure) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                exit_by_signal(signal.SIGINT)
            raise Preempted("the ranks were told to end; the same command goes on from their last checkpoint") from None


def as_rank(work: Callable[[Any], T], argument: Any) -> T:
    """Call a rank's function. Lack of memory or disk is raised as ResourceError: of other errors only text gets out."""
    exit_on_signals(is_silent=True)
    with resource_errors():
        return work(argument)


@contextmanager
def same_handlers() -> Iterator[None]:
    """Restore signal handlers at the end: torchrun's agent leaves its own."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def translated(rank: int, failure: ProcessFailure) -> Exception:
    """Turn the failure report of a rank into the error to raise."""
    if failure.exitcode in (-signal.SIGTERM, errors.EXIT_PREEMPTED):
        return Preempted(f"rank {rank} was told to end; the same command goes on from the last checkpoint")
    if failure.exitcode < 0:
        return RuntimeError(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; so were the others")
    reported: Any = failure.message
    details = ""
    if isinstance(reported, dict):
        details = reported.get("extraInfo", {}).get("py_callstack", "")
        reported = reported.get("message", "")
    kind, _, message = str(reported).partition(": ")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, NestlmError):
        return known(message if message.startswith("rank ") else f"rank {rank}: {message}")
    return RuntimeError(f"rank {rank}: {reported}\n{details}".rstrip())


@contextmanager
def quiet_agent() -> Iterator[None]:
    """Silence the log of torchrun's agent: the exception contains the same."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:  # each has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def shared_cores(num_ranks: int) -> Iterator[None]:
    """Give each rank its part of the cores by OMP_NUM_THREADS, unless that is set."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = before or str(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
