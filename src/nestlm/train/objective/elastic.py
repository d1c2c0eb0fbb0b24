"""Elastic training: every step trains the sub-networks that a sampler draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.distributed.collectives import RowShard
from nestlm.elastic.sampler.base import MixedSpecs, Sample, Sampler, policy_of
from nestlm.spec import SearchSpace, Site
from nestlm.train.objective.base import Objective, PolicyLoss, StageModels, Term
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.objective.elastic_values import ElasticValues, by_token

PAIRS = 1024  # that are kept: the newest, since the model changes


class ElasticObjective(Objective):
    """The mean over the drawn sub-networks' losses, and a record of what they lost.

    Flextron sums the losses. The mean keeps the norm at which gradients are clipped independent of their number, and
    AdamW takes the same step (our choice). What signals can start with comes for free: pairs of choices and loss, or,
    where each token has choices of its own and no loss of its own spec, the values of choices.
    """

    choices: Tensor
    losses: Tensor
    gaps: Tensor
    count: Tensor

    def __init__(
        self,
        space: SearchSpace,
        *,
        sampler: Sampler,
        distillation: DistillationLoss,
        values: ElasticValues | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.values = values
        self.space, self.sampler, self.distillation, self.seed = space, sampler, distillation, seed
        self.register_buffer("choices", torch.zeros(PAIRS, len(space.sites), dtype=torch.long))
        self.register_buffer("losses", torch.zeros(PAIRS))
        self.register_buffer("gaps", torch.zeros(PAIRS))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        num_rows, length = batch.tokens_BL.shape
        shape = (batch.row_shard.total(num_rows), length)
        everywhere = self.sampler.draw(self.space, seed=self.seed, step=step, batch=shape)
        drawn = [each.own(batch.row_shard) if isinstance(each, MixedSpecs) else each for each in everywhere]
        whole = [not isinstance(spec, MixedSpecs) and spec == self.space.full() for spec in drawn]
        seen: dict[Site, Tensor] = {}
        policies = [policy_of(spec, self.space, device=batch.tokens_BL.device) for spec in drawn]
        if self.values is not None:
            policies = [
                self.values.watched(policy, seen) if by_token(spec) else policy
                for policy, spec in zip(policies, drawn, strict=True)
            ]
        lessons = self.distillation.lessons(models, batch, policies=tuple(zip(policies, whole, strict=True)))
        for number, (lesson, spec, is_whole) in enumerate(zip(lessons, drawn, whole, strict=True), start=1):
            if not is_whole and lesson.reference_BL is not None:
                self.remember(everywhere[number - 1], lesson, row_shard=batch.row_shard)
            name = "loss_full" if is_whole else "loss_subnet"
            loss, distance_BL = lesson.losses.loss, lesson.losses.distance_BL
            yield Term(loss / len(drawn), {name: loss.detach()}, is_last=number == len(drawn))
            if self.values is not None and by_token(spec) and distance_BL is not None:
                yield self.values.term(seen, indices_SBL=spec.indices, distance_BL=distance_BL)
            seen.clear()

    @torch.no_grad()
    def remember(self, drawn: Sample, lesson: PolicyLoss, *, row_shard: RowShard) -> None:
        """Keep what sub-networks, drawn for all ranks, lost in place of the oldest pairs."""
        assert lesson.reference_BL is not None, "there is something to compare with"
        losses, references = lesson.losses.text_BL, lesson.reference_BL
        if isinstance(drawn, MixedSpecs):
            if by_token(drawn):
                return
            choices, losses, references = (
                drawn.indices.T,
                row_shard.gather(losses.mean(1)),
                row_shard.gather(references.mean(1)),
            )
        else:
            choices = torch.tensor([self.space.indices(drawn)])
            losses, references = row_shard.mean(losses.mean())[None], row_shard.mean(references.mean())[None]
        slots = (torch.arange(len(losses)) + self.count.cpu()) % PAIRS
        slots = slots.to(self.count.device)
        self.choices[slots] = choices.to(self.choices.device)
        self.losses[slots], self.gaps[slots] = losses, losses - references
        self.count += len(losses)

    def record(self) -> dict[str, Tensor]:
        """Pairs, the oldest first where there is room left: `choices` (n, sites), `losses`, `gaps` (n,).

        And where values were learned, what learned them, as `ElasticValues` saves itself: the networks of value routers
        are `static.*` and `dynamic.*`.
        """
        known = min(int(self.count), PAIRS)
        pairs = {"choices": self.choices[:known], "losses": self.losses[:known], "gaps": self.gaps[:known]}
        return pairs if self.values is None or not self.values.steps else pairs | self.values.state_dict()
