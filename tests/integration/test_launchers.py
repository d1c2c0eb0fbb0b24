"""Sweeps under every launcher that runs here: errors of jobs, threads, and stages that jobs share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import processes
from nestlm.cli.app import app
from nestlm.report.runs import find_runs
from plugins import NANO, stages_that_ran

TRAIN = Path(__file__).parents[2] / "train.py"
SLOW = pytest.mark.slow  # the launcher does the same in a quick test of another behaviour
FAST = [*NANO, "router=uniform", "budget=0.8"]


def sweep(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, str(TRAIN), "-m", *FAST, *overrides], cwd=folder, env=env)


@pytest.mark.parametrize(
    "launcher", ["serial", pytest.param("joblib", marks=SLOW), pytest.param("submitit_local", marks=SLOW)]
)
def test_every_failure_is_named_and_the_other_jobs_finish(launcher, tmp_path):
    done = sweep(tmp_path, f"launcher={launcher}", "budget=0.1,0.8,7")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(" (")[0] for line in errors] == ["error: job 0", "error: job 2"]
    assert "budget=0.1" in errors[0]
    assert "got 0.1 (flops), but the smallest sub-network costs 0.45" in errors[0]
    assert "got 7" in errors[1]
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.glob("runs/default/*/results.csv"))) == 1


# Run by each interpreter at its start.
BUG = """
import yaml
dump = yaml.safe_dump
def safe_dump(content, *arguments, **options):
    if content.get("seed") == 1:
        raise ZeroDivisionError("a bug")
    return dump(content, *arguments, **options)
yaml.safe_dump = safe_dump
"""


@pytest.mark.parametrize(
    "launcher", [pytest.param("serial", marks=SLOW), pytest.param("joblib", marks=SLOW), "submitit_local"]
)
def test_a_bug_in_a_job_is_a_failure_with_its_traceback(launcher, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BUG)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TRAIN), "-m", *FAST, f"launcher={launcher}", "seed=0,1"]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith("error: job 1 (")
    assert "ZeroDivisionError" in error
    logs = [path.read_text() for path in tmp_path.glob("runs/multirun/*/.submitit/**/*.err")]
    assert any("Traceback" in text for text in [done.stderr, *logs])
    assert len(list(tmp_path.glob("runs/default/*/SHA256SUMS"))) == 1


def free_threads() -> dict[str, str]:
    """Return the environment without a number of threads."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@SLOW
def test_joblib_shares_the_cores_between_its_workers(tmp_path):
    """Results are the same bit for bit only with as many threads; each run says how many it had."""
    done = sweep(tmp_path, "launcher=joblib", "seed=0,1", f"hydra.launcher.n_jobs={os.cpu_count()}", env=free_threads())
    assert done.returncode == 0, done.stderr
    provenances = list(tmp_path.glob("runs/default/*/provenance.json"))
    assert len(provenances) == 2
    for path in provenances:
        assert '"threads": 1,' in path.read_text()


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["joblib", "hydra.launcher.n_jobs=2"], marks=SLOW),
        pytest.param(["submitit_local", "hydra.launcher.gpus_per_node=1"], marks=SLOW),
        ["serial"],
    ],
    ids=lambda launcher: launcher[0],
)
def test_each_job_on_a_machine_has_a_gpu_of_its_own(launcher, tmp_path):
    """One made-up GPU for two jobs (`auto` then computes on the CPU): the second waits, unless they take turns."""
    (tmp_path / "tmp").mkdir()
    gpu = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "TMPDIR": str(tmp_path / "tmp")}
    name, *more = launcher
    done = sweep(tmp_path, f"launcher={name}", *more, "trainer.accelerator=auto", "seed=0,1", env=gpu)
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in tmp_path.glob("runs/multirun/*/.submitit/**/*.err")]
    waiting = sum("waiting for a free GPU of 0" in text for text in [done.stderr, *logs])
    assert waiting == (0 if name == "serial" else 1)


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=SLOW)])
def test_jobs_at_the_same_time_run_each_stage_once(launcher, tmp_path):
    parallel = [f"hydra.launcher.n_jobs={os.cpu_count()}"] if launcher == "joblib" else []
    done = sweep(tmp_path, f"launcher={launcher}", *parallel, "seed=0,1", "budget=0.8,0.9", env=free_threads())
    assert done.returncode == 0, done.stderr
    runs = [path.parent for path in tmp_path.glob("runs/default/*/results.csv")]
    assert len(runs) == 4
    once_a_seed = ("pretrain", "rank", "elastic", "router", "joint")
    assert sorted(name for run in runs for name in stages_that_ran(run)) == sorted(
        ["data", *2 * once_a_seed, *4 * ["evaluate"]]
    )
    if launcher == "joblib":
        assert all('"threads": 1,' in (run / "provenance.json").read_text() for run in runs), "workers share the cores"
    (folder,) = tmp_path.glob("runs/multirun/*")
    assert {run.folder.resolve() for run in find_runs([folder])} == set(runs), "the sweep's folder leads to its runs"


def test_a_group_of_ablations_is_one_command_and_one_table(tmp_path):
    done = sweep(tmp_path, "+experiment/ablation/teacher=glob(*)", "seed=0,1")
    assert done.returncode == 0, done.stderr
    result = CliRunner().invoke(app, ["report", str(tmp_path / "runs/ablation/teacher"), "--force"])
    assert result.exit_code == 0, result.output
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in result.output.splitlines()]
    rows = [cells for cells in table if cells[-1] == "2"]
    assert [row[0] for row in rows] == ["frozen", "in-place", "none (text only)"]
    assert all("±" in row[1] for row in rows)
    assert "42 stages of 6 runs, 13 of them from the cache" in result.output
