"""The classes that Hydra itself may build: launchers, sweepers, callbacks and log handlers.

Their names are checked before Hydra imports them. Only `nestlm train` composes the section `hydra` of a config: a run's
folder does not hold it, and no other command reads it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
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
    """Hydra's config loader, which also checks the names in the section `hydra`. Jobs of a sweep use it, too."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Compose a config.

        Raises:
            NotAllowedError: the section `hydra` names code that is not listed.
            ConfigError: the value of a group is no name.
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
    """Replace Hydra's config loader by `CheckedLoader`. Hydra has no setting for it, and its version is pinned."""
    setattr(hydra_main_loop, ConfigLoaderImpl.__name__, CheckedLoader)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[ArgumentParser, Namespace]:
    """Parse a command line as Hydra does.

    Args:
        arguments: overrides and flags; None: those of `sys.argv`.

    Returns:
        Hydra's parser, and the parsed arguments.

    Raises:
        NotAllowedError: the arguments contain `--experimental-rerun`, which would load a pickle.
    """
    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    if parsed.experimental_rerun is not None:
        raise NotAllowedError("--experimental-rerun: reads a pickle, which can run code; give the run's command again")
    return parser, parsed


def check_choice(override: Override, *, options: list[str]) -> None:
    """Raise ConfigError if the value of a group is a number, null, or anything else that is no name."""
    value = override.value()
    if override.is_delete() or override.is_sweep_override() or isinstance(value, dict):
        return
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str | QuotedString) for name in names):
        wanted = f"one of {', '.join(options)}" if options else "a name"
        raise ConfigError(f"{override.key_or_group}: got {override.get_value_element_as_str()}, wanted {wanted}")


def check(node: Any, where: str, *, plugins: tuple[Any, ...]) -> None:
    """Raise NotAllowedError if a node of the section `hydra` names code that is not listed.

    Interpolations are followed, so that none hides a name. One that leads nowhere is skipped.
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
    """Raise NotAllowedError unless a name is listed, or belongs to a package that `plugins` names."""
    own = isinstance(value, str) and any(value.startswith(f"{name}.") for name in plugins)
    if value not in TARGETS and not own:
        raise NotAllowedError(
            f"{where}: {quote_value(value)} is not allowed; wanted a launcher or a sweeper by its name, such as "
            "launcher=joblib, or a class of a package that plugins=[PACKAGE] names"
        )


def check_logging(key: Any, value: Any, where: str) -> None:
    """Raise NotAllowedError if a setting of logging names code."""
    imported = isinstance(value, str) and value.startswith("ext://") and value not in STREAMS
    if (key in LOGGING and value not in LOGGING[key]) or imported:
        raise NotAllowedError(
            f"{where}: {quote_value(value)} is not allowed; wanted logging.StreamHandler or FileHandler"
        )
