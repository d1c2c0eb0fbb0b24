"""Every router with every policy and granularity: budgets are kept, gradients real, state complete."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestlm.cost.table import CostTable
from nestlm.data.batch import Batch
from nestlm.errors import BudgetError
from nestlm.evaluation import spent_shares
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy, full
from nestlm.objective.base import Parts
from nestlm.router.base import Router
from nestlm.router.calibration import Plan
from nestlm.router.per_token import CAUTIONS, TokenRouter, features, mean_losses
from nestlm.router.trial import Trial
from nestlm.sampler.base import generator, independent
from nestlm.seeding import torch_generator
from nestlm.spec import Budget, SubnetSpec
from plugins import NANO, classes, compose, targets
from routers import DYNAMICS, EVERY, LENGTH, PROMPT, SPACE, STATIC, STATICS, Variant, batches, choices, variants

# budgets


@STATICS
def test_specs_never_exceed_a_budget(variant, trial):
    router, table = variant.router(), STATIC.main
    router.prepare(trial)
    floor = table.share(SPACE.smallest())
    for share in [floor + 1e-9, *np.linspace(floor + 1e-6, 1.0, 12)]:
        budget = Budget.of_share(share)
        spec = router.spec(budget)
        assert table.share(spec) <= share
        assert spec == router.spec(budget), "deterministic"
    assert router.find(Budget.of_share(1.0), trial=trial).spec == SPACE.full()
    assert table.share(router.spec(Budget.of_share(0.85), trial=trial)) <= 0.85
    with pytest.raises(BudgetError, match="smallest") as refused:
        router.spec(Budget.of_share(floor - 1e-3))
    named = float(str(refused.value).partition("costs ")[2].partition(";")[0])
    assert router.spec(Budget.of_share(named)), "the budget that the message names can be met"
    for spec in (SPACE.smallest(), *(independent(SPACE, generator(0, step, 0)) for step in range(6))):
        assert router.spec(Budget.of_share(table.share(spec))), "what was achieved once can be asked for"


@STATICS
def test_specs_keep_several_limits_together(variant):
    router, table, memory = variant.router(), STATIC.main, STATIC.others["memory"]
    allowed = memory.cost(SPACE.smallest()) + (memory.whole - memory.cost(SPACE.smallest())) / 3
    assert memory.cost(router.spec(Budget.of_share(0.95))) > allowed, "the second limit restricts"
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
@pytest.mark.parametrize("budget", [0.97, 0.9, [0.95, "0.9latency"], ["0.85latency", 0.97]], ids=str)
def test_no_sequence_ends_above_its_budget(variant, trial, budget):
    """Also on text of another kind than the router was calibrated on: one token, again and again."""
    router, asked = variant.router(), Budget.parse(budget)
    answer = router.find(asked, trial=trial)
    alike = [Batch(torch.full((4, LENGTH), token), torch.full((4, LENGTH), token), None) for token in range(0, 50, 5)]
    ratios = []
    for bound in router.prices.bounds(asked):
        for text in (batches(5, count=6), alike):
            shares = spent(trial.decoder, answer.policy, bound.table, text)
            assert float(shares.max()) <= bound.share
        ratios.append(float(spent(trial.decoder, answer.policy, bound.table, trial.batches).mean()) / bound.share)
    # choices that are the same for all tokens come in steps, so under several limits something may be left
    least = 0.985 if variant.granularity == "token" and len(asked.limits) == 1 else 0.85
    assert max(ratios) > least, "on average the budget is used"
    assert answer.plan == router.find(asked, trial=trial).plan, "deterministic"


@torch.no_grad()
@DYNAMICS
@pytest.mark.parametrize("above", [0.0, 1e-9, 1e-4, 3e-3, 2e-2])
def test_every_budget_from_the_floor_on_can_be_met(variant, trial, above):
    router = variant.router()
    for kind, table in router.planned.tables.items():
        share = table.cheapest / table.whole * (1 + above)
        answer = router.find(Budget.parse(f"{share}{kind}"), trial=trial)
        shares = spent(trial.decoder, answer.policy, router.prices.tables[kind], batches(6))
        # a sum of prices in another order may differ in the last digit
        assert float(shares.max()) <= share * (1 + 1e-12)


@torch.no_grad()
@DYNAMICS
def test_the_plan_is_the_best_of_those_tried(variant, trial, monkeypatch):
    """Whichever loses least on the trial's text, also one in which no site decides."""
    router = variant.router()
    router.prepare(trial)
    budget = Budget.of_share(0.9)
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 0.0)
    plans: list[Plan] = []
    monkeypatch.setattr(router, "policy", lambda plan, **notes: (plans.append(plan), full)[1])
    monkeypatch.setattr(router, "record", lambda plan, trial: scores)
    scores = {row: torch.randn(8, LENGTH, len(widths)) for row, widths in enumerate(SPACE.choices.values())}
    monkeypatch.setattr(Trial, "loss", lambda trial, policy: 0.0)
    assert router.calibrate(budget, trial=trial) is plans[0]
    tried = len(plans)
    assert tried == len(CAUTIONS) + 3
    assert [len(plan.fixed) == len(SPACE.sites) for plan in plans[len(CAUTIONS) :]] == [True] * (tried - len(CAUTIONS))
    for best in range(tried):
        plans.clear()
        monkeypatch.setattr(Trial, "loss", lambda trial, policy, best=best: float(len(plans) != best + 1))
        assert router.calibrate(budget, trial=trial) is plans[best]
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 1.1)
    plans.clear()
    router.calibrate(budget, trial=trial)
    assert len(plans) == len(CAUTIONS), "what wastes the budget is no answer"


