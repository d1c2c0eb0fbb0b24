"""Signal handlers: SIGTERM and SIGINT end a command with one line and exit code 143 or 130.

This module imports nothing slow, because a command installs the handlers before its other imports.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 10  # for cleanup; afterwards the process ends even if a library swallowed SystemExit


def exit_on_signals(*, is_silent: bool = False) -> None:
    """Install handlers that end this process on SIGTERM and SIGINT.

    A signal that the process was started to ignore, as under nohup, stays ignored.

    Args:
        is_silent: print no line; for ranks whose launcher prints one.
    """
    owner = os.getpid()

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        del frame
        if os.getpid() != owner:  # a forked process, such as a DataLoader worker
            os._exit(128 + signum)
        exit_by_signal(signal.Signals(signum), is_silent=is_silent)

    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, end)
    # At exit Python restores the default handlers, with which a late signal would end the process without a line.
    atexit.register(ignore_signals)


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT from now on."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def exit_by_signal(signum: signal.Signals, *, is_silent: bool = False) -> NoReturn:
    """Print which signal ended this process, then exit; after GRACE_SECONDS the exit is forced."""
    code = 128 + signum
    ignore_signals()  # a second signal must not interrupt the cleanup
    if not is_silent and os.environ.get("RANK", "0") == "0":
        os.write(2, f"error: ended by {signum.name}; the same command goes on from what is finished\n".encode())
    timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    raise SystemExit(code)
