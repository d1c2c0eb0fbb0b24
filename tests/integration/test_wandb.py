"""`logger=wandb` for real: what an offline run records, without an account, and that nothing fails or asks."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

import processes
from nestlm.api import run_and_report
from plugins import NANO
from wandb_files import history, records

TRAIN = Path(__file__).parents[2] / "train.py"


def command_line(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run as a stranger starts it: an empty home, no account, nothing to type on."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return processes.run(
        [sys.executable, str(TRAIN), *NANO, "budget=[0.9,0.7]", "logger=wandb", "run_dir=run", *overrides],
        cwd=tmp_path,
        env=environment | {"HOME": str(home)},
    )


def check_artifacts(run_dir: Path) -> None:
    artifacts = {record.artifact.type: record.artifact for record in records(run_dir) if record.HasField("artifact")}
    paths = {kind: {entry.path for entry in artifact.manifest.contents} for kind, artifact in artifacts.items()}
    assert paths["specs"] == {
        "specs/0.9.json", "specs/0.7.json", "results.csv", "config.yaml", "latency_table.json"
    }  # fmt: skip
    assert paths["model"] == {
        "checkpoints/joint/model.safetensors", "checkpoints/joint/router.safetensors", "checkpoints/data/tokenizer.json"
    }  # fmt: skip
    for kind in ("specs", "model"):
        for entry in artifacts[kind].manifest.contents:
            assert Path(entry.local_path) == run_dir / entry.path, "nothing is copied"
            assert entry.size == (run_dir / entry.path).stat().st_size


def test_an_offline_run_records_all_and_asks_nothing(tmp_path):
    finished = command_line(tmp_path, "+cost@costs.latency=latency")
    assert finished.returncode == 0, finished.stderr
    run_dir = tmp_path / "run"
    logged = history(run_dir)
    for stage in ("pretrain", "elastic", "router", "joint"):
        assert logged[f"{stage}/tokens_per_second"]
    for name in ("pretrain/loss", "elastic/loss_subnet", "joint/loss_subnet", "router/rank_correlation"):
        assert name in logged
    with (run_dir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("achieved", "val_loss", "accuracy"):
            assert logged[f"evaluate/{row['router']}/{row['budget']}/{name}"] == [pytest.approx(float(row[name]))]
    assert len(logged["val/pareto_gap"]) == 1
    (offline,) = (run_dir / "logs/wandb").glob("offline-run-*")
    for name in ("pareto", "routing"):
        (path,) = logged[f"{name}.path"]
        assert (offline / "files" / path).read_bytes() == (run_dir / f"{name}.png").read_bytes()
    assert logged["results.nrows"] == [len(rows)]
    assert logged["results.ncols"] == [len(rows[0])]
    check_artifacts(run_dir)
    sync = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(offline)], capture_output=True, text=True, cwd="/"
    )
    assert "Would sync 1 run" in sync.stdout + sync.stderr, sync


def test_a_run_that_fails_is_finished_as_failed(run, tmp_path, monkeypatch):
    def broken(folder: Path) -> None:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(run_and_report, "render", broken)
    with pytest.raises(RuntimeError, match="no picture"):
        run("logger=wandb", "budget=0.8")
    assert wandb.run is None
    assert [record.exit.exit_code for record in records(tmp_path / "run") if record.HasField("exit")] == [1]


def test_sending_without_an_account_is_one_line(tmp_path):
    finished = command_line(tmp_path, "logger.offline=false")
    assert finished.returncode == 2
    errors = [line for line in finished.stderr.splitlines() if not line.startswith("wandb:")]
    assert len(errors) == 1
    assert "wandb login" in errors[0]
    assert "logger.offline=true" in errors[0]


def test_other_loggers_do_not_import_wandb():
    loaded = "import sys, nestlm.api.run_and_report; print('wandb' in sys.modules)"
    printed = processes.run([sys.executable, "-c", loaded], check=True)
    assert printed.stdout == "False\n"