@torch.no_grad()
@DYNAMICS
def test_where_no_site_decides_the_answer_is_a_sub_network(variant, trial, monkeypatch):
    monkeypatch.setattr("nestlm.router.per_token.CAUTIONS", ())
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 0.0)
    router = variant.router()
    router.prepare(trial)
    answer = router.find(Budget.of_share(0.9), trial=trial)
    assert answer.plan is None
    assert 0.85 < STATIC.main.share(answer.spec) <= 0.9
    output = trial.decoder(trial.batches[0].tokens_BL, answer.policy)
    assert {site: decision.width for site, decision in output.decisions.items() if site in SPACE.choices} == dict(
        answer.spec.items()
    )


def test_a_trial_runs_in_the_precision_that_it_is_given(trial):
    """As scoring does under mixed precision, so that a plan is made from the scores that it will meet."""
    mixed = replace(trial, precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    outputs = [output.logits_BLV.dtype for _, output in mixed.outputs(full)]
    assert outputs == [torch.bfloat16] * len(trial.batches)
    plan = Variant("value", "dynamic").router().find(Budget.of_share(0.8), trial=mixed)
    assert all(output.logits_BLV.dtype == torch.bfloat16 for _, output in mixed.outputs(plan.policy))


@torch.no_grad()
def test_values_are_brought_to_the_scale_of_what_is_measured(trial):
    """The mean of a choice's values is the geometric mean of what was learned and what it adds to the loss."""
    router = Variant("value", "dynamic").router()
    learned = mean_values(router, trial)
    router.prepare(trial)
    added, scaled = trial.sensitivities(SPACE), mean_values(router, trial)
    assert float(added.max()) > 1e-3
    for row, widths in enumerate(SPACE.choices.values()):
        product_K = learned[row] * added[row, : len(widths)].clamp_min(0.0)
        torch.testing.assert_close(scaled[row].square(), product_K, rtol=0.1, atol=5e-3)
    assert router.measured_losses() == [
        row[: len(w)].tolist() for row, w in zip(added, SPACE.choices.values(), strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.option != "value"], ids=str)
def test_the_price_that_scores_hold_is_found(variant, trial):
    """In minus a multiple of what is measured, less a price of cost; without the price, only losses are left."""
    router = variant.router()
    router.prepare(trial)
    plan = Plan(1.0, router.tariffs(router.planned.bounds(Budget.of_share(0.8))))
    losses = [torch.tensor([row]).double().clamp_min(0.0) for row in router.measured_losses()]
    scores = [3.0 - (20.0 * loss_K + 7.0 * price_K) for loss_K, price_K in zip(losses, plan.prices, strict=True)]
    held = router.held(plan, mean_losses(dict(enumerate(scores))))
    assert held == pytest.approx(7.0)
    plan = replace(plan, held=held)
    for row, loss_K in enumerate(losses):
        free_K = plan.unpriced(row, scores[row])
        torch.testing.assert_close(free_K[..., -1:] - free_K, 20.0 * loss_K)
    backwards = [-score for score in scores]
    assert router.held(plan, mean_losses(dict(enumerate(backwards)))) == 0.0, "nothing is known of what they hold"


def mean_values(router: TokenRouter, trial: Trial) -> list[torch.Tensor]:
    """Of each choice, over the tokens of the whole model, a row a site."""
    scorer, seen = router.scorer(0.9), {}

    def whole(site, hidden_BLD, stream):
        if site in SPACE.choices:
            seen.setdefault(row := SPACE.sites.index(site), []).append(-scorer(row, features(hidden_BLD)))
        return full(site, hidden_BLD, stream)

    list(trial.outputs(whole))
    return [torch.cat(seen[row]).double().flatten(0, -2).mean(0) for row in range(len(SPACE.sites))]


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.granularity == "prompt"], ids=str)
def test_prompts_are_decided_by_what_they_say(variant, trial, deciding):
    """Different prompts, different choices for the rest; the same prompt, the same."""
    policy = variant.router().find(Budget.of_share(0.93), trial=trial).policy
    tokens_BL = torch.cat([batch.tokens_BL for batch in batches(8, count=8)])
    decided = torch.stack([index[:, -1] for index in choices(trial.decoder(tokens_BL, policy)).values()])
    assert len(decided.unique(dim=1).T) > 1
    tokens_BL[:, :PROMPT] = tokens_BL[:1, :PROMPT]
    decided = torch.stack([index[:, -1] for index in choices(trial.decoder(tokens_BL, policy)).values()])
    assert len(decided.unique(dim=1).T) == 1


