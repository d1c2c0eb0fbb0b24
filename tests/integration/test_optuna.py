"""A search by Optuna, where the extra `optuna` is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from plugins import NANO

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra `optuna`")
def test_optuna_minimises_the_gap_and_keeps_its_study(tmp_path):
    search = [
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.study_name=lr",
        "hydra.sweeper.storage=sqlite:///lr.db", "elastic.lr=tag(log,interval(1e-4,3e-3))",
    ]  # fmt: skip
    command = [sys.executable, str(TRAIN), *search, *NANO, "router=uniform", "budget=0.9", "joint.steps=0"]
    for seed in (0, 1):  # the same study goes on
        again = [*command, f"hydra.sweeper.sampler.seed={seed}"]
        finished = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
    found = {}
    for path in tmp_path.glob("runs/default/*/metrics.json"):
        lr = yaml.safe_load((path.parent / "config.yaml").read_text())["elastic"]["lr"]
        found[lr] = json.loads(path.read_text())["evaluate"]["pareto_gap"]
    assert len(found) == 4
    last = max(tmp_path.glob("runs/multirun/*/optimization_results.yaml"))  # folders are named by their times
    best = yaml.safe_load(last.read_text())
    assert best["best_value"] == min(found.values())
    assert best["best_params"]["elastic.lr"] == min(found, key=lambda lr: found[lr])
