"""Every router with every policy and granularity: budgets are kept, gradients real, state complete."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestlm.config.allowlist import full_name
from nestlm.cost.table import CostTable
from nestlm.data.batch import Batch
from nestlm.elastic.sampler.base import generator, independent
from nestlm.errors import BudgetError
from nestlm.eval.policy_scores import spent_shares
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy, full
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.base import GAIN_THRESHOLDS, DynamicRouter, features, mean_losses
from nestlm.router.dynamic.plan import Plan
from nestlm.spec import Budget, SubnetSpec
from nestlm.train.objective.base import StageModels
from nestlm.utils.seeding import torch_generator
from plugins import classes
from routers import DYNAMICS, EVERY, LENGTH, PROMPT, SPACE, STATIC, STATICS, Variant, batches, choices, variants

# budgets


@STATICS
def test_specs_never_exceed_a_budget(variant, calibration):
    router, table = variant.router(), STATIC.main
    router.prepare(calibration)
    floor = table.share(SPACE.smallest())
    for share in [floor + 1e-9, *np.linspace(floor + 1e-6, 1.0, 12)]:
        budget = Budget.from_share(share)
        spec = router.spec(budget)
        assert table.share(spec) <= share
        assert spec == router.spec(budget), "deterministic"
    assert router.find(Budget.from_share(1.0), calibration=calibration).spec == SPACE.full()
    assert table.share(router.spec(Budget.from_share(0.85), calibration=calibration)) <= 0.85
    with pytest.raises(BudgetError, match="smallest") as refused:
        router.spec(Budget.from_share(floor - 1e-3))
    named = float(str(refused.value).partition("costs ")[2].partition(";")[0])
    assert router.spec(Budget.from_share(named)), "the budget that the message names can be met"
    for spec in (SPACE.smallest(), *(independent(SPACE, generator(0, step, 0)) for step in range(6))):
        assert router.spec(Budget.from_share(table.share(spec))), "what was achieved once can be asked for"


@STATICS
def test_specs_keep_several_limits_together(variant):
    router, table, memory = variant.router(), STATIC.main, STATIC.others["memory"]
    allowed = memory.cost(SPACE.smallest()) + (memory.whole - memory.cost(SPACE.smallest())) / 3
    assert memory.cost(router.spec(Budget.from_share(0.95))) > allowed, "the second limit restricts"
    both = router.spec(Budget.parse([0.95, f"{allowed}B"]))
    assert table.share(both) <= 0.95
    assert memory.cost(both) <= allowed
    assert router.spec(Budget.parse(["1memory", 1.0])) == SPACE.full()


def spent(decoder: Decoder, policy: Policy, table: CostTable, text: list[Batch]) -> torch.Tensor:
    """Cost of each sequence as a share of the whole model."""
    outputs = [decoder(batch.tokens_BL, policy) for batch in text]
    return torch.cat([spent_shares(output.decisions, table, batch_size=4) for output in outputs])


@torch.no_grad()
@DYNAMICS
@pytest.mark.parametrize(
    "budget",
    [
        0.9,
        ["0.85latency", 0.97],
        *(pytest.param(each, marks=pytest.mark.slow) for each in (0.97, [0.95, "0.9latency"])),
    ],
    ids=str,
)
def test_no_sequence_ends_above_its_budget(variant, calibration, budget):
    """The text is also of another kind than the calibration text: one token, again and again."""
    router, asked = variant.router(), Budget.parse(budget)
    answer = router.find(asked, calibration=calibration)
    alike = [Batch(torch.full((4, LENGTH), token), torch.full((4, LENGTH), token), None) for token in range(0, 50, 5)]
    ratios = []
    for bound in router.prices.bounds(asked):
        for text in (batches(5, count=6), alike):
            shares = spent(calibration.decoder, answer.policy, bound.table, text)
            assert float(shares.max()) <= bound.share
        ratios.append(
            float(spent(calibration.decoder, answer.policy, bound.table, calibration.batches).mean()) / bound.share
        )
    # choices that are the same for all tokens come in steps, so under several limits something may be left
    least = 0.985 if variant.granularity == "token" and len(asked.limits) == 1 else 0.85
    assert max(ratios) > least, "on average the budget is used"
    assert answer.plan == router.find(asked, calibration=calibration).plan, "deterministic"


@torch.no_grad()
@DYNAMICS
@pytest.mark.parametrize(
    "above", [0.0, 1e-9, 2e-2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1e-4, 3e-3))]
)
def test_every_budget_from_the_floor_on_can_be_met(variant, calibration, above):
    router = variant.router()
    for kind, table in router.planned.tables.items():
        share = table.cheapest / table.whole * (1 + above)
        answer = router.find(Budget.parse(f"{share}{kind}"), calibration=calibration)
        shares = spent(calibration.decoder, answer.policy, router.prices.tables[kind], batches(6))
        # a sum of prices in another order may differ in the last digit
        assert float(shares.max()) <= share * (1 + 1e-12)


@torch.no_grad()
@DYNAMICS
def test_the_plan_is_the_best_of_those_tried(variant, calibration, monkeypatch):
    """The plan of lowest loss on calibration text is taken, also one in which no site decides."""
    router = variant.router()
    router.prepare(calibration)
    budget = Budget.from_share(0.9)
    monkeypatch.setattr("nestlm.router.dynamic.base.LEAST_USED", 0.0)
    plans: list[Plan] = []
    monkeypatch.setattr(router, "policy", lambda plan, **observed: (plans.append(plan), full)[1])
    monkeypatch.setattr(router, "record", lambda plan, calibration: scores)
    scores = {row: torch.randn(8, LENGTH, len(widths)) for row, widths in enumerate(SPACE.choices.values())}
    monkeypatch.setattr(CalibrationData, "loss", lambda calibration, policy: 0.0)
    assert router.calibrate(budget, calibration=calibration) is plans[0]
    tried = len(plans)
    assert tried == len(GAIN_THRESHOLDS) + 3
    assert all(len(plan.fixed) == len(SPACE.sites) for plan in plans[len(GAIN_THRESHOLDS) :])
    for best in range(tried):
        plans.clear()
        monkeypatch.setattr(
            CalibrationData, "loss", lambda calibration, policy, best=best: float(len(plans) != best + 1)
        )
        assert router.calibrate(budget, calibration=calibration) is plans[best]
    monkeypatch.setattr("nestlm.router.dynamic.base.LEAST_USED", 1.1)
    plans.clear()
    router.calibrate(budget, calibration=calibration)
    assert len(plans) == len(GAIN_THRESHOLDS), "what wastes the budget is no answer"


@torch.no_grad()
@DYNAMICS
def test_where_no_site_decides_the_answer_is_a_sub_network(variant, calibration, monkeypatch):
    monkeypatch.setattr("nestlm.router.dynamic.base.GAIN_THRESHOLDS", ())
    monkeypatch.setattr("nestlm.router.dynamic.base.LEAST_USED", 0.0)
    router = variant.router()
    router.prepare(calibration)
    answer = router.find(Budget.from_share(0.9), calibration=calibration)
    assert answer.plan is None
    assert 0.85 < STATIC.main.share(answer.spec) <= 0.9
    output = calibration.decoder(calibration.batches[0].tokens_BL, answer.policy)
    assert {site: decision.width.units for site, decision in output.decisions.items() if site in SPACE.choices} == dict(
        answer.spec.items()
    )


def test_calibration_runs_in_the_precision_that_it_is_given(calibration):
    """Evaluation runs in mixed precision, too, so a plan is made from the scores that it will meet."""
    mixed = replace(calibration, precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    outputs = [output.logits_BLV.dtype for _, output in mixed.outputs(full)]
    assert outputs == [torch.bfloat16] * len(calibration.batches)
    plan = Variant("value", "dynamic").router().find(Budget.from_share(0.8), calibration=mixed)
    assert all(output.logits_BLV.dtype == torch.bfloat16 for _, output in mixed.outputs(plan.policy))


@torch.no_grad()
def test_values_are_brought_to_the_scale_of_what_is_measured(calibration):
    """The mean of a choice's values is the geometric mean of what was learned and what it adds to the loss."""
    router = Variant("value", "dynamic").router()
    learned = mean_values(router, calibration)
    router.prepare(calibration)
    added, scaled = calibration.sensitivities(SPACE), mean_values(router, calibration)
    assert float(added.max()) > 1e-3
    for row, widths in enumerate(SPACE.choices.values()):
        product_K = learned[row] * added[row, : len(widths)].clamp_min(0.0)
        torch.testing.assert_close(scaled[row].square(), product_K, rtol=0.1, atol=5e-3)
    assert router.measured_losses() == [
        row[: len(w)].tolist() for row, w in zip(added, SPACE.choices.values(), strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.option != "value"], ids=str)
