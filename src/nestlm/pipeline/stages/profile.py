"""Stage `profile`: measure the latency table of a run that counts time, or take the table that was named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from typing_extensions import override

from nestlm.eval.latency_profile import profile
from nestlm.pipeline.cache import file_identity
from nestlm.pipeline.checks import check_budgets
from nestlm.pipeline.runtime import LATENCY_TABLE, StageRuntime
from nestlm.pipeline.settings import PriceSettings, Settings
from nestlm.pipeline.stages.base import Stage, StageResult
from nestlm.train.trainer import trainer_device
from nestlm.utils.devices import device_name
from nestlm.utils.json_files import write_json


@dataclass(frozen=True, kw_only=True)
class ProfileResult(StageResult):
    """Result of the profile stage: the origin of the latency table.

    Attributes:
        unit: what a price of the table is the time of.
        device: device on which times were measured.
        dtype: dtype of weights and activations.
        check: how far sums of prices lie from times that were measured end to end; None where that was not measured.
    """

    unit: str
    device: str
    dtype: str
    check: Mapping[str, int | float] | None


@dataclass(frozen=True, kw_only=True)
class ProfileStage(PriceSettings, Stage[ProfileResult]):
    """Prices time on the trainer's device, in runs that count it."""

    name = "profile"
    is_alone = True

    trainer: Callable[..., L.Trainer]

    @property
    @override
    def is_needed(self) -> bool:
        return self.latency is not None

    @override
    def outside_identity(self, cache: Path) -> str:
        assert self.latency is not None, "there is a cost to profile"
        if self.latency.table is not None:
            return file_identity(Path(self.latency.table))
        return device_name(trainer_device(self.trainer))

    @override
    def run(self, runtime: StageRuntime) -> ProfileResult:
        cost = self.latency
        assert cost is not None, "there is a cost to profile"
        if cost.table is None:
            config, device = self.model.decoder_config(), trainer_device(self.trainer)
            table = profile(cost, space=self.space(), config=config, device=device)
        else:
            table = cost.read()
        write_json(runtime.folder / LATENCY_TABLE, table.to_json())
        check = None if table.check is None else table.check.model_dump()
        return ProfileResult(unit=cost.unit, device=table.device, dtype=table.dtype, check=check)

    @override
    def identity(self, folder: Path, *, key: str) -> str:
        """Hash the table: times differ whenever they are measured, and later stages depend on what was measured."""
        return file_identity(folder / LATENCY_TABLE)

    @override
    def refine(self, settings: Settings, result: ProfileResult, *, folder: Path) -> Settings:
        """Price time from the table of the stage; one that it measured must be of this device.

        Raises:
            BudgetError: a budget cannot be kept at these prices.
        """
        assert self.latency is not None, "there is a cost to profile"
        device = self.latency.device if self.latency.table is not None else device_name(trainer_device(self.trainer))
        priced = settings.with_latency(self.latency.with_table(folder / LATENCY_TABLE, device=device))
        check_budgets(priced)
        return priced
