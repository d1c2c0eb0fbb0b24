"""Estimate the most that choices per token could gain, by an oracle that knows what each choice costs each token.

It runs every choice of every site by itself and sees each token's KL to the whole model; then each token takes the MLP
widths of the least KL plus price of cost, at the price at which the mean cost is that of the knapsack's sub-network.
Nothing is charged for deciding, no ledger holds a sequence back, heads are the knapsack's: a learned router has less.

python benchmarks/oracle_gain.py RUN          (a run folder, best of router=uniform joint.steps=0)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from nestlm.config.compose import build
from nestlm.cost.table import CostTable
from nestlm.data.batch import Batch
from nestlm.data.datamodule import PackedTokens
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import HeadInputs, LossFn
from nestlm.nn.policy import fixed, full, mixed
from nestlm.pipeline.settings import Settings
from nestlm.report.tables import markdown_table
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.static.knapsack import KnapsackRouter
from nestlm.spec import MLP_WIDTH

ROWS = 48  # of calibration text
HALVINGS = 30
LARGEST = 100.0  # nats for the cost of the whole model


def text(settings: Settings, run: Path) -> list[Batch]:
    """Return calibration text, tokenized as in the run."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_source(
            settings.data.source,
            Path(folder),
            vocab_size=settings.model.decoder_config().vocab_size,
            tokenizer_file=run / "checkpoints/data/tokenizer.json",
            heldout_share=settings.data.heldout_share,
        )
        data = PackedTokens(
            settings.data, PreparedData.read(Path(folder)), seed=settings.seed, stream="calibration", num_steps=0
        )
        return list(data.heldout_dataloader("calibration", num_rows=ROWS))


@torch.no_grad()
def costs_of_choices(calibration: CalibrationData, table: CostTable) -> list[Tensor]:
    """Return for each batch the KL of each token to the full model under each single choice: (sites, choices, B, L)."""
    space, found = table.space, []
    for batch in calibration.batches:
        output_fn = LossFn(batch.targets_BL, teacher=calibration.run(batch, full, HeadInputs.detached).output)
        kl = torch.zeros(len(space.sites), space.max_choices, *batch.tokens_BL.shape)
        for row, (site, widths) in enumerate(space.choices.items()):
            for index in range(len(widths) - 1):
                single = space.spec(dict.fromkeys(space.sites, -1) | {site: index})
                kl[row, index] = calibration.run(batch, fixed(single), output_fn).output.kl_BL
        found.append(kl)
    return found


def choose(kl: Tensor, table: CostTable, *, spec: Sequence[int], price: float) -> Tensor:
    """Return choices of each token, (sites, B, L): MLP widths by KL and price of cost, heads as in a spec."""
    rows = []
    for row, (site, widths) in enumerate(table.space.choices.items()):
        if site.axis == MLP_WIDTH:
            priced = kl[row, : len(widths)] + price * table.shares[row, : len(widths), None, None]
            rows.append(priced.argmin(0))
        else:
            rows.append(torch.full(kl.shape[2:], spec[row]))
    return torch.stack(rows)


def mean_share(chosen: list[Tensor], table: CostTable) -> float:
    """Return the mean cost of choices, as a share of the full model's."""
    indices = torch.cat([indices_SBL.flatten(1) for indices_SBL in chosen], dim=1)
    rows = (table.shares[row][index].mean() for row, index in enumerate(indices))
    return table.constant / table.whole + float(sum(rows))


@torch.no_grad()
def main(run: Path) -> None:
    """Print the table."""
    settings: Settings = build(yaml.safe_load((run / "config.yaml").read_text()))
    decoder = Decoder(settings.model.decoder_config()).eval()
    decoder.load_state_dict(load_file(run / "checkpoints/elastic/model.safetensors"))
    calibration = CalibrationData(decoder, text(settings, run))
    prices = settings.prices()
    table, space = prices.main, prices.space
    router = KnapsackRouter(prices=prices)
    router.prepare(calibration)
    kl = costs_of_choices(calibration, table)
    rows = []
    for budget in settings.budgets[1:]:
        spec = router.spec(budget)
        indices, share = space.indices(spec), table.share(spec)
        low, high = 0.0, LARGEST
        for _ in range(HALVINGS):
            price = (low + high) / 2
            chosen = [choose(part, table, spec=indices, price=price) for part in kl]
            low, high = (price, high) if mean_share(chosen, table) > share else (low, price)
        chosen = [choose(part, table, spec=indices, price=high) for part in kl]
        losses = [
            CalibrationData(decoder, [batch]).loss(mixed(space, part)) * batch.targets_BL.numel()
            for batch, part in zip(calibration.batches, chosen, strict=True)
        ]
        oracle = sum(losses) / sum(batch.targets_BL.numel() for batch in calibration.batches)
        alike = calibration.loss(fixed(spec))
        rows.append([str(budget), f"{share:.3f}", f"{alike:.4f}", f"{oracle:.4f}", f"{oracle - alike:+.4f}"])
    print(markdown_table(["budget", "cost", "knapsack", "oracle per token", "difference"], rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
