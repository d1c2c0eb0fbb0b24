"""Loss, accuracy and real spending of a policy on held-out text, and the time that it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from nestlm.cost.table import CostTable, PriceList, TokenTable
from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import ScoreFn
from nestlm.nn.policy import FULL, Decision, Policy
from nestlm.router.calibration_data import CalibrationData
from nestlm.spec import SearchSpace, Site
from nestlm.train.trainer import quiet_lightning
from nestlm.utils.devices import synchronize

WARM_UP, REPEATS = 2, 7  # forward passes that are not counted, and that are


@dataclass(frozen=True)
class Spending:
    """Cost of sequences as shares of the whole model's cost: mean, standard deviation and maximum."""

    mean: float
    spread: float
    worst: float


@dataclass(frozen=True)
class Scores:
    """Means over tokens.

    Attributes:
        loss: in nats.
        accuracy: share of tokens that were the most likely ones.
        spending: by cost.
        widths: units that ran, by axis and layer.
    """

    loss: float
    accuracy: float
    spending: Mapping[str, Spending] = field(default_factory=dict)
    widths: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Perplexity: the exponential of the mean loss."""
        return math.exp(self.loss)

    def bits_per_byte(self, *, tokens: int, num_bytes: int) -> float:
        """Convert the loss to bits per byte of text, which is comparable across tokenizers.

        Args:
            tokens: of the split.
            num_bytes: of the split's text.
        """
        return self.loss / math.log(2) * tokens / num_bytes

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Scores:
        """Rebuild scores from what `dataclasses.asdict` returned."""
        spending = {name: Spending(**spent) for name, spent in fields["spending"].items()}
        return cls(fields["loss"], fields["accuracy"], spending, fields["widths"])


class PolicyEvaluation(L.LightningModule):
    """Lightning module that scores a decoder under one policy, and counts what the policy's decisions cost."""

    def __init__(self, decoder: Decoder, policy: Policy, *, prices: PriceList | None) -> None:
        super().__init__()
        self.decoder, self.policy = decoder, policy
        self.prices = prices
        self.loss = MeanMetric().set_dtype(torch.float64)
        self.accuracy = MeanMetric().set_dtype(torch.float64)
        self.spent: dict[str, list[Tensor]] = defaultdict(list)
        self.widths: dict[Site, float] = defaultdict(float)
        self.sequences = 0

    def configure_model(self) -> None:
        """Leave the decoder where it is: it has been placed on its device before."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the counts; every token weighs the same."""
        del batch_idx
        output = self.decoder(
            batch.tokens_BL, self.policy, documents_BL=batch.documents_BL, output_fn=ScoreFn(batch.targets_BL)
        )
        if not batch.is_counted:
            return
        tokens = batch.targets_BL.numel()
        losses_BL, hits_BL = output.output
        self.loss.update(losses_BL.mean(), weight=tokens)
        self.accuracy.update(hits_BL.double().mean(), weight=tokens)
        if self.prices is None:
            return
        sequences = len(batch.tokens_BL)
        self.sequences += sequences
        for name, table in self.prices.tables.items():
            self.spent[name].append(spent_shares(output.decisions, table, batch_size=sequences).cpu())
        for site, widths in self.prices.space.choices.items():
            block_site = self.prices.space.enclosing.get(site)
            block = FULL if block_site is None else output.decisions[block_site]
            ran = output.decisions[site].restrict_to(block, num_units=widths[-1])
            self.widths[site] += sequences * mean_width(ran, whole=widths[-1])

    def spending(self) -> dict[str, Spending]:
        """Gather what the sequences of all ranks spent, by cost."""
        found = {}
        for name in self.prices.tables if self.prices is not None else ():
            shares = torch.cat(collectives.all_gather_object(self.spent[name]))
            found[name] = Spending(float(shares.mean()), float(shares.std(correction=0)), float(shares.max()))
        return found

    def mean_widths(self) -> dict[str, list[float]]:
        """Gather the mean number of units that ran, by axis, one a layer."""
        if self.prices is None:
            return {}
        totals = collectives.all_gather_object([(dict(self.widths), self.sequences)])
        sequences = sum(number for _, number in totals)

        def mean(site: Site) -> float:
            return sum(widths.get(site, 0.0) for widths, _ in totals) / sequences

        return {axis: [mean(site) for site in sites] for axis, sites in self.prices.space.axes.items()}


def mean_width(decision: Decision, *, whole: int) -> float:
    """Return the mean number of units that ran at a site over the tokens of a batch.

    Args:
        decision: what the policy decided.
        whole: all units of the site.
    """
    width = decision.width
    return float(width.count(whole) if width.index is None else width.units_by_row.double().mean())


def spent_shares(decisions: Mapping[Site, Decision], table: CostTable, *, batch_size: int) -> Tensor:
    """Compute the cost of what ran as a share of the whole model's, a mean over each sequence's tokens: (B,), float64.

    What tokens that skip a block would have chosen in it costs nothing. But widths at which all tokens run alike are
    charged to them as well, which is never too little: they may have to give keys and values.
    """
    total = torch.full((batch_size,), table.constant / table.whole, dtype=torch.float64)
    for row, (site, widths) in enumerate(table.space.choices.items()):
        prices = table.shares[row]
        width = decisions[site].width
        if isinstance(table, TokenTable) and table.fixed is not None and width.index is None:
            prices = (torch.tensor(table.fixed[row], dtype=torch.float64) - table.shared[row]) / table.whole
        if width.index is not None:
            prices = prices.to(width.index.device)
            paid = prices[width.index * runs_block(site, decisions, table.space)]
            total = total.to(paid.device) + (paid.mean(1) if paid.ndim == 2 else paid)
        else:
            total = total + prices[widths.index(width.count(widths[-1]))]
    return total


def runs_block(site: Site, decisions: Mapping[Site, Decision], space: SearchSpace) -> Tensor | int:
    """Return 1 where the block of a site runs and 0 where it is skipped: one number, or a tensor (B,) or (B, L)."""
    block_site = space.enclosing.get(site)
    if block_site is None:
        return 1
    width = decisions[block_site].width
    return int(not width.is_zero) if width.index is None else width.index


def evaluate(
    decoder: Decoder, policy: Policy, *, loader: Iterable[Batch], trainer: L.Trainer, prices: PriceList | None = None
) -> Scores:
    """Score a policy in one pass over a loader, in the trainer's precision; with prices, count its cost as well."""
    module = PolicyEvaluation(decoder, policy, prices=prices)
    with quiet_lightning():
        trainer.validate(module, dataloaders=loader, verbose=False)
    loss, accuracy = float(module.loss.compute()), float(module.accuracy.compute())
    return Scores(loss, accuracy, module.spending(), module.mean_widths())


@torch.no_grad()
def forward_seconds(calibration: CalibrationData, policies: Sequence[Policy], *, num_rows: int) -> list[float]:
    """Time a forward pass of each policy, in seconds: medians over repeats in which the policies take turns.

    Args:
        calibration: the model, and batches of which the first rows are run.
        policies: how it is run.
        num_rows: at most this many sequences.
    """
    batch = calibration.batches[0].head(num_rows)
    times: list[list[float]] = [[] for _ in policies]
    for repeat in range(WARM_UP + REPEATS):
        for policy, found in zip(policies, times, strict=True):
            synchronize(batch.tokens_BL.device)
            started = time.perf_counter()
            calibration.run(batch, policy)
            synchronize(batch.tokens_BL.device)
            if repeat >= WARM_UP:
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]
