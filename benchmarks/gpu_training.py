"""Measure training speed on one GPU: plain steps, elastic steps with a frozen teacher, and sandwich steps.

    python benchmarks/gpu_training.py [model=llama2_7b] [data.sequence_length=4096] [OVERRIDE ...]

Random weights and tokens, bfloat16. Prints a table of tokens a second, model FLOPs utilization, peak memory, and a
step's time over that of a plain one; writes docs/results/gpu-training.md with the machine and versions.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from nestlm.config.compose import build, compose
from nestlm.data.batch import Batch
from nestlm.distributed.strategy import placement_for
from nestlm.estimate.dry_run import training_stages
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.settings import Settings
from nestlm.train.lightning_module import NestedLM
from nestlm.train.objective.base import Objective, StageModels
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.pretrain import PretrainObjective
from nestlm.train.task import Task
from nestlm.train.trainer import make_trainer

PAGE = Path("docs/results/gpu-training.md")
DEFAULT = [
    "model=llama2_7b", "model.init=random", "trainer=gpu", "data=synthetic", "data.sequence_length=4096",
    "data.batch_size=1", "optim=adamw_8bit", "activation_checkpointing=true",
]  # fmt: skip
WARM_UP, STEPS = 3, 10
WAYS = {
    "(a) plain": ("pretrain", ["teacher=ce"]),
    "(b) elastic, `sampler=one sampler.p_full=0.5`, frozen teacher": (
        "elastic",
        ["sampler=one", "sampler.p_full=0.5", "teacher=kd_frozen"],
    ),
    "(c) elastic, `sampler=sandwich`, frozen teacher": ("elastic", ["sampler=sandwich", "teacher=kd_frozen"]),
}


class Steps(L.Callback):
    """A callback that measures the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        synchronize()
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class RandomTokens(torch.utils.data.IterableDataset[Batch]):
    """Batches of random tokens."""

    def __init__(self, settings: Settings) -> None:
        self.shape = (settings.data.batch_size, settings.data.sequence_length + 1)
        self.vocab_size = settings.model.decoder_config().vocab_size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(WARM_UP + STEPS):
            rows = torch.randint(self.vocab_size, self.shape, generator=generator)
            yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None)


def objective_of(stage: str, settings: Settings) -> Objective:
    """Return the objective that a stage trains on, without learned values of choices, which no way times."""
    if stage == "pretrain":
        return PretrainObjective()
    return ElasticObjective(
        settings.space(), sampler=settings.sampler, distillation=settings.teacher, values=None, seed=settings.seed
    )


def measure(overrides: list[str], stage: str) -> tuple[Settings, float, float]:
    """Return the settings, the median seconds of a step and the peak bytes of one way to train."""
    settings = build(compose(overrides))
    steps = Steps()
    trainer = make_trainer(settings.trainer, callbacks=[steps])
    placement = placement_for(trainer)
    decoder = Decoder.on_meta(
        settings.model.decoder_config(), activation_checkpointing=settings.activation_checkpointing
    )
    placement.place(decoder, blocks=decoder.blocks)
    decoder.init_weights(seed=0)
    teacher = None
    if stage == "elastic" and settings.teacher.needs_teacher:
        teacher = deepcopy(decoder)
        if "bf16" in str(trainer.precision):
            teacher = teacher.to(torch.bfloat16)
    models, objective = StageModels(decoder, teacher), objective_of(stage, settings)
    task = Task(models, objective, {"decoder": (decoder, 1e-5)}, WARM_UP + STEPS)
    module = NestedLM(task, stage=stage, optim=settings.optim)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, torch.utils.data.DataLoader(RandomTokens(settings), batch_size=None))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
    return settings, statistics.median(steps.seconds[WARM_UP:]), peak


def main() -> None:
    """Measure, and write the page."""
    asked = [*DEFAULT, *sys.argv[1:]]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    command = " ".join(["python benchmarks/gpu_training.py", *sys.argv[1:]])
    page = f"""# Training on one GPU

Generated by `{command}`: {" ".join(asked)}; medians of {STEPS} steps
after {WARM_UP}. {device}, torch {torch.__version__}, Python {platform.python_version()}. MFU counts a step's
expected FLOPs, a teacher's included, without what activation checkpointing computes again.

| way | seconds a step | over (a) | tokens a second | MFU | peak memory, GiB |
|---|---|---|---|---|---|
"""
    plain = None
    for name, (stage, overrides) in WAYS.items():
        settings, seconds, peak = measure([*asked, *overrides], stage)
        plain = plain or seconds
        tokens = settings.data.batch_size * settings.data.sequence_length
        available = get_available_flops(torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else None
        (flops,) = [each.flops_per_token() for each in training_stages(settings) if each.name == stage]
        used = f"{flops * tokens / seconds / available:.1%}" if available else ""
        rate = f"{tokens / seconds:,.0f} | {used} | {peak / 2**30:.1f}"
        page += f"| {name} | {seconds:.3f} | {seconds / plain:.2f} | {rate} |\n"
        torch.cuda.empty_cache()
    PAGE.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
