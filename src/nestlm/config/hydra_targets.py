"""What Hydra itself may make: launchers, sweepers, callbacks and log handlers, checked before it imports them.

The `hydra` part of a config is composed for `train.py` alone: a run's folder does not hold it, and no other command
reads it.
"""

from __future__ import annotations

from typing import Any

from hydra._internal import hydra as hydra_main_loop
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from nestlm.errors import ConfigError, NotAllowedError
from nestlm.utils.messages import quote_value

LAUNCHERS = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
SAMPLERS = ("CmaEsSampler", "GridSampler", "MOTPESampler", "NSGAIISampler", "RandomSampler", "TPESampler")
TARGETS = {
    "nestlm.config.sweep.CheckSweep",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    f"{LAUNCHERS}.LocalLauncher",
    f"{LAUNCHERS}.SlurmLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    *(f"optuna.samplers.{name}" for name in SAMPLERS),
}
NAMING = {"_target_", "custom_search_space"}  # keys whose value Hydra, or Optuna's sweeper, imports
LOGGING = {"class": {"logging.StreamHandler", "logging.FileHandler"}, "()": set[str](), "factory": set[str]()}
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


class CheckedLoader(ConfigLoaderImpl):
    """Composes as Hydra does, and refuses what must not be made. Jobs of a sweep have it, too."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """The composed config.

        Raises:
            NotAllowedError: Hydra's own part names code that is not listed.
            ConfigError: a group is chosen by something that is no name.
        """
        for override in OverridesParser.create(config_loader=self).parse_overrides(overrides):
            group = override.key_or_group
            if not group:
                raise ConfigError(f"{override.input_line}: wanted GROUP=NAME or FIELD=VALUE")
            if group == "hydra.searchpath" and "pkg://" in str(override.input_line):
                raise NotAllowedError("hydra.searchpath: got pkg://, which imports a package; wanted a folder")
            if self.repository.group_exists(group):
                check_choice(override, options=self.get_group_options(group))
        config = super().load_configuration(config_name, overrides, *args, **kwargs)
        plugins = config.get("plugins")
        check(config.get("hydra"), "hydra", plugins=tuple(plugins) if isinstance(plugins, ListConfig) else ())
        return config


def install() -> None:
    """Let Hydra compose with `CheckedLoader`. Hydra has no such setting, and its version is pinned."""
    setattr(hydra_main_loop, ConfigLoaderImpl.__name__, CheckedLoader)


def refuse_pickles() -> None:
    """Raise NotAllowedError where the command line asks Hydra for a rerun, which reads a pickle."""
    if get_args_parser().parse_args().experimental_rerun is not None:
        raise NotAllowedError("--experimental-rerun: reads a pickle, which can run code; give the run's command again")


def check_choice(override: Override, *, options: list[str]) -> None:
    """Raise ConfigError where an override of a group chooses a number, null, or the like."""
    value = override.value()
    if override.is_delete() or override.is_sweep_override() or isinstance(value, dict):
        return
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str | QuotedString) for name in names):
        wanted = f"one of {', '.join(options)}" if options else "a name"
        raise ConfigError(f"{override.key_or_group}: got {override.get_value_element_as_str()}, wanted {wanted}")


def check(node: Any, where: str, *, plugins: tuple[Any, ...]) -> None:
    """Raise NotAllowedError where a node below Hydra's own config names code that is not listed.

    Interpolations are followed, so that none hides a name; one that leads nowhere names nothing.
    """
    if not isinstance(node, DictConfig | ListConfig):
        return
    keys: list[Any] = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        try:
            value = node[key]
        except OmegaConfBaseException:
            continue
        below = f"{where}.{key}"
        if key in NAMING and value is not None:
            check_target(value, below, plugins=plugins)
        elif key in ("_args_", "_recursive_", "_convert_") and where != "hydra":
            raise NotAllowedError(f"{below}: wanted fields of the class alone")
        if "_logging" in where:
            check_logging(key, value, below)
        check(value, below, plugins=plugins)


def check_target(value: Any, where: str, *, plugins: tuple[Any, ...]) -> None:
    """Raise NotAllowedError unless a name is listed, or of a package that `plugins` names."""
    own = isinstance(value, str) and any(value.startswith(f"{name}.") for name in plugins)
    if value not in TARGETS and not own:
        raise NotAllowedError(
            f"{where}: {quote_value(value)} is not allowed; wanted a launcher or a sweeper by its name, such as "
            "launcher=joblib, or a class of a package that plugins=[PACKAGE] names"
        )


def check_logging(key: Any, value: Any, where: str) -> None:
    """Raise NotAllowedError where settings of logging name code."""
    imported = isinstance(value, str) and value.startswith("ext://") and value not in STREAMS
    if (key in LOGGING and value not in LOGGING[key]) or imported:
        raise NotAllowedError(
            f"{where}: {quote_value(value)} is not allowed; wanted logging.StreamHandler or FileHandler"
        )
