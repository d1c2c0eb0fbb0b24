"""Which GPU a job gets: made-up names, real processes."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nestlm.distributed.gpu_lock import lock_gpu, visible_gpus

# Holds a GPU of the named ones several times over; prints what it sees at the start and at the end of each job.
WORKER = """
import os, sys, time
from pathlib import Path
from nestlm.distributed.gpu_lock import lock_gpu, visible_gpus
os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[2]
for job in range(int(sys.argv[3])):
    with lock_gpu(visible_gpus(), folder=Path(sys.argv[1])):
        print("start", os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic_ns(), flush=True)
        time.sleep(float(sys.argv[4]))
        print("end", os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic_ns(), flush=True)
"""


def start(folder: Path, names: str, *, jobs: int = 1, seconds: float = 0.3) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), names, str(jobs), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_jobs_at_the_same_time_hold_different_gpus_and_the_rest_waits(tmp_path):
    workers = [start(tmp_path, "0,GPU-1a2b", jobs=2) for _ in range(4)]
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    events = sorted(
        (int(when), name, what) for out, _ in outputs for what, name, when in map(str.split, out.splitlines())
    )
    held = Counter[str]()
    most = 0
    for _, name, what in events:
        held[name] += 1 if what == "start" else -1
        assert held[name] <= 1, "two jobs on one GPU"
        most = max(most, sum(held.values()))
    assert most == 2, "both GPUs are used at the same time"
    assert set(held) == {"0", "GPU-1a2b"}
    assert any("waiting for a free GPU of 0, GPU-1a2b" in error for _, error in outputs)


def test_a_process_takes_the_same_gpu_again(tmp_path):
    """Its CUDA may be initialised on it: also when one with a lower number has become free."""
    first = start(tmp_path, "0,1", seconds=1.0)
    assert first.stdout
    assert first.stdout.readline().split()[1] == "0"
    second = start(tmp_path, "0,1", jobs=3, seconds=0.8)
    out, errors = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert {line.split()[1] for line in out.splitlines()} == {"1"}
    assert errors == ""


def test_a_killed_holder_does_not_block(tmp_path):
    holder = start(tmp_path, "7", seconds=600)
    assert holder.stdout
    assert holder.stdout.readline().split()[1] == "7"
    waiting = start(tmp_path, "7", seconds=0.0)
    assert waiting.stderr
    assert "waiting for a free GPU of 7" in waiting.stderr.readline()
    killed = time.monotonic()
    holder.kill()
    out, _ = waiting.communicate(timeout=60)
    holder.communicate()
    assert time.monotonic() - killed < 10
    assert out.split()[1] == "7"


@pytest.mark.parametrize(
    ("listed", "names"),
    [("1, GPU-3f,MIG-GPU-9/1/0", ["1", "GPU-3f", "MIG-GPU-9/1/0"]), ("", []), ("-1", [])],
)
def test_the_outer_list_is_obeyed(listed, names, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == names
    with lock_gpu(names, folder=tmp_path / "locks"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == (names[0] if names else listed)
    with lock_gpu(names[::-1], folder=tmp_path / "locks"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == (names[-1] if names else listed)


def test_without_a_list_all_of_the_machine_are_visible(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == [str(number) for number in range(torch.cuda.device_count())]
