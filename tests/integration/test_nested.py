"""`nestlm.load`: a run's folder alone, without the cache, answers budgets as the run did."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import nestlm
from nestlm.api import reproduce
from nestlm.data.preparation import prepare_source
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.tokenizer import train_tokenizer
from nestlm.elastic.axes.depth import Depth
from nestlm.errors import BudgetError, CheckpointError, ConfigError, DataError
from nestlm.eval.policy_scores import evaluate
from nestlm.report import record
from nestlm.report.runs import RunResults, find_runs
from nestlm.report.tables import read_csv
from nestlm.train.trainer import make_trainer

SOURCE = Synthetic(num_documents=100, num_words=100, seed=0)


def recorded(folder: Path) -> dict[tuple[str, str], float]:
    return {(row["router"], str(row["budget"])): row["val_loss"] for row in read_csv(folder / "results.csv")}


def answers_are_the_runs(folder: Path) -> None:
    """Every budget's loss is the recorded one, bit for bit."""
    model, known = nestlm.load(folder), recorded(folder)
    loader = model.stage.packed_tokens(model.runtime, stream="validation").heldout_dataloader("validation")
    for budget in model.budgets:
        found = model.at(str(budget).split("+"))
        scores = evaluate(model.decoder, found.policy, loader=loader, trainer=make_trainer(model.settings.trainer))
        assert scores.loss == known[found.router, str(budget)]
        plan = json.loads((folder / f"specs/{budget}.json").read_text()).get("plan")
        assert (found.spec is None) == (plan is not None) == (found.routed.plan is not None)


def test_budgets_of_a_run_are_answered_as_the_run_did_without_its_cache(static_run, dynamic_run):
    answers_are_the_runs(static_run)
    answers_are_the_runs(dynamic_run)
    assert nestlm.load(dynamic_run).at(0.8).spec is None, "tokens differ"


@pytest.mark.parametrize(
    "overrides",
    [["axes=mlp_heads_depth"], ["router=value", "router.granularity=prompt", "router.prompt_tokens=4"]],
    ids=str,
)
def test_skipped_blocks_and_decisions_by_prompt_are_answered_as_well(run, overrides):
    folder = run(*overrides, "budget=0.8", "router.num_sequences=4", "model.mlp_width=384")
    answers_are_the_runs(folder)
    model = nestlm.load(folder)
    for axis in model.axes:
        if isinstance(axis, Depth):
            assert list(axis.layers or ()) == model.metrics["rank"]["skippable"]


def test_other_budgets_are_found_now_and_kept(static_run, dynamic_run):
    for folder in (static_run, dynamic_run):
        model = nestlm.load(folder)
        for budget in (0.75, "90%"):
            found = model.at(budget)
            assert found is model.at(budget)
            if found.spec is not None:
                assert found.achieved == model.prices.main.share(found.spec) <= found.budget.limits[0].amount


def test_a_dynamic_run_has_a_static_router_as_well_which_takes_all_budgets(dynamic_run):
    model = nestlm.load(dynamic_run)
    assert model.at(0.8).routed.plan is not None
    static = model.at(0.8, router="static")
    assert (static.router, static.routed.plan) == ("knapsack", None)
    assert static.achieved <= 0.8
    assert model.prices.tables["params"].share(model.at("0.8params", router="static").spec) <= 0.8
    with pytest.raises(BudgetError, match="FLOP and latency budgets only"):
        model.at("0.8params")


def test_what_cannot_be_answered_is_said(static_run):
    model = nestlm.load(static_run)
    with pytest.raises(BudgetError, match=r"got 0.01 .* ask for at least that"):
        model.at(0.01)
    with pytest.raises(BudgetError, match="got 'small', wanted a share"):
        model.at("small")
    with pytest.raises(ConfigError, match="router is surrogate-static; train one with router=value"):
        model.at(0.8, router="dynamic")
    with pytest.raises(ConfigError, match="got 'fast', wanted static or dynamic"):
        model.at(0.8, router="fast")


def copied(folder: Path, place: Path) -> Path:
    """A copy of a run, without hard links to its cache."""
    return Path(shutil.copytree(folder, place))


