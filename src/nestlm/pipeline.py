"""The run: stages in order, each looked up in the cache first, then the run's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, WandbLogger

from nestlm import stages
from nestlm.cache import StageFolder, files_identity, stage_key
from nestlm.context import Context
from nestlm.data.source.base import fingerprint
from nestlm.dry_run import describe
from nestlm.errors import ConfigError
from nestlm.progress import console
from nestlm.report.render import render
from nestlm.report.run_folder import FinishedStage, write_run_folder
from nestlm.settings import Settings, View, check
from nestlm.training import make_trainer

TRAINING = ("optim", "trainer", "data", "seed")


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Attributes:
        name: as in the run's folder.
        run: does the work and reports plain values.
        reads: config sections that determine the result; the stage can see no other.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    reads: tuple[str, ...]


STAGES = (
    Stage("data", stages.prepare_data, ("data", "model")),
    Stage("pretrain", stages.pretrain, ("model", "pretrain", *TRAINING)),
    Stage("rank", stages.rank, ("model", "axes", "ranking", "trainer", "data", "seed")),
    Stage("elastic", stages.elastic, ("model", "axes", "elastic", "sampler", "teacher", *TRAINING)),
    Stage("router", stages.train_router, ("model", "axes", "cost", "costs", "router", *TRAINING)),
    Stage("joint", stages.joint, ("model", "axes", "cost", "costs", "router", "joint", "teacher", *TRAINING)),
    Stage(
        "evaluate", stages.evaluate, ("model", "axes", "cost", "costs", "router", "budget", "trainer", "data", "seed")
    ),
)


def run(settings: Settings, *, config: dict[str, Any]) -> Path | None:
    """Walk the stages and write the run's folder.

    Args:
        settings: what to do.
        config: the same as plain resolved values, from which the cache keys are made.

    Returns:
        The run's folder; None for a dry run.

    Raises:
        NestlmError: something in the settings, the data or the weights that a user can cure.
    """
    check(settings)
    if settings.dry_run:
        describe(settings)
        return None
    check_trainer(settings)
    run_dir = run_folder(settings, config=config)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: cannot make {run_dir} ({error.strerror}); wanted a folder to write to") from error
    cache = Path(settings.cache_dir or "cache") if settings.cache == "on" else run_dir / "stages"
    logger = settings.logger(save_dir=run_dir / "logs", name=run_dir.name)
    logger.log_hyperparams(config)
    try:
        finished = run_stages(settings, config=config, cache=cache, logger=logger)
        write_run_folder(run_dir, config=config, finished=finished, router=settings.router.label)
        logger.log_metrics(result_metrics(finished[-1].result["rows"]))
    finally:
        logger.finalize("finished")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # it would stay open, and the next job of a sweep would log into it
    render(run_dir)
    return run_dir


def check_trainer(settings: Settings) -> None:
    """Raise ConfigError when this machine cannot run the configured trainer."""
    try:
        make_trainer(settings.trainer)
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def run_stages(settings: Settings, *, config: dict[str, Any], cache: Path, logger: Logger) -> list[FinishedStage]:
    """Every stage's result, in order; a stage's key covers its inputs and the key of the stage before."""
    finished: list[FinishedStage] = []
    key, inputs = "", dict[str, Path]()
    for stage in STAGES:
        sections = {name: config[name] for name in stage.reads}
        key = stage_key(stage.name, sections=sections, previous=key, extra=outside_inputs(stage.name, settings))
        folder = StageFolder(cache, stage.name, key)
        context = Context(View(settings, stage.reads), folder.path, inputs=dict(inputs), logger=logger)
        finished.append(run_stage(stage, folder, context))
        inputs[stage.name] = folder.path
    return finished


def run_stage(stage: Stage, folder: StageFolder, context: Context) -> FinishedStage:
    """The stage's result, from the cache or by doing the work."""
    with folder.locked():
        result = folder.result()
        cached = result is not None
        if result is None:
            started = time.monotonic()
            result = stage.run(context)
            result |= {"seconds": time.monotonic() - started}
            folder.finish(result)
        drop_checkpoints(folder.path)
    seconds = f"{result['seconds']:7.1f} s"
    console.print(f"{stage.name:>9} {seconds}{'  (from the cache)' if cached else ''}", highlight=False)
    return FinishedStage(stage.name, folder.path, result, cached=cached)


def drop_checkpoints(folder: Path) -> None:
    """Remove what a finished stage could have been resumed from: optimizer states are larger than the result."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def outside_inputs(stage: str, settings: Settings) -> str:
    """What determines a stage from outside the config: the text, the tokenizer, the weights."""
    if stage == "data":
        tokenizer = settings.tokenizer_file
        tokenizer_hash = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer and tokenizer.is_file() else ""
        return fingerprint(settings.data.source.documents()) + tokenizer_hash
    if stage == "pretrain" and settings.model.weights is not None:
        return files_identity(Path(settings.model.weights))
    return ""


def result_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The results as a logger takes them: one number a name."""
    return {
        f"evaluate/{row['router']}/{row['budget']}/{name}": row[name]
        for row in rows
        for name in ("achieved", "val_loss", "accuracy")
    }


def run_folder(settings: Settings, *, config: dict[str, Any]) -> Path:
    """The folder that was asked for, or one whose name tells router, seed and config: the same command meets it."""
    if settings.run_dir is not None:
        return Path(settings.run_dir)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / settings.experiment_name / f"{settings.router.label}-seed{settings.seed}-{digest}"
