"""SIGTERM and SIGINT end train.py and the verbs with 143 and 130 and one line, whenever they come."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from plugins import NANO
from processes import Forked

TRAIN = Path(__file__).parents[2] / "train.py"
LONG = ["pretrain.steps=100000", "checkpoint_seconds=1000"]
# What is loaded or written when the signal comes.
MOMENTS = {
    "the first imports": lambda job, cache: "hydra" in maps_and_files(job),
    "the heavy imports": lambda job, cache: "libtorch" in maps_and_files(job),
    "text is prepared": lambda job, cache: list(cache.glob("data-*")),
    "before the first step": lambda job, cache: list(cache.glob("pretrain-*")),
}


def maps_and_files(job: subprocess.Popen[str] | Forked) -> str:
    """What a process has mapped, and for Python's own files how long it runs."""
    maps = Path(f"/proc/{job.pid}/maps").read_text()
    return maps + ("hydra" if "libssl" in maps or "_yaml" in maps or "pydantic" in maps else "")


def ended(
    arguments: list[str], signum: signal.Signals, condition, *, during_imports: bool
) -> tuple[int | None, list[str]]:
    """Exit code and error lines of a command that gets a signal as soon as the condition holds."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(arguments, **pipes) if during_imports else processes.start(arguments)
    end = time.monotonic() + 120
    while not condition(job):
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)
    job.send_signal(signum)
    said = job.communicate(timeout=120)[1]
    return job.returncode, [line for line in said.splitlines() if "error" in line or "Traceback" in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="moments are seen in /proc")
@pytest.mark.parametrize(
    ("moment", "signum"),
    [*((moment, signal.SIGTERM) for moment in MOMENTS), ("before the first step", signal.SIGINT)],
)
def test_a_run_ends_at_once(moment, signum, tmp_path):
    cache = tmp_path / "cache"
    arguments = [sys.executable, str(TRAIN), *NANO, *LONG, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}"]
    code, lines = ended(arguments, signum, lambda job: MOMENTS[moment](job, cache), during_imports="imports" in moment)
    assert code == 128 + signum
    assert len(lines) == 1, lines
    assert signum.name in lines[0] or "told to end after step" in lines[0]
    assert not (tmp_path / "run/SHA256SUMS").exists()


def test_a_verb_ends_at_once(static_run):
    arguments = [sys.executable, "-m", "nestlm", "generate", str(static_run), "--prompt", "def"]
    code, lines = ended(arguments, signal.SIGTERM, lambda job: "libtorch" in maps_and_files(job), during_imports=True)
    assert (code, len(lines)) == (143, 1)


def test_an_exit_that_a_library_swallows_comes_all_the_same():
    """And a fork, such as a loader's worker, ends without a word."""
    script = """
import os, signal, time
from nestlm.utils import interrupts
interrupts.GRACE_SECONDS = 0.2
interrupts.exit_on_signals()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b"!")
    time.sleep(60)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 143
    assert done.stderr.count("\n") == 1


def test_who_ignores_a_signal_goes_on():
    """As under nohup, or in the background of a shell without job control."""
    script = (
        "import os, signal; from nestlm.utils.interrupts import exit_on_signals; exit_on_signals(); "
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, **ignoring)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_after_the_work_changes_nothing():
    script = """
import atexit, os, signal
from nestlm.utils.interrupts import exit_on_signals
atexit.register(os.kill, os.getpid(), signal.SIGTERM)  # after what is registered later
exit_on_signals()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
