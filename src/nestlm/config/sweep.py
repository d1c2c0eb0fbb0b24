"""Sweeps under any launcher: failed jobs are named at once and again at the end, and an empty sweep is refused."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nestlm.errors import EXIT_USER_ERROR, ConfigError
from nestlm.utils.console import console

ONE_MACHINE = ("joblib", "submitit_local")  # launchers whose jobs run side by side on one machine


class JobFailed(Exception):  # noqa: N818 (it reports one)
    """A job of a sweep ended with an error. Hydra raises it again after the other jobs have ended.

    It holds strings alone, since it is pickled between processes.

    Attributes:
        message: the job and its error, in one line.
        folder: the folder with the messages of all failed jobs.
    """

    def __init__(self, message: str, folder: str) -> None:
        super().__init__(message, folder)
        self.message, self.folder = message, folder

    def __str__(self) -> str:
        return self.message


def in_sweep() -> bool:
    """Tell whether the current job belongs to a sweep (`-m`)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def shares_machine() -> bool:
    """Tell whether other jobs of the sweep run on this machine at the same time."""
    return in_sweep() and HydraConfig.get().runtime.choices["hydra/launcher"] in ONE_MACHINE


def link_run(folder: Path) -> None:
    """Link the folder of a job's run from the sweep's folder, under the number of the job."""
    hydra = HydraConfig.get()
    link = Path(hydra.sweep.dir) / str(hydra.job.num)
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        new.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
        new.replace(link)  # of a job that was queued again
    except OSError as error:  # a file system without links: the run is finished all the same
        console.print(f"{link} does not lead to {folder}: {error.strerror}", markup=False)


def job_failed(message: str) -> JobFailed:
    """Print which job failed and why, write it to the sweep's folder, and return the error to raise."""
    hydra = HydraConfig.get()
    line = f"job {hydra.job.num} ({' '.join(hydra.overrides.task)}): {message}"
    print(f"failed: {line}", file=sys.stderr, flush=True)
    folder = Path(hydra.sweep.dir) / "failed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{hydra.job.num}.txt").write_text(line + "\n", encoding="utf-8")
    return JobFailed(line, str(folder))


def failures(first: JobFailed) -> list[str]:
    """Return a line for each failed job of the sweep that an error belongs to, in the order of the jobs."""
    paths = sorted(Path(first.folder).glob("*.txt"), key=lambda path: int(path.stem))
    return [path.read_text(encoding="utf-8").strip() for path in paths]


class CheckSweep(Callback):
    """A callback of Hydra that ends a sweep which cannot start or has no jobs. Hydra takes no jobs for a success."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print an error line and exit if `check_sweep` raises."""
        try:
            check_sweep(config)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)  # Hydra makes warnings of a callback's exceptions, but not of an exit


def check_sweep(config: DictConfig) -> None:
    """Raise ConfigError if there is no SLURM to submit to, or if an override of the sweep stands for no value."""
    if config.hydra.runtime.choices["hydra/launcher"] == "submitit_slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "launcher: got submitit, but there is no SLURM here (no srun); wanted a machine of the cluster, "
            "or launcher=submitit_local"
        )
    check_launcher(OmegaConf.to_container(config.hydra.launcher, resolve=False))
    loader = GlobalHydra.instance().config_loader()
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [*(f"{name}={value}" for name, value in params.items()), *config.hydra.overrides.task]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    for override in {override.key_or_group: override for override in overrides}.values():
        if override.is_discrete_sweep() and next(override.sweep_string_iterator(), None) is None:
            options = loader.get_group_options(override.key_or_group)
            wanted = f"one of {', '.join(options)}" if options else "at least one value"
            raise ConfigError(f"{override.input_line}: got nothing that matches, so no job would run; wanted {wanted}")


def check_launcher(node: Any) -> None:
    """Raise ConfigError if a number among the launcher's settings is one with which it starts no job or fails."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "n_jobs":
            if value == 0:
                raise ConfigError("hydra.launcher.n_jobs: got 0, wanted jobs at the same time, or -1 for one a core")
        elif not 0 <= value < 2**31 or (value == 0 and name not in ("verbose", "mem_gb", "max_num_timeout")):
            raise ConfigError(f"hydra.launcher.{name}: got {value}, wanted a positive number")