def test_the_implicit_multiplier_is_found(variant, calibration):
    """Scores of minus a multiple of measured losses, less a price of cost: without the price only losses are left."""
    router = variant.router()
    router.prepare(calibration)
    plan = Plan(1.0, router.fixed_point_prices(router.planned.bounds(Budget.from_share(0.8))))
    losses = [torch.tensor([row]).double().clamp_min(0.0) for row in router.measured_losses()]
    scores = [3.0 - (20.0 * loss_K + 7.0 * price_K) for loss_K, price_K in zip(losses, plan.costs, strict=True)]
    price = router.implicit_multiplier(plan, mean_losses(dict(enumerate(scores))))
    assert price == pytest.approx(7.0)
    plan = replace(plan, implicit_multiplier=price)
    for row, loss_K in enumerate(losses):
        free_K = plan.remove_implicit_cost(row, scores[row])
        torch.testing.assert_close(free_K[..., -1:] - free_K, 20.0 * loss_K)
    backwards = [-score for score in scores]
    found = router.implicit_multiplier(plan, mean_losses(dict(enumerate(backwards))))
    assert found == 0.0, "scores that rise with the loss contain no price"


def mean_values(router: DynamicRouter, calibration: CalibrationData) -> list[torch.Tensor]:
    """Return the mean value of each choice over the tokens of the whole model, a row a site."""
    scorer, seen = router.scorer(0.9), {}

    def whole(site, hidden_BLD, stream):
        if site in SPACE.choices:
            seen.setdefault(row := SPACE.sites.index(site), []).append(-scorer(row, features(hidden_BLD)))
        return full(site, hidden_BLD, stream)

    list(calibration.outputs(whole))
    return [torch.cat(seen[row]).double().flatten(0, -2).mean(0) for row in range(len(SPACE.sites))]


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.granularity == "prompt"], ids=str)
def test_prompts_are_decided_by_what_they_say(variant, calibration, deciding):
    """Different prompts give different choices for the rest of a sequence, equal prompts give equal ones."""
    policy = variant.router().find(Budget.from_share(0.93), calibration=calibration).policy
    tokens_BL = torch.cat([batch.tokens_BL for batch in batches(8, count=8)])
    decided = torch.stack([index[:, -1] for index in choices(calibration.decoder(tokens_BL, policy)).values()])
    assert len(decided.unique(dim=1).T) > 1
    tokens_BL[:, :PROMPT] = tokens_BL[:1, :PROMPT]
    decided = torch.stack([index[:, -1] for index in choices(calibration.decoder(tokens_BL, policy)).values()])
    assert len(decided.unique(dim=1).T) == 1


