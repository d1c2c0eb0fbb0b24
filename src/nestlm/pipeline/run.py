"""The run: stages in order, each looked up in the cache first, then the run's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from nestlm.distributed import collectives
from nestlm.model.checkpoint import shard_files
from nestlm.pipeline import stages
from nestlm.pipeline.cache import StageFolder, contents_identity, file_identity, stage_key
from nestlm.pipeline.checks import check_budgets
from nestlm.pipeline.context import LATENCY_TABLE, SKIPPABLE, Context
from nestlm.pipeline.settings import Settings, View
from nestlm.train.trainer import trainer_device
from nestlm.utils.console import console
from nestlm.utils.devices import device_name
from nestlm.utils.resources import resource_errors

HASHES = "weights.json"  # in the cache: hashes of weights that were read before
PLACES = ("path", "tokenizer")  # in the data section
TRAINING = ("optim", "trainer", "data", "seed")


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Attributes:
        name: as in the run's folder.
        run: does the work and reports plain values.
        reads: config sections that determine the result; the stage can see no other.
        after: stages whose results it builds on: its key covers theirs, and it can see no other's folder.
        is_alone: whether rank 0 works and the others wait.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    reads: tuple[str, ...]
    after: tuple[str, ...]
    is_alone: bool = False


STAGES = (
    Stage("profile", stages.profile, ("model", "axes", "cost", "costs", "trainer"), (), is_alone=True),
    Stage("data", stages.prepare_data, ("data", "model"), (), is_alone=True),
    Stage("pretrain", stages.pretrain, ("model", "pretrain", *TRAINING), ("data",)),
    Stage("rank", stages.rank, ("model", "axes", "ranking", "trainer", "data", "seed"), ("pretrain",)),
    Stage("elastic", stages.elastic, ("model", "axes", "elastic", "sampler", "teacher", *TRAINING), ("rank",)),
    Stage(
        "router",
        stages.train_router,
        ("model", "axes", "cost", "costs", "router", *TRAINING),
        ("elastic", "profile"),
    ),
    Stage(
        "joint",
        stages.joint,
        ("model", "axes", "cost", "costs", "router", "joint", "teacher", *TRAINING),
        ("router",),
    ),
    Stage(
        "evaluate",
        stages.evaluate,
        ("model", "axes", "cost", "costs", "router", "budget", "trainer", "data", "seed"),
        ("joint", "profile"),
    ),
)


@dataclass(frozen=True)
class FinishedStage:
    """A stage's folder and result, and whether it came from the cache."""

    name: str
    folder: Path
    result: dict[str, Any]
    cached: bool


def run_stages(settings: Settings, *, config: dict[str, Any], cache: Path, logger: Logger) -> list[FinishedStage]:
    """Every stage's result, in order; a stage's key covers its inputs and the keys of the stages that it is after."""
    finished: list[FinishedStage] = []
    keys, folders = dict[str, str](), dict[str, Path]()
    seen: dict[str, list[str]] = {}  # by stage, all that it builds on
    for stage in STAGES:
        if stage.name == "profile" and settings.latency is None:
            continue
        direct = [name for name in stage.after if name in keys]
        seen[stage.name] = list(dict.fromkeys(other for name in direct for other in (*seen[name], name)))
        key = stage_key(
            stage.name,
            sections={name: determining(name, config[name]) for name in stage.reads},
            previous=[keys[name] for name in direct],
            extra=outside_inputs(stage.name, settings, cache=cache),
        )
        folder = StageFolder(cache, stage.name, key)
        inputs = {name: folders[name] for name in seen[stage.name]}
        context = Context(View(settings, stage.reads), folder.path, inputs=inputs, logger=logger)
        finished.append(run_stage(stage, folder, context))
        keys[stage.name], folders[stage.name] = key, folder.path
        if stage.name == "profile":  # times differ each time: what follows depends on what was measured
            keys["profile"] = file_identity(folder.path / LATENCY_TABLE)
            settings = priced(settings, folder.path)
            check_budgets(settings)
        if SKIPPABLE in finished[-1].result:
            settings = settings.with_skippable(finished[-1].result[SKIPPABLE])
    return finished


def priced(settings: Settings, folder: Path) -> Settings:
    """The settings with the table that the profile stage left; one that it measured must be of this device."""
    latency = settings.latency
    assert latency is not None, "there is a cost to profile"
    device = latency.device if latency.table is not None else device_name(trainer_device(settings.trainer))
    return settings.with_latency(latency.with_table(folder / LATENCY_TABLE, device=device))


def run_stage(stage: Stage, folder: StageFolder, context: Context) -> FinishedStage:
    """The stage's result, from the cache or by doing the work; rank 0 looks and writes, the others wait for it."""
    is_first = collectives.rank() == 0
    with folder.locked() if is_first else nullcontext():
        result = collectives.broadcast_from_rank_zero(folder.result() if is_first else None)
        cached = result is not None
        if result is None:
            started = time.monotonic()
            with resource_errors(folder.path):
                mine = stage.run(context) if is_first or not stage.is_alone else {}
            result = collectives.broadcast_from_rank_zero(mine | {"seconds": time.monotonic() - started})
            if is_first:
                folder.finish(result)
        if is_first:
            drop_checkpoints(folder.path)
        collectives.barrier()
    seconds = f"{result['seconds']:7.1f} s"
    if "peak_bytes" in result:
        seconds += f"  peak {result['peak_bytes'] / 2**30:.3g} GiB"
    console.print(f"{stage.name:>9} {seconds}{'  (from the cache)' if cached else ''}", highlight=False)
    return FinishedStage(stage.name, folder.path, result, cached=cached)


def determining(section: str, config: Any) -> Any:
    """What of a section determines results.

    Not how many ranks share the work, so that another number can go on, nor where weights, text and tokenizer lie: the
    content counts. A stream is known by its place, too.
    """
    if section == "data":
        return config if "heldout_documents" in config["source"] else without_places(config)
    if section == "model":
        return config | {"weights": config["weights"] is not None}
    if section != "trainer":
        return config
    return {key: value for key, value in config.items() if key not in ("devices", "num_nodes", "strategy")}


def without_places(node: Any) -> Any:
    """A section of the config without the paths in it, but for whether there are any."""
    if isinstance(node, list):
        return [without_places(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {name: value is not None if name in PLACES else without_places(value) for name, value in node.items()}


def drop_checkpoints(folder: Path) -> None:
    """Remove what a finished stage could have been resumed from: optimizer states are larger than the result."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def outside_inputs(stage: str, settings: Settings, *, cache: Path) -> str:
    """What determines a stage from outside the config: the text, the tokenizer, the weights, a table, the device."""
    if stage == "data":
        tokenizer = settings.tokenizer_file
        tokenizer_hash = file_identity(tokenizer) if tokenizer and tokenizer.is_file() else ""
        return settings.data.identity + tokenizer_hash + repr(settings.special_tokens)
    if stage == "pretrain" and settings.model.weights is not None:
        files, first = shard_files(settings.model.weights_folder), collectives.rank() == 0
        return collectives.broadcast_from_rank_zero(contents_identity(files, known=cache / HASHES) if first else "")
    if stage == "profile" and settings.latency is not None:
        if settings.latency.table is not None:
            return file_identity(Path(settings.latency.table))
        return device_name(trainer_device(settings.trainer))
    return ""
