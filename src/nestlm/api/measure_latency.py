"""Measure a latency table, for `cost=latency cost.table=FILE`."""

from __future__ import annotations

from pathlib import Path

from nestlm.errors import ConfigError
from nestlm.eval.latency_profile import profile as measure
from nestlm.pipeline.checks import check
from nestlm.pipeline.settings import Settings
from nestlm.train.trainer import check_trainer, trainer_device
from nestlm.utils.console import output
from nestlm.utils.json_files import write_json
from nestlm.utils.resources import check_writable


def measure_latency(settings: Settings, *, out: Path) -> None:
    """Measure a latency table, print it, and write it to a file.

    Raises:
        ConfigError: the settings count no time, name a table already, or the file cannot be written.
    """
    latency = settings.latency
    if latency is None or latency.table is not None:
        raise ConfigError("profile: got a cost without anything to measure; wanted cost=latency, without a table")
    check_writable(out.parent, setting="--out")
    check(settings)
    check_trainer(settings.trainer)
    table = measure(
        latency,
        space=settings.space(),
        config=settings.model.decoder_config(),
        device=trainer_device(settings.trainer),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, table.to_json())
    for line in table.summary():
        output.print(line)
    output.print(f"written: {out}; take it with cost=latency cost.table={out}")
