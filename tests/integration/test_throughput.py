"""Tokens a second and MFU of the training stages, as loggers get them."""

import csv
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from nestlm.config.compose import build, compose
from nestlm.estimate.dry_run import training_stages
from nestlm.pipeline import run as pipeline
from nestlm.train.callbacks import throughput
from plugins import NANO

STAGES = ("pretrain", "elastic", "router", "joint")
TOKENS_PER_STEP = 8 * 32


def logged(folder: Path) -> dict[str, list[float]]:
    """Values of each metric, in order."""
    values: dict[str, list[float]] = {}
    (written,) = folder.glob("logs/*/version_0/metrics.csv")
    with written.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    values.setdefault(name, []).append(float(value))
    return values


def test_every_stage_logs_tokens_a_second_and_no_mfu_without_a_known_peak(run, tmp_path):
    values = logged(run("budget=0.8", "pretrain.steps=25", cache=tmp_path / "cache"))
    for stage in STAGES:
        assert all(value > 0 for value in values[f"{stage}/tokens_per_second"])
    assert len(values["pretrain/tokens_per_second"]) == 2, "steps 10 and 20"
    assert not [name for name in values if "mfu" in name]


def test_mfu_is_the_expected_flops_over_the_peak(run, tmp_path, monkeypatch):
    """No device here has a known peak, so one is given."""
    peak = 10**9
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: peak)
    values = logged(run("budget=0.8", cache=tmp_path / "cache"))
    stages = training_stages(build(compose(NANO)))
    assert tuple(stage.name for stage in stages) == STAGES
    for stage in stages:
        (rate,), (mfu,) = values[f"{stage.name}/tokens_per_second"], values[f"{stage.name}/mfu"]
        assert mfu == pytest.approx(rate * stage.flops_per_token() / peak, rel=1e-6)


def test_a_resumed_stage_counts_its_own_steps(run, tmp_path, monkeypatch):
    """By a clock that says one second later each time it is asked: at the start twice, then when it is logged."""
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=count().__next__))
    monkeypatch.setattr(pipeline, "drop_checkpoints", lambda folder: None)
    cache, fast = tmp_path / "cache", ["checkpoint_seconds=1e-9", "budget=0.8"]
    whole = logged(run(*fast, name="whole", cache=cache))
    assert whole["elastic/tokens_per_second"] == [4 * TOKENS_PER_STEP]
    for path in cache.glob("elastic-*/stage.json"):
        path.unlink()
    shutil.rmtree(sorted(cache.glob("elastic-*/checkpoints/*.ckpt"))[-1])
    resumed = logged(run(*fast, name="resumed", cache=cache))
    assert resumed["elastic/tokens_per_second"] == [1 * TOKENS_PER_STEP]
