"""Calibration text: batches on which routers measure sub-networks and policies."""

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
from nestlm.nn.decoder import Decoder, DecoderOutput, OutputFn
from nestlm.nn.loss import LossFn
from nestlm.nn.policy import Policy, fixed, full
from nestlm.spec import SearchSpace


@dataclass(frozen=True)
class CalibrationData:
    """A model and batches on its device.

    Attributes:
        decoder: the model.
        batches: calibration text.
        precision: returns the context in which the model runs, such as autocast where training is in mixed precision.
    """

    decoder: Decoder
    batches: Sequence[Batch]
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def device(self) -> torch.device:
        """Device of the model and the batches."""
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def run(self, batch: Batch, policy: Policy, output_fn: OutputFn = F.linear) -> DecoderOutput:
        """Run the model on a batch under a policy, without gradients."""
        with self.precision():
            return self.decoder(batch.tokens_BL, policy, documents_BL=batch.documents_BL, output_fn=output_fn)

    def outputs(self, policy: Policy) -> Iterator[tuple[Batch, DecoderOutput]]:
        """Run the model on each batch under a policy."""
        for batch in self.batches:
            yield batch, self.run(batch, policy)

    @torch.no_grad()
    def sensitivities(self, space: SearchSpace) -> Tensor:
        """Measure what each choice adds to the loss when all other sites run whole, (sites, max choices) in float64."""
        whole = self.loss(full)
        added = torch.zeros(len(space.sites), space.max_choices, dtype=torch.float64)
        for row, (site, widths) in enumerate(space.choices.items()):
            for index in range(len(widths) - 1):
                single = space.spec(dict.fromkeys(space.sites, -1) | {site: index})
                added[row, index] = self.loss(fixed(single)) - whole
        return added

    def loss(self, policy: Policy) -> float:
        """Return the mean negative log-likelihood in nats per token; all ranks return what rank 0 measured."""
        total, tokens = 0.0, 0
        for batch in self.batches:
            total += float(self.run(batch, policy, LossFn(batch.targets_BL)).output.nll_BL.sum())
            tokens += batch.targets_BL.numel()
        return collectives.broadcast_from_rank_zero(total / tokens)
