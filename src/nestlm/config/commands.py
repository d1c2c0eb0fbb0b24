"""The commands `train`, `profile` and `verify`, and `nestlm.load`.

The heavy imports wait until the config is composed and checked.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra import version
from hydra._internal.utils import _run_hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from nestlm.config import hydra_allowlist
from nestlm.config.allowlist import allowed_plugins, plugins_of
from nestlm.config.compose import build, compose, settings_of, to_plain, with_sizes
from nestlm.config.error_messages import explain, plain_errors, user_error
from nestlm.config.groups import CONF
from nestlm.config.sweep import JobFailed, failures, in_sweep, job_failed, link_run, shares_machine
from nestlm.distributed.gpu_lock import lock_gpu, visible_gpus
from nestlm.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted

if TYPE_CHECKING:  # heavy to import
    from nestlm.api.nested_model import NestedModel
    from nestlm.api.run_and_report import FinishedRun

T = TypeVar("T")

hydra_allowlist.install()


def train(arguments: Sequence[str] | None = None) -> None:
    """Run `nestlm train`: one run, a sweep, or what Hydra's own flags ask for, such as `--cfg job`.

    An error that a user can cure is printed in one or two lines, and ends the process with exit code 2.

    Args:
        arguments: overrides and flags of Hydra; None: those of this process, `sys.argv`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    version.setbase("1.3")
    try:
        with plain_errors():
            parser, parsed = hydra_allowlist.parse_arguments(arguments)
            # what hydra.main calls, for arguments that need not be those of sys.argv
            _run_hydra(
                args=parsed, args_parser=parser, task_function=run_job, config_path=str(CONF), config_name="train"
            )
    except JobFailed as first:
        for line in failures(first):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    finally:
        GlobalHydra.instance().clear()


def run_job(config: DictConfig) -> float | None:
    """Run the composed config of `nestlm train`: a single run, or one job of a sweep.

    Returns:
        The run's pareto gap, which a sweeper minimises; None for a dry run.

    Raises:
        JobFailed: a job of a sweep ended with an error.
    """
    if not in_sweep():
        with plain_errors():
            finished = run_config(config)
            return None if finished is None else finished.pareto_gap
    try:
        finished = run_config(config)
    except Exception as error:
        known = user_error(error)
        if isinstance(known, Preempted):  # the sweep ends, too
            print(f"error: {known}", file=sys.stderr)
            sys.exit(EXIT_PREEMPTED)
        if known is None or config.get("traceback") is True:
            traceback.print_exc()
        raise job_failed(f"{type(error).__name__}: {error}" if known is None else explain(known)) from error
    if finished is None:
        return None
    link_run(finished.folder)
    return finished.pareto_gap


def run_config(config: DictConfig) -> FinishedRun | None:
    """Check a composed config, build its settings, and run the pipeline on as many ranks as the trainer asks for.

    Returns:
        The finished run; None for a dry run.
    """
    plain = with_sizes(to_plain(config))
    trainer = plain.get("trainer")
    on_gpu = isinstance(trainer, dict) and trainer.get("accelerator") in ("gpu", "cuda", "auto")
    with lock_gpu(visible_gpus() if on_gpu and shares_machine() else []):
        from nestlm.train.trainer import ranks_to_start

        settings = build(plain, plugins=plugins_of(plain))
        number = 0 if settings.dry_run else ranks_to_start(settings.trainer)
        return in_ranks(run_as_rank, plain, num_ranks=number)


def run_as_rank(plain: dict[str, Any]) -> FinishedRun | None:
    """Build the settings of a plain config, and run the pipeline in this process, which is one rank or the only one."""
    from nestlm.api.run_and_report import run_and_report
    from nestlm.distributed import collectives
    from nestlm.utils.console import console

    try:
        return run_and_report(build(plain, plugins=plugins_of(plain)), config=plain)
    except Preempted as error:
        if collectives.num_ranks() > 1:  # who started the ranks only knows that they were told to end
            console.print(str(error), highlight=False)
        raise


def profile(overrides: list[str], *, out: Path) -> None:
    """Run `nestlm profile`: measure the latency table of a model, print it, and write it to `out`.

    Args:
        overrides: Hydra overrides that describe the model; without one of `cost`, `cost=latency` is added.
        out: the file of the table.
    """
    with plain_errors():
        counted = [] if any(override.startswith("cost=") for override in overrides) else ["cost=latency"]
        plain = with_sizes(compose([*counted, *overrides]))
        settings = build(plain, plugins=plugins_of(plain))
        from nestlm.api.measure_latency import measure_latency

        measure_latency(settings, out=out)


def verify(folder: Path, *, out: Path | None, tolerance: float, overrides: Sequence[str] = ()) -> bool:
    """Run `nestlm verify`: repeat a finished run without the cache, and compare the results.

    Args:
        folder: the finished run's folder.
        out: the folder where the second run works and stays; None: a temporary one.
        tolerance: largest difference of two numbers that count as equal.
        overrides: Hydra overrides for text and weights that have moved since the run.

    Returns:
        Whether the results are the same.
    """
    with plain_errors():
        from nestlm.api import reproduce
        from nestlm.train.trainer import ranks_to_start

        settings, config = settings_of(folder)
        config = reproduce.elsewhere(config, overrides, folder=folder)
        with reproduce.workplace(out) as place:
            config = reproduce.with_kept_weights(config, settings.model, folder=folder, place=place)
            again = (config, folder, place, tolerance, allowed_plugins())
            return in_ranks(verify_as_rank, again, num_ranks=ranks_to_start(settings.trainer))


def verify_as_rank(again: tuple[dict[str, Any], Path, Path, float, tuple[str, ...]]) -> bool:
    """Do the work of `verify` in this process, which is one rank or the only one.

    Args:
        again: config, the finished run's folder, the second run's folder, tolerance, allowed plug-ins: one tuple, as
            `in_ranks` passes one argument.

    Returns:
        Whether the results are the same.
    """
    from nestlm.api import reproduce

    config, folder, place, tolerance, plugins = again
    settings = build(config, plugins=plugins)
    return reproduce.verify(folder, settings, config=config, place=place, tolerance=tolerance)


def in_ranks(work: Callable[[Any], T], argument: Any, *, num_ranks: int) -> T:
    """Call a function on `num_ranks` new processes, and return what rank 0 returned.

    Args:
        work: a function at the top level of a module, since it is pickled.
        argument: its only argument, which is pickled too.
        num_ranks: processes to start; 0: call the function in this process.
    """
    if not num_ranks:
        return work(argument)
    from nestlm.distributed.launch import launch

    return launch(work, argument, num_ranks=num_ranks)


def load(folder: Path, *, device: str | None, plugins: Sequence[str] = ()) -> NestedModel:
    """Load the nested model of a finished run; `nestlm.load` describes arguments and errors."""
    from nestlm.report.runs import read_provenance

    read_provenance(folder)  # before the heavy imports
    from nestlm.api.nested_model import NestedModel

    settings, _ = settings_of(folder, plugins=plugins)
    return NestedModel.open(folder, settings, device=device)
