"""Loss and accuracy of a policy on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import lightning as L
import torch
from torchmetrics import MeanMetric

from nestlm.data.batch import Batch
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import cross_entropy
from nestlm.nn.policy import Policy


@dataclass(frozen=True)
class Scores:
    """Means over tokens: loss in nats, and the share of tokens that were the most likely ones."""

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def bits_per_byte(self, *, tokens: int, num_bytes: int) -> float:
        """Loss per byte of text, in bits, with the tokens and bytes of the split: comparable across tokenizers."""
        return self.loss / math.log(2) * tokens / num_bytes


class PolicyEvaluation(L.LightningModule):
    """Counts what a decoder gets right under one policy."""

    def __init__(self, decoder: Decoder, policy: Policy) -> None:
        super().__init__()
        self.decoder, self.policy = decoder, policy
        self.loss = MeanMetric().set_dtype(torch.float64)
        self.accuracy = MeanMetric().set_dtype(torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the counts; every token weighs the same."""
        del batch_idx
        logits_BLV = self.decoder(batch.tokens_BL, self.policy, documents_BL=batch.documents_BL).logits_BLV
        tokens = batch.targets_BL.numel()
        self.loss.update(cross_entropy(logits_BLV, batch.targets_BL).mean(), weight=tokens)
        self.accuracy.update((logits_BLV.argmax(-1) == batch.targets_BL).double().mean(), weight=tokens)


def evaluate(decoder: Decoder, policy: Policy, *, loader: Iterable[Batch], trainer: L.Trainer) -> Scores:
    """Run one pass over a loader under the trainer's device and precision."""
    module = PolicyEvaluation(decoder, policy)
    trainer.validate(module, dataloaders=loader, verbose=False)
    return Scores(loss=float(module.loss.compute()), accuracy=float(module.accuracy.compute()))
