"""Runs in which blocks may be skipped: the ranking names them, all later stages keep to them, budgets reach lower."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nestlm.cli.app import app
from nestlm.config.compose import build, compose
from nestlm.elastic.surgery import extract
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.settings import Settings
from plugins import NANO, stages_that_ran

SIZES, AXES = ["model.num_layers=4"], ["axes=mlp_heads_depth", "axes.depth.share=0.5"]
DEEP = [*SIZES, *AXES]
ROUTERS = {
    "surrogate-static": ["router=surrogate"],
    "knapsack": ["router=knapsack"],
    "value-dynamic": ["router=value"],
    "surrogate-dynamic-prompt": ["router=surrogate", "router.policy=dynamic", "router.granularity=prompt"],
}


def settings_of(*overrides: str) -> Settings:
    return build(compose([*NANO, *DEEP, *overrides]))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def skippable(folder: Path) -> list[int]:
    return json.loads((folder / "metrics.json").read_text())["rank"]["skippable"]


@pytest.fixture(scope="module")
def low() -> float:
    """A budget below the smallest widths in all blocks."""
    shares = [
        table.share(table.space.smallest())
        for table in (build(compose([*NANO, *SIZES, *axes])).prices().main for axes in (["axes=mlp_heads"], AXES))
    ]
    assert shares[1] < shares[0]
    return round((shares[0] + shares[1]) / 2, 3)


@pytest.mark.parametrize("router", ROUTERS)
def test_budgets_that_no_widths_reach_are_kept(run, low, router):
    prompt = router.endswith("prompt")  # which runs whole
    budget = 0.8 if prompt else low
    whole = ["router.prompt_tokens=8"] if prompt else []
    folder = run(*DEEP, *ROUTERS[router], f"budget=[1.0,{budget}]", *whole)
    for row in rows_of(folder):
        assert float(row["achieved"]) <= float(row["budget"])
    layers = skippable(folder)
    assert len(layers) == 2
    spec = json.loads((folder / f"specs/{budget:g}.json").read_text())
    assert spec["router"] == router
    assert spec["layers"] == {"mlp_width": [0, 1, 2, 3], "attn_heads": [0, 1, 2, 3], "depth": layers}
    if not prompt:
        assert min(spec["widths"]["depth"]) < 1
    for layer, runs in zip(layers, spec["widths"]["depth"], strict=True):
        if "dynamic" in router and runs == 0:
            assert spec["widths"]["mlp_width"][layer] in (0, 8)
    assert (folder / "routing.png").is_file()


def test_the_ranking_names_the_blocks_and_later_stages_keep_to_them(run, low, tmp_path):
    cache = tmp_path / "own-cache"
    asked = [*DEEP, "router=knapsack", f"budget=[0.6,{low}]"]
    folder = run(*asked, name="first", cache=cache)
    scores = load_file(folder / "checkpoints/rank/importance.safetensors")
    influence = [float(scores[f"depth[{layer}]"]) for layer in range(4)]
    assert skippable(folder) == sorted(sorted(range(4), key=influence.__getitem__)[:2])
    chosen = run(*asked, "ranking=random", "seed=3", name="random", cache=cache)
    assert skippable(chosen) != [1, 2], "not those that stand in before the ranking"
    for each in (folder, chosen):
        rows = {row["budget"]: row for row in rows_of(each) if row["router"] == "knapsack"}
        for path in (each / "specs").iterdir():
            spec = json.loads(path.read_text())
            assert spec["layers"]["depth"] == skippable(each)
            assert spec["params"] == params_of(each, spec)
            assert spec["params"] == int(rows[path.stem]["params"])


def params_of(folder: Path, spec: dict) -> int:
    """Parameters of the stand-alone model, cut out of the run's weights."""
    settings = settings_of().with_skippable(spec["layers"]["depth"])
    space = settings.space()
    widths = {axis: dict(zip(spec["layers"][axis], found, strict=True)) for axis, found in spec["widths"].items()}
    chosen = space.spec({site: space.choices[site].index(widths[site.axis][site.layer]) for site in space.sites})
    decoder = Decoder(settings.model.decoder_config())
    decoder.load_state_dict(load_file(folder / "checkpoints/joint/model.safetensors"))
    small = extract(decoder, chosen, axes=settings.axis_list)
    assert len(small.blocks) == 4 - len(widths["depth"]) + sum(widths["depth"].values())
    return sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("router", ["value-dynamic"])
def test_a_resumed_run_skips_the_same_blocks(run, low, router, tmp_path):
    cache = tmp_path / "own-cache"
    asked = [*DEEP, *ROUTERS[router], "ranking=random", "seed=3", f"budget={low}"]
    folder = run(*asked, name="first", cache=cache)
    for stage in ("joint", "evaluate"):
        for path in cache.glob(f"{stage}-*"):
            shutil.rmtree(path)
    again = run(*asked, name="again", cache=cache)
    assert stages_that_ran(again) == ["joint", "evaluate"]
    for name in ("results.csv", "metrics.json", f"specs/{low:g}.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("sampler", ["sandwich", pytest.param("homogeneous", marks=pytest.mark.slow), "sequence"])
def test_every_kind_of_sampler_trains_with_depth(run, low, sampler):
    for row in rows_of(run(*DEEP, f"sampler={sampler}", "router=uniform", f"budget={low}")):
        assert float(row["achieved"]) <= low


def test_depth_alone(run):
    folder = run("axes=depth", "axes.depth.share=0.5", "model.num_layers=4", "budget=[0.9,0.8]")
    for row in rows_of(folder):
        assert float(row["achieved"]) <= float(row["budget"])
    assert set(json.loads((folder / "specs/0.8.json").read_text())["widths"]) == {"depth"}


def test_a_profile_prices_the_blocks_that_the_ranking_names(run, tmp_path, capsys):
    path = tmp_path / "measured.json"
    app(["profile", *NANO, *DEEP, "cost.repeats=1", "--out", str(path)], standalone_mode=False)
    assert "depth (all layers) 0: 0, 1:" in capsys.readouterr().out
    latency = [*DEEP, "cost=latency", f"cost.table={path}", "ranking=random", "seed=3"]
    folder = run(*latency, "router=knapsack", "budget=0.7")
    assert skippable(folder) != [1, 2]
    for row in rows_of(folder):
        assert float(row["achieved"]) <= 0.7
    for row in rows_of(run(*latency, "router=value", "budget=0.9", name="dynamic")):
        assert float(row["worst"]) <= 0.9


def test_a_share_of_no_block_is_refused_before_anything_runs(run, tmp_path):
    with pytest.raises(ValueError, match=r"axes\.depth\.share: got 0\.1 of 4 blocks, wanted"):
        run(*DEEP, "axes.depth.share=0.1", cache=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
