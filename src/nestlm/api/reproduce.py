"""Do a finished run again and compare: the same commit, config and seed give the same numbers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger

from nestlm.api.run_and_report import fill_run_folder
from nestlm.distributed import collectives
from nestlm.errors import CheckpointError, ConfigError, DataError
from nestlm.export import hf_folder
from nestlm.export.new_folder import new_folder
from nestlm.model import hub
from nestlm.model.family import Family
from nestlm.model.parent_files import ParentFiles
from nestlm.model.weights_io import load_weights
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.checks import check
from nestlm.pipeline.runtime import LATENCY_TABLE, MODEL
from nestlm.pipeline.settings import Settings
from nestlm.report.differences import cached_stages, changed_cells, changed_origins, changed_specs, differences_table
from nestlm.report.provenance import environment
from nestlm.report.record import check_record, is_finished
from nestlm.report.run_folder import PARENT
from nestlm.report.runs import read_config, read_provenance
from nestlm.utils.console import console, output
from nestlm.utils.resources import check_writable

PLACES = ("data.path", "model.weights", "data.tokenizer")  # settings that name files outside a run


def read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Read the resolved config of a run, and its commit.

    Raises:
        DataError: the folder is no finished run, or its files are not those that the run wrote.
    """
    check_record(folder)
    return read_config(folder), read_provenance(folder)["commit"]


def elsewhere(config: dict[str, Any], overrides: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """Return a run's config with the present places of its text and weights.

    Args:
        config: as the run left it.
        overrides: other places, such as `data.path=FOLDER`.
        folder: of the run, which knows the directory that relative paths were meant from.

    Raises:
        ConfigError: an override of something else.
    """
    named = {name: place for name, _, place in (override.partition("=") for override in overrides)}
    strangers = [name for name in named if name not in PLACES]
    if strangers:
        raise ConfigError(f"{strangers[0][:100]}: got another setting, wanted one of {', '.join(PLACES)}, as KEY=PLACE")
    start = Path(read_provenance(folder).get("directory", "."))
    config = copy.deepcopy(config)
    for name in PLACES:
        group, _, key = name.partition(".")
        place = named.get(name, config[group].get(key))
        if not isinstance(place, str):
            continue
        if name not in named and not Path(place).exists() and (start / place).exists():
            place = str(start / place)
        config[group][key] = place
        source = config[group].get("source")
        if key == "path" and isinstance(source, dict) and "path" in source:
            source["path"] = place
    return config


def with_kept_weights(config: dict[str, Any], family: Family, *, folder: Path, place: Path) -> dict[str, Any]:
    """Return a run's config in which the run's own copy stands in for given weights that are gone.

    Args:
        config: with the places as they are now.
        family: the model of the run.
        folder: of the run.
        place: where the second run works; the copy is written there, as a checkpoint folder.

    Raises:
        CheckpointError: what the run kept is lost or damaged.
    """
    weights, parent = config["model"].get("weights"), folder / "checkpoints" / PARENT
    if weights is None or not parent.is_dir() or is_there(weights):
        return config
    copied = place / "weights"
    if not copied.is_dir():
        decoder = Decoder.empty(family.decoder_config())
        load_weights(decoder, parent.with_name(MODEL))
        with new_folder(copied) as new:
            hf_folder.write_hf_folder(decoder, family, new, parent=ParentFiles.read(parent))
    console.print(f"model.weights: {weights} is gone; the run's own copy of them serves", highlight=False, markup=False)
    return config | {"model": config["model"] | {"weights": str(copied)}}


def is_there(weights: str) -> bool:
    """Whether a checkpoint's folder, or its repository, can be read."""
    try:
        return hub.fetch_small_files(weights).is_dir()
    except CheckpointError:
        return False


@contextmanager
def naming_places(folder: Path) -> Iterator[None]:
    """Add to errors about missing text or weights how their new places are named."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        hint = f"nestlm verify {folder} {PLACES[0]}=PLACE {PLACES[1]}=PLACE"
        raise type(error)(f"{error}; if text or weights have moved: {hint}") from error


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
        with naming_places(folder):
            check(settings)
            now = environment() | {"data_fingerprint": settings.data.fingerprint}
        for line in [*changed_origins(then, now), *missing_cores(then["threads"])]:
            console.print(f"unlike the run: {line}", highlight=False, markup=False)
        fill_run_folder(settings, config=config, shown=False)
        return collectives.broadcast_from_rank_zero(
            collectives.rank() == 0 and judge(folder, place, tolerance=tolerance)
        )


def own_table(settings: Settings, folder: Path) -> Settings:
    """Return settings that price time from the table that the run left: times differ whenever they are measured."""
    if settings.latency is None:
        return settings
    return settings.with_latency(settings.latency.with_table(folder / LATENCY_TABLE, device=None))


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads for the while: it decides the order of sums, and so their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def missing_cores(threads: int) -> list[str]:
    """Return a line to print where the machine has fewer cores than the run had threads; else nothing."""
    cores = os.cpu_count() or threads
    return [f"threads: {threads}, of which this machine runs {cores} at once"] if cores < threads else []


@contextmanager
def workplace(out: Path | None) -> Iterator[Path]:
    """Open the folder of the second run; None: a temporary one. Raises ConfigError where it holds a finished run."""
    if out is None:
        with TemporaryDirectory(prefix="nestlm-verify-") as place:
            yield Path(place)
        return
    check_writable(out, setting="--out")
    if is_finished(out):
        raise ConfigError(f"--out: {out} holds a finished run; wanted a new folder, or an interrupted verify's")
    yield out


def judge(then: Path, now: Path, *, tolerance: float) -> bool:
    """Compare two runs, print one line or what differs and why, and return whether their results are the same."""
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
