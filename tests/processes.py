"""Runs in processes of their own, and their sudden ends."""

import signal
import subprocess
import time


def kill_when(arguments: list[str], condition, *, deadline: float = 120) -> None:
    """Start a run and kill it with SIGKILL as soon as the condition holds."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + deadline
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    if process.stderr:
        process.stderr.close()
