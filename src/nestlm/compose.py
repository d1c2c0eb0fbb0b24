"""From a Hydra config to settings: names and types are checked before anything is built.

Only this file and `sweep.py` know Hydra.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestlm.dotted import flat_items
from nestlm.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, NestlmError, Preempted
from nestlm.gpus import own_gpu, visible_gpus
from nestlm.sweep import JobFailed, failures, in_sweep, job_failed, link_run, shares_machine

if TYPE_CHECKING:  # heavy to import
    from nestlm.data.module import DataSettings
    from nestlm.nested import NestedModel
    from nestlm.pipeline import FinishedRun

T = TypeVar("T")
CONF = Path(__file__).resolve().parents[2] / "conf"
SETTINGS = "nestlm.settings.Settings"
PRETRAINED = "nestlm.model.pretrained.pretrained"
INSTANTIATE_KEYS = {"_target_", "_partial_"}
PLUGGED_IN = ("joblib", "submitit_local", "submitit_slurm")  # launchers that are not Hydra's own
RUNS_OWN_SIZES = ("sequence_length", "eval_batch_size", "separate_documents")
USER_ERRORS = (NestlmError, HydraException, OmegaConfBaseException)


def run() -> None:
    """The command line of `train.py`. Errors that a user can cure are one or two lines and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and we print
    try:
        with plain_errors():
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
        known = isinstance(error, USER_ERRORS)
        if not known or config.get("traceback") is True:
            traceback.print_exc()
        raise job_failed(explain(error) if known else f"{type(error).__name__}: {error}") from error
    if finished is None:
        return None
    link_run(finished.folder)
    return finished.pareto_gap


def run_config(config: DictConfig) -> FinishedRun | None:
    """Check, build, run. The heavy imports wait for the composed config."""
    plain = with_sizes(to_plain(config))
    on_gpu = plain["trainer"].get("accelerator") in ("gpu", "cuda", "auto")
    with own_gpu(visible_gpus() if on_gpu and shares_machine() else []):
        from nestlm import pipeline

        settings = build(plain)
        number = 0 if settings.dry_run else pipeline.ranks_to_start(settings)
        return in_ranks(run_as_rank, plain, num_ranks=number)


def run_as_rank(plain: dict[str, Any]) -> FinishedRun | None:
    """A run's part of one rank among several."""
    from nestlm import pipeline

    try:
        return pipeline.run(build(plain), config=plain)
    except Preempted as error:
        if pipeline.ranks.num_ranks() > 1:  # who started the ranks only knows that they were told to end
            pipeline.console.print(str(error), highlight=False)
        raise


def profile(overrides: list[str], *, out: Path) -> None:
    """Measure the latency table of a command line's model, print it, and write it to a file."""
    with plain_errors():
        counted = [] if any(override.startswith("cost=") for override in overrides) else ["cost=latency"]
        settings = build(with_sizes(compose([*counted, *overrides])))
        from nestlm import pipeline

        pipeline.profile(settings, out=out)


def verify(folder: Path, *, out: Path | None, tolerance: float) -> bool:
    """Do a finished run again; returns whether its results are the same."""
    with plain_errors():
        from nestlm import pipeline, verification

        settings, config = settings_of(folder)
        with verification.workplace(out) as place:
            again = (config, folder, place, tolerance)
            return in_ranks(verify_as_rank, again, num_ranks=pipeline.ranks_to_start(settings))


def verify_as_rank(again: tuple[dict[str, Any], Path, Path, float]) -> bool:
    """A rank's part of a run that is done again: config, its folder, the new one, and the tolerance."""
    from nestlm import verification

    config, folder, place, tolerance = again
    return verification.verify(folder, build(config), config=config, place=place, tolerance=tolerance)


def in_ranks(work: Callable[[Any], T], argument: Any, *, num_ranks: int) -> T:
    """Do work in processes that are started for it; in this one where there are none to start."""
    if not num_ranks:
        return work(argument)
    from nestlm.parallel.launch import launch

    return launch(work, argument, num_ranks=num_ranks)


def load(folder: Path, *, device: str | None) -> NestedModel:
    """The nested model of a finished run."""
    from nestlm.report.runs import read_provenance

    read_provenance(folder)  # before the heavy imports
    from nestlm.nested import NestedModel

    settings, _ = settings_of(folder)
    return NestedModel.open(folder, settings, device=device)


def data_settings(overrides: list[str], *, run: Path) -> DataSettings:
    """The data group of `data=NAME data.FIELD=VALUE ...`, for text to score; other sizes are those of a run.

    Raises:
        NestlmError, HydraException: something else is overridden, or cannot be used.
    """
    from nestlm import verification

    strangers = [override for override in overrides if not re.match(r"\+{0,2}data[.=]", override)]
    if strangers:
        raise ConfigError(f"{strangers[0]}: only the data group can be another than the run's; wanted data.FIELD=VALUE")
    node, own = compose(overrides)["data"], verification.read(run)[0]["data"]
    named = {override.partition("=")[0].lstrip("+") for override in overrides}
    kept = {"heldout_share": None} | {name: own[name] for name in RUNS_OWN_SIZES}
    node |= {name: value for name, value in kept.items() if f"data.{name}" not in named}
    check_node(node, "data")
    return instantiate(node, _convert_="all")


