"""What a dry run says of memory is what stages take, on one device and in shards; runs with small optimizer states."""

import shutil
import sys
from functools import partial
from importlib.machinery import PathFinder
from statistics import median

import pytest
import torch
from lightning import Trainer
from torch.optim.lr_scheduler import LambdaLR

import memory as benchmark
from models import DECODERS
from nestlm.config.compose import build, compose
from nestlm.config.error_messages import explain
from nestlm.distributed.device_layout import ComputePrecision, DeviceLayout
from nestlm.errors import ConfigError
from nestlm.estimate.dry_run import training_stages
from nestlm.estimate.fake_step import GRADIENTS, PARTS, REST, STATES, TEACHER, WEIGHTS, FakeStep
from nestlm.estimate.memory import lengthen, predict
from nestlm.nn.decoder import Decoder
from nestlm.nn.linear import cast_linear_weights
from nestlm.pipeline import run as pipeline
from nestlm.pipeline.stages.elastic import ElasticStage
from nestlm.train.callbacks.timed_checkpoint import STATE
from nestlm.train.optim import AdamWBf16States

TINY = ("data=synthetic", "data.batch_size=2", "data.sequence_length=64", "model.num_layers=3")
SMALL = ("model=small", "data=synthetic", "data.batch_size=2", "data.sequence_length=128")
# Each of them by another path: samplers and teachers, precision, what is computed again, routers.
MEASURED = {
    "elastic by token": ("elastic", ()),
    "elastic, one at a time": ("elastic", ("sampler=one", "teacher=kd_inplace", "activation_checkpointing=true")),
    "pretrain in bf16": ("pretrain", ("trainer.precision=bf16-mixed", "optim=adamw_bf16")),
    "joint": ("joint", ("router=knapsack", "teacher=ce", "data.separate_documents=false")),
    "router per token": ("router", ("router=gumbel", "router.policy=dynamic")),
}


def made(*overrides: str):
    return build(compose([*TINY, *overrides]))


def predicted(stage: str, settings):
    precision = ComputePrecision.from_trainer(settings.trainer)
    assert precision is not None
    (found,) = [each for each in training_stages(settings) if each.name == stage]
    return predict(
        found,
        activation_checkpointing=settings.activation_checkpointing,
        layout=DeviceLayout.from_trainer(settings.trainer),
        precision=precision,
    )


