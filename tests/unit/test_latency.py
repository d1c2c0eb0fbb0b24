"""Latency tables: the fit against known prices, the file's forms and refusals, budgets in milliseconds."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from models import AXES, decoder_config
from nestlm.config.groups import CONF
from nestlm.cost.latency.fit import fit_prices, mean_error, predict
from nestlm.cost.latency.latency import Latency
from nestlm.cost.latency.table_file import LatencyTable, Prices
from nestlm.cost.table import CostTable, PriceList, TokenTable
from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.axes.mlp_width import MLPWidth
from nestlm.errors import BudgetError, ConfigError
from nestlm.eval.latency_profile import (
    Mix,
    group_of,
    mix_designs,
    profile,
    random_specs,
    reached,
    router_time,
    spec_designs,
)
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.spec import Budget

CONFIG = decoder_config(num_kv_groups=2)
SPACE = search_space(AXES, CONFIG)  # widths 6, 12, 24 and 1, 2 in three layers
ALIKE = [group_of(site, config=CONFIG, space=SPACE) for site in SPACE.sites]
ROWS = ((0.5, 0.5, 2.0),) * 3 + ((1.0, 1.75),) * 3
COST = Latency(phase="prefill", batch_size=2, context_length=20, dtype="float32", repeats=1, table=None, device=None)
HAND_WRITTEN = {
    "format": 1,
    "unit": "ms",
    "phase": "prefill",
    "device": "a phone",
    "dtype": "int4",
    "batch_size": 2,
    "context_length": 20,
    "constant": 3.0,
    "prices": {
        "mlp_width": {"6": 0.5, "12": 1.0, "24": 2.0},
        "attn_heads": [{"1": 1.0, "2": 1.5}, {"1": 1.0, "2": 1.5}, {"1": 0.0, "2": 2.0}],
    },
}
PER_TOKEN = HAND_WRITTEN | {
    "per_token": {
        "prices": {"mlp_width": {"6": 0.75, "12": 1.0, "24": 2.0}, "attn_heads": {"1": 1.5, "2": 2.0}},
        "router": {"constant": 0.25, "per_unit": 0.01},
    }
}


def write(tmp_path, content) -> Latency:
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return COST.with_table(path, device=None)


def table_of(cost: Latency, *, per_token: bool = False) -> CostTable:
    return cost.tabulate(SPACE, axes=AXES, config=CONFIG, per_token=per_token)


def reach_of(runs):
    return np.stack([reached(run if run.ndim == 2 else run[:, None], SPACE) for run in runs])


def test_the_fit_recovers_known_prices_and_the_constant():
    reach = reach_of(spec_designs(SPACE))
    constant, rows = fit_prices(reach, predict(reach, constant=4.0, rows=ROWS), space=SPACE, alike=ALIKE)
    assert constant == pytest.approx(4.0)
    assert np.concatenate(rows) == pytest.approx(np.concatenate(ROWS))


def test_predictions_are_sums_of_prices():
    specs = random_specs(SPACE, count=5, generator=np.random.default_rng(3))
    sums = [4.0 + sum(row[index] for row, index in zip(ROWS, spec, strict=True)) for spec in specs]
    assert predict(reach_of(specs), constant=4.0, rows=ROWS) == pytest.approx(sums)


@pytest.mark.parametrize("seed", range(3))
def test_noisy_times_give_near_prices_that_never_fall(seed):
    reach = reach_of(spec_designs(SPACE))
    noise = np.random.default_rng(seed).lognormal(sigma=0.05, size=len(reach))
    constant, rows = fit_prices(reach, predict(reach, constant=4.0, rows=ROWS) * noise, space=SPACE, alike=ALIKE)
    others = reach_of(random_specs(SPACE, count=50, generator=np.random.default_rng(9)))
    assert mean_error(predict(others, constant=constant, rows=rows), predict(others, constant=4.0, rows=ROWS)) < 0.03
    for row in rows:
        assert row[0] >= 0
        assert np.all(np.diff(row) >= 0)


def test_falling_times_become_equal_prices():
    falling = ((1.0, 2.0, 1.5),) * 3 + ((1.0, 1.75),) * 3
    reach = reach_of(spec_designs(SPACE))
    _, rows = fit_prices(reach, predict(reach, constant=4.0, rows=falling), space=SPACE, alike=ALIKE)
    assert rows[0][2] == rows[0][1] > rows[0][0]


def test_sites_that_decide_are_priced_apart_from_those_that_do_not():
    """Runs in which one axis decides tell what deciding costs at each; tokens lie between the choices' prices."""
    runs = mix_designs(SPACE, 40)
    assert {sum(run.decides) for run in runs} == {3, 6}
    per_token = tuple(tuple(price + 0.3 for price in row) for row in ROWS)
    reach = np.stack([run.reach(SPACE) for run in runs])
    known = np.array([4.0 + run.fixed_price(ROWS, SPACE) for run in runs])
    times = known + predict(reach, constant=0.0, rows=per_token)
    _, rows = fit_prices(reach, times, space=SPACE, alike=ALIKE, known=known)
    for found, real in zip(rows, per_token, strict=True):
        assert found == pytest.approx(real)


