"""Runs that count time: the table is measured once, named in the run's folder, and budgets in ms are kept."""

import csv
import json
import shutil
import sys

import pytest

from nestlm.cli.app import app
from nestlm.config import commands
from nestlm.errors import BudgetError, ConfigError
from nestlm.eval import latency_profile
from nestlm.utils.devices import device_name
from plugins import NANO, compose

# wide enough that the smallest sub-network is much faster
LATENCY = ["cost=latency", "cost.repeats=3", "router=knapsack", "model.mlp_width=4096"]
# Of the nano model, whose full model then takes 8 ms and whose smallest 3 ms.
WRITTEN = {
    "format": 1,
    "unit": "ms",
    "phase": "prefill",
    "device": "a phone",
    "dtype": "int8",
    "batch_size": 1,
    "context_length": 32,
    "constant": 1.0,
    "prices": {
        "mlp_width": {"8": 0.5, "12": 0.5, "24": 1.0, "36": 1.25, "48": 1.5},
        "attn_heads": {"1": 0.5, "2": 1.0, "3": 1.5, "4": 2.0},
    },
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(WRITTEN))
    return path


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_measures_a_table_and_a_resumed_one_takes_it_again(run, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "own-cache"
    folder = run(*LATENCY, "budget=[1.0,0.9]", name="first", cache=cache)
    table = json.loads((folder / "latency_table.json").read_text())
    assert table["device"] == device_name(latency_profile.torch.device("cpu"))
    assert (table["phase"], table["context_length"], len(table["prices"]["mlp_width"])) == ("prefill", 32, 2)
    for row in rows_of(folder):
        assert row["cost"] == "latency"
        assert float(row["achieved"]) <= float(row["budget"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["profile"]["check"] == table["check"]
    printed = capsys.readouterr().out
    assert "latency: ms for 1 prompt of 32 tokens, float32, measured on" in printed
    assert "mean absolute error" in (folder / "report.md").read_text()

    def measured_again(*args, **kwargs):
        raise AssertionError("the table is in the cache")

    monkeypatch.setattr("nestlm.pipeline.stages.profile.profile", measured_again)
    for path in cache.glob("evaluate-*"):
        shutil.rmtree(path)
    again = run(*LATENCY, "budget=[1.0,0.9]", name="again", cache=cache)
    assert (again / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    run(*LATENCY, "budget=[1.0,0.9]", "seed=1", name="seed", cache=cache)  # nor does another seed


def test_another_cost_trains_no_teacher_and_another_table_routes_again(run, tmp_path, table):
    cache = tmp_path / "own-cache"
    run("router=knapsack", "budget=0.8", name="flops", cache=cache)
    named = ["cost=latency", f"cost.table={table}", "router=knapsack", "budget=0.8"]
    run(*named, name="first", cache=cache)

    def stages():
        return sorted(path.parent.name.rpartition("-")[0] for path in cache.glob("*/stage.json"))

    once = ["data", "elastic", "pretrain", "rank"]
    assert stages() == sorted([*once, "profile", *2 * ["evaluate", "joint", "router"]])
    table.write_text(json.dumps(WRITTEN | {"constant": 2.0}))
    run(*named, name="second", cache=cache)
    assert stages() == sorted([*once, *2 * ["profile"], *3 * ["evaluate", "joint", "router"]])


def test_a_budget_in_ms_is_kept_beside_another_cost(run, table):
    folder = run("+cost@costs.latency=latency", f"costs.latency.table={table}", "router=knapsack", "budget=[[0.9,5ms]]")
    for row in rows_of(folder):
        assert row["cost"] == "flops"
        assert 3.0 <= float(row["latency"]) <= 5.0
    assert json.loads((folder / "latency_table.json").read_text())["device"] == "a phone"


def test_a_dynamic_router_pays_for_itself_in_ms(run, table):
    """Two neighbouring widths cost the same here; the ledgers cope."""
    per_token = {"prices": WRITTEN["prices"], "router": {"constant": 0.25, "per_unit": 0.01}}
    table.write_text(json.dumps(WRITTEN | {"per_token": per_token}))
    folder = run("cost=latency", f"cost.table={table}", "router=value", "budget=[6.5ms]")
    (row,) = [row for row in rows_of(folder) if row["router"] == "value-dynamic"]
    assert 3.0 <= float(row["achieved_cost"]) <= 6.5
    assert float(row["worst"]) * 8.0 <= 6.5


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["budget=2ms"], BudgetError, "smallest sub-network costs 3ms"),
        (["budget=9ms"], BudgetError, "full model's latency is 8ms"),
        (["cost.phase=decode"], ConfigError, "got phase=prefill, wanted cost.phase=decode"),
        (["router=value", "budget=0.9"], BudgetError, "no prices per token"),
        (["cost.device=here"], ConfigError, "got device=a phone"),
        (["cost.context_length=300"], ConfigError, "cost.context_length: got 300, wanted at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_named_table_is_checked_before_anything_runs(run, table, tmp_path, overrides, error, expected):
    with pytest.raises(error, match=expected):
        run("cost=latency", f"cost.table={table}", *overrides, cache=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


def test_a_budget_that_the_measured_table_cannot_meet_stops_before_training(run, tmp_path):
    cache = tmp_path / "own-cache"
    with pytest.raises(BudgetError, match=r"0.001us .*smallest sub-network costs .*us; ask for at least that"):
        run(*LATENCY, "budget=0.001us", cache=cache)
    assert {path.parent.name.rpartition("-")[0] for path in cache.glob("*/stage.json")} == {"profile"}


def test_a_dry_run_waits_for_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *NANO, "cost=latency", "budget=12ms", "dry_run=true"])
    commands.train()
    printed = capsys.readouterr().out
    assert "measured by the run" in printed
    assert "elastic" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_profile_command_writes_a_table_that_a_run_takes(run, tmp_path, capsys):
    path = tmp_path / "measured.json"
    app(["profile", *NANO, "cost.repeats=1", "--out", str(path)], standalone_mode=False)
    printed = capsys.readouterr().out
    for part in ("constant", "mlp_width (layers 0-1) 8:", "per token: router", "mean absolute error", str(path)):
        assert part in printed
    folder = run("cost=latency", f"cost.table={path}", "router=knapsack", "budget=1.0")
    assert json.loads((folder / "latency_table.json").read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cost=flops", "--out", "t.json"], "wanted cost=latency"),
        (["--out", "/dev/null/t.json"], "--out: cannot"),
        (["modle=tiny", "--out", "t.json"], "'model'"),
    ],
)
def test_the_profile_command_names_mistakes(arguments, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        app(["profile", *NANO, *arguments], standalone_mode=False)
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_config_names_no_default_twice():
    assert compose(["cost=latency"])["cost"]["context_length"] == 256
