"""Turns a Hydra config into settings: names and types are checked before anything is built.

Only this file and `sweep.py` know Hydra.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestlm.config import hydra_targets, nodes
from nestlm.config.allowlist import allowed_plugins, check_plugins, plugins_of
from nestlm.config.explaining import explain
from nestlm.config.groups import CONF
from nestlm.config.limits import check_values
from nestlm.config.sweep import JobFailed, failures, in_sweep, job_failed, link_run, shares_machine
from nestlm.distributed.gpu_lock import own_gpu, visible_gpus
from nestlm.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, NestlmError, NotAllowedError, Preempted
from nestlm.utils.nested_dict import flat_items
from nestlm.utils.resources import resource_error

if TYPE_CHECKING:  # heavy to import
    from nestlm.api.nested_model import NestedModel
    from nestlm.api.run_and_report import FinishedRun
    from nestlm.data.datamodule import DataSettings
    from nestlm.pipeline.settings import Settings

T = TypeVar("T")
PRETRAINED = "nestlm.model.pretrained.family_from_checkpoint"
RUNS_OWN_SIZES = ("sequence_length", "eval_batch_size", "separate_documents")
PATHS = {"path", "weights", "tokenizer", "table", "run_dir", "cache_dir"}  # fields that name files
USER_ERRORS = (NestlmError, HydraException, OmegaConfBaseException)

hydra_targets.install()


def run() -> None:
    """The command line of `train.py`. Errors that a user can cure are one or two lines and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and we print
    try:
        with plain_errors():
            hydra_targets.refuse_pickles()
            hydra_main(version_base="1.3", config_path=str(CONF), config_name="train")(run_job)()
    except JobFailed as first:
        for line in failures(first):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    finally:
        GlobalHydra.instance().clear()


def run_job(config: DictConfig) -> float | None:
    """One job, which may be one of a sweep and in a process of its own; returns what a sweeper minimises."""
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
    """Check, build, run. The heavy imports wait for the composed config."""
    plain = with_sizes(to_plain(config))
    trainer = plain.get("trainer")
    on_gpu = isinstance(trainer, dict) and trainer.get("accelerator") in ("gpu", "cuda", "auto")
    with own_gpu(visible_gpus() if on_gpu and shares_machine() else []):
        from nestlm.train.trainer import ranks_to_start

        settings = build(plain, plugins=plugins_of(plain))
        number = 0 if settings.dry_run else ranks_to_start(settings.trainer)
        return in_ranks(run_as_rank, plain, num_ranks=number)


def run_as_rank(plain: dict[str, Any]) -> FinishedRun | None:
    """A run's part of one rank among several."""
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
    """Measure the latency table of a command line's model, print it, and write it to a file."""
    with plain_errors():
        counted = [] if any(override.startswith("cost=") for override in overrides) else ["cost=latency"]
        plain = with_sizes(compose([*counted, *overrides]))
        settings = build(plain, plugins=plugins_of(plain))
        from nestlm.api.measure_latency import measure_latency

        measure_latency(settings, out=out)


def verify(folder: Path, *, out: Path | None, tolerance: float, overrides: Sequence[str] = ()) -> bool:
    """Do a finished run again; returns whether its results are the same. Overrides name where text and weights are."""
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
    """A rank's part of a run that is done again: config, its folder, the new one, the tolerance, allowed plug-ins."""
    from nestlm.api import reproduce

    config, folder, place, tolerance, plugins = again
    settings = build(config, plugins=plugins)
    return reproduce.verify(folder, settings, config=config, place=place, tolerance=tolerance)


def in_ranks(work: Callable[[Any], T], argument: Any, *, num_ranks: int) -> T:
    """Do work in processes that are started for it; in this one where there are none to start."""
    if not num_ranks:
        return work(argument)
    from nestlm.distributed.launch import launch

    return launch(work, argument, num_ranks=num_ranks)


def load(folder: Path, *, device: str | None, plugins: Sequence[str] = ()) -> NestedModel:
    """The nested model of a finished run; `plugins` are packages whose classes it may name."""
    from nestlm.report.runs import read_provenance

    read_provenance(folder)  # before the heavy imports
    from nestlm.api.nested_model import NestedModel

    settings, _ = settings_of(folder, plugins=plugins)
    return NestedModel.open(folder, settings, device=device)