def test_only_blocks_of_the_same_sizes_share_prices():
    small, large = BlockConfig(4, 2, 24), BlockConfig(4, 2, 48)
    config = DecoderConfig(vocab_size=50, hidden_size=16, head_dim=8, context_length=32, blocks=(small, large, small))
    space = search_space(AXES, config)
    alike = [group_of(site, config=config, space=space) for site in space.sites]
    assert alike[0] == alike[2] != alike[1]
    assert len(set(alike)) == 4, "nor do two axes"


def test_the_routers_time_is_a_line_above_what_runs_without():
    time = router_time(1.0, 1.5 + 32 * 0.01, 1.5 + 128 * 0.01)
    assert (time.constant, time.per_unit) == (pytest.approx(0.5), pytest.approx(0.01))
    assert router_time(1.0, 0.9, 0.8).constant == router_time(1.0, 0.9, 0.8).per_unit == 0.0


def test_a_hand_written_table_prices_specs_and_milliseconds(tmp_path):
    table = table_of(write(tmp_path, HAND_WRITTEN))
    assert table.whole == 3.0 + 3 * 2.0 + 1.5 + 1.5 + 2.0 == table.cost(SPACE.full())
    assert table.cost(SPACE.smallest()) == 3.0 + 3 * 0.5 + 1.0 + 1.0
    assert table.unit.startswith("ms")
    prices = PriceList(table, {})
    assert prices.bounds(Budget.parse("7ms"))[0].share == 0.5
    assert prices.bounds(Budget.parse("7000us"))[0].share == 0.5
    with pytest.raises(BudgetError, match=r"6ms \(latency\), but the smallest sub-network costs 6.5ms"):
        prices.check(Budget.parse("6ms"))
    with pytest.raises(BudgetError, match="full model's latency is 14ms"):
        prices.check(Budget.parse("15ms"))


def test_a_site_that_decides_pays_for_it_and_for_its_router(tmp_path):
    cost = write(tmp_path, PER_TOKEN)
    static, tokens = table_of(cost), table_of(cost, per_token=True)
    assert isinstance(tokens, TokenTable)
    assert tokens.whole == static.whole, "shares refer to the static full model"
    narrowest = 3.0 + 3 * 0.75 + 3 * 1.5
    assert tokens.cost(SPACE.smallest()) == pytest.approx(narrowest)
    routed = tokens.with_router(10)
    assert routed.cost(SPACE.smallest()) == pytest.approx(narrowest + 0.25 + 0.01 * 10)
    assert routed.cost(SPACE.full()) == pytest.approx(3.0 + 3 * 2.0 + 3 * 2.0 + 0.35)
    assert routed.cheapest == pytest.approx(static.cost(SPACE.smallest())), "where no site decides"


def changed(**fields) -> dict:
    return {**HAND_WRITTEN, **fields}


