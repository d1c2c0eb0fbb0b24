"""Elastic training: every step sums the loss of the sub-networks that a sampler draws."""

from __future__ import annotations

from collections.abc import Iterator

from nestlm.data.batch import Batch
from nestlm.nn.policy import fixed, full
from nestlm.objective.base import Objective, Parts, Term
from nestlm.objective.teaching import Teaching
from nestlm.sampler.base import Sampler
from nestlm.spec import SearchSpace


class Elastic(Objective):
    """The mean over the drawn sub-networks' losses.

    Flextron sums them. The mean keeps the norm at which gradients are clipped independent of their number, and AdamW
    takes the same step (our choice).
    """

    def __init__(self, space: SearchSpace, *, sampler: Sampler, teaching: Teaching, seed: int) -> None:
        super().__init__()
        self.space, self.sampler, self.teaching, self.seed = space, sampler, teaching, seed

    def terms(self, parts: Parts, batch: Batch, *, step: int) -> Iterator[Term]:
        specs = self.sampler.draw(self.space, seed=self.seed, step=step)
        whole = [spec == self.space.full() for spec in specs]
        policies = [full if is_whole else fixed(spec) for spec, is_whole in zip(specs, whole, strict=True)]
        losses = self.teaching.losses(parts, batch, policies=tuple(zip(policies, whole, strict=True)))
        for loss, is_whole in zip(losses, whole, strict=True):
            yield Term(loss / len(specs), {"loss_full" if is_whole else "loss_subnet": loss.detach()})
