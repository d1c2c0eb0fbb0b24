"""`nestlm verify`: a run is done again, from nothing but its folder, and gives the same results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from nestlm.cli.app import app
from nestlm.report.record import write_record

ROOT = Path(__file__).parents[2]
TIMED = ["cost.repeats=1", "model.mlp_width=2048"]  # wide enough that narrow is faster


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def alone(*command: str | Path, threads: int, cwd: Path) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "overrides",
    [
        ["budget=[[0.9,75%],1.0]", "logger=tensorboard"],
        ["cost=latency", *TIMED, "cost.device=elsewhere", "router=value", "budget=[0.95,0.99flops]"],
        pytest.param(
            ["+cost@costs.latency=latency", "costs.latency.repeats=1", "router=evolution", "budget=0.8"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_a_run_gives_the_same_again(run, tmp_path, overrides):
    """The second run measures no times, takes nothing from the first one's cache, and logs to a file."""
    folder = run(*overrides)
    result = verify(folder, "--out", "again")
    assert result.exit_code == 0, result.output
    assert result.stdout == "same, bit for bit\n"
    again = tmp_path / "again"
    assert (again / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert "True" not in (again / "timings.csv").read_text(), "nothing came from a cache"
    assert list((again / "logs").rglob("metrics.csv"))
    assert not list((again / "logs").rglob("*tfevents*"))
    tables = [run / "latency_table.json" for run in (folder, again)]
    assert len({path.read_text() for path in tables if path.is_file()}) == ("latency" in " ".join(overrides))


def test_what_was_changed_is_found_and_reasons_are_given_first(run):
    folder = run("budget=[1.0,0.8]", "router=uniform")
    last = (folder / "results.csv").read_text().splitlines()[-1].split(",")
    rewrite(folder / "results.csv", f"{last[2]},", "0.7,")
    torch_version = json.loads((folder / "provenance.json").read_text())["packages"]["torch"]
    rewrite(folder / "provenance.json", f'"torch": "{torch_version}"', '"torch": "1.0"')
    assert "is not the file that the run wrote" in verify(folder).stderr
    write_record(folder)
    result = verify(folder)
    assert result.exit_code == 1
    reason = f"packages.torch: 1.0 then, {torch_version} now"
    for part in ("uniform", "achieved", "0.7 ", last[2], reason):
        assert part in result.stdout
    assert "val_loss" not in result.stdout
    assert result.stderr.index(f"unlike the run: {reason}") < result.stderr.index("data")


def test_the_command_takes_the_runs_number_of_threads(run, tmp_path):
    """In a process that was started with another one; also its exit codes."""
    folder, threads = run("budget=0.8", "router=uniform"), torch.get_num_threads()
    command = ("-c", "from nestlm.__main__ import main; main()", "verify")
    same = alone(*command, folder, "--out", "again", threads=threads + 1, cwd=tmp_path)
    assert (same.returncode, same.stdout) == (0, "same, bit for bit\n"), same.stderr
    assert json.loads((tmp_path / "again/provenance.json").read_text())["threads"] == threads
    none = alone(*command, tmp_path, threads=1, cwd=tmp_path)
    assert (none.returncode, none.stdout) == (2, "")
    assert "is no finished run" in none.stderr
    assert none.stderr.count("\n") == 1


def spoil_config(folder: Path, **values) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | values))


# what is done to a run's folder, and what is said
SPOILED = {
    "another version's field": (lambda run: spoil_config(run, warmth=3), ["of another version", "'warmth'"]),
    "another version's class": (
        lambda run: rewrite(run / "config.yaml", "uniform.UniformRouter", "uniform.EvenRouter"),
        ["of another version", "'EvenRouter'"],
    ),
    "no YAML": (lambda run: (run / "config.yaml").write_text("a: [1"), ["no YAML", "config.yaml"]),
    "no mapping": (lambda run: (run / "config.yaml").write_text("3"), ["config.yaml: got a int"]),
    "no table": (lambda run: (run / "latency_table.json").unlink(), ["latency_table.json"]),
    "no weights": (
        lambda run: rewrite(run / "config.yaml", "weights: null", "weights: absent"), ["model.weights", "absent"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_run_that_cannot_be_done_again_is_refused_in_a_line(run, tmp_path, spoil, expected):
    folder = run("budget=1.0", "router=uniform", "cost=latency", "cost.repeats=1")
    spoil(folder)
    write_record(folder)
    result = verify(folder, "--out", "again")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    for part in expected:
        assert part in result.stderr
    assert not (tmp_path / "again").exists()


def test_a_run_whose_text_has_moved_takes_another_place(run, tmp_path, monkeypatch):
    """Relative paths count from where the run was started."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"text {number} of many words " * 60)
    folder = run("budget=1.0", "router=uniform", "elastic.steps=0", "joint.steps=0", "data=text", "data.path=text")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert verify(folder).stdout == "same, bit for bit\n"
    text.rename(tmp_path / "moved")
    refused = verify(folder)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert f"if text or weights have moved: nestlm verify {folder} data.path=PLACE" in refused.stderr
    assert verify(folder, f"data.path={tmp_path / 'moved'}").stdout == "same, bit for bit\n"
    assert "seed: got another setting" in verify(folder, "seed=1").stderr


def test_a_finished_run_is_not_written_over(run):
    folder = run("budget=0.8", "router=uniform")
    before = (folder / "results.csv").stat().st_mtime_ns
    result = verify(folder, "--out", folder)
    assert result.exit_code == 2
    assert "holds a finished run" in result.stderr
    assert (folder / "results.csv").stat().st_mtime_ns == before
