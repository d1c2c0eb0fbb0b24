"""Ranks that die, diverge, lack memory or are told to end: all end, the user learns why, and the run goes on."""

import contextlib
import csv
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from typer.testing import CliRunner

import many_runs
import processes
from many_runs import CPU, assert_same_results
from nestlm.cli.app import app
from nestlm.distributed import sharded_checkpoint as checkpoint
from nestlm.distributed.launch import launch
from nestlm.errors import EXIT_PREEMPTED, CheckpointError, DeviceMemoryError, DivergenceError
from nestlm.train.callbacks.timed_checkpoint import complete, last_good_checkpoint
from nestlm.utils.checksums import XXH128
from plugins import NANO
from processes import Forked, start

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

TRAIN = Path(__file__).parents[2] / "train.py"
LENGTHS = [
    "pretrain.steps=2",
    "elastic.steps=80",
    "router=uniform",
    "joint.steps=0",
    "budget=[0.7]",
    "data.batch_size=12",
]
WITHIN_SECONDS = 60  # that a job ends when one of its ranks died


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    """The command line of a run."""
    return [
        *(sys.executable, str(TRAIN), *NANO, *LENGTHS, "trainer=fsdp", *CPU, "checkpoint_seconds=0.2"),
        *(f"run_dir={folder / name}", f"cache_dir={folder / 'cache'}", *overrides),
    ]


def ranks_of(job: int) -> list[int]:
    """The processes of a job's ranks."""
    children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for_checkpoint(job: Forked, cache: Path, *, after: Path | None = None) -> None:
    """Until elastic training has saved, or saved again."""
    end = time.monotonic() + 240
    while newest(cache) == after:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def newest(cache: Path) -> Path | None:
    """The newest checkpoint of elastic training."""
    return max(cache.glob("elastic-*/checkpoints/*.ckpt"), default=None)


