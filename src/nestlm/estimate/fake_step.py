"""A step of a training stage on a model of a few blocks without storage, at the widest choices of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nestlm.cost.static import Flops
from nestlm.data.batch import Batch
from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.distributed.device_layout import ComputePrecision
from nestlm.elastic.axes.mlp_width import MLPWidth
from nestlm.elastic.sampler.base import MixedSpecs, Sample, Sampler
from nestlm.estimate.memory_tracker import MemoryTracker, with_cuda_kernels
from nestlm.nn.decoder import Decoder
from nestlm.nn.linear import cast_linear_weights
from nestlm.nn.policy import Policy, fixed
from nestlm.pipeline.settings import PriceSettings, SpaceSettings
from nestlm.pipeline.stages.training import TrainingStage
from nestlm.router.base import Router
from nestlm.router.protocols import BudgetLogits, lacking, narrow
from nestlm.router.relaxed import gated_policy
from nestlm.spec import Budget, SearchSpace, Site
from nestlm.train.lightning_module import NestedLM
from nestlm.train.objective.base import StageModels
from nestlm.train.task import Task

DRAWS, TOKENS = 64, 64  # of a sampler, in rows of so many tokens: the widest are taken
WEIGHTS, GRADIENTS, STATES, TEACHER = "weights", "gradients", "optimizer states", "teacher"
REST = "activations, logits, loss"
PARTS = (WEIGHTS, GRADIENTS, STATES, TEACHER, REST)
ALL_RUN = {"mlp_width": MLPWidth(fractions=(1.0,), multiple_of=1)}  # for runs whose only axis skips blocks
UPDATE = "update"
ROUTED_SHARE = 0.75  # of a width: between the smallest and the whole, of which few draws run just that
PART_OF_BACKWARD = "; "  # in the name of a moment: what it comes to is named after it
HELD = ", held"  # in the name of a moment: its gradients wait for later ones before ranks reduce them
COMPILED = "compiled"  # the moment of an update that keeps nothing on the way
COMPILING = ("torchao",)  # packages whose optimizers compile it


@dataclass(frozen=True)
class FakeStep:
    """A step of a training stage on a model of a few blocks whose tensors have no storage.

    Attributes:
        stage: the stage that trains.
        rows: sequences of a step, on one device.
        precision: dtype that the stage computes in.
        activation_checkpointing: whether backward passes recompute the blocks.
        on_cuda: whether the device is a GPU.
        gathered: whether weights are gathered from shards, in the dtype of products.
    """

    stage: TrainingStage[Any]
    rows: int
    precision: ComputePrecision
    activation_checkpointing: bool = False
    on_cuda: bool = False
    gathered: bool = False

    def moments(self, num_blocks: int, *, passes: bool = True) -> dict[str, Mapping[str, float]]:
        """Track a step, and return the bytes of each of the `PARTS` at the peak of each moment of the step.

        Args:
            num_blocks: blocks of the model.
            passes: whether the step has forward and backward passes; it always has the optimizer's update.

        Returns:
            Bytes by part, by moment; empty where the stage trains nothing.
        """
        if not self.stage.learns:
            return {}
        tracker = MemoryTracker()
        task = self.task(tracker, num_blocks)
        module = NestedLM(task, stage=self.stage.name, optim=self.stage.optim)
        tracker.assign(TEACHER, [] if task.models.teacher is None else task.models.teacher.parameters())
        tracker.assign(WEIGHTS, [*module.parameters(), *module.buffers()])
        dtype, mixed = self.precision.dtype, self.precision.mixed
        with tracker.running(), torch.autocast("cpu", dtype=dtype, enabled=mixed, cache_enabled=False):
            optimizer = fake_update(module, tracker, on_cuda=self.on_cuda)
            if passes:
                mark_blocks(module.decoder, tracker)
                for step in range(len(self.draws)):
                    self.fake_passes(task, module, tracker, step=step)
            del optimizer  # its states were there until now
        return {name: parts for name, parts in tracker.peaks(rest=REST).items() if name != COMPILED}

    def fake_passes(self, task: Task, module: NestedLM, tracker: MemoryTracker, *, step: int) -> None:
        """Run the forward and backward passes of a step; each has moments of its own."""
        module.zero_grad()
        tracker.moment = f"step {step}, forward 0"
        for number, term in enumerate(task.objective.terms(task.models, self.batch(), step=step)):
            tracker.moment = f"step {step}, backward {number}" + ("" if term.is_last else HELD)
            term.loss.backward()
            tracker.assign(GRADIENTS, [parameter.grad for parameter in module.parameters()])
            tracker.moment = f"step {step}, forward {number + 1}"
            del term

    def task(self, tracker: MemoryTracker, num_blocks: int) -> Task:
        """Build the stage's task for a model of a few blocks. Routers and signals are small, and have storage."""
        stage = self.shortened(num_blocks)
        decoder = self.decoder(tracker, stage)
        teacher = self.decoder(tracker, stage, teaches=True) if stage.needs_teacher else None
        models = StageModels(decoder, teacher, stage.new_router())
        task = stage.task(models)
        router = models.router
        if router is not None and not router.per_token and task.trains(decoder):
            return stage.task(replace(models, router=TypicalRouter(router)))
        return task

    def decoder(self, tracker: MemoryTracker, stage: TrainingStage[Any], *, teaches: bool = False) -> Decoder:
        """Build the model, or the teacher as `TrainingStage.load_teacher` holds it, without storage."""
        config = stage.model.decoder_config()
        decoder = Decoder.on_meta(config, activation_checkpointing=self.activation_checkpointing)
        if self.gathered or not self.precision.mixed:
            decoder.to(self.precision.dtype)
        elif teaches:
            cast_linear_weights(decoder, self.precision.dtype)
        if self.on_cuda:
            with_cuda_kernels(decoder)
        tracker.without_storage(decoder)
        return decoder

    def batch(self) -> Batch:
        """Build a batch of which only the shape counts."""
        data = self.stage.data
        tokens, targets, documents = (
            torch.zeros((self.rows, data.sequence_length), dtype=torch.long) for _ in range(3)
        )
        return Batch(tokens, targets, documents if data.separate_documents else None)

    @property
    def sampler(self) -> Sampler | None:
        """The sampler of the stage; None where the stage draws no sub-networks."""
        return getattr(self.stage, "sampler", None)

    @cached_property
    def draws(self) -> list[tuple[Sample, ...]]:
        """Samples of the steps to track: the widest with and the widest without the whole model."""
        stage = self.stage
        if self.sampler is None or not isinstance(stage, SpaceSettings):
            return [()]
        space = stage.space()
        widest: dict[bool, tuple[float, int]] = {}
        for step in range(max(1, min(DRAWS, stage.num_steps))):
            drawn = self.sampler.draw(space, seed=stage.seed, step=step, batch=(self.rows, TOKENS))
            kind = any(not isinstance(item, MixedSpecs) and item == space.full() for item in drawn)
            width = max(level(item, space) for item in drawn[1:] or drawn)
            widest[kind] = max(widest.get(kind, (-1.0, 0)), (width, step))
        shape = (self.rows, stage.data.sequence_length)
        return [self.sampler.draw(space, seed=stage.seed, step=step, batch=shape) for _, step in widest.values()]

    def shortened(self, num_blocks: int) -> TrainingStage[Any]:
        """Return the stage with a model of fewer blocks, none of which is skipped, and with prices in FLOPs."""
        stage = self.stage
        changes: dict[str, Any] = {"model": replace(stage.model, num_layers=num_blocks)}
        if isinstance(stage, SpaceSettings):
            kept = {name: axis for name, axis in stage.axes.items() if not Site(axis.name, 0).is_block}
            changes["axes"] = kept or ALL_RUN
            if self.sampler is not None:
                changes["sampler"] = RepeatedSampler(stage.space(), tuple(self.draws))
        if isinstance(stage, PriceSettings):
            changes |= {"cost": Flops(stage.data.sequence_length), "costs": {}}
        return replace(stage, **changes)


