"""Stage `rank`: sort the units of every site by importance, and name the blocks that may be skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.utilities.apply_func import move_data_to_device
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.ranking.base import Ranking, order
from nestlm.elastic.surgery import sort_units
from nestlm.nn.policy import fixed
from nestlm.pipeline.runtime import MODEL, StageRuntime
from nestlm.pipeline.settings import Settings, SpaceSettings
from nestlm.pipeline.stages.base import ModelStage, StageResult
from nestlm.utils.console import track


@dataclass(frozen=True, kw_only=True)
class RankResult(StageResult):
    """Result of the rank stage: losses before and after units are sorted.

    Attributes:
        sequences: calibration sequences that were read.
        smallest_unsorted: validation loss of the smallest sub-network before units are sorted.
        smallest_sliced: the same after units are sorted.
        skippable: layers of the blocks that may be skipped; None where every block always runs.
    """

    sequences: int
    smallest_unsorted: float
    smallest_sliced: float
    skippable: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class RankStage(SpaceSettings, ModelStage[RankResult]):
    """Leaves the model with sorted units: the full model stays the same function."""

    name = "rank"
    after = ("pretrain",)

    ranking: Ranking

    @override
    def run(self, runtime: StageRuntime) -> RankResult:
        decoder = self.load_decoder(runtime, "pretrain")
        unsorted = self.score(decoder, {"smallest_unsorted": fixed(self.space().smallest())}, runtime)
        scores = self.ranking.scores(
            decoder.to(self.device()), axes=self.axis_list, batches=self.batches(runtime), seed=self.seed
        )
        runtime.save_tensors({str(site): score for site, score in scores.items()}, "importance.safetensors")
        sort_units(decoder, {site: order(score) for site, score in scores.items()}, axes=self.axis_list)
        runtime.save_module(decoder, MODEL)
        axes = tuple(axis.ranked(scores, num_layers=len(decoder.config.blocks)) for axis in self.axis_list)
        space = search_space(axes, decoder.config)
        sliced = self.score(decoder, {"smallest_sliced": fixed(space.smallest())}, runtime)
        rows = self.packed_tokens(runtime, stream="calibration").rows("calibration")
        return RankResult(
            sequences=min(self.ranking.num_sequences, len(rows)),
            smallest_unsorted=unsorted["smallest_unsorted"].loss,
            smallest_sliced=sliced["smallest_sliced"].loss,
            skippable=tuple(site.layer for site in space.block_sites) or None,
        )

    def batches(self, runtime: StageRuntime) -> Iterator[Batch]:
        """Yield batches of calibration text on the trainer's device, under a progress bar."""
        tokens = self.packed_tokens(runtime, stream="calibration")
        loader = tokens.heldout_dataloader("calibration", num_rows=self.ranking.num_sequences)
        device = self.device()
        for batch in track(loader, "rank", total=len(loader)):
            yield move_data_to_device(batch, device)

    @override
    def refine(self, settings: Settings, result: RankResult, *, folder: Path) -> Settings:
        """Let block axes skip the blocks that matter least."""
        return settings if result.skippable is None else settings.with_skippable(result.skippable)