@DYNAMICS
def test_dynamic_budgets_that_cannot_be(variant, trial):
    router = variant.router()
    with pytest.raises(BudgetError, match="FLOP and latency budgets only"):
        router.find(Budget.parse("4GiB"), trial=trial)
    with pytest.raises(BudgetError, match="at least") as refused:
        router.find(Budget.of_share(0.3), trial=trial)
    named = float(str(refused.value).partition("costs ")[2].partition(";")[0])
    router.check(Budget.of_share(named))
    assert router.find(Budget.of_share(1.0), trial=None).policy is full, "the whole model bypasses routing"


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.granularity == "token"], ids=str)
def test_what_is_priced_is_what_runs(variant, trial, deciding):
    """FLOPs of the narrower matrices and of the router, as torch counts them, for one sequence."""
    router = variant.router()
    policy = router.find(Budget.of_share(0.9), trial=trial).policy
    for row in range(3):
        tokens_BL = trial.batches[0].tokens_BL[row : row + 1]
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            output = trial.decoder(tokens_BL, policy)
        share = float(spent_shares(output.decisions, router.prices.main, batch_size=1)[0])
        assert counter.get_total_flops() == pytest.approx(share * router.prices.main.whole * LENGTH, rel=1e-9)
        assert any(index.unique().numel() > 1 for index in choices(output).values())


# learning


@EVERY
def test_the_signal_reaches_every_weight(variant, trial):
    router, signal = variant.router(), variant.settings().signal
    assert bool(list(router.parameters())) == (signal is not None)
    if signal is None:
        return
    objective = signal(router)
    if hasattr(objective, "gate"):
        objective.gate = 1e9
    trial.decoder.requires_grad_(False)
    for step in range(10):
        (batch,) = batches(step, count=1)
        for term in objective.terms(Parts(trial.decoder, router=router), batch, step=step):
            term.loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    summary = objective.summary(Parts(trial.decoder, router=router), batches(20))
    assert all(value is None or np.isfinite(value) for value in summary.values())


@EVERY
def test_joint_tuning_draws_a_policy(variant, trial):
    """The same draw again under the same generator, and gradients for the model."""
    router = variant.router()
    router.prepare(trial)
    tokens_BL = trial.batches[0].tokens_BL
    grads = []
    for checkpointing in (False, True):
        trial.decoder.activation_checkpointing = checkpointing
        trial.decoder.zero_grad()
        policy = router.draw(Budget.of_share(0.9), generator=torch_generator("test"))
        trial.decoder(tokens_BL, policy).logits_BLV.square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in trial.decoder.parameters()])
    torch.testing.assert_close(*grads)


@EVERY
def test_router_saves_and_loads(variant, trial):
    router, other = variant.router(), variant.router()
    router.prepare(trial)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    other.load_state_dict(router.state_dict())
    for share in (0.95, 0.9):
        one, same = (found.find(Budget.of_share(share), trial=trial) for found in (router, other))
        assert (one.spec, one.plan) == (same.spec, same.plan)
        assert one.spec is None or isinstance(one.spec, SubnetSpec)


def test_every_router_has_a_config():
    shipped = set()
    for variant in variants():
        node = compose([*NANO, f"router={variant.option}", f"router.policy={variant.policy}"])["router"]
        shipped |= targets(node)
    abstract = {f"{kind.__module__}.{kind.__qualname__}" for kind in (Router, TokenRouter)}
    assert classes("nestlm.router", Router) - abstract <= shipped
