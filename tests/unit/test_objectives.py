"""Losses, distillation, elastic training and joint tuning."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from models import AXES, decoder_config, random_decoder
from nestlm.cost.static import Flops
from nestlm.cost.table import PriceList
from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.sampler.sandwich import Sandwich
from nestlm.elastic.sampler.within_batch import WithinBatch
from nestlm.errors import NestlmError
from nestlm.nn.policy import fixed, full
from nestlm.router.relaxed import budget_loss, entropy
from nestlm.router.static.logits import StaticLogitsRouter
from nestlm.spec import Budget
from nestlm.train.lightning_module import NestedLM
from nestlm.train.objective.base import Objective, StageModels, Term
from nestlm.train.objective.distillation import CrossEntropy, FrozenTeacher, InPlace
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.joint import JointObjective
from nestlm.train.task import Task
from plugins import build
from references import cross_entropy, forward_kl

CONFIG = decoder_config(num_kv_groups=4)
SPACE = search_space(AXES, CONFIG)
TABLE = Flops(context_length=20).tabulate(SPACE, axes=AXES, config=CONFIG)


@pytest.fixture
def batch() -> Batch:
    tokens = torch.randint(0, 50, (4, 21), generator=torch.Generator().manual_seed(2))
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


@pytest.mark.parametrize("ce_share", [0.0, 0.25])
def test_teaching_gives_each_path_its_loss(batch, ce_share):
    decoder, teacher = random_decoder(CONFIG, seed=0), random_decoder(CONFIG, seed=1)
    small = fixed(SPACE.smallest())
    full_BLV = decoder(batch.tokens_BL).logits_BLV
    small_BLV = decoder(batch.tokens_BL, small).logits_BLV
    teacher_BLV = teacher(batch.tokens_BL).logits_BLV
    models, policies = StageModels(decoder, teacher), ((full, True), (small, False))

    def mix(student, against):
        return (1 - ce_share) * forward_kl(student, against).mean() + ce_share * cross_entropy(
            student, batch.targets_BL
        ).mean()

    ce_full, ce_small = (cross_entropy(logits, batch.targets_BL).mean() for logits in (full_BLV, small_BLV))
    expected = {
        CrossEntropy(): [ce_full, ce_small],
        FrozenTeacher(ce_share=ce_share): [mix(full_BLV, teacher_BLV), mix(small_BLV, teacher_BLV)],
        InPlace(ce_share=ce_share): [ce_full, mix(small_BLV, full_BLV)],
    }
    for distillation, losses in expected.items():
        found = [each.losses.loss for each in distillation.policy_losses(models, batch, policies=policies)]
        torch.testing.assert_close(found, losses)
    alone = [
        policy_loss.losses.loss
        for policy_loss in InPlace(ce_share=ce_share).policy_losses(models, batch, policies=((small, False),))
    ]
    torch.testing.assert_close(alone, [mix(small_BLV, full_BLV)])


def test_elastic_gradients_are_those_of_the_mean_loss(batch):
    decoder = random_decoder(CONFIG)
    sampler = Sandwich(num_random=2)
    specs = sampler.draw(SPACE, seed=0, step=7, batch=(4, 20))
    torch.stack(
        [cross_entropy(decoder(batch.tokens_BL, fixed(spec)).logits_BLV, batch.targets_BL).mean() for spec in specs]
    ).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    objective = ElasticObjective(SPACE, sampler=sampler, distillation=CrossEntropy(), values=None, seed=0)
    for term in objective.terms(StageModels(decoder), batch, step=7):
        term.loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in decoder.named_parameters()}, expected)


def test_elastic_training_records_what_sequences_lose(batch):
    """Each pair is a sequence's own choices, its loss, and its gap to the teacher's loss on the same sequence."""
    decoder, teacher = random_decoder(CONFIG), random_decoder(CONFIG, seed=1)
    sampler = WithinBatch(per_token=False, p_full=0.25, p_smallest=0.25)
    objective = ElasticObjective(SPACE, sampler=sampler, distillation=FrozenTeacher(ce_share=0.0), values=None, seed=0)
    for step in range(3):
        list(objective.terms(StageModels(decoder, teacher), batch, step=step))
    pairs = objective.record()
    assert len(pairs["losses"]) == 3 * len(batch.tokens_BL)
    for number in range(len(pairs["losses"])):
        row = slice(number % 4, number % 4 + 1)
        spec = SPACE.spec(dict(zip(SPACE.sites, pairs["choices"][number].tolist(), strict=True)))
        target = batch.targets_BL[row]
        loss = cross_entropy(decoder(batch.tokens_BL[row], fixed(spec)).logits_BLV, target).mean()
        reference = cross_entropy(teacher(batch.tokens_BL[row]).logits_BLV, target).mean()
        torch.testing.assert_close(pairs["losses"][number], loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs["gaps"][number], loss - reference, rtol=1e-4, atol=1e-4)


def test_budget_loss_has_a_dead_zone_on_both_sides():
    target = torch.tensor([0.5, 0.5, 0.5, 0.5])
    loss = budget_loss(torch.tensor([0.5, 0.504, 0.6, 0.4]), target, dead_zone=0.01)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 0.19, 0.19]))


def test_entropy_is_that_of_the_choices_that_a_site_has():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1], [0.5, 0.2, 0.9, -torch.inf]], requires_grad=True)
    found = entropy(logits)
    torch.testing.assert_close(found[0], torch.distributions.Categorical(logits=logits[0]).entropy())
    torch.testing.assert_close(found[1], torch.distributions.Categorical(logits=logits[1, :3]).entropy())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert gradient[0].abs().min() > 0
    assert gradient[1, 3] == 0


def test_joint_trains_model_and_router(batch):
    decoder, teacher = random_decoder(CONFIG), random_decoder(CONFIG, seed=1)
    router = StaticLogitsRouter(prices=PriceList(TABLE, {}), hidden_width=8, init_std=0.1, seed=0)
    objective = JointObjective(FrozenTeacher(ce_share=0.0), budgets_per_step=2, cost_weight=1.0, dead_zone=0.0, seed=0)
    terms = objective.terms(StageModels(decoder, teacher, router), batch, step=0)
    names = [sorted(term.logs) for term in backpropagate(terms)]
    assert names == [["loss_full"], ["budget_distance", "loss_subnet"], ["budget_distance", "loss_subnet"]]
    for module in (decoder, router):
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def backpropagate(terms):
    for term in terms:
        term.loss.backward()
        yield term


def test_gates_carry_the_worth_of_a_wider_choice(batch):
    """Where wider is better, the loss pushes probability towards the wider choices."""
    decoder = random_decoder(CONFIG)
    targets_BL = decoder(batch.tokens_BL).logits_BLV.argmax(-1)
    router = StaticLogitsRouter(prices=PriceList(TABLE, {}), hidden_width=8, init_std=0.1, seed=0)
    gradient = torch.zeros_like(router.networks.output_bias)
    for sample in range(60):
        draw = router.draw(Budget.from_share(0.8), generator=torch.Generator().manual_seed(sample))
        cross_entropy(decoder(batch.tokens_BL, draw).logits_BLV, targets_BL).mean().backward()
    gradient = router.networks.output_bias.grad
    assert gradient is not None
    narrow, wide = gradient[:3, 0, 0], gradient[:3, 0, 2]
    assert (narrow > 0).float().mean() > 0.5
    assert float(wide.sum()) < 0 < float(narrow.sum())


class Lopsided(Objective):
    """A small gradient for the model, and a huge one for the router."""

    def terms(self, models, batch, *, step):
        yield Term(1e-2 * models.decoder.norm.weight[0] + 1e6 * models.router.networks.output.sum())


def test_gradients_are_clipped_for_each_part_by_itself(tmp_path, batch):
    decoder, router = (
        random_decoder(CONFIG),
        StaticLogitsRouter(prices=PriceList(TABLE, {}), hidden_width=8, init_std=0.1, seed=0),
    )
    before, routed = decoder.norm.weight.clone(), router.networks.output.clone()
    optim = replace(build("optim", "adamw"), optimizer=torch.optim.SGD, warmup_share=0.0, clip_norm=1.0)
    fit_once(
        NestedLM(
            Task(
                StageModels(decoder, router=router), Lopsided(), {"decoder": (decoder, 1.0), "router": (router, 1.0)}, 1
            ),
            stage="joint", optim=optim,
        ),
        batch,
        folder=tmp_path,
    )  # fmt: skip
    rate = optim.rate(0, num_steps=1)
    moved = [(before - decoder.norm.weight).detach()[0], (routed - router.networks.output).detach().norm()]
    torch.testing.assert_close(torch.stack(moved), torch.tensor([1e-2 * rate, rate]), rtol=1e-3, atol=0)


def fit_once(module: NestedLM, batch: Batch, *, folder) -> None:
    """Run one step of Lightning's Trainer."""
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader([batch], collate_fn=lambda rows: rows[0]))


class Broken(Objective):
    def terms(self, models, batch, *, step):
        yield Term(next(models.decoder.parameters()).sum() * float("nan"))


def test_a_loss_that_is_not_finite_stops_the_stage_before_the_weights_change(tmp_path, batch):
    decoder = random_decoder(CONFIG)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    module = NestedLM(
        Task(StageModels(decoder), Broken(), {"decoder": (decoder, 1e-3)}, 1), stage="elastic",
        optim=build("optim", "adamw"),
    )  # fmt: skip
    with pytest.raises(NestlmError, match=r"elastic: the loss is nan at step 0, batch [0-9a-f]{12}"):
        fit_once(module, batch, folder=tmp_path)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name])
