"""Kill runs at random moments and start them again until they finish."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fault_place import SMALL, TRAIN, Place, results_of

LENGTHS = (
    "pretrain.steps=80", "elastic.steps=40", "router.steps=30", "joint.steps=20", "router.num_sequences=8",
    "checkpoint_seconds=0.1",
)  # fmt: skip
VICTIMS: Mapping[str, tuple[str, ...]] = {
    "surrogate, dynamic": ("router=surrogate", "router.policy=dynamic", "model.mlp_width=384", "budget=[1.0,0.8,0.7]"),
    "surrogate, static": ("router=surrogate", "budget=[0.9,0.7]"),
    "value, dynamic": ("router=value", "router.policy=dynamic", "model.mlp_width=384", "budget=[0.9,0.7]"),
    "gumbel, by prompt": (
        "router=gumbel", "router.policy=dynamic", "router.granularity=prompt", "router.prompt_tokens=8", "budget=[0.9]",
    ),
    "evolution, two limits": ("router=evolution", "budget=[[0.9,0.8params],0.7]", "axes=mlp_heads_depth"),
}  # fmt: skip
SIGNALS = {signal.SIGKILL: 8, signal.SIGTERM: 1, signal.SIGINT: 1}  # and how often they are drawn
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
EARLY = 0.3  # seconds: Python itself is starting, and ends as it always does
PATIENCE = 90  # seconds from a signal that is taken to the end


@dataclass(frozen=True)
class Killed:
    """A signal, or the end of a run, and the fault in what followed, or None."""

    kind: str
    what: str
    wrong: str | None


def start(place: Place, name: str, folder: Path, log: Path) -> subprocess.Popen[str]:
    """Start a run, or start it again."""
    text = [*SMALL, *LENGTHS, "data=text", f"data.path={place.texts}", *VICTIMS[name]]
    command = [sys.executable, str(TRAIN), *text, f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}"]
    with log.open("w") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, text=True, env={**os.environ}, preexec_fn=hear_sigint
        )


def hear_sigint() -> None:
    """Restore SIGINT's handler: a shell starts background jobs with SIGINT ignored, and the runs would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def undisturbed(place: Place, name: str) -> tuple[float, str]:
    """Run without signals; returns the seconds that the run takes, and its results."""
    with place.made(f"undisturbed-{list(VICTIMS).index(name)}") as folder:
        if folder is not None:
            started = time.monotonic()
            code = start(place, name, folder, folder / "log").wait()
            if code != 0:
                raise RuntimeError(f"{name}: {(folder / 'log').read_text()[-500:]}")
            (folder / "seconds").write_text(str(time.monotonic() - started))
    folder = place.root / f"undisturbed-{list(VICTIMS).index(name)}"
    return float((folder / "seconds").read_text()), results_of(folder / "run")


def kill(place: Place, number: int, *, seed: int, most: int) -> Iterator[Killed]:
    """Send several signals to a run at random times, each followed by the same command, then let the run finish."""
    name, rng = list(VICTIMS)[number % len(VICTIMS)], random.Random(f"{seed}/kill/{number}")
    seconds, wanted = undisturbed(place, name)
    with TemporaryDirectory(dir=place.root) as scratch:
        folder = Path(scratch)
        log = folder / "log"
        for turn in range(most):
            (sent,), delay = rng.choices(list(SIGNALS), list(SIGNALS.values())), rng.uniform(0, seconds)
            process = start(place, name, folder, log)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.send_signal(sent)
                yield Killed(sent.name, f"{name}, {turn}: after {delay:.1f} s", fault_of_end(process, sent, delay, log))
            else:
                if process.returncode != 0:
                    yield Killed("start", f"{name}, {turn}", f"exit code {process.returncode}: {tail(log)}")
                shutil.rmtree(folder / "run", ignore_errors=True)  # it ended before: done again from the cache
        process = start(place, name, folder, log)
        code = process.wait()
        if code != 0:
            wrong = f"exit code {code}: {tail(log)}"
        else:
            wrong = None if results_of(folder / "run") == wanted else "other results than of an undisturbed run"
        yield Killed("end", name, wrong)


def fault_of_end(process: subprocess.Popen[str], sent: signal.Signals, delay: float, log: Path) -> str | None:
    """Return the fault in how a process reacted to a signal, or None."""
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"goes on for {PATIENCE} s"
    allowed = {-sent, CODES.get(sent)} if sent == signal.SIGKILL or delay < EARLY else {CODES[sent], 0}
    if code not in allowed:
        return f"exit code {code}, wanted {CODES.get(sent)}: {tail(log)}"
    text = log.read_text()
    return f"a traceback: {tail(log)}" if "Traceback" in text and delay >= EARLY else None


def tail(log: Path) -> str:
    """Return the end of a log, in one line."""
    return log.read_text()[-300:].strip().replace("\n", " | ")
