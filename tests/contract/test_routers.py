"""Every router with every policy and granularity: budgets are kept, choices causal, gradients real, state complete."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from models import AXES, decoder_config, random_decoder
from nestlm.axes.base import search_space
from nestlm.cost.memory import Memory
from nestlm.cost.static import Flops
from nestlm.cost.table import CostTable, PriceList
from nestlm.data.batch import Batch
from nestlm.errors import BudgetError
from nestlm.evaluation import spent_shares
from nestlm.nn.decoder import Decoder, DecoderOutput
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import Mixed, Policy, full
from nestlm.objective.base import Parts
from nestlm.router.base import Router
from nestlm.router.calibration import Plan
from nestlm.router.per_token import CAUTIONS, Granularity, TokenRouter, features, mean_losses
from nestlm.router.trial import Trial
from nestlm.sampler.base import generator, independent
from nestlm.seeding import torch_generator
from nestlm.spec import Budget, SubnetSpec
from plugins import NANO, classes, compose, options, targets

CONFIG = decoder_config(num_kv_groups=2)
SPACE = search_space(AXES, CONFIG)
LENGTH, PROMPT = 24, 4


def flops(*, per_token: bool) -> CostTable:
    return Flops(context_length=LENGTH).tabulate(SPACE, axes=AXES, config=CONFIG, per_token=per_token)


def uneven(table: CostTable, name: str) -> CostTable:
    """A second kind whose prices weigh late layers more."""
    rows = zip(SPACE.sites, table.prices, strict=True)
    prices = tuple(tuple(price * (1 + site.layer) for price in row) for site, row in rows)
    added = sum(new[-1] - old[-1] for new, old in zip(prices, table.prices, strict=True))
    return replace(table, name=name, prices=prices, whole=table.whole + added)


MEMORY = Memory(batch_size=2, context_length=LENGTH, bytes_per_element=2, cache_bytes_per_element=2)
STATIC = PriceList(flops(per_token=False), {"memory": MEMORY.tabulate(SPACE, axes=AXES, config=CONFIG)})
TOKENS = PriceList(flops(per_token=True), {"latency": uneven(flops(per_token=True), "latency")}, per_token=True)


@dataclass(frozen=True)
class Variant:
    """A way to spell a router."""

    option: str
    policy: str
    granularity: str = "token"

    def settings(self):
        spelled = [f"router={self.option}", f"router.policy={self.policy}", f"router.granularity={self.granularity}"]
        return instantiate(compose([*NANO, *spelled])["router"], _convert_="all")

    def router(self) -> Router:
        if self.policy == "static":
            return self.settings().network(prices=STATIC).eval()
        granularity = Granularity(PROMPT if self.granularity == "prompt" else 0, LENGTH)
        network = self.settings().network(prices=TOKENS, hidden_size=CONFIG.hidden_size, granularity=granularity)
        # networks at their start see little of a token; these differ from token to token, so that deciding pays
        source = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=source))
        return network.eval()

    def __str__(self) -> str:
        return f"{self.option}-{self.policy}-{self.granularity}"


def variants(policy: str | None = None) -> Iterator[Variant]:
    for option in options("router"):
        learns = compose([*NANO, f"router={option}"])["router"]["signal"] is not None
        for variant in (
            Variant(option, "static"),
            *([Variant(option, "dynamic"), Variant(option, "dynamic", "prompt")] if learns else []),
        ):
            if policy in (None, variant.policy):
                yield variant


EVERY = pytest.mark.parametrize("variant", list(variants()), ids=str)
STATICS = pytest.mark.parametrize("variant", list(variants("static")), ids=str)
DYNAMICS = pytest.mark.parametrize("variant", list(variants("dynamic")), ids=str)


def batches(seed: int, *, count: int = 2, rows: int = 4) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 50, (rows, LENGTH + 1), generator=source) for _ in range(count)]
    return [Batch(part[:, :-1], part[:, 1:], None) for part in tokens]


@pytest.fixture
def trial() -> Trial:
    return Trial(random_decoder(CONFIG), batches(0))


@pytest.fixture
def deciding(monkeypatch) -> None:
    """A plan in which no site decides is no answer: otherwise the best one may leave nothing to look at."""
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 1.1)


def wide(trial: Trial) -> Trial:
    """In float64."""
    return Trial(trial.decoder.double(), trial.batches)


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
@pytest.mark.parametrize("variant", [each for each in variants("dynamic") if each.granularity == "token"], ids=str)
def test_the_plan_is_the_best_of_those_tried(variant, trial, monkeypatch):
    """Whichever loses least on the trial's text, also one in which no site decides."""
    router = variant.router()
    router.prepare(trial)
    bounds = router.planned.bounds(Budget.of_share(0.8))
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 0.0)
    plans: list[Plan] = []
    monkeypatch.setattr(router, "policy", lambda plan, **notes: (plans.append(plan), full)[1])
    monkeypatch.setattr(router, "record", lambda plan, trial: scores)
    scores = {row: torch.randn(8, LENGTH, len(widths)) for row, widths in enumerate(SPACE.choices.values())}
    monkeypatch.setattr(Trial, "loss", lambda trial, policy: 0.0)
    assert router.calibrate(bounds, trial=trial) is plans[0]
    tried = len(plans)
    assert tried == len(CAUTIONS) + 3
    assert [len(plan.fixed) == len(SPACE.sites) for plan in plans[len(CAUTIONS) :]] == [True] * (tried - len(CAUTIONS))
    for best in range(tried):
        plans.clear()
        monkeypatch.setattr(Trial, "loss", lambda trial, policy, best=best: float(len(plans) != best + 1))
        assert router.calibrate(bounds, trial=trial) is plans[best]
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 1.1)
    plans.clear()
    router.calibrate(bounds, trial=trial)
    assert len(plans) == len(CAUTIONS), "what wastes the budget is no answer"