MLP = HAND_WRITTEN["prices"]["mlp_width"]
HEADS = HAND_WRITTEN["prices"]["attn_heads"]
REFUSED = {
    "no json": ("times: 3", "table.json: .*JSON.*fill-a-latency-table"),
    "another format": (changed(format=2), r"format: got 2; .*1"),
    "seconds": (changed(unit="s"), "unit: got 's'.*ms"),
    "another phase": (changed(phase="decode"), r"got phase=decode, wanted cost.phase=prefill"),
    "another batch": (changed(batch_size=8), r"got batch_size=8, wanted cost.batch_size=2; .*nestlm profile"),
    "another context": (changed(context_length=9), "got context_length=9, wanted cost.context_length=20"),
    "no axis": (changed(prices={"mlp_width": MLP}), "no prices for the axis attn_heads.*mlp_width"),
    "no choice": (
        changed(prices={"mlp_width": {"6": 1.0, "24": 2.0}, "attn_heads": HEADS}),
        "no price of width 12 in layer 0, only of 6, 24; add it",
    ),
    "too few layers": (changed(prices={"mlp_width": MLP, "attn_heads": HEADS[:2]}), "list of 2 layers, wanted 3"),
    "negative": (
        changed(prices={"mlp_width": MLP | {"6": -1.0}, "attn_heads": HEADS}),
        r"prices.mlp_width.6: got -1.0; .*greater than or equal to 0",
    ),
    "not finite": (json.dumps(changed(constant=1.0)).replace("1.0, ", "NaN, ", 1), "JSON|finite"),
    "falling": (
        changed(prices={"mlp_width": MLP | {"24": 0.75}, "attn_heads": HEADS}),
        "got 0.75 ms for width 24 in layer 0, wanted at least the 1 ms of width 12; measure again",
    ),
    "a misspelled field": (changed(constnat=1.0), "constnat: got 1.0"),
    "no constant": ({key: value for key, value in HAND_WRITTEN.items() if key != "constant"}, "constant: .*required"),
}