@dataclass(frozen=True)
class RepeatedSampler:
    """A sampler that draws for fewer blocks what was drawn for all.

    Attributes:
        space: choices of all blocks.
        draws: samples in that space, by step.
    """

    space: SearchSpace
    draws: tuple[tuple[Sample, ...], ...]

    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[Sample, ...]:
        """Shorten a step's samples: mixed specs as in the first blocks, others next to the mean over blocks."""
        del seed, batch
        return tuple(self.shorten(item, space) for item in self.draws[step])

    def shorten(self, sample: Sample, space: SearchSpace) -> Sample:
        """Translate a sample to a space of fewer blocks; sites of axes that were not drawn run whole."""
        if isinstance(sample, MixedSpecs):
            rows = dict(zip(self.space.sites, sample.indices, strict=True))
            return MixedSpecs(
                torch.stack([rows.get(site, torch.zeros_like(sample.indices[0])) for site in space.sites])
            )
        widths = sample.widths_by_axis()
        chosen = {}
        for site, known in space.choices.items():
            chosen[site] = nearest(known, mean(widths.get(site.axis, known[-1:])))
        return space.spec(chosen)


class TypicalRouter(Router):
    """Runs the sub-network next to `ROUTED_SHARE` of every width, with gates where the router learns from the loss."""

    def __init__(self, router: Router) -> None:
        super().__init__(router.prices)
        self.router = router

    def draw(self, budget: Budget, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Policy:
        """Choose the sub-network, which is the same for every budget."""
        del budget, generator, row_shard
        space = self.prices.space
        chosen = [nearest(widths, ROUTED_SHARE * widths[-1]) for widths in space.choices.values()]
        if not lacking(self.router, BudgetLogits):
            logits = narrow(self.router, BudgetLogits).budget_logits(torch.ones(1))[0]
            return gated_policy(space, logits.softmax(-1), torch.tensor(chosen))
        return fixed(space.spec(dict(zip(space.sites, chosen, strict=True))))


def nearest(widths: Sequence[int], wanted: float) -> int:
    """Return the index of the width nearest to a wanted one; of two as near, the wider."""
    return min(reversed(range(len(widths))), key=lambda index: abs(widths[index] - wanted))


def level(drawn: Sample, space: SearchSpace) -> float:
    """Return how wide a sample is, from 0, the smallest sub-network, to 1, the whole model."""
    chosen = drawn.indices if isinstance(drawn, MixedSpecs) else torch.tensor(space.indices(drawn))[:, None]
    counts = torch.tensor([len(widths) for widths in space.choices.values()])
    return float((chosen.flatten(1).float().mean(1) / (counts - 1).clamp_min(1)).mean())


def fake_update(module: NestedLM, tracker: MemoryTracker, *, on_cuda: bool) -> Optimizer:
    """Make the optimizer and track an update, which allocates its states; returns the optimizer."""
    (optimizer,), _ = module.configure_optimizers()
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    tracker.assign(GRADIENTS, [parameter.grad for parameter in module.parameters()])
    if on_cuda and "foreach" in optimizer.defaults:  # torch's default there, unless fused
        for group in optimizer.param_groups:
            group["foreach"] = not group.get("fused") if group["foreach"] is None else group["foreach"]
    compiled = type(optimizer).__module__.startswith(COMPILING)
    tracker.moment = COMPILED if compiled else UPDATE
    with torch.compiler.set_stance("force_eager" if compiled else "default"):
        optimizer.step()
    tracker.assign(STATES, states(optimizer))
    tracker.moment = UPDATE
    torch.empty(1)  # so that what is there now is seen
    return optimizer


def states(optimizer: Optimizer) -> list[Tensor]:
    """List the state tensors of an optimizer; of quantized states the tensors that they are made of."""
    kept: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    parts: list[Tensor] = []
    for value in kept:
        if is_traceable_wrapper_subclass(value):
            parts += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor):
            parts.append(value)
    return parts


def mark_blocks(decoder: Decoder, tracker: MemoryTracker) -> None:
    """Begin a new moment of a backward pass at the last block, at the first block, and at the embedding.

    The gradient of a block's first norm is the last that the block gets, so hooks on norms mark where a block ends.
    """
    blocks = list(decoder.blocks)
    above_first = blocks[1].attn_norm if len(blocks) > 1 else decoder.norm
    norms = {"last": decoder.norm, "first": above_first, "embedding": blocks[0].attn_norm}

    def mark(name: str) -> None:
        tracker.moment = f"{tracker.moment.partition(PART_OF_BACKWARD)[0]}{PART_OF_BACKWARD}{name}"

    for name, norm in norms.items():
        if norm.weight.requires_grad:
            norm.weight.register_post_accumulate_grad_hook(lambda _, name=name: mark(name))
