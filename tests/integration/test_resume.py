"""`kill -9` at any moment: the same command goes on, and ends with the same results, bit for bit."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestlm import pipeline
from nestlm.callbacks.checkpoint import last_good_checkpoint
from nestlm.errors import CheckpointError
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
    subprocess.run(command(whole, tmp_path / "other"), check=True, capture_output=True)
    kill_when(arguments, lambda: list(cache.glob("data-*")))  # while the text is prepared
    kill_when(arguments, lambda: checkpoints(cache, "pretrain"))
    reached = checkpoints(cache, "pretrain")[-1]
    # A checkpoint that was cut short: the one before it is used, or the start.
    reached.write_bytes(reached.read_bytes()[: reached.stat().st_size // 2])
    kill_when(arguments, lambda: checkpoints(cache, "router"))
    assert list(cache.glob("elastic-*/stage.json")), "finished stages stay finished"
    elastic_made = next(cache.glob("elastic-*/stage.json")).stat().st_mtime_ns
    kill_when(arguments, lambda: list(cache.glob("evaluate-*/score-*.json")))
    last = subprocess.run(arguments, check=True, capture_output=True, text=True)
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
        checkpoints(cache, stage)[-1].unlink()
    again = run(*fast, name="again", cache=cache)
    assert (first / "results.csv").read_bytes() == (again / "results.csv").read_bytes()
    with (again / "timings.csv").open() as file:
        resumed = {row["what"]: int(row["resumed_at_step"]) for row in csv.DictReader(file)}
    assert resumed["pretrain"] == 6, "at its end"
    assert resumed["elastic"] == 3, "before its end"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    for step in (1, 2):
        torch.save({"state": torch.ones(1000)}, tmp_path / f"step={step:08d}.ckpt")
    newest = tmp_path / "step=00000002.ckpt"
    newest.write_bytes(newest.read_bytes()[:700])
    assert last_good_checkpoint(tmp_path, is_sharded=False) == tmp_path / "step=00000001.ckpt"
    assert "step=00000002.ckpt is damaged" in capsys.readouterr().err
    assert last_good_checkpoint(tmp_path / "absent", is_sharded=False) is None


def test_nothing_unpickles_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    torch.save({"state": Evil()}, tmp_path / "step=00000001.ckpt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        last_good_checkpoint(tmp_path, is_sharded=False)
    assert not (tmp_path / "owned").exists()