@pytest.mark.parametrize(("content", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_a_table_cannot_be_is_refused_in_one_line(content, expected, tmp_path):
    with pytest.raises(ConfigError) as refused:
        table_of(write(tmp_path, content))
    assert re.search(expected, str(refused.value))
    assert "table.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_named_table_may_be_of_another_device_but_a_measured_one_may_not(tmp_path):
    path = tmp_path / "table.json"
    assert table_of(write(tmp_path, HAND_WRITTEN)).whole == 14.0
    with pytest.raises(ConfigError, match=r"got device=a phone, wanted cost.device=this one"):
        table_of(COST.with_table(path, device="this one"))
    with pytest.raises(ConfigError, match=r"got dtype=int4, wanted cost.dtype=float32"):
        table_of(COST.with_table(path, device="a phone"))


def test_without_a_table_or_prices_per_token_the_cure_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"latency has no table yet.*nestlm profile --out FILE"):
        table_of(COST)
    with pytest.raises(ConfigError, match=r"cannot read .*nestlm profile --out FILE makes one"):
        table_of(COST.with_table(tmp_path / "absent.json", device=None))
    with pytest.raises(BudgetError, match=r"no prices per token.*router.policy=static"):
        table_of(write(tmp_path, HAND_WRITTEN), per_token=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_profile_is_a_table_that_can_be_read(phase, dtype, tmp_path):
    cost = Latency(phase=phase, batch_size=2, context_length=20, dtype=dtype, repeats=1, table=None, device=None)
    before = torch.get_rng_state()
    measured = profile(cost, space=SPACE, config=CONFIG, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before), "no stage after it draws other numbers"
    path = tmp_path / "table.json"
    path.write_text(json.dumps(measured.to_json()))
    assert LatencyTable.read(path) == measured
    read = cost.with_table(path, device=measured.device)
    static, per_token = table_of(read), table_of(read, per_token=True)
    assert static.constant > 0
    assert static.cost(SPACE.full()) == static.whole >= static.cost(SPACE.smallest()) > 0
    assert per_token.whole == static.whole
    assert isinstance(per_token, TokenTable)
    assert per_token.fixed == static.prices
    assert per_token.constant == pytest.approx(static.constant + sum(per_token.shared))
    assert static.prices[0] == static.prices[1] == static.prices[2]
    assert measured.check is not None
    assert any("mlp_width (layers 0-2)" in line for line in measured.summary())


def test_prices_are_written_layer_by_layer():
    assert Prices(prices=Prices.of(SPACE, ROWS)).rows(SPACE) == ROWS


# depth

DEEP_AXES = (*AXES, Depth(share=0.5, layers=(0, 1)))
DEEP = search_space(DEEP_AXES, CONFIG)
DEEP_ALIKE = [group_of(site, config=CONFIG, space=DEEP) for site in DEEP.sites]
DEEP_ROWS = (*ROWS, (0.0, 0.4), (0.0, 0.4))
DEEP_WRITTEN = {
    "prices": {
        "mlp_width": {"6": 0.75, "12": 1.0, "24": 2.0},
        "attn_heads": {"1": 1.5, "2": 2.0},
        "depth": {"0": 0.25, "1": 0.5},
    },
    "router": {"constant": 0.0, "per_unit": 0.0},
}
DEEP_TABLE = HAND_WRITTEN | {
    "prices": {
        "mlp_width": {"6": 0.5, "12": 1.0, "24": 2.0},
        "attn_heads": {"1": 1.0, "2": 1.5},
        "depth": {"0": 0.0, "1": 0.4},
    },
    "per_token": DEEP_WRITTEN,
}


def test_the_fit_recovers_what_a_block_takes():
    """Skipped blocks take nothing, whatever is drawn for their widths."""
    runs = spec_designs(DEEP)
    reach = np.stack([reached(run[:, None], DEEP) for run in runs])
    times = predict(reach, constant=4.0, rows=DEEP_ROWS)
    assert times[0] == pytest.approx(4.0), "nothing runs"
    constant, rows = fit_prices(reach, times, space=DEEP, alike=DEEP_ALIKE)
    assert constant == pytest.approx(4.0)
    assert np.concatenate(rows) == pytest.approx(np.concatenate(DEEP_ROWS))


def test_tokens_that_skip_a_block_reach_nothing_in_it():
    indices = np.array([[2, 2, 1, 0]] * 3 + [[1, 1, 0, 0]] * 3 + [[1, 0, 1, 0], [1, 1, 1, 1]])
    reach = reached(indices, DEEP)
    assert reach[0].tolist() == [0.5, 0.5, 0.25], "two tokens run the first block, at widths 2 and 1"
    assert reach[1].tolist() == reach[2].tolist() == [1.0, 0.75, 0.5]
    assert reach[3].tolist() == [0.5, 0.25, 0.0]
    assert reach[6].tolist() == [1.0, 0.5, 0.0]
    fixed = Mix(np.repeat(indices[:, :1], 4, axis=1), (False,) * 8).fixed_price(DEEP_ROWS, DEEP)
    assert fixed == pytest.approx(3 * 2.0 + 3 * 1.75 + 2 * 0.4)
    decides = Mix(np.concatenate([np.repeat(indices[:6, :1], 4, axis=1), indices[6:]]), (False,) * 6 + (True,) * 2)
    assert decides.fixed_price(DEEP_ROWS, DEEP) == pytest.approx(2.5 * (2.0 + 1.75))


def test_the_fit_recovers_what_deciding_to_skip_takes():
    runs = mix_designs(DEEP, 40)
    per_token = tuple(tuple(price + 0.3 for price in row) for row in DEEP_ROWS)
    reach = np.stack([run.reach(DEEP) for run in runs])
    known = np.array([4.0 + run.fixed_price(DEEP_ROWS, DEEP) for run in runs])
    times = known + predict(reach, constant=0.0, rows=per_token)
    _, rows = fit_prices(reach, times, space=DEEP, alike=DEEP_ALIKE, known=known)
    assert np.concatenate(rows) == pytest.approx(np.concatenate(per_token))


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (2,)])
def test_a_table_prices_whichever_blocks_may_be_skipped(tmp_path, layers):
    axes = (*AXES, Depth(share=0.5, layers=layers))
    space = search_space(axes, CONFIG)
    table = write(tmp_path, DEEP_TABLE).tabulate(space, axes=axes, config=CONFIG)
    per_block = 2.0 + 1.5
    # the block's own 0.4 stand in the prices of those that may be skipped, and in the constant of the others
    assert table.whole == table.cost(space.full()) == pytest.approx(3.0 + 3 * per_block + 0.4 * len(layers))
    skipping = space.spec(dict.fromkeys(space.sites, -1) | dict.fromkeys(space.axes["depth"], 0))
    assert table.cost(skipping) == pytest.approx(3.0 + (3 - len(layers)) * per_block)
    narrow = space.spec(dict.fromkeys(space.sites, 0) | dict.fromkeys(space.axes["depth"], 1))
    assert table.cost(narrow) == pytest.approx(3.0 + 3 * 1.5 + 0.4 * len(layers))


