"""SIGTERM and SIGINT end a command with exit codes 143 and 130 and one line, whatever it does at the time.

Imports nothing heavy: a command listens before it imports anything else.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 10  # for what has to be closed or removed; a library may have swallowed the exit


def exit_on_signals(*, is_silent: bool = False) -> None:
    """End this process when it is told to. One that was started to ignore a signal goes on ignoring it.

    Args:
        is_silent: print no line, as in ranks whose parent prints one.
    """
    owner = os.getpid()

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        del frame
        if os.getpid() != owner:  # a fork, such as a data loader's worker
            os._exit(128 + signum)
        exit_by_signal(signal.Signals(signum), is_silent=is_silent)

    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, end)
    atexit.register(
        ignore_signals
    )  # the work is done: Python would put back the handlers that end a process without a word


def ignore_signals() -> None:
    """Go on, whatever signal comes."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def exit_by_signal(signum: signal.Signals, *, is_silent: bool = False) -> NoReturn:
    """Print why this process ends, and end it: at the latest when the time for closing files is over."""
    code = 128 + signum
    ignore_signals()  # it ends already
    if not is_silent and os.environ.get("RANK", "0") == "0":
        os.write(2, f"error: ended by {signum.name}; the same command goes on from what is finished\n".encode())
    timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    raise SystemExit(code)
