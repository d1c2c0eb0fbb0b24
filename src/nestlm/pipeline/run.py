"""The run: stages in order, each looked up in the cache first, then the run's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from nestlm.distributed import collectives
from nestlm.distributed.strategy import placement_of, starts_ranks
from nestlm.errors import ConfigError
from nestlm.estimate.dry_run import describe
from nestlm.eval.latency_profile import profile as measure
from nestlm.model.checkpoint import shard_files
from nestlm.model.parent_files import ParentFiles
from nestlm.pipeline import stages
from nestlm.pipeline.cache import StageFolder, contents_identity, file_identity, stage_key
from nestlm.pipeline.context import LATENCY_TABLE, SKIPPABLE, Context
from nestlm.report import wandb_run
from nestlm.report.render import render
from nestlm.report.run_folder import FinishedStage, write_run_folder
from nestlm.train.settings import Settings, View, check, check_budgets
from nestlm.train.trainer import make_trainer, trainer_device
from nestlm.utils.console import console, output
from nestlm.utils.devices import device_name
from nestlm.utils.json_files import write_json
from nestlm.utils.locks import lock_folder
from nestlm.utils.resources import check_writable, resource_errors

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
class FinishedRun:
    """A run's folder, and the one number to optimise: the mean over budgets of its loss above the teacher's."""

    folder: Path
    pareto_gap: float


def run(settings: Settings, *, config: dict[str, Any]) -> FinishedRun | None:
    """Walk the stages and write the run's folder.

    Args:
        settings: what to do.
        config: the same as plain resolved values, from which the cache keys are made.

    Returns:
        Where its results are; None for a dry run.

    Raises:
        NestlmError: something in the settings, the data or the weights that a user can cure.
    """
    check(settings)
    check_places(settings, config=config)
    if settings.dry_run:
        describe(settings)
        return None
    if settings.model.weights is not None:
        settings.model.check_headers()
    return fill_run_folder(settings, config=config)


def fill_run_folder(settings: Settings, *, config: dict[str, Any], shown: bool = True) -> FinishedRun:
    """Walk the stages of settings that are checked; `shown` also draws pictures, writes the page, prints the table."""
    check_trainer(settings)
    placement_of(make_trainer(settings.trainer))  # ranks meet
    console.quiet = output.quiet = collectives.rank() != 0
    run_dir = run_folder(settings, config=config)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    # the same command twice at the same time
    with lock_folder(run_dir, str(run_dir)) if collectives.rank() == 0 else nullcontext():
        return work_in(run_dir, settings, config=config, shown=shown)


def work_in(run_dir: Path, settings: Settings, *, config: dict[str, Any], shown: bool) -> FinishedRun:
    """Walk the stages and write the run's folder, alone in it."""
    parent = settings.model.parent() if collectives.rank() == 0 else None
    cache = cache_folder(settings, run_dir)
    with open_logger(settings, run_dir, config=config) as logger:
        finished = run_stages(settings, config=config, cache=cache, logger=logger)
        gap = 0.0
        if collectives.rank() == 0:
            with resource_errors(run_dir):
                gap = write(run_dir, finished, settings, config=config, logger=logger, shown=shown, parent=parent)
    return FinishedRun(run_dir, collectives.broadcast_from_rank_zero(gap))


def write(
    run_dir: Path,
    finished: list[FinishedStage],
    settings: Settings,
    *,
    config: dict[str, Any],
    logger: Logger,
    shown: bool,
    parent: ParentFiles | None,
) -> float:
    """Write a run's folder, and tell the logger; returns the pareto gap."""
    label = settings.router.label
    metrics = write_run_folder(run_dir, config=config, finished=finished, router=label, parent=parent)
    logger.log_metrics(result_metrics(finished[-1].result["rows"], metrics))
    if shown:
        render(run_dir)
        if isinstance(logger, WandbLogger):
            wandb_run.publish(logger, run_dir)
    return metrics["evaluate"]["pareto_gap"]


@contextmanager
def open_logger(settings: Settings, run_dir: Path, *, config: dict[str, Any]) -> Iterator[Logger]:
    """The configured logger, which is told the config, and whether the run failed; ranks but the first log nothing.

    Raises:
        ConfigError: wandb refuses to begin a run.
    """
    if collectives.rank() != 0:
        yield DummyLogger()
        return
    logger = settings.logger(save_dir=run_dir / "logs", name=run_dir.name)
    if isinstance(logger, WandbLogger):
        wandb_run.start(logger)
    logger.log_hyperparams(config)
    failed = True
    try:
        yield logger
        failed = False
    finally:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            wandb_run.finish(logger, failed=failed)


def profile(settings: Settings, *, out: Path) -> None:
    """Measure a latency table, print it, and write it to a file.

    Raises:
        ConfigError: the settings count no time, name a table already, or the file cannot be written.
    """
    latency = settings.latency
    if latency is None or latency.table is not None:
        raise ConfigError("profile: got a cost without anything to measure; wanted cost=latency, without a table")
    check_writable(out.parent, setting="--out")
    check(settings)
    check_trainer(settings)
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


def ranks_to_start(settings: Settings) -> int:
    """How many ranks the settings ask for on this machine that nobody has started yet; 0 where this process will do."""
    check_trainer(settings)
    return starts_ranks(make_trainer(settings.trainer))


def check_trainer(settings: Settings) -> None:
    """Raise ConfigError when this machine cannot run the configured trainer."""
    try:
        make_trainer(settings.trainer)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


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
        files, first = shard_files(settings.model.folder), collectives.rank() == 0
        return collectives.broadcast_from_rank_zero(contents_identity(files, known=cache / HASHES) if first else "")
    if stage == "profile" and settings.latency is not None:
        if settings.latency.table is not None:
            return file_identity(Path(settings.latency.table))
        return device_name(trainer_device(settings.trainer))
    return ""


def result_metrics(rows: list[dict[str, Any]], metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The results as a logger takes them: one number a name."""
    logged = {
        f"evaluate/{row['router']}/{row['budget']}/{name}": row[name]
        for row in rows
        for name in ("achieved", "val_loss", "accuracy")
    }
    correlation = metrics["router"].get("rank_correlation")
    if correlation is not None:
        logged["router/rank_correlation"] = correlation
    return logged | {"val/pareto_gap": metrics["evaluate"]["pareto_gap"]}


def check_places(settings: Settings, *, config: dict[str, Any]) -> None:
    """Raise ConfigError where the run's folder or the cache cannot be written to."""
    run_dir = run_folder(settings, config=config)
    check_writable(run_dir, setting="run_dir")
    check_writable(cache_folder(settings, run_dir), setting="cache_dir")


def cache_folder(settings: Settings, run_dir: Path) -> Path:
    """Where stages work."""
    return Path(settings.cache_dir or "cache") if settings.cache == "on" else run_dir / "stages"


def run_folder(settings: Settings, *, config: dict[str, Any]) -> Path:
    """The folder that was asked for, or one whose name tells router, seed and config: the same command meets it."""
    if settings.run_dir is not None:
        return Path(settings.run_dir)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / settings.experiment_name / f"{settings.router.label}-seed{settings.seed}-{digest}"