@pytest.mark.filterwarnings("ignore:.*Profiler.*")
@pytest.mark.parametrize("case", MEASURED)
def test_a_stage_takes_what_was_predicted(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, overrides = MEASURED[case]
    told, taken = benchmark.both(stage, [*TINY, *overrides], folder=tmp_path)
    assert told == pytest.approx(taken, rel=0.1)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rank_that_holds_a_shard_takes_what_was_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # beside other work a rank may wait so that it holds less than it needs alone: the least is too little here
    told, taken = benchmark.both("pretrain", [*SMALL, *benchmark.SHARDS], folder=tmp_path, of_runs=median)
    assert told == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("overrides", [(), ("activation_checkpointing=true", "sampler=sandwich")])
def test_two_blocks_tell_of_five(overrides):
    settings = made("model.num_layers=5", *overrides)
    precision = ComputePrecision(torch.float32, mixed=False)
    fake_step = FakeStep(ElasticStage.of(settings), 2, precision, settings.activation_checkpointing)
    long = lengthen(fake_step.moments(1), fake_step.moments(2), num_blocks=5)
    whole = fake_step.moments(5)
    assert max(sum(parts.values()) for parts in long.values()) == pytest.approx(
        max(sum(parts.values()) for parts in whole.values()), rel=0.01
    )


def test_a_model_of_7b_is_predicted_without_its_memory():
    base = ("model=llama2_7b", "data.batch_size=8", "data.sequence_length=4096", "activation_checkpointing=true")
    settings = build(compose([*base, "sampler=one", "axes.mlp_width.multiple_of=128", "trainer=gpu"]))
    one = predicted("elastic", settings)
    weights, gib = 6_738_415_616, 2**30
    assert one[WEIGHTS] == pytest.approx(4 * weights, rel=0.01)
    assert one[STATES] == pytest.approx(8 * weights, rel=0.01)
    assert one[TEACHER] == pytest.approx(2 * weights, rel=0.05), "its linear maps are held in bfloat16"
    assert one[REST] > 8 * gib, "what blocks are computed again from, above all"
    overrides = ["trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=8", "sampler=sandwich"]
    many = predicted("elastic", build(compose([*base, "axes.mlp_width.multiple_of=128", *overrides])))
    assert many[STATES] == pytest.approx(weights, rel=0.01), "an eighth"
    assert many[GRADIENTS] == pytest.approx(4 * weights, rel=0.01), "whole, until the last term of a step"
    assert weights / 2 < many[WEIGHTS] < weights, "an eighth, and what is gathered"
    assert many[REST] < one[REST] / 4, "a row a rank"
    assert set(many) == set(PARTS)


@pytest.mark.parametrize(
    ("overrides", "ranks", "shards"),
    [
        (("trainer=cpu",), 1, None),
        (("trainer=gpu",), 1, None),
        (("trainer=fsdp", "trainer.devices=4", "trainer.num_nodes=2"), 8, 8),
        (("trainer=fsdp", "trainer.devices=4", "trainer.num_nodes=2", "trainer.strategy.shards=4"), 8, 4),
        (("trainer=ddp", "trainer.devices=4"), 4, 1),
    ],
)
def test_the_trainer_tells_how_a_stage_is_laid_out(overrides, ranks, shards):
    layout = DeviceLayout.from_trainer(made(*overrides).trainer)
    assert (layout.ranks, layout.shards) == (ranks, shards)
    assert layout.on_cuda == ("trainer=gpu" in overrides)


@pytest.mark.parametrize(("name", "mixed"), [("bf16-mixed", True), ("bf16", True), ("bf16-true", False)])
def test_precisions_by_their_names(name, mixed):
    assert ComputePrecision.from_trainer(made(f"trainer.precision={name}").trainer) == ComputePrecision(
        torch.bfloat16, mixed
    )
    assert ComputePrecision.from_trainer(partial(Trainer, precision="transformer-engine")) is None


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms of queries and keys
@pytest.mark.parametrize("name", DECODERS)
def test_a_teacher_held_in_bfloat16_says_the_same(name):
    decoder = Decoder(DECODERS[name])
    decoder.init_weights(seed=0)
    tokens_BL = torch.arange(40).view(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = decoder(tokens_BL).logits_BLV
        cast_linear_weights(decoder, torch.bfloat16)
        assert torch.equal(decoder(tokens_BL).logits_BLV, before)
    assert decoder.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert decoder.embed.weight.dtype == torch.float32


def train(optimizer_class, *, steps: int, resumed_at: int | None = None, **options):
    """Losses, weights and optimizer of a small regression, whose optimizer may be saved and loaded on the way."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Linear(64, 64)
    torch.nn.init.normal_(network.weight, std=0.1, generator=generator)
    torch.nn.init.zeros_(network.bias)
    inputs, targets = (torch.randn(256, 64, generator=generator) for _ in range(2))

    def make():
        optimizer = optimizer_class(network.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step / steps))

    (optimizer, schedule), losses = make(), []
    for step in range(steps):
        if step == resumed_at:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = make()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        optimizer.zero_grad()
        loss = (network(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, network.weight.detach(), optimizer


def test_states_in_bfloat16_follow_adamw_and_resume_exactly():
    known, _, _ = train(torch.optim.AdamW, steps=30)
    losses, weight, optimizer = train(AdamWBf16States, steps=30)
    assert losses == pytest.approx(known, rel=0.01)
    assert losses != known, "it rounds"
    assert {
        value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    } == {torch.bfloat16}
    assert torch.equal(train(AdamWBf16States, steps=30, resumed_at=10)[1], weight)


def test_8_bit_states_follow_adamw():
    known, _, _ = train(torch.optim.AdamW, steps=30)
    optimizer = made("optim=adamw_8bit").optim.optimizer
    with torch.compiler.set_stance("force_eager"):  # compiled code for a CPU takes minutes to build
        losses, weight, _ = train(optimizer.func, steps=30)
        assert losses == pytest.approx(known, rel=0.01)
        assert torch.equal(train(optimizer.func, steps=30, resumed_at=10)[1], weight)


def test_a_run_with_8_bit_states_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "drop_checkpoints", lambda folder: None)
    cache = tmp_path / "cache"
    options = ["optim=adamw_8bit", "router=uniform", "elastic.steps=0", "joint.steps=0", "checkpoint_seconds=1e-9"]
    with torch.compiler.set_stance("force_eager"):
        first = run(*options, name="first", cache=cache)
        last = sorted(cache.glob("pretrain-*/checkpoints/*.ckpt"))[-1]
        states = torch.load(last / STATE, weights_only=True)["optimizer_states"][0]["state"].values()
        assert "OptimState8bit" in {type(value).__name__ for state in states for value in state.values()}
        shutil.rmtree(last)
        for path in cache.glob("*/stage.json"):
            path.unlink()
        again = run(*options, name="again", cache=cache)
    assert "pretrain" in (again / "timings.csv").read_text()
    assert (first / "results.csv").read_bytes() == (again / "results.csv").read_bytes()


def test_an_extra_that_is_missing_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    missing = PathFinder.find_spec
    monkeypatch.setattr(
        PathFinder, "find_spec", lambda name, *rest: None if name == "torchao" else missing(name, *rest)
    )
    with pytest.raises(ConfigError) as error:
        made("optim=adamw_8bit")
    assert "optim.optimizer._target_" in explain(error.value)
    assert "pip install 'nestlm[torchao]'" in explain(error.value)