def kill_all(group: int) -> None:
    """What is left of a job."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def kill_a_rank(folder: Path) -> None:
    """Start a job with two ranks, kill one of them after a checkpoint, and see the job end."""
    job = start(command(folder, "run", "trainer.devices=2"))
    with contextlib.ExitStack() as last:
        last.callback(kill_all, job.pid)
        wait_for_checkpoint(job, folder / "cache")
        pids = ranks_of(job.pid)
        os.kill(pids[1], signal.SIGKILL)
        _, says = job.communicate(timeout=WITHIN_SECONDS)
    assert job.returncode not in (0, None)
    assert "rank" in says
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "no rank is left"


def finish_alone(folder: Path) -> None:
    """Finish the job in one process, and see the results of a run that nothing happened to."""
    done = processes.run(command(folder, "run", "trainer.devices=1"), check=True)
    assert "pretrain" in done.stderr
    assert "(from the cache)" in done.stderr
    rows = list(csv.DictReader((folder / "run/timings.csv").read_text().splitlines()))
    assert int(next(row for row in rows if row["what"] == "elastic")["resumed_at_step"]) > 0
    whole = [*NANO, *LENGTHS, f"run_dir={folder / 'whole'}", f"cache_dir={folder / 'other'}"]
    assert_same_results(many_runs.one(whole).folder, folder / "run")


def test_a_job_outlives_one_of_its_ranks(tmp_path):
    """Killed with two ranks, finished with one."""
    kill_a_rank(tmp_path)
    finish_alone(tmp_path)


@pytest.mark.slow
def test_a_job_outlives_its_ranks(tmp_path):
    """Killed with two ranks, told to end with three, ended with one: as if nothing had happened."""
    cache = tmp_path / "cache"
    kill_a_rank(tmp_path)
    reached = newest(cache)
    job = start(command(tmp_path, "run", "trainer.devices=3"))
    with contextlib.ExitStack() as last:
        last.callback(kill_all, job.pid)
        wait_for_checkpoint(job, cache, after=reached)
        job.terminate()
        _, says = job.communicate(timeout=WITHIN_SECONDS)
    assert job.returncode == EXIT_PREEMPTED, says
    step = re.search(r"elastic: told to end after step (\d+)", says)
    assert step is not None, says
    assert newest(cache).name == f"step={int(step.group(1)):08d}.ckpt"
    finish_alone(tmp_path)


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("nan", DivergenceError, "rank 1: pretrain: the loss is nan at step 2"),
        pytest.param(
            *("memory", DeviceMemoryError, "rank 1: pretrain: out of memory at step 2"), marks=pytest.mark.slow
        ),
    ],
)
def test_what_stops_one_rank_is_named(trouble, error, message, tmp_path):
    run = [*NANO, "trainer=ddp", "trainer.devices=2", *CPU, f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(error, match=message):
        launch(many_runs.in_trouble, (trouble, [*run, f"cache_dir={tmp_path / 'cache'}"]), num_ranks=2)


def test_a_sharded_checkpoint_becomes_safetensors(sharded_checkpoint, tmp_path):
    expected = torch.load(sharded_checkpoint.with_name("expected.pt"), weights_only=True)
    out = tmp_path / "weights"
    result = CliRunner().invoke(app, ["consolidate", str(sharded_checkpoint), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for part, file in (("decoder", "model.safetensors"), ("router", "router.safetensors")):
        found = load_file(out / file)
        assert found.keys() == {"weight", "bias"}
        assert all(torch.equal(value, expected[f"{part}.{name}"]) for name, value in found.items())


@pytest.mark.parametrize("name", ["__0_0.distcp", checkpoint.INDEX, checkpoint.LOOPS, XXH128.file_name])
def test_a_damaged_file_of_a_sharded_checkpoint_is_named(name, sharded_checkpoint, tmp_path, capsys):
    assert last_good_checkpoint(sharded_checkpoint.parent, is_sharded=True) == sharded_checkpoint
    assert last_good_checkpoint(sharded_checkpoint.parent, is_sharded=False) is None, (
        "those of one process are another kind"
    )
    content = bytearray((sharded_checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (sharded_checkpoint / name).write_bytes(content)
    result = CliRunner().invoke(app, ["consolidate", str(sharded_checkpoint), "--out", str(tmp_path / "weights")])
    assert "wanted a checkpoint that several ranks wrote" in str(result.exception)
    assert last_good_checkpoint(sharded_checkpoint.parent, is_sharded=True) is None
    assert "step=00000001.ckpt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../{}", "{}/../{}", "/{}"])
def test_an_index_names_files_of_its_folder(name, sharded_checkpoint):
    index = checkpoint.read_index(sharded_checkpoint)
    for stored in index.storage_data.values():
        stored.relative_path = name.replace("{}", stored.relative_path)
    (sharded_checkpoint / checkpoint.INDEX).write_bytes(pickle.dumps(index))
    complete(sharded_checkpoint, None)
    with pytest.raises(CheckpointError, match="its index names"):
        last_good_checkpoint(sharded_checkpoint.parent, is_sharded=True)


def test_nothing_unpickles_code_from_shards(sharded_checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (sharded_checkpoint / checkpoint.INDEX).write_bytes(pickle.dumps(Evil()))
    complete(sharded_checkpoint, None)
    with pytest.raises(CheckpointError, match=r"posix\.system is no part of an index"):
        last_good_checkpoint(sharded_checkpoint.parent, is_sharded=True)
    assert not (tmp_path / "owned").exists()


def test_no_value_of_a_shard_runs_code(tmp_path):
    """A value that is no tensor lies in a shard as a pickle of its own."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    bad = {"model": {"decoder.weight": torch.ones(2), "value": Evil()}}
    dcp.save(bad, checkpoint_id=tmp_path / "bad", no_dist=True)
    state = {"model": {"value": None}}
    with pytest.raises(dcp.api.CheckpointException, match="no plain values"):
        dcp.load(
            state,
            storage_reader=checkpoint.SafeReader(tmp_path / "bad"),
            planner=checkpoint.SafePlanner(),
            no_dist=True,
        )
    assert not (tmp_path / "owned").exists()