def settings_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The settings of a finished run, and the same as plain values.

    Raises:
        NestlmError: it is no finished run, or of another version of nestlm.
    """
    from nestlm import verification

    config, commit = verification.read(folder)
    try:
        check_node({"_target_": SETTINGS, **config}, "")
    except ConfigError as error:
        raise ConfigError(f"{folder} is of another version of nestlm, commit {commit}: {error}") from None
    return build(config), config


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print a user's error and exit; a bug keeps its traceback, and `traceback=true` shows it for all."""
    try:
        yield
    except USER_ERRORS as error:
        if any(argument.lower() == "traceback=true" for argument in sys.argv[1:]):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED if isinstance(error, Preempted) else EXIT_USER_ERROR)


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
    return typing.cast("dict[str, Any]", plain)


def with_sizes(plain: dict[str, Any]) -> dict[str, Any]:
    """The config with the model's sizes, where only its weights say them, so that cache keys and runs hold them."""
    node = plain["model"]
    check_node(node, "model")
    if node["_target_"] != PRETRAINED:
        return plain
    from nestlm.model.pretrained import as_node, pretrained

    return plain | {"model": as_node(pretrained(**{name: value for name, value in node.items() if name != "_target_"}))}


def build(plain: dict[str, Any]) -> Any:
    """Settings from plain values.

    Raises:
        ConfigError: a name that its target does not take, or a value of the wrong type.
    """
    target = {"_target_": SETTINGS, **plain}
    check_node(target, "")
    try:
        return instantiate(target, _convert_="all")
    except HydraException as error:
        # a target's own refusal arrives wrapped; it may not know under which name it stands
        if not isinstance(error.__cause__, NestlmError):
            raise
        message, where = str(error.__cause__), re.search(r"full_key: (\S+)", str(error))
        group = where.group(1).partition(".")[0] if where else ""
        prefix = "" if message.startswith(group) else f"{group}."
        raise type(error.__cause__)(prefix + message) from None


def check_node(node: Any, where: str) -> None:
    """Check every `_target_` below a node against the signature of what it names."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_node(item, f"{where}[{index}]")
    if not isinstance(node, dict):
        return
    arguments = {key: value for key, value in node.items() if key not in INSTANTIATE_KEYS}
    if "_target_" in node:
        check_arguments(locate(node["_target_"], where), arguments, where=where, partial=bool(node.get("_partial_")))
    for key, value in arguments.items():
        check_node(value, f"{where}.{key}" if where else key)


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], *, where: str, partial: bool) -> None:
    """Raise ConfigError for an unknown or missing argument, or one whose plain value has the wrong type."""
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = type_hints(target)
    for name, value in arguments.items():
        full_name = f"{where}.{name}" if where else name
        if name not in parameters:
            if takes_any:
                continue
            raise ConfigError(f"{full_name}: {target.__qualname__} takes no {name!r}{nearest(name, parameters)}")
        if name in hints and not (isinstance(value, dict) and "_target_" in value):
            check_type(full_name, value, hints[name])
    if not partial:
        for name, parameter in parameters.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind is not parameter.VAR_KEYWORD
                and name not in arguments
            ):
                raise ConfigError(f"{where}.{name}: has no value; {target.__qualname__} wants one")


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a callable's arguments; none where they cannot be resolved (a third-party class)."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError when a plain value is not what the annotation says."""
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    if contains_target(value):
        return
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return
    try:
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        wanted = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint).replace("collections.abc.", "")
        raise ConfigError(f"{name}: got {value!r}, wanted {wanted or hint}; {error.errors()[0]['msg']}") from None


def contains_target(value: Any) -> bool:
    """Whether a value holds a node that is built later, and then checked by itself."""
    if isinstance(value, dict):
        return "_target_" in value or any(contains_target(item) for item in value.values())
    return isinstance(value, list) and any(contains_target(item) for item in value)


def locate(path: str, where: str) -> Callable[..., Any]:
    """The class or function of a dotted path. Raises ConfigError with the nearest name that exists."""
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        package_path, _, missing = module_path.rpartition(".")
        if error.name != module_path or package_path not in sys.modules:
            extras = importlib.metadata.metadata("nestlm").get_all("Provides-Extra") or []
            cure = f"pip install 'nestlm[{error.name}]'" if error.name in extras else "is its package installed?"
            raise ConfigError(f"{where}._target_: cannot import {module_path!r} ({error}); {cure}") from None
        siblings = [info.name for info in pkgutil.iter_modules(sys.modules[package_path].__path__)]
        raise ConfigError(f"{where}: {package_path} has no {missing!r}{nearest(missing, siblings)}") from None
    if not hasattr(module, name):
        raise ConfigError(f"{where}._target_: {module_path} has no {name!r}{nearest(name, dir(module))}")
    return getattr(module, name)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of a message: the likeliest right name, or all of them."""
    names = list(candidates)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; it has {', '.join(sorted(names))}" if len(names) <= 20 else ""


def explain(error: Exception) -> str:
    """One or two lines: what was got, what was wanted, the cure."""
    if isinstance(error, NestlmError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        options = error.options
        group, _, got = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        if group == "hydra/launcher" and got in PLUGGED_IN:
            return f"launcher: {got} needs a package that is not installed; pip install 'nestlm[launchers]'"
        return f"{group}: got {got!r}, wanted one of {', '.join(options)}{nearest(got, options)}"
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        name = unknown.group(1).split("@")[0]
        return f"{name}: no such group or field{nearest_key(name)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:2])


def nearest_key(name: str) -> str:
    """The end of a message: the existing key that is most like a misspelled one."""
    config = compose([])
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    parent = name.rpartition(".")[0]
    keys = list(dict.fromkeys([*(key for key, _ in flat_items(config)), *groups]))
    return nearest(name, [key for key in keys if key.rpartition(".")[0] == parent] or keys)
