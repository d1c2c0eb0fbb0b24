"""The pipeline from text to table: its folder, its cache, its variants, its loggers."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import nestlm
import wandb_files
from nestlm.cli.app import app
from nestlm.config.compose import compose
from nestlm.config.groups import CONF
from nestlm.errors import NestlmError
from nestlm.report.render import render
from plugins import options

COLUMNS = {
    "router", "budget", "achieved", "cost", "achieved_cost", "params", "active_params", "flops", "memory",
    "val_loss", "perplexity", "bits_per_byte", "accuracy", "seed",
}  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_run_folder_holds_all_that_is_promised(run, capsys):
    folder = run("budget=[1.0,0.8,0.7]")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present >= {
        "config.yaml", "provenance.json", "metrics.json", "results.csv", "timings.csv", "report.md", "pareto.png",
        "routing.png", "specs/1.json", "specs/0.8.json", "specs/0.7.json", "checkpoints/joint/model.safetensors",
        "checkpoints/joint/router.safetensors", "checkpoints/data/tokenizer.json",
    }  # fmt: skip
    rows = rows_of(folder)
    assert set(rows[0]) >= COLUMNS
    assert [(row["router"], float(row["budget"])) for row in rows] == [
        (router, budget) for router in ("uniform", "surrogate-static") for budget in (1.0, 0.8, 0.7)
    ]
    for row in rows:
        assert float(row["achieved"]) <= float(row["budget"])
        spec = json.loads((folder / "specs" / f"{float(row['budget']):g}.json").read_text())
        if row["router"] == spec["router"]:
            assert spec["params"] == int(row["params"])
    assert not any("second" in column for column in rows[0]), "times stay out of the results"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["seed"] == 0
    assert set(provenance) >= {"commit", "dirty", "packages", "device", "data_fingerprint", "tokens", "wall_seconds"}
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [float(row["val_loss"]) for row in rows if row["router"] == "surrogate-static"]
    gap = sum(losses) / len(losses) - metrics["pretrain"]["val_loss"]
    assert metrics["evaluate"]["pareto_gap"] == pytest.approx(gap)
    printed = capsys.readouterr()
    assert f"mean over budgets: {gap:+.4f}" in printed.out
    assert "surrogate-static" in printed.out
    assert "7.63%" in printed.out
    assert str(folder) in printed.out
    for stage in ("data", "pretrain", "rank", "elastic", "router", "joint", "evaluate"):
        assert stage in printed.err
    before = (folder / "report.md").read_text()
    render(folder)
    assert (folder / "report.md").read_text() == before


@pytest.mark.parametrize("cost", ["flops", "memory"])
def test_several_limits_are_kept_and_named(run, cost):
    folder = run("budget=[[0.95,50KB],75%,2e4params]", f"cost={cost}")
    rows = rows_of(folder)
    assert [row["budget"] for row in rows] == 2 * ["0.75", "0.95+50KB", "20000params"]
    for row in rows:
        assert row["cost"] == cost
        assert row["achieved_cost"] == row[cost]
        assert float(row["achieved"]) <= {"0.75": 0.75, "0.95+50KB": 0.95}.get(row["budget"], 1.0)
        if "KB" in row["budget"]:
            assert int(row["memory"]) <= 50_000
        if "params" in row["budget"]:
            assert int(row["params"]) <= 20_000
    assert {path.stem for path in (folder / "specs").iterdir()} == {row["budget"] for row in rows}
    assert "0.95+50KB" in (folder / "report.md").read_text()


def test_finished_stages_come_from_the_cache(run, tmp_path):
    cache = tmp_path / "own-cache"
    first = run("budget=0.8", name="first", cache=cache)
    stamps = {path: path.stat().st_mtime_ns for path in cache.glob("*/stage.json")}
    assert len(stamps) == 7
    again = run("budget=0.8", name="again", cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*/stage.json")} == stamps
    assert (first / "results.csv").read_bytes() == (again / "results.csv").read_bytes()
    run("budget=0.8", "router=uniform", name="other", cache=cache)
    new = {path.parent.name.split("-")[0] for path in cache.glob("*/stage.json") if path not in stamps}
    assert new == {"router", "joint", "evaluate"}, "only what depends on the router ran"
    run("budget=0.8", "seed=1", name="seed", cache=cache)
    assert len(list(cache.glob("data-*"))) == 1
    assert len(list(cache.glob("pretrain-*/stage.json"))) == 2


def test_two_seeds_differ_and_one_seed_repeats(run, tmp_path):
    """With separate caches, so that everything is computed again."""
    first = run("seed=0", "budget=[0.9,0.7]", name="first", cache=tmp_path / "a")
    again = run("seed=0", "budget=[0.9,0.7]", name="again", cache=tmp_path / "b")
    other = run("seed=1", "budget=[0.9,0.7]", name="other", cache=tmp_path / "a")
    assert (first / "results.csv").read_bytes() == (again / "results.csv").read_bytes()
    assert (first / "metrics.json").read_bytes() == (again / "metrics.json").read_bytes()
    losses = [[row["val_loss"] for row in rows_of(folder)] for folder in (first, other)]
    assert losses[0] != losses[1]


def test_cache_off_works_in_the_runs_folder(run, tmp_path):
    cache = tmp_path / "unused"
    folder = run("cache=off", "budget=0.8", cache=cache)
    assert not cache.exists()
    assert len(list((folder / "stages").glob("*/stage.json"))) == 7


def pairs() -> Iterator[Any]:
    """Every sampler with every teacher; of them each sampler and each teacher at least once without the mark slow."""
    for row, sampler in enumerate(options("sampler")):
        for column, teacher in enumerate(options("teacher")):
            is_quick = column == row % len(options("teacher"))
            yield pytest.param(teacher, sampler, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("teacher", "sampler"), list(pairs()))
def test_every_teacher_and_sampler_trains(run, teacher, sampler):
    folder = run(f"teacher={teacher}", f"sampler={sampler}", "budget=0.8", "router=uniform")
    start, end = (load_file(folder / "checkpoints" / stage / "model.safetensors") for stage in ("rank", "elastic"))
    assert any(not torch.equal(end[name], value) for name, value in start.items())


@pytest.mark.parametrize(
    "overrides",
    [
        ["axes=mlp"],
        ["axes=heads", "budget=0.9"],
        ["cost=params"],
        ["model.num_kv_groups=2", "axes.attn_heads.fractions=[0.5,1.0]"],
        ["model.tie_embeddings=false"],
        ["data.separate_documents=false"],
        ["ranking=none"],
        ["axes=mlp", "axes.mlp_width.fractions=[1.0]", "budget=1"],
        ["activation_checkpointing=true"],
        ["elastic.steps=0"],
        ["router.steps=0"],
        ["joint.steps=0"],
        ["router.signal.target=loss"],
        ["data.num_workers=1"],
    ],
    ids=" ".join,
)
def test_variants_run_within_their_budget(run, overrides):
    budget = [] if any(override.startswith("budget") for override in overrides) else ["budget=0.8"]
    for row in rows_of(run(*overrides, *budget)):
        assert float(row["achieved"]) <= float(row["budget"])


SHIPPED = [
    f"{group}={path.stem}" for group in ("debug", "experiment") for path in sorted((CONF / group).glob("*.yaml"))
]


@pytest.mark.parametrize("choice", SHIPPED)
def test_shipped_experiments_and_debug_configs_run(run, choice):
    budget = [] if choice.startswith("experiment") else ["budget=0.9"]
    rows = rows_of(run(choice, "pretrain.steps=2", "elastic.steps=2", "router.steps=2", *budget))
    assert all(float(row["achieved"]) <= float(row["budget"]) for row in rows)


def test_weights_in_safetensors_and_nothing_pickled_is_left(run):
    folder = run("budget=0.8")
    stages = [path for path in (folder / "checkpoints").iterdir() if path.name != "data"]
    left = {path.name if not path.suffix else path.suffix for stage in stages for path in stage.iterdir()}
    assert left == {".safetensors", "SHA256SUMS"}
    with safe_open(folder / "checkpoints" / "joint" / "router.safetensors", framework="pt") as router:
        assert not [name for name in router.keys() if "surrogate" in name], "the surrogate is thrown away"  # noqa: SIM118


@pytest.mark.parametrize("logger", sorted(path.stem for path in (CONF / "logger").glob("*.yaml")))
def test_loggers_log_every_stages_loss(run, logger, tmp_path):
    """csv, tensorboard and wandb for real (wandb offline)."""
    folder = run(f"logger={logger}", "budget=0.8", cache=tmp_path / "cache")
    if logger == "wandb":
        logged = " ".join(wandb_files.history(folder))
    else:
        files = [path for path in (folder / "logs").rglob("*") if path.is_file()]
        logged = "".join(path.read_text(encoding="latin-1") for path in files)
    for name in ("pretrain/loss", "elastic/loss_subnet", "router/surrogate_error", "joint/loss_subnet"):
        assert name in logged


def test_text_folder_is_a_source(run, tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    words = [f"word{number}" for number in range(60)]
    for number in range(60):
        picked = torch.randint(0, 60, (120,), generator=generator).tolist()
        (source / f"{number}.md").write_text(" ".join(words[index] for index in picked))
    folder = run("data=text", f"data.path={source}", "budget=0.8")
    assert len(rows_of(folder)) == 2


def test_a_model_with_weights_is_not_pretrained(run, tmp_path):
    """A tiny checkpoint written by transformers, with a tokenizer of its own."""
    trained = run("budget=0.8", name="for-its-tokenizer")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    weights = tmp_path / "weights"
    transformers.LlamaForCausalLM(config).save_pretrained(weights)
    (weights / "tokenizer.json").write_bytes((trained / "checkpoints/data/tokenizer.json").read_bytes())
    options = ["model.pretraining_tokens=1e6", "budget=0.8"]
    folder = run(f"model.weights={weights}", *options, name="imported")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["pretrain"]["steps"] == 0
    ours = load_file(folder / "checkpoints/pretrain/model.safetensors")
    theirs = load_file(weights / "model.safetensors")
    assert torch.equal(ours["blocks.1.mlp.down.weight"], theirs["model.layers.1.mlp.down_proj.weight"])
    (weights / "NOTES.md").write_text("a note")
    (weights / "chat_template.jinja").write_text("{{ messages }}")
    copied = Path(shutil.copytree(weights, tmp_path / "elsewhere/copied"))
    again = run(f"model.weights={copied}", *options, name="again")
    with (again / "timings.csv").open() as file:
        cached = {row["what"]: row["cached"] for row in csv.DictReader(file)}
    assert {cached[stage] for stage in ("data", "pretrain", "rank", "elastic", "joint")} == {"True"}
    shutil.rmtree(weights)
    shutil.rmtree(copied)
    done_again = CliRunner().invoke(app, ["verify", str(folder)])
    assert done_again.stdout == "same, bit for bit\n", done_again.output
    assert "the run's own copy of them serves" in done_again.stderr
    for source, templates in ((folder, set()), (again, {"chat_template.jinja"})):
        nestlm.load(source).export(tmp_path / f"{source.name}-out", budget=0.8)
        written = {path.name for path in (tmp_path / f"{source.name}-out").iterdir()}
        assert written & {"NOTES.md", "chat_template.jinja"} == templates, "as it was when the run was made"
        shutil.rmtree(source / "checkpoints/pretrain/parent")
        with pytest.raises(NestlmError, match="parent"):
            nestlm.load(source).export(tmp_path / "not", budget=0.8)


def test_small_model_composes_with_real_sizes():
    assert compose(["model=small"])["model"]["hidden_size"] == 768


def test_many_runs_are_put_into_one_table(run, tmp_path):
    for router in ("knapsack", "uniform"):
        for seed in (0, 1):
            run(f"router={router}", f"seed={seed}", "budget=[1.0,0.8]", name=f"many/{router}-{seed}")
    asked = ["report", str(tmp_path / "many"), "--force"]  # what is tested may not be committed yet
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "many/report").iterdir()}
    assert written == {"comparison.md", "comparison.csv", "comparison.tex", "comparison.html"}
    table = (tmp_path / "many/report/comparison.md").read_text()
    assert table in result.output
    losses = [float(rows_of(tmp_path / f"many/knapsack-{seed}")[-1]["val_loss"]) for seed in (0, 1)]
    assert f"{sum(losses) / 2:.4f} ±" in table
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ") and " ± " in line]
    assert [row[0].strip() for row in rows] == ["knapsack", "uniform"]