@torch.no_grad()
@pytest.mark.parametrize("variant", [each for each in variants("dynamic") if each.granularity == "token"], ids=str)
def test_where_no_site_decides_the_answer_is_a_sub_network(variant, trial, monkeypatch):
    monkeypatch.setattr("nestlm.router.per_token.CAUTIONS", ())
    monkeypatch.setattr("nestlm.router.per_token.LEAST_USED", 0.0)
    router = variant.router()
    router.prepare(trial)
    answer = router.find(Budget.of_share(0.8), trial=trial)
    assert answer.plan is None
    assert 0.7 < STATIC.main.share(answer.spec) <= 0.8
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
    plan = Plan(1.0, 0.0, router.tariffs(router.planned.bounds(Budget.of_share(0.8))), {})
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
        seen.setdefault(row := SPACE.sites.index(site), []).append(-scorer(row, features(hidden_BLD)))
        return full(site, hidden_BLD, stream)

    list(trial.outputs(whole))
    return [torch.cat(seen[row]).double().flatten(0, -2).mean(0) for row in range(len(SPACE.sites))]


@torch.no_grad()
@pytest.mark.parametrize("variant", [v for v in variants("dynamic") if v.granularity == "prompt"], ids=str)
def test_prompts_are_decided_by_what_they_say(variant, trial):
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


# causality


def choices(output: DecoderOutput) -> dict[str, torch.Tensor]:
    """Choice indices of tokens where they may differ."""
    widths = {str(site): decision.width for site, decision in output.decisions.items()}
    return {site: width.index for site, width in widths.items() if isinstance(width, Mixed)}


@torch.no_grad()
@EVERY
def test_later_tokens_change_nothing_before_them(variant, trial, deciding):
    policy = variant.router().find(Budget.of_share(0.9), trial=trial).policy
    tokens_BL = batches(3)[0].tokens_BL
    changed_BL = tokens_BL.clone()
    changed_BL[:, 10:] = (changed_BL[:, 10:] + 7) % 50
    one, other = (trial.decoder(tokens, policy) for tokens in (tokens_BL, changed_BL))
    torch.testing.assert_close(one.logits_BLV[:, :10], other.logits_BLV[:, :10])
    assert not torch.allclose(one.logits_BLV[:, 10:], other.logits_BLV[:, 10:])
    for site, before in choices(one).items():
        assert torch.equal(before[:, :10], choices(other)[site][:, :10])


@torch.no_grad()
@DYNAMICS
def test_alone_together_padded_and_token_by_token(variant, trial, deciding):
    """Equal choices in float64, and logits within 1e-4."""
    trial = wide(trial)
    router = variant.router().double()
    policy = router.find(Budget.of_share(0.9), trial=trial).policy
    tokens_BL = batches(3)[0].tokens_BL
    together = trial.decoder(tokens_BL, policy)
    logits_BLV, chosen = together.logits_BLV, choices(together)
    assert any(index.unique().numel() > 1 for index in chosen.values()), "tokens differ"
    for row in range(len(tokens_BL)):
        alone = trial.decoder(tokens_BL[row : row + 1], policy)
        torch.testing.assert_close(alone.logits_BLV, logits_BLV[row : row + 1], rtol=0, atol=1e-4)
        assert all(torch.equal(index, chosen[site][row : row + 1]) for site, index in choices(alone).items())
    padding = 5
    padded_BL = torch.cat((torch.zeros(4, padding, dtype=torch.long), tokens_BL), dim=1)
    documents_BL = (torch.arange(padded_BL.shape[1]) >= padding).long().expand(4, -1) - 1
    padded = trial.decoder(padded_BL, policy, documents_BL=documents_BL)
    torch.testing.assert_close(padded.logits_BLV[:, padding:], logits_BLV, rtol=0, atol=1e-4)
    assert all(torch.equal(index[:, padding:], chosen[site]) for site, index in choices(padded).items())
    for prompt in (1, PROMPT + 3):
        cache = KVCache(CONFIG, batch_size=4, length=LENGTH, device=torch.device("cpu"), dtype=torch.float64)
        edges = [0, prompt, *range(prompt + 1, LENGTH + 1)]
        for start, end in pairwise(edges):
            piece = trial.decoder(tokens_BL[:, start:end], policy, cache=cache)
            torch.testing.assert_close(piece.logits_BLV, logits_BLV[:, start:end], rtol=0, atol=1e-4)
            assert all(torch.equal(index, chosen[site][:, start:end]) for site, index in choices(piece).items())