def test_damages_of_a_run_are_named(dynamic_run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(["joint/model.safetensors", "joint/router.safetensors"] * 8):
        place = copied(dynamic_run, tmp_path / f"flipped-{number}")
        path = place / "checkpoints" / name
        content = bytearray(path.read_bytes())
        content[int(torch.randint(len(content), (), generator=generator))] ^= 1 << (number % 8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged.*copy its folder again"):
            nestlm.load(place)
    for number, name in enumerate(["joint/model.safetensors", "joint/SHA256SUMS", "data", "joint"]):
        place = copied(dynamic_run, tmp_path / f"gone-{number}")
        path = place / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises((CheckpointError, DataError), match=f"{name}.* does not exist"):
            nestlm.load(place)


def test_a_recalled_answer_is_priced_again(dynamic_run, static_run, tmp_path):
    """Even where the run's record lists the file."""
    place = copied(dynamic_run, tmp_path / "dynamic")
    spec = {"router": "value-dynamic", "achieved": 0.8}
    (place / "specs/0.8.json").write_text(json.dumps(spec | {"plan": {"share": 1}}))
    (place / "specs/0.7.json").write_text(json.dumps(spec | {"widths": {"mlp_width": [1]}}))
    record.write_record(place)
    model = nestlm.load(place)
    with pytest.raises(CheckpointError, match=r"0.8.json is damaged.*KeyError"):
        model.at(0.8)
    with pytest.raises(CheckpointError, match=r"0.7.json is damaged.*wanted those of"):
        model.at(0.7)
    place = copied(static_run, tmp_path / "static")
    path = place / "specs/0.8.json"
    kept = json.loads(path.read_text())
    for changed, message in (
        ({"widths": kept["full_widths"]}, "costs more than the budget 0.8"),
        ({"achieved": 0.5}, "of the whole model, not 0.5"),
        ({"achieved": float("nan")}, "of the whole model, not nan"),
    ):
        path.write_text(json.dumps(kept | changed))
        record.write_record(place)
        with pytest.raises(CheckpointError, match=f"0.8.json is damaged.*{message}"):
            nestlm.load(place).at(0.8)


def test_what_is_no_finished_run_is_refused(static_run, tmp_path):
    with pytest.raises(DataError, match="is no finished run"):
        nestlm.load(tmp_path)
    place = copied(static_run, tmp_path / "unfinished")
    (place / "provenance.json").unlink()
    with pytest.raises(DataError, match="is no finished run"):
        nestlm.load(place)
    place = copied(static_run, tmp_path / "without_record")
    (place / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match="is no finished run, for it lacks SHA256SUMS"):
        nestlm.load(place)


def text(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


# what is done to a run's folder, and the file that is named
CHANGES = {
    "an edited setting": (lambda run, _: text(run / "config.yaml", "norm_eps:", "norm_eps: 1e-3 #"), "config.yaml"),
    "a cut config": (lambda run, _: (run / "config.yaml").write_text(""), "config.yaml"),
    "edited metrics": (lambda run, _: text(run / "metrics.json", "steps", "Steps"), "metrics.json"),
    "edited results": (lambda run, _: text(run / "results.csv", "uniform", "knapsack"), "results.csv"),
    "edited timings": (lambda run, _: text(run / "timings.csv", "False", "True"), "timings.csv"),
    "edited provenance": (lambda run, _: text(run / "provenance.json", "seed", "Seed"), "provenance.json"),
    "a swapped spec": (lambda run, _: shutil.copy(run / "specs/1.json", run / "specs/0.8.json"), "specs/0.8.json"),
    "another spec": (lambda run, _: shutil.copy(run / "specs/1.json", run / "specs/0.75.json"), "specs/0.75.json"),
    "a lost spec": (lambda run, _: (run / "specs/0.8.json").unlink(), "specs/0.8.json"),
    "another run's weights": (
        lambda run, other: shutil.copytree(
            other / "checkpoints/joint", run / "checkpoints/joint", dirs_exist_ok=True
        ),
        "checkpoints/joint/SHA256SUMS",
    ),
    "another tokenizer": (
        lambda run, _: text(run / "checkpoints/data/tokenizer.json", "{", "{ "), "checkpoints/data/tokenizer.json"
    ),
    "no record": (lambda run, _: (run / "SHA256SUMS").write_text("everything is well"), "SHA256SUMS"),
    "a damaged record": (
        lambda run, _: (run / "SHA256SUMS").write_bytes(bytes(100) + (run / "SHA256SUMS").read_bytes()[100:]),
        "SHA256SUMS",
    ),
    "a link out of the run": (
        lambda run, other: move_away(run / "checkpoints/joint/model.safetensors", other), "joint/model.safetensors"
    ),
    "a linked folder": (lambda run, other: move_away(run / "specs", other), "specs"),
    "a name that leads out": (
        lambda run, _: text(run / "SHA256SUMS", "  metrics.json", "  ../metrics.json"), "../metrics.json"
    ),
    "an absolute name": (lambda run, _: text(run / "SHA256SUMS", "  metrics.json", "  /etc/hosts"), "/etc/hosts"),
}  # fmt: skip


def move_away(path: Path, other: Path) -> None:
    """Move a file or folder out of a run, and leave a link."""
    place = other.with_name("moved") / path.name
    place.parent.mkdir()
    path.rename(place)
    path.symlink_to(place)


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_the_run_did_not_write_is_named(change, name, static_run, dynamic_run, tmp_path):
    """By everything that opens a run, before weights are read."""
    place = copied(static_run, tmp_path / "run")
    other = copied(dynamic_run, tmp_path / "other")
    change(place, other)
    for opened in (nestlm.load, reproduce.read, RunResults.read):
        with pytest.raises(DataError) as refused:
            opened(place)
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_notes_and_scores_in_a_runs_folder_are_no_change(static_run, tmp_path):
    """Neither is a link to the run, as sweeps leave them."""
    place = copied(static_run, tmp_path / "run")
    (place / "notes.txt").write_text("the best")
    (place / "evaluation.csv").write_text("a\n1\n")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/0").symlink_to(place)
    assert nestlm.load(tmp_path / "sweep/0").folder.name == "0"
    assert len(find_runs([tmp_path / "sweep"])) == 1


def test_text_that_was_prepared_elsewhere_is_needed_for_training_alone(run, tmp_path):
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    model = tmp_path / "tokenizer.json"
    model.write_text(train_tokenizer((document.text for document in SOURCE.documents()), vocab_size=288).to_str())
    prepare_source(SOURCE, prepared, vocab_size=288, tokenizer_file=model, heldout_share=0.1)
    loaded = nestlm.load(run("budget=0.8", "router=evolution", "data=shards", f"data.path={prepared}"))
    shutil.rmtree(prepared)
    assert loaded.at(0.8).achieved <= 0.8
    assert loaded.at(0.7).achieved <= 0.7, "the router tries candidates on calibration text"
    assert loaded.evaluate([0.8])[0]["val_loss"] > 0
    assert loaded.generate("the cat", max_tokens=2)


def test_a_device_that_is_not_there_is_an_error(static_run):
    assert nestlm.load(static_run, device="cpu").device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device: got cuda.*try device=cpu"):
            nestlm.load(static_run, device="cuda")
