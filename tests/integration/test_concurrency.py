"""Processes that share a cache and work at the same time: each stage runs once, and nobody waits for the dead."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
from plugins import NANO, stages_that_ran
from processes import Forked

TRAIN = Path(__file__).parents[2] / "train.py"
WAITS = "waits for another process that works on it"
# Long enough that processes meet in it.
LENGTHS = ["pretrain.steps=300", "checkpoint_seconds=0.2", "router=uniform", "budget=[0.9,0.7]"]
STAGES = ["data", "pretrain", "rank", "elastic", "router", "joint", "evaluate"]


def command(cache: Path, run: Path) -> list[str]:
    return [sys.executable, str(TRAIN), *NANO, *LENGTHS, f"run_dir={run}", f"cache_dir={cache}"]


def start(cache: Path, run: Path) -> Forked:
    return processes.start(command(cache, run))


def test_two_processes_share_every_stage(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    jobs = [start(tmp_path / "cache", run) for run in runs]
    errors = [job.communicate(timeout=200)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert sorted(name for run in runs for name in stages_that_ran(run)) == sorted(STAGES)
    assert WAITS in "".join(errors)
    first, second = ((run / "results.csv").read_bytes() for run in runs)
    assert first == second
    alone = start(tmp_path / "cache", tmp_path / "three")
    assert WAITS not in alone.communicate(timeout=200)[1], "who does not wait says nothing"


def test_the_same_command_twice_is_one_run(tmp_path):
    jobs = [start(tmp_path / "cache", tmp_path / "run") for _ in range(2)]
    errors = [job.communicate(timeout=200)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert sum(f"run {WAITS}" in error for error in errors) == 1
    assert stages_that_ran(tmp_path / "run") == [], "the second found all"


def test_a_killed_holder_does_not_block_who_waits(tmp_path):
    cache = tmp_path / "cache"
    holder = start(cache, tmp_path / "killed")
    end = time.monotonic() + 120
    while not list(cache.glob("pretrain-*/checkpoints/*.ckpt")):
        assert holder.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    holder.send_signal(signal.SIGSTOP)  # it holds the stage for as long as the other takes to start
    waiting = subprocess.Popen(
        command(cache, tmp_path / "waiting"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert waiting.stderr
    assert "data" in waiting.stderr.readline()
    assert f"pretrain {WAITS}" in waiting.stderr.readline()
    holder.kill()
    holder.communicate()
    errors = waiting.communicate(timeout=200)[1]
    assert waiting.returncode == 0, errors
    with (tmp_path / "waiting/timings.csv").open() as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert rows["pretrain"]["cached"] == "False"
    assert 0 < int(rows["pretrain"]["resumed_at_step"]) < 300
