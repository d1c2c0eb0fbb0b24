"""The objective of elastic training: every step trains the sub-networks that a sampler draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.distributed.collectives import RowShard
from nestlm.elastic.sampler.base import MixedSpecs, Sample, Sampler, policy_of
from nestlm.spec import SearchSpace, Site
from nestlm.train.objective.base import Objective, PolicyLoss, StageModels, Term
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.objective.elastic_values import ElasticValues, draws_per_token

PAIRS = 1024  # the newest pairs of choices and loss are kept, since the model changes


class ElasticObjective(Objective):
    """The mean of the drawn sub-networks' losses, and a record of choices and losses for the signals of routers.

    Flextron (arXiv 2406.10260) sums the losses. The mean keeps the norm at which gradients are clipped independent of
    the number of sub-networks, and AdamW takes the same step (our choice). The record comes for free: pairs of choices
    and loss, or, where each token has choices of its own, so that no loss belongs to one spec, values of choices.

    Attributes:
        choices: choice indices of recorded sub-networks, (PAIRS, sites).
        losses: their losses on the text in nats, (PAIRS,).
        gaps: the losses less those of the teacher or the full path, (PAIRS,).
        count: number of pairs ever recorded.
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

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        num_rows, length = batch.tokens_BL.shape
        shape = (batch.row_shard.global_rows(num_rows), length)
        everywhere = self.sampler.draw(self.space, seed=self.seed, step=step, batch=shape)
        drawn = [each.local_rows(batch.row_shard) if isinstance(each, MixedSpecs) else each for each in everywhere]
        whole = [not isinstance(spec, MixedSpecs) and spec == self.space.full() for spec in drawn]
        seen: dict[Site, Tensor] = {}
        policies = [policy_of(spec, self.space, device=batch.tokens_BL.device) for spec in drawn]
        if self.values is not None:
            policies = [
                self.values.record_hidden(policy, seen) if draws_per_token(spec) else policy
                for policy, spec in zip(policies, drawn, strict=True)
            ]
        policy_losses = self.distillation.policy_losses(
            models, batch, policies=tuple(zip(policies, whole, strict=True))
        )
        for number, (policy_loss, spec, is_whole) in enumerate(zip(policy_losses, drawn, whole, strict=True), start=1):
            if not is_whole and policy_loss.reference_BL is not None:
                self.record_pairs(everywhere[number - 1], policy_loss, row_shard=batch.row_shard)
            name = "loss_full" if is_whole else "loss_subnet"
            loss, kl_BL = policy_loss.losses.loss, policy_loss.losses.kl_BL
            yield Term(loss / len(drawn), {name: loss.detach()}, is_last=number == len(drawn))
            if self.values is not None and draws_per_token(spec) and kl_BL is not None:
                yield self.values.term(seen, indices_SBL=spec.indices, kl_BL=kl_BL)
            seen.clear()

    @torch.no_grad()
    def record_pairs(self, drawn: Sample, policy_loss: PolicyLoss, *, row_shard: RowShard) -> None:
        """Put the losses of sub-networks that were drawn for the rows of all ranks in place of the oldest pairs."""
        assert policy_loss.reference_BL is not None, "there is something to compare with"
        losses, references = policy_loss.losses.nll_BL, policy_loss.reference_BL
        if isinstance(drawn, MixedSpecs):
            if draws_per_token(drawn):
                return
            choices, losses, references = (
                drawn.indices.T,
                row_shard.all_gather(losses.mean(1)),
                row_shard.all_gather(references.mean(1)),
            )
        else:
            choices = torch.tensor([self.space.indices(drawn)])
            losses, references = (
                row_shard.all_reduce_mean(losses.mean())[None],
                row_shard.all_reduce_mean(references.mean())[None],
            )
        slots = (torch.arange(len(losses)) + self.count.cpu()) % PAIRS
        slots = slots.to(self.count.device)
        self.choices[slots] = choices.to(self.choices.device)
        self.losses[slots], self.gaps[slots] = losses, losses - references
        self.count += len(losses)

    def record(self) -> dict[str, Tensor]:
        """Return the recorded pairs: `choices` (n, sites), `losses` and `gaps` (n,).

        Where values of choices were learned, the state of `ElasticValues` comes with them: its networks are those of
        the value routers, `static.*` and `dynamic.*`.
        """
        known = min(int(self.count), PAIRS)
        pairs = {"choices": self.choices[:known], "losses": self.losses[:known], "gaps": self.gaps[:known]}
        return pairs if self.values is None or not self.values.steps else pairs | self.values.state_dict()
