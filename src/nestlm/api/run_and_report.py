"""Do a run: walk its stages, then write its folder; a dry run prints what it would take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from nestlm.distributed import collectives
from nestlm.distributed.strategy import placement_of
from nestlm.estimate.dry_run import describe
from nestlm.model.parent_files import ParentFiles
from nestlm.pipeline.checks import check
from nestlm.pipeline.run import FinishedStage, run_stages
from nestlm.pipeline.settings import Settings
from nestlm.report import wandb_run
from nestlm.report.render import render
from nestlm.report.run_folder import write_run_folder
from nestlm.train.trainer import check_trainer, make_trainer
from nestlm.utils.console import console, output
from nestlm.utils.locks import lock_folder
from nestlm.utils.resources import check_writable, resource_errors


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, and the one number to optimise: the mean over budgets of its loss above the teacher's."""

    folder: Path
    pareto_gap: float


def run_and_report(settings: Settings, *, config: dict[str, Any]) -> FinishedRun | None:
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
    check_trainer(settings.trainer)
    placement_of(make_trainer(settings.trainer))  # ranks meet
    console.quiet = output.quiet = collectives.rank() != 0
    run_dir = run_folder(settings, config=config)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    # the same command twice at the same time
    with lock_folder(run_dir, str(run_dir)) if collectives.rank() == 0 else nullcontext():
        return work_in(run_dir, settings, config=config, shown=shown)


def work_in(run_dir: Path, settings: Settings, *, config: dict[str, Any], shown: bool) -> FinishedRun:
    """Walk the stages and write the run's folder, alone in it."""
    parent = settings.model.read_parent_files() if collectives.rank() == 0 else None
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
