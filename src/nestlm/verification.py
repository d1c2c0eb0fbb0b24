"""Do a finished run again and compare: the same commit, config and seed give the same numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger

from nestlm.context import LATENCY_TABLE
from nestlm.errors import ConfigError
from nestlm.parallel import ranks
from nestlm.pipeline import fill_run_folder
from nestlm.progress import console
from nestlm.report.console import output
from nestlm.report.differences import cached_stages, changed_cells, changed_origins, changed_specs, differences_table
from nestlm.report.provenance import environment
from nestlm.report.record import check_record, is_finished
from nestlm.report.runs import read_config, read_provenance
from nestlm.resources import check_writable
from nestlm.settings import Settings, check


def read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The resolved config of a run, and its commit.

    Raises:
        DataError: the folder is no finished run, or its files are not those that the run wrote.
    """
    check_record(folder)
    return read_config(folder), read_provenance(folder)["commit"]


def verify(folder: Path, settings: Settings, *, config: dict[str, Any], place: Path, tolerance: float) -> bool:
    """Do a run again, compare, and print what differs; each of several ranks has its part in it.

    Args:
        folder: the finished run.
        settings: its own, as this code understands them.
        config: the same as plain values.
        place: where the second run works.
        tolerance: by how much numbers of results.csv may differ; 0 asks for the same bytes, and the same specs.

    Raises:
        NestlmError: the run cannot be done again here.
    """
    then = read_provenance(folder)
    with num_threads(then["threads"]):
        settings = replace(own_table(settings, folder), run_dir=str(place), cache="off", logger=CSVLogger)
        check(settings)
        now = environment() | {"data_fingerprint": settings.data.fingerprint}
        for line in [*changed_origins(then, now), *missing_cores(then["threads"])]:
            console.print(f"unlike the run: {line}", highlight=False, markup=False)
        fill_run_folder(settings, config=config, shown=False)
        return ranks.agreed(ranks.rank() == 0 and judge(folder, place, tolerance=tolerance))


def own_table(settings: Settings, folder: Path) -> Settings:
    """The settings with the table that the run left, wherever time is counted: times differ whenever they are taken."""
    if settings.latency is None:
        return settings
    return settings.with_latency(settings.latency.with_table(folder / LATENCY_TABLE, device=None))


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Compute with a number of threads: sums are split among them, so that it decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def missing_cores(threads: int) -> list[str]:
    """A line where the machine has fewer cores than the run had threads."""
    cores = os.cpu_count() or threads
    return [f"threads: {threads}, of which this machine runs {cores} at once"] if cores < threads else []


@contextmanager
def workplace(out: Path | None) -> Iterator[Path]:
    """The folder of the second run; None forgets it. Raises ConfigError for one that holds a finished run."""
    if out is None:
        with TemporaryDirectory(prefix="nestlm-verify-") as place:
            yield Path(place)
        return
    check_writable(out, setting="--out")
    if is_finished(out):
        raise ConfigError(f"--out: {out} holds a finished run; wanted a new folder, or an interrupted verify's")
    yield out


def judge(then: Path, now: Path, *, tolerance: float) -> bool:
    """Whether two runs have the same results; prints one line, or what differs and why that may be."""
    specs = changed_specs(then, now)
    same_bytes = (then / "results.csv").read_bytes() == (now / "results.csv").read_bytes()
    if same_bytes and not specs:
        output.print("same, bit for bit")
        return True
    cells = [cell for cell in changed_cells(then, now) if not cell.is_within(tolerance)]
    if tolerance and not cells:
        output.print(f"same within {tolerance:g}, not bit for bit")
        return True
    if cells:
        output.print(differences_table(cells))
    elif not same_bytes:
        output.print("results.csv: every number is the same, the bytes are not")
    for name in specs:
        output.print(f"specs/{name}: differs", markup=False)
    reasons = [*changed_origins(read_provenance(then), read_provenance(now)), *cached_stages(then)]
    for line in reasons or ["code, packages, device, threads, text and tokenizer are the same"]:
        output.print(line, markup=False)
    return False