def test_tokens_that_skip_save_the_narrowest_widths(tmp_path):
    tokens = write(tmp_path, DEEP_TABLE).tabulate(DEEP, axes=DEEP_AXES, config=CONFIG, per_token=True)
    assert isinstance(tokens, TokenTable)
    by_token = {"mlp_width": (0.75, 1.0, 2.0), "attn_heads": (1.5, 2.0), "depth": (0.25, 0.5)}
    for spec in (DEEP.full(), DEEP.spec(dict.fromkeys(DEEP.sites, 0) | dict.fromkeys(DEEP.axes["depth"], 1))):
        indices = zip(DEEP.sites, DEEP.indices(spec), strict=True)
        assert tokens.cost(spec) == pytest.approx(3.0 + sum(by_token[site.axis][index] for site, index in indices))
    # what is left of a block that is skipped: deciding, and what each of its sites takes more where tokens differ
    left = 0.25 + (0.75 - 0.5) + (1.5 - 1.0)
    assert tokens.cost(DEEP.smallest()) == pytest.approx(3.0 + 2 * left + 0.75 + 1.5)
    assert tokens.cheapest == pytest.approx(3.0 + 0.5 + 1.0), "where nothing decides"


def test_a_list_of_layers_is_no_price_of_depth(tmp_path):
    listed = DEEP_TABLE["prices"] | {"depth": [{"0": 0.0, "1": 0.4}] * 2}
    with pytest.raises(ConfigError, match=r"prices\.depth: got a list of layers, wanted one mapping for all"):
        write(tmp_path, DEEP_TABLE | {"prices": listed}).tabulate(DEEP, axes=DEEP_AXES, config=CONFIG)


def test_a_profile_with_depth_holds_for_other_blocks(tmp_path):
    cost = dataclasses.replace(COST, batch_size=1)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(profile(cost, space=DEEP, config=CONFIG, device=torch.device("cpu")).to_json()))
    assert set(json.loads(path.read_text())["prices"]["depth"]) == {"0", "1"}
    axes = (*AXES, Depth(share=0.5, layers=(1, 2)))
    for per_token in (False, True):
        table = cost.with_table(path, device=None).tabulate(
            search_space(axes, CONFIG), axes=axes, config=CONFIG, per_token=per_token
        )
        assert table.cost(table.space.full()) >= table.cost(table.space.smallest()) > 0


def test_the_how_to_shows_tables_that_can_be_read(tmp_path):
    text = (CONF.parent / "docs/howto/fill-a-latency-table.md").read_text()
    whole, per_token = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    config = decoder_config(num_heads=4, num_kv_groups=4, mlp_width=352)
    config = dataclasses.replace(config, blocks=config.blocks[:1] * 4)
    axes = (MLPWidth(fractions=(0.25, 0.5, 1.0)), AttnHeads(fractions=(0.5, 1.0)))
    space = search_space(axes, config)
    for content in (json.loads(whole), json.loads(whole) | json.loads("{" + per_token + "}")):
        path = tmp_path / "shown.json"
        path.write_text(json.dumps(content))
        cost = dataclasses.replace(COST, phase="decode", batch_size=1, context_length=256, table=str(path))
        for flag in (False, "per_token" in content):
            table = cost.tabulate(space, axes=axes, config=config, per_token=flag)
            assert table.whole == pytest.approx(3.0 + 4 * 2.0 + 3 * 1.5 + 1.2)
