"""`kill -9` at any moment: the same command goes on, and ends with the same results, bit for bit."""

import csv
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import processes
from nestlm.errors import CheckpointError
from nestlm.pipeline import run as pipeline
from nestlm.train.callbacks.timed_checkpoint import (
    STATE,
    CheckpointFile,
    TimedCheckpoint,
    complete,
    last_good_checkpoint,
)
from nestlm.utils.checksums import XXH128
from plugins import NANO
from processes import kill_when

TRAIN = Path(__file__).parents[2] / "train.py"
# Long enough to be killed in the middle, and a checkpoint so often that the middle is reached.
LENGTHS = ["pretrain.steps=300", "elastic.steps=80", "router.steps=60", "joint.steps=40", "checkpoint_seconds=0.2"]


def command(run_dir: Path, cache: Path) -> list[str]:
    return [sys.executable, str(TRAIN), *NANO, *LENGTHS, "budget=[0.9,0.7]", f"run_dir={run_dir}", f"cache_dir={cache}"]


def checkpoints(cache: Path, stage: str) -> list[Path]:
    return sorted(cache.glob(f"{stage}-*/checkpoints/*.ckpt"))


def test_killed_runs_end_with_the_same_results(tmp_path):
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    arguments = command(tmp_path / "killed", cache)
    processes.run(command(whole, tmp_path / "other"), check=True)
    kill_when(arguments, lambda: list(cache.glob("data-*")))  # while the text is prepared
    kill_when(arguments, lambda: checkpoints(cache, "pretrain"))
    reached = checkpoints(cache, "pretrain")[-1]
    flip_bit(reached / STATE)  # the one before it is used, or the start
    kill_when(arguments, lambda: checkpoints(cache, "router"))
    assert list(cache.glob("elastic-*/stage.json")), "finished stages stay finished"
    elastic_made = next(cache.glob("elastic-*/stage.json")).stat().st_mtime_ns
    kill_when(arguments, lambda: list(cache.glob("evaluate-*/score-*.json")))
    last = processes.run(arguments, check=True)
    assert next(cache.glob("elastic-*/stage.json")).stat().st_mtime_ns == elastic_made
    assert "from the cache" in last.stderr
    assert (tmp_path / "killed/results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def test_a_stage_goes_on_from_its_last_checkpoint(run, tmp_path, monkeypatch):
    """Also from one that was written after the last step."""
    monkeypatch.setattr(pipeline, "drop_checkpoints", lambda folder: None)
    cache = tmp_path / "cache"
    fast = ["checkpoint_seconds=1e-9", "budget=0.8"]
    first = run(*fast, name="first", cache=cache)
    kept = {
        stage: [path.name for path in checkpoints(cache, stage)] for stage in ("pretrain", "elastic", "router", "joint")
    }
    assert kept["pretrain"] == ["step=00000005.ckpt", "step=00000006.ckpt"]
    for path in cache.glob("*/stage.json"):
        path.unlink()
    for stage in ("elastic", "router"):  # these go on from the step before the last
        shutil.rmtree(checkpoints(cache, stage)[-1])
    again = run(*fast, name="again", cache=cache)
    assert (first / "results.csv").read_bytes() == (again / "results.csv").read_bytes()
    with (again / "timings.csv").open() as file:
        resumed = {row["what"]: int(row["resumed_at_step"]) for row in csv.DictReader(file)}
    assert resumed["pretrain"] == 6, "at its end"
    assert resumed["elastic"] == 3, "before its end"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(4096) + content[8192:])


def saved(folder: Path, state: object) -> Path:
    """A checkpoint as one process writes it."""
    CheckpointFile().save_checkpoint({"state": state}, folder)
    complete(folder, None)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_bit(path / STATE),
        lambda path: zero_page(path / STATE),
        lambda path: (path / STATE).write_bytes((path / STATE).read_bytes()[:700]),
        lambda path: flip_bit(path / XXH128.file_name),
        lambda path: (path / XXH128.file_name).unlink(),
        lambda path: (path / XXH128.file_name).write_text(""),
        lambda path: (path / "another.pt").write_bytes(b""),
    ],
    ids=["flipped bit", "zeroed page", "cut", "flipped bit of hashes", "no hashes", "empty hashes", "another file"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, capsys):
    before, newest = (saved(tmp_path / f"step={step:08d}.ckpt", torch.ones(4000)) for step in (1, 2))
    assert last_good_checkpoint(tmp_path, is_sharded=False) == newest
    damage(newest)
    assert last_good_checkpoint(tmp_path, is_sharded=False) == before
    assert "step=00000002.ckpt is damaged" in capsys.readouterr().err
    assert not newest.exists()
    assert last_good_checkpoint(tmp_path / "absent", is_sharded=False) is None


def test_a_checkpoint_gets_its_name_after_its_hashes(tmp_path):
    """So that a kill between both neither loses it nor lets a damaged one pass."""
    seen = []
    callback = TimedCheckpoint(tmp_path, stage="elastic", seconds=1.0)
    trainer = SimpleNamespace(
        save_checkpoint=lambda path: CheckpointFile().save_checkpoint({"state": 1}, path),
        is_global_zero=True,
        strategy=None,
    )
    for step in range(1, 5):
        callback.save(trainer, step=step)  # pyright: ignore
        seen.append([path.name for path in tmp_path.glob("*.ckpt") if not (path / XXH128.file_name).is_file()])
    callback.finish()
    assert seen == [[]] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=00000003.ckpt", "step=00000004.ckpt"]


def test_what_is_left_of_a_damaged_checkpoint_is_replaced(tmp_path):
    (tmp_path / "step=00000001.ckpt").mkdir()
    (tmp_path / "step=00000001.ckpt/metadata").write_text("left")
    assert last_good_checkpoint(tmp_path, is_sharded=False) is None
    callback = TimedCheckpoint(tmp_path, stage="elastic", seconds=1.0)
    callback.partial = saved(tmp_path / ".step=00000001.partial", torch.ones(3))
    callback.finish()
    assert last_good_checkpoint(tmp_path, is_sharded=False) == tmp_path / "step=00000001.ckpt"


def test_nothing_unpickles_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    saved(tmp_path / "step=00000001.ckpt", Evil())
    with pytest.raises(CheckpointError, match="more than tensors"):
        last_good_checkpoint(tmp_path, is_sharded=False)
    assert not (tmp_path / "owned").exists()
