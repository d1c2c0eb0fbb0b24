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
from nestlm.distributed.strategy import placement_for
from nestlm.estimate.dry_run import describe
from nestlm.pipeline.checks import check
from nestlm.pipeline.run import FinishedStages, run_stages
from nestlm.pipeline.settings import Settings
from nestlm.pipeline.stages.evaluate import EvaluateStage
from nestlm.pipeline.stages.router import RouterStage
from nestlm.report import wandb_run
from nestlm.report.render import render
from nestlm.report.run_folder import pareto_gap, write_run_folder
from nestlm.train.trainer import check_trainer, make_trainer
from nestlm.utils.console import console, output
from nestlm.utils.locks import lock_folder
from nestlm.utils.resources import check_writable, resource_errors


@dataclass(frozen=True)
class FinishedRun:
    """The result of `run_and_report`.

    Attributes:
        folder: the run's folder.
        pareto_gap: the number that a sweeper minimises: loss of the run's router minus loss of the teacher, averaged
            over budgets.
    """

    folder: Path
    pareto_gap: float


def run_and_report(settings: Settings, *, config: dict[str, Any]) -> FinishedRun | None:
    """Check the settings, run all stages, and write the run's folder; for a dry run, print estimates instead.

    Args:
        settings: settings of the run.
        config: the settings as resolved plain values, from which cache keys are computed.

    Returns:
        The finished run; None for a dry run.

    Raises:
        NestlmError: the settings, the data or the weights have an error that a user can cure.
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
    """Run all stages, and write the run's folder, while holding the lock of that folder.

    Args:
        settings: settings of the run, after `check`.
        config: the settings as resolved plain values.
        shown: whether to draw plots, write the report page, print the table of results, and upload the folder to wandb.
    """
    check_trainer(settings.trainer)
    placement_for(make_trainer(settings.trainer))  # ranks meet
    is_first = collectives.rank() == 0
    console.quiet = output.quiet = not is_first
    run_dir = run_folder(settings, config=config)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    # the same command may run twice at the same time
    with lock_folder(run_dir, str(run_dir)) if is_first else nullcontext():
        parent = settings.model.read_parent_files() if is_first else None
        cache = cache_folder(settings, run_dir)
        with open_logger(settings, run_dir, config=config) as logger:
            finished = run_stages(settings, config=config, cache=cache, logger=logger)
            gap = 0.0
            if is_first:
                with resource_errors(run_dir):
                    label = settings.router.label
                    write_run_folder(run_dir, config=config, finished=finished, router=label, parent=parent)
                    gap = pareto_gap(finished, router=label)
                    logger.log_metrics(logged_results(finished) | {"val/pareto_gap": gap})
                    if shown:
                        show(run_dir, logger)
    return FinishedRun(run_dir, collectives.broadcast_from_rank_zero(gap))


def show(run_dir: Path, logger: Logger) -> None:
    """Draw plots, write the report page, and print the table of results; upload the folder if the logger is wandb's."""
    render(run_dir)
    if isinstance(logger, WandbLogger):
        wandb_run.publish(logger, run_dir)


@contextmanager
def open_logger(settings: Settings, run_dir: Path, *, config: dict[str, Any]) -> Iterator[Logger]:
    """Open the configured logger, log the config, and close the logger as succeeded or failed; only rank 0 logs.

    Raises:
        ConfigError: wandb cannot start a run.
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


def logged_results(finished: FinishedStages) -> dict[str, float]:
    """Flatten the results of all stages to the names and numbers that a logger takes."""
    logged: dict[str, float] = {}
    for outcome in finished.result(EvaluateStage).outcomes:
        name = f"evaluate/{outcome.router}/{outcome.budget}"
        logged[f"{name}/achieved"] = outcome.achieved
        logged[f"{name}/val_loss"] = outcome.readings.val_loss
        logged[f"{name}/accuracy"] = outcome.readings.accuracy
    correlation = finished.result(RouterStage).signal.get("rank_correlation")
    return logged if correlation is None else logged | {"router/rank_correlation": correlation}


def check_places(settings: Settings, *, config: dict[str, Any]) -> None:
    """Raise ConfigError where the run's folder or the cache cannot be written to."""
    run_dir = run_folder(settings, config=config)
    check_writable(run_dir, setting="run_dir")
    check_writable(cache_folder(settings, run_dir), setting="cache_dir")


def cache_folder(settings: Settings, run_dir: Path) -> Path:
    """Return the folder of the stages' folders: the cache, or `stages` in the run's folder if `cache` is off."""
    return Path(settings.cache_dir or "cache") if settings.cache == "on" else run_dir / "stages"


def run_folder(settings: Settings, *, config: dict[str, Any]) -> Path:
    """Return the run's folder: `run_dir`, or one named by router, seed and a hash of the config.

    The same command always gets the same folder.
    """
    if settings.run_dir is not None:
        return Path(settings.run_dir)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / settings.experiment_name / f"{settings.router.label}-seed{settings.seed}-{digest}"
