"""Calibration text, on which routers try what they consider."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.nn.decoder import Decoder, DecoderOutput, Reader
from nestlm.nn.loss import LossReader
from nestlm.nn.policy import Policy, fixed, full
from nestlm.spec import SearchSpace


@dataclass(frozen=True)
class CalibrationData:
    """A model and batches on its device.

    Attributes:
        decoder: the model.
        batches: what it is tried on.
        precision: makes the context in which the model runs, as in training and scoring: autocast, where that is mixed.
    """

    decoder: Decoder
    batches: Sequence[Batch]
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def run(self, batch: Batch, policy: Policy, read: Reader = F.linear) -> DecoderOutput:
        """What the model answers to a batch under a policy."""
        with self.precision():
            return self.decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, read=read)

    def outputs(self, policy: Policy) -> Iterator[tuple[Batch, DecoderOutput]]:
        """What the model answers to each batch."""
        for batch in self.batches:
            yield batch, self.run(batch, policy)

    @torch.no_grad()
    def sensitivities(self, space: SearchSpace) -> Tensor:
        """What each choice adds to the loss when all other sites run whole, (sites, max choices) in float64."""
        whole = self.loss(full)
        added = torch.zeros(len(space.sites), space.max_choices, dtype=torch.float64)
        for row, (site, widths) in enumerate(space.choices.items()):
            for index in range(len(widths) - 1):
                single = space.spec(dict.fromkeys(space.sites, -1) | {site: index})
                added[row, index] = self.loss(fixed(single)) - whole
        return added

    def loss(self, policy: Policy) -> float:
        """Mean negative log-likelihood of the text, in nats a token; all ranks go by what rank 0 found."""
        total, tokens = 0.0, 0
        for batch in self.batches:
            total += float(self.run(batch, policy, LossReader(batch.targets_BL)).read.text_BL.sum())
            tokens += batch.targets_BL.numel()
        return collectives.broadcast_from_rank_zero(total / tokens)