@DYNAMICS
def test_dynamic_budgets_that_cannot_be(variant, calibration):
    router = variant.router()
    with pytest.raises(BudgetError, match="FLOP and latency budgets only"):
        router.find(Budget.parse("4GiB"), calibration=calibration)
    with pytest.raises(BudgetError, match="at least") as refused:
        router.find(Budget.from_share(0.3), calibration=calibration)
    named = float(str(refused.value).partition("costs ")[2].partition(";")[0])
    router.check(Budget.from_share(named))
    assert router.find(Budget.from_share(1.0), calibration=None).policy is full, "the whole model bypasses routing"


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.granularity == "token"], ids=str)
def test_what_is_priced_is_what_runs(variant, calibration, deciding):
    """Prices equal the FLOPs that torch counts for one sequence, the router's own included."""
    router = variant.router()
    policy = router.find(Budget.from_share(0.9), calibration=calibration).policy
    for row in range(3):
        tokens_BL = calibration.batches[0].tokens_BL[row : row + 1]
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            output = calibration.decoder(tokens_BL, policy)
        share = float(spent_shares(output.decisions, router.prices.main, batch_size=1)[0])
        assert counter.get_total_flops() == pytest.approx(share * router.prices.main.whole * LENGTH, rel=1e-9)
        assert any(index.unique().numel() > 1 for index in choices(output).values())


# learning


@EVERY
def test_the_signal_reaches_every_weight(variant, calibration):
    router, signal = variant.router(), variant.settings().signal
    assert bool(list(router.parameters())) == (signal is not None)
    if signal is None:
        return
    objective = signal(router)
    if hasattr(objective, "gate"):
        objective.gate = 1e9
    calibration.decoder.requires_grad_(False)
    for step in range(10):
        (batch,) = batches(step, count=1)
        for term in objective.terms(StageModels(calibration.decoder, router=router), batch, step=step):
            term.loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    summary = objective.summary(StageModels(calibration.decoder, router=router), batches(20))
    assert all(value is None or np.isfinite(value) for value in summary.values())


@EVERY
def test_joint_tuning_draws_a_policy(variant, calibration):
    """A generator in the same state gives the same draw, and the model gets gradients."""
    router = variant.router()
    router.prepare(calibration)
    tokens_BL = calibration.batches[0].tokens_BL
    grads = []
    for checkpointing in (False, True):
        calibration.decoder.activation_checkpointing = checkpointing
        calibration.decoder.zero_grad()
        policy = router.draw(Budget.from_share(0.9), generator=torch_generator("test"))
        calibration.decoder(tokens_BL, policy).logits_BLV.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in calibration.decoder.parameters()])
    torch.testing.assert_close(*grads)


@EVERY
def test_router_saves_and_loads(variant, calibration):
    router, other = variant.router(), variant.router()
    router.prepare(calibration)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    other.load_state_dict(router.state_dict())
    for share in (0.95, 0.9):
        one, same = (found.find(Budget.from_share(share), calibration=calibration) for found in (router, other))
        assert (one.spec, one.plan) == (same.spec, same.plan)
        assert one.spec is None or isinstance(one.spec, SubnetSpec)


def test_every_router_has_a_config():
    shipped = {full_name(type(variant.router())) for variant in variants()}
    abstract = {full_name(kind) for kind in (Router, DynamicRouter)}
    assert classes("nestlm.router", Router) - abstract <= shipped
