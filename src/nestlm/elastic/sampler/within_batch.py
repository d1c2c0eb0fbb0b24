"""Many specs in one batch: a spec of its own for each sequence or each token, all in one pass (our choice)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.elastic.sampler.base import MixedSpecs, Sampler, check_shares
from nestlm.spec import SearchSpace
from nestlm.utils.seeding import torch_generator


@dataclass(frozen=True)
class WithinBatch(Sampler):
    """Each sequence is whole, the smallest, or drawn independently: a choice a site, or a choice a site and token.

    Attributes:
        per_token: whether the tokens of a drawn sequence differ.
        p_full: probability that a sequence runs whole.
        p_smallest: probability that it runs the smallest sub-network.
    """

    per_token: bool
    p_full: float
    p_smallest: float

    def __post_init__(self) -> None:
        check_shares(p_full=self.p_full, p_smallest=self.p_smallest)

    @override
    def draw(self, space: SearchSpace, *, seed: int, step: int, batch: tuple[int, int]) -> tuple[MixedSpecs, ...]:
        rows = [self.row(space, seed=seed, step=step, row=row, length=batch[1]) for row in range(batch[0])]
        indices_SBL = torch.stack(rows, dim=1)
        return (MixedSpecs(indices_SBL if self.per_token else indices_SBL[:, :, 0]),)

    def row(self, space: SearchSpace, *, seed: int, step: int, row: int, length: int) -> Tensor:
        """Draw the choice indices of one sequence, (sites, L or 1), from (seed, step, row) alone."""
        counts_S1 = torch.tensor([len(widths) for widths in space.choices.values()])[:, None]
        length = length if self.per_token else 1
        source = torch_generator(seed, "within batch", step, row)
        kind = float(torch.rand((), generator=source))
        if kind < self.p_full:
            return (counts_S1 - 1).expand(-1, length)
        if kind < self.p_full + self.p_smallest:
            return torch.zeros(len(counts_S1), length, dtype=torch.long)
        return (torch.rand(len(counts_S1), length, generator=source) * counts_S1).long()