@torch.no_grad()
@DYNAMICS
def test_in_float32_choices_are_equal_up_to_the_first_tie(variant, trial, monkeypatch, deciding):
    """Alone, together or token by token: choices differ at most after the two best differed by less than 1e-4."""
    router = variant.router()
    router.networks.output_bias.add_(8.0)  # steps of values far from 0, where all choices tie; logits do not mind
    policy = router.find(Budget.of_share(0.9), trial=trial).policy
    tokens_BL = batches(3)[0].tokens_BL
    gaps: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "argmax", noting_gaps(gaps))
    together = trial.decoder(tokens_BL, policy)
    monkeypatch.undo()
    assert gaps, "choices are argmaxes"
    # of a prompt one gap, (B,), of tokens one at each multiplier, (J, B, L)
    tied_BL = torch.stack(
        [(gap[:, None] if gap.ndim == 1 else gap.amin(0)).expand(4, LENGTH) < 1e-4 for gap in gaps]
    ).any(0)
    clear_B = (tied_BL.cumsum(1) == 0).sum(1).tolist()
    assert sum(clear_B) > 8, "some tokens come before any tie"
    for row, clear in enumerate(clear_B):
        cache = KVCache(CONFIG, batch_size=1, length=LENGTH, device=torch.device("cpu"), dtype=torch.float32)
        steps = [trial.decoder(tokens_BL[row : row + 1, at : at + 1], policy, cache=cache) for at in range(LENGTH)]
        alone = trial.decoder(tokens_BL[row : row + 1], policy)
        for site, index in choices(together).items():
            assert torch.equal(choices(alone)[site][0, :clear], index[row, :clear])
            assert torch.equal(torch.cat([choices(step)[site][0] for step in steps])[:clear], index[row, :clear])
        logits_LV = together.logits_BLV[row, :clear]
        torch.testing.assert_close(alone.logits_BLV[0, :clear], logits_LV, rtol=0, atol=1e-4)
        by_token_LV = torch.cat([step.logits_BLV[0] for step in steps])[:clear]
        torch.testing.assert_close(by_token_LV, logits_LV, rtol=0, atol=1e-4)


def noting_gaps(gaps: list[torch.Tensor]):
    """`Tensor.argmax` that notes by how much the best of each row is ahead."""
    plain = torch.Tensor.argmax

    def argmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
        best = scores.topk(2, dim).values
        gaps.append(best[..., 0] - best[..., 1])
        return plain(scores, dim)

    return argmax


@torch.no_grad()
@DYNAMICS
def test_a_ragged_batch_is_padded_on_the_left(variant, trial, deciding):
    """Prompts of different lengths in one batch, then decoding: each row chooses as it would alone."""
    trial = wide(trial)
    policy = variant.router().double().find(Budget.of_share(0.9), trial=trial).policy
    tokens_BL = batches(4)[0].tokens_BL
    lengths, longest, steps = [3, 9, 6, 1], 9, 6
    cache = KVCache(CONFIG, batch_size=4, length=longest + steps, device=torch.device("cpu"), dtype=torch.float64)
    prompt_BL = torch.zeros(4, longest, dtype=torch.long)
    documents_BL = torch.full((4, longest), -1)
    for row, length in enumerate(lengths):
        prompt_BL[row, longest - length :] = tokens_BL[row, :length]
        documents_BL[row, longest - length :] = 0
    outputs = [trial.decoder(prompt_BL, policy, documents_BL=documents_BL, cache=cache)]
    for step in range(steps):
        following = torch.stack([tokens_BL[row, length + step] for row, length in enumerate(lengths)])[:, None]
        outputs.append(trial.decoder(following, policy, documents_BL=torch.zeros(4, 1, dtype=torch.long), cache=cache))
    for row, length in enumerate(lengths):
        alone = trial.decoder(tokens_BL[row : row + 1, : length + steps], policy)
        for site, index in choices(alone).items():
            found = torch.cat([choices(output)[site][row] for output in outputs])[longest - length :]
            assert torch.equal(found, index[0])
        logits = torch.cat([output.logits_BLV[row] for output in outputs])[longest - length :]
        torch.testing.assert_close(logits, alone.logits_BLV[0], rtol=0, atol=1e-4)


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