def data_settings(overrides: list[str], *, run: Path) -> DataSettings:
    """The data group of `data=NAME data.FIELD=VALUE ...`, for text to score; other sizes are those of a run.

    Raises:
        NestlmError, HydraException: something else is overridden, or cannot be used.
    """
    from nestlm.api import reproduce

    strangers = [override for override in overrides if not re.match(r"\+{0,2}data[.=]", override)]
    if strangers:
        raise ConfigError(f"{strangers[0]}: only the data group can be another than the run's; wanted data.FIELD=VALUE")
    node, own = compose(overrides)["data"], reproduce.read(run)[0]["data"]
    named = {override.partition("=")[0].lstrip("+") for override in overrides}
    kept = {"heldout_share": None} | {name: own[name] for name in RUNS_OWN_SIZES}
    node |= {name: value for name, value in kept.items() if f"data.{name}" not in named}
    from nestlm.data.datamodule import DataSettings

    return nodes.build(node, DataSettings, where="data", plugins=allowed_plugins())


def settings_of(folder: Path, *, plugins: Sequence[str] = ()) -> tuple[Settings, dict[str, Any]]:
    """The settings of a finished run, and the same as plain values. The folder itself allows no package of plug-ins.

    Raises:
        NestlmError: it is no finished run, of another version of nestlm, or names classes that it may not.
    """
    from nestlm.api import reproduce

    config, commit = reproduce.read(folder)
    try:
        parsed = parse(config, plugins=allowed_plugins(plugins))
    except NotAllowedError as error:
        raise NotAllowedError(f"{folder / 'config.yaml'}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{folder} is of another version of nestlm, commit {commit}: {error}") from None
    return nodes.make(parsed), config


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print a user's error and exit; a bug keeps its traceback, and `traceback=true` shows it for all."""
    try:
        yield
    except Exception as error:
        known = user_error(error)
        if known is None or any(argument.lower() == "traceback=true" for argument in sys.argv[1:]):
            raise
        print(f"error: {explain(known)}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED if isinstance(known, Preempted) else EXIT_USER_ERROR)


def user_error(error: Exception) -> Exception | None:
    """An error that a user can cure, or what the machine lacks; None for a bug."""
    return error if isinstance(error, USER_ERRORS) else resource_error(error)


def compose(overrides: list[str]) -> dict[str, Any]:
    """The resolved config of a command line, as plain values, without running it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_plain(hydra_compose("train", overrides=overrides))


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values. Raises ConfigError for a value that is missing."""
    for name, value in flat_items(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            raise ConfigError(f"{name}: has no value; give one with {name}=VALUE")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict), "a config file is a mapping"
    return with_homes(typing.cast("dict[str, Any]", plain))


def with_homes(node: Any, name: str = "") -> Any:
    """The config with the home folder for a `~/` at the start of a path: shells leave it in FIELD=~/PATH."""
    if isinstance(node, dict):
        return {key: with_homes(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [with_homes(value) for value in node]
    return os.path.expanduser(node) if name in PATHS and isinstance(node, str) and node.startswith("~") else node  # noqa: PTH111


def with_sizes(plain: dict[str, Any]) -> dict[str, Any]:
    """The config with the model's sizes, where only its weights say them, so that cache keys and runs hold them."""
    check_values(plain)
    node = plain.get("model")
    if not isinstance(node, dict) or node.get(nodes.TARGET) != PRETRAINED:
        return plain
    from nestlm.model.pretrained import family_from_checkpoint, to_config_node

    smaller = OmegaConf.create((CONF / "debug/smoke.yaml").read_text(encoding="utf-8")).model.items()
    # a checkpoint's sizes stay its own
    arguments = {name: value for name, value in node.items() if name != nodes.TARGET and (name, value) not in smaller}
    return plain | {
        "model": to_config_node(nodes.make(nodes.parse_call(family_from_checkpoint, arguments, where="model")))
    }


def build(plain: dict[str, Any], *, plugins: Sequence[str] = ()) -> Settings:
    """Settings from plain values; `plugins` are the packages that the user allows to name classes.

    Raises:
        NotAllowedError: a class that may not be named.
        ConfigError: a name that its target does not take, or a value of the wrong type.
    """
    return nodes.make(parse(plain, plugins=plugins))


def parse(plain: dict[str, Any], *, plugins: Sequence[str]) -> nodes.Call:
    """Plain values of settings, checked: every name, type and class; nothing is made yet."""
    from nestlm.pipeline.settings import Settings

    check_values(plain)
    check_plugins(plain.get("plugins"), allowed=plugins)
    if nodes.TARGET in plain:
        raise NotAllowedError(f"{nodes.TARGET}: stands at the top, wanted the settings of a run alone")
    return nodes.parse_call(Settings, plain, where="", plugins=plugins)
