"""Signals: what they learn about a model's choices, and what they teach routers."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from models import AXES, decoder_config, random_decoder
from nestlm.cost.static import Flops
from nestlm.cost.table import PriceList
from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.sampler.base import generator, independent
from nestlm.elastic.sampler.within_batch import WithinBatch
from nestlm.errors import ConfigError
from nestlm.nn.policy import mixed
from nestlm.router.dynamic.base import Granularity
from nestlm.router.dynamic.logits import DynamicLogitsRouter
from nestlm.router.dynamic.value import DynamicValueRouter
from nestlm.router.static.logits import StaticLogitsRouter
from nestlm.router.static.value import StaticValueRouter
from nestlm.train.objective.base import StageModels
from nestlm.train.objective.distillation import FrozenTeacher
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.elastic_values import ElasticValues
from nestlm.train.signal.gumbel import GumbelSignal
from nestlm.train.signal.surrogate_dynamic import DynamicSurrogateSignal
from nestlm.train.signal.surrogate_static import PairSettings, StaticSurrogateSignal
from nestlm.train.signal.value import ValueSignal
from nestlm.utils.seeding import torch_generator
from references import cross_entropy, forward_kl

CONFIG = decoder_config(num_kv_groups=4)
SPACE = search_space(AXES, CONFIG)
TABLE = Flops(context_length=20).tabulate(SPACE, axes=AXES, config=CONFIG)
PRICES = PriceList(TABLE, {})
TOKENS = PriceList(
    Flops(context_length=20).tabulate(SPACE, axes=AXES, config=CONFIG, per_token=True), {}, per_token=True
)
NETWORK = {"hidden_width": 16, "init_std": 0.1, "seed": 0}
PER_TOKEN = {"hidden_size": CONFIG.hidden_size, "granularity": Granularity(0, 20)}
PAIRS = PairSettings(specs_per_step=4, replay=512, warm_start=True)


def text(seed: int, rows: int = 4) -> Batch:
    tokens = torch.randint(0, 50, (rows, 21), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


@pytest.fixture
def batch() -> Batch:
    return text(2)


def train(signal, router, decoder, *, steps: int, lr: float) -> list[dict]:
    """Train with Adam on new text in each step; returns the logs of each step."""
    decoder.requires_grad_(False)
    optimizer = torch.optim.Adam([*signal.parameters(), *router.parameters()], lr=lr)
    logged = []
    for step in range(steps):
        optimizer.zero_grad()
        logs: dict = {}
        for term in signal.terms(StageModels(decoder, router=router), text(1000 + step, rows=32), step=step):
            term.loss.backward()
            logs |= term.logs
        optimizer.step()
        logged.append(logs)
    return logged


def test_a_signal_refuses_a_router_that_it_cannot_train():
    router = StaticValueRouter(prices=PRICES, **NETWORK)
    with pytest.raises(
        ConfigError, match=r"StaticValueRouter, which the signal surrogate cannot train; wanted a BudgetLogits router"
    ):
        surrogate("gap", router=router)


def test_values_find_what_a_choice_costs_a_token():
    """Predictions rank held-out tokens, and a view of the token helps."""
    decoder = random_decoder(CONFIG)
    seeing = DynamicValueRouter(prices=TOKENS, **PER_TOKEN, **NETWORK)
    blind = StaticValueRouter(prices=PRICES, **NETWORK)
    blind.per_token = True  # for the same draws and targets
    errors = []
    for router in (seeing, blind):
        signal = ValueSignal(router, skew=1.0, random_share=1.0, warm_start=True, seed=0)
        train(signal, router, decoder, steps=150, lr=0.01)
        summary = signal.summary(StageModels(decoder, router=router), [text(seed) for seed in range(8)])
        errors.append(summary["value_error"])
        assert summary["rank_correlation"] > 0.4
    assert errors[0] < 0.95 * errors[1]


def test_elastic_training_learns_values_on_the_way(batch):
    """Values are learned where tokens draw their own widths, and routers start with them."""
    decoder, teacher = random_decoder(CONFIG), random_decoder(CONFIG)
    routers = [
        DynamicValueRouter(prices=TOKENS, **PER_TOKEN, **NETWORK),
        StaticValueRouter(prices=PRICES, **NETWORK),
    ]
    errors, left = {}, {}
    for steps in (1, 150):
        values = ElasticValues(SPACE, hidden_size=CONFIG.hidden_size, hidden_width=16, seed=0)
        sampler = WithinBatch(per_token=True, p_full=0.25, p_smallest=0.0)
        objective = ElasticObjective(
            SPACE, sampler=sampler, distillation=FrozenTeacher(ce_share=0.0), values=values, seed=0
        )
        optimizer = torch.optim.Adam(values.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            elastic_term, regression = objective.terms(
                StageModels(decoder, teacher), text(1000 + step, rows=32), step=step
            )
            assert "loss_subnet" in elastic_term.logs
            regression.loss.backward()
            optimizer.step()
        assert all(parameter.grad is None for parameter in decoder.parameters()), "values teach the model nothing"
        left[steps] = objective.record()
        assert len(left[steps]["choices"]) == 0
        for router in routers:
            signal = ValueSignal(router, skew=1.0, random_share=1.0, warm_start=True, seed=0)
            signal.warm_up(router, left[steps])
            summary = signal.summary(StageModels(decoder, router=router), [text(seed) for seed in range(8)])
            errors[steps, router.per_token] = summary["value_error"]
    assert errors[150, True] < 0.9 * errors[1, True]
    assert errors[150, False] < errors[1, False]
    other = DynamicValueRouter(prices=TOKENS, **PER_TOKEN, **{**NETWORK, "hidden_width": 8})
    with pytest.raises(ConfigError, match=r"hidden_width: got 8, .*hidden_width=16; wanted the same"):
        ValueSignal(other, skew=1.0, random_share=1.0, warm_start=True, seed=0).warm_up(other, left[1])
    cold = other.networks.input.clone()
    ValueSignal(other, skew=1.0, random_share=1.0, warm_start=False, seed=0).warm_up(other, left[1])
    assert torch.equal(other.networks.input, cold)
    values = ElasticValues(SPACE, hidden_size=CONFIG.hidden_size, hidden_width=16, seed=0)
    by_sequence = WithinBatch(per_token=False, p_full=0.25, p_smallest=0.0)
    objective = ElasticObjective(
        SPACE, sampler=by_sequence, distillation=FrozenTeacher(ce_share=0.0), values=values, seed=0
    )
    list(objective.terms(StageModels(decoder, teacher), batch, step=0))
    assert not [name for name in objective.record() if name.startswith(("static.", "dynamic."))], "nothing was learned"


@pytest.mark.parametrize("axes", [AXES, AXES[:1], AXES[1:]], ids=["both", "first", "second"])
def test_values_leave_the_models_gradients_alone(batch, axes):
    """Activation checkpointing, which calls policies twice, and sites that are not elastic change nothing."""
    space, teacher = search_space(axes, CONFIG), random_decoder(CONFIG, seed=1)
    gradients = []
    for learns, checkpointing in ((False, False), (True, False), (True, True)):
        decoder = random_decoder(CONFIG)
        decoder.activation_checkpointing = checkpointing
        values = ElasticValues(space, hidden_size=CONFIG.hidden_size, hidden_width=16, seed=0) if learns else None
        sampler = WithinBatch(per_token=True, p_full=0.25, p_smallest=0.0)
        objective = ElasticObjective(
            space, sampler=sampler, distillation=FrozenTeacher(ce_share=0.0), values=values, seed=0
        )
        for term in objective.terms(StageModels(decoder, teacher), batch, step=0):
            term.loss.backward()
        found = {name: parameter.grad for name, parameter in decoder.named_parameters()}
        learned = {} if values is None else {name: parameter.grad for name, parameter in values.named_parameters()}
        assert all(grad is not None for grad in learned.values())
        gradients.append((found, learned))
    assert all(torch.equal(grad, gradients[1][0][name]) for name, grad in gradients[0][0].items())
    torch.testing.assert_close(gradients[1], gradients[2])


def test_values_are_the_sum_over_sites_of_what_was_chosen(batch):
    decoder = random_decoder(CONFIG)
    for per_token, router in (
        (True, DynamicValueRouter(prices=TOKENS, **PER_TOKEN, **NETWORK)),
        (False, StaticValueRouter(prices=PRICES, **NETWORK)),
    ):
        signal = ValueSignal(router, skew=1.0, random_share=1.0, warm_start=True, seed=0)
        predicted, target = signal.observe(StageModels(decoder, router=router), batch, key=3)
        assert predicted.shape == target.shape == ((4, 20) if per_token else (4,))
        assert float(target.min()) >= -1e-5, "a KL"
        assert predicted.requires_grad
        assert not target.requires_grad
    # static values are the same for all tokens, so the prediction can be done by hand
    from nestlm.train.signal.exploration import random_choices

    indices_SB = random_choices(SPACE, (4, 20), per_token=False, skew=1.0, generator=torch_generator(0, "value", 3))
    by_hand = sum(router.values(row, torch.zeros(1, 1, 1))[0, 0][indices_SB[row]] for row in range(len(SPACE.sites)))
    torch.testing.assert_close(predicted, by_hand)
    whole = decoder(batch.tokens_BL).logits_BLV
    kl = forward_kl(decoder(batch.tokens_BL, mixed(SPACE, indices_SB)).logits_BLV, whole).mean(1)
    torch.testing.assert_close(target, kl.detach())


def test_gumbel_moves_towards_the_budget_and_anneals(batch):
    decoder = random_decoder(CONFIG)
    for router in (
        StaticLogitsRouter(prices=PRICES, **NETWORK),
        DynamicLogitsRouter(prices=TOKENS, **PER_TOKEN, **NETWORK),
    ):
        signal = GumbelSignal(
            router, temperature=(1.0, 0.05), gain=(1.0, 10.0), anneal_steps=60, cost_weight=10.0, dead_zone=0.0, seed=0
        )
        logs = train(signal, router, decoder, steps=60, lr=0.02)
        distance = [float(log["budget_distance"]) for log in logs]
        assert sum(distance[-10:]) < 0.6 * sum(distance[:10])


def test_the_token_surrogate_predicts_and_opens_its_gate():
    decoder = random_decoder(CONFIG)
    for target in ("gap", "loss"):
        router = DynamicLogitsRouter(prices=TOKENS, **PER_TOKEN, **NETWORK)
        signal = DynamicSurrogateSignal(
            router, target=target, random_share=0.5, gate=0.9, cost_weight=1.0, dead_zone=0.01, entropy_weight=0.01,
            warm_start=True, hidden_width=16, lr=0.01, seed=0,
        )  # fmt: skip
        logs = train(signal, router, decoder, steps=120, lr=0.01)
        assert not logs[0]["gate_open"]
        if target == "gap":
            assert logs[-1]["gate_open"]
            summary = signal.summary(StageModels(decoder, router=router), [text(seed) for seed in range(8)])
            assert summary["rank_correlation"] > 0.6


def test_a_closed_gate_moves_no_dynamic_router(batch):
    router = DynamicLogitsRouter(prices=TOKENS, **PER_TOKEN, **NETWORK)
    signal = DynamicSurrogateSignal(
        router, target="gap", random_share=0.5, gate=0.0, cost_weight=1.0, dead_zone=0.01, entropy_weight=0.01,
        warm_start=True, hidden_width=16, lr=0.01, seed=0,
    )  # fmt: skip
    for term in signal.terms(StageModels(random_decoder(CONFIG), router=router), batch, step=0):
        term.loss.backward()
    assert all(parameter.grad is None for parameter in router.parameters())
    assert all(parameter.grad is not None for parameter in signal.effects.parameters())


def surrogate(target: str, *, router=None, pairs: PairSettings = PAIRS) -> StaticSurrogateSignal:
    return StaticSurrogateSignal(
        router or StaticLogitsRouter(prices=PRICES, **NETWORK), target=target, random_share=1.0, gate=0.5,
        cost_weight=1.0, dead_zone=0.01, entropy_weight=0.01, pairs=pairs, hidden_width=16, lr=0.01, seed=0,
    )  # fmt: skip


def test_surrogate_learns_to_rank_specs_and_opens_its_gate(batch):
    decoder = random_decoder(CONFIG)
    router = StaticLogitsRouter(prices=PRICES, **NETWORK)
    signal, models = surrogate("gap"), StageModels(decoder, router=router)
    optimizer = torch.optim.Adam([*signal.parameters(), *router.parameters()], lr=0.01)
    opened = []
    for step in range(120):
        optimizer.zero_grad()
        terms = list(signal.terms(models, batch, step=step))
        for term in terms:
            term.loss.backward()
        if len(terms) == 1:
            assert all(parameter.grad is None for parameter in router.parameters()), "a closed gate moves no router"
        else:
            assert float(signal.error) < signal.gate
        opened.append(len(terms) == 2)
        optimizer.step()
    assert not opened[0]
    assert opened[-1]
    summary = signal.summary(models, [batch])
    assert summary["surrogate_error"] < 0.5
    assert summary["rank_correlation"] > 0.6
    choices = torch.tensor([SPACE.indices(independent(SPACE, generator(9, step, 0))) for step in range(12)])
    inputs, targets = signal.observe(decoder, batch, choices=choices)
    with torch.no_grad():
        assert spearmanr(signal.surrogate(inputs), targets).statistic > 0.7


def test_surrogate_targets_differ_by_the_full_models_loss(batch):
    decoder = random_decoder(CONFIG)
    router = StaticLogitsRouter(prices=PRICES, **NETWORK)
    (inputs, gaps), (same_inputs, losses) = (
        signal.observe(decoder, batch, choices=signal.draw_choices(router, step=3))
        for signal in (surrogate("gap"), surrogate("loss"))
    )
    assert torch.equal(inputs, same_inputs)
    whole = cross_entropy(decoder(batch.tokens_BL).logits_BLV, batch.targets_BL).mean()
    torch.testing.assert_close(losses - gaps, whole.expand(4))


def test_replay_keeps_the_newest_pairs():
    signal = surrogate("gap")
    for start in range(0, 520, 4):
        pairs = torch.zeros(4, len(SPACE.sites), SPACE.max_choices)
        signal.add_pairs(pairs, torch.arange(start, start + 4, dtype=torch.float32))
    assert set(signal.targets.tolist()) == set(range(8, 520))


def test_a_warm_start_knows_what_elastic_training_recorded(batch):
    """With pairs in which only the first site matters; without warm start nothing is learned."""
    choices = torch.tensor([SPACE.indices(independent(SPACE, generator(0, step, 0))) for step in range(200)])
    gaps = 0.3 * (2 - choices[:, 0]).float()
    pairs = {"choices": choices, "gaps": gaps, "losses": gaps + 3.0}
    inputs = torch.nn.functional.one_hot(choices, SPACE.max_choices).float()
    for warm_start, target, offset in ((True, "gap", 0.0), (True, "loss", 3.0), (False, "gap", 0.0)):
        signal = surrogate(target, pairs=replace(PAIRS, warm_start=warm_start))
        signal.warm_up(StaticLogitsRouter(prices=PRICES, **NETWORK), pairs)
        with torch.no_grad():
            error = float((signal.surrogate(inputs) - gaps - offset).abs().mean())
        assert (error < 0.05) == warm_start
        assert int(signal.count) == (200 if warm_start else 0)
    signal = surrogate("gap")
    signal.warm_up(StaticLogitsRouter(prices=PRICES, **NETWORK), {name: pair[:0] for name, pair in pairs.items()})
    assert int(signal.count) == 0, "the sampler token leaves no pairs"
