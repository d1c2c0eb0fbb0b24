"""Compose a Hydra config and turn it into settings. Names and types are checked before any object is built."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from nestlm.config import instantiate
from nestlm.config.allowlist import allowed_plugins, check_plugins
from nestlm.config.groups import CONF
from nestlm.config.value_bounds import check_values
from nestlm.errors import ConfigError, NotAllowedError
from nestlm.utils.nested_dict import flat_items

if TYPE_CHECKING:  # heavy to import
    from nestlm.data.datamodule import DataSettings
    from nestlm.pipeline.settings import Settings

PRETRAINED = "nestlm.model.pretrained.family_from_checkpoint"
RUNS_OWN_SIZES = ("sequence_length", "eval_batch_size", "separate_documents")
PATHS = {"path", "weights", "tokenizer", "table", "run_dir", "cache_dir"}  # fields that name files


def compose(overrides: list[str]) -> dict[str, Any]:
    """Compose the config of a command line and resolve it to plain values.

    Args:
        overrides: `GROUP=NAME` and `FIELD=VALUE`, as `nestlm train` takes them.

    Raises:
        HydraException: an override names no group, option or field.
        ConfigError: a field has no value.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_plain(hydra_compose("train", overrides=overrides))


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a composed config to plain values. Raises ConfigError for a field that has no value."""
    for name, value in flat_items(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            raise ConfigError(f"{name}: has no value; give one with {name}=VALUE")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict), "a config file is a mapping"
    return with_homes(typing.cast("dict[str, Any]", plain))


def with_homes(node: Any, name: str = "") -> Any:
    """Replace a leading `~` of every path in a config by the home folder: shells leave it alone in FIELD=~/PATH.

    Args:
        node: plain values of a config.
        name: the key that holds them.
    """
    if isinstance(node, dict):
        return {key: with_homes(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [with_homes(value) for value in node]
    return os.path.expanduser(node) if name in PATHS and isinstance(node, str) and node.startswith("~") else node  # noqa: PTH111


def with_sizes(plain: dict[str, Any]) -> dict[str, Any]:
    """Replace `model=pretrained` in a composed config by the sizes that its checkpoint names.

    So cache keys and a run's config.yaml hold the sizes themselves. Other models are returned unchanged.

    Raises:
        NestlmError: a value is out of bounds, or the checkpoint cannot be read.
    """
    check_values(plain)
    node = plain.get("model")
    if not isinstance(node, dict) or node.get(instantiate.TARGET) != PRETRAINED:
        return plain
    from nestlm.model.pretrained import family_from_checkpoint, to_config_node

    smaller = OmegaConf.create((CONF / "debug/smoke.yaml").read_text(encoding="utf-8")).model.items()
    # debug=smoke does not shrink a checkpoint
    arguments = {
        name: value for name, value in node.items() if name != instantiate.TARGET and (name, value) not in smaller
    }
    family = instantiate.make(instantiate.parse_call(family_from_checkpoint, arguments, where="model"))
    return plain | {"model": to_config_node(family)}


def build(plain: dict[str, Any], *, plugins: Sequence[str] = ()) -> Settings:
    """Build the settings of a run from a composed config.

    Args:
        plain: what `compose` returns.
        plugins: packages whose classes the user allows the config to name.

    Raises:
        NotAllowedError: the config names a class that it may not name.
        ConfigError: the config has a name that its target does not take, or a value of the wrong type.
    """
    return instantiate.make(parse(plain, plugins=plugins))


def parse(plain: dict[str, Any], *, plugins: Sequence[str]) -> instantiate.Call:
    """Check every name, type and class of a composed config without building any object.

    Raises:
        NotAllowedError, ConfigError: as `build`.
    """
    from nestlm.pipeline.settings import Settings

    check_values(plain)
    check_plugins(plain.get("plugins"), allowed=plugins)
    if instantiate.TARGET in plain:
        raise NotAllowedError(f"{instantiate.TARGET}: stands at the top, wanted the settings of a run alone")
    return instantiate.parse_call(Settings, plain, where="", plugins=plugins)


def settings_of(folder: Path, *, plugins: Sequence[str] = ()) -> tuple[Settings, dict[str, Any]]:
    """Read the settings of a finished run from its folder.

    Args:
        folder: the run's folder. It cannot allow a package of plug-ins by itself.
        plugins: packages whose classes the user allows the run's config to name.

    Returns:
        The settings, and the config that they were built from as plain values.

    Raises:
        NestlmError: the folder holds no finished run, or one of another version of nestlm, or its config names classes
            that it may not name.
    """
    from nestlm.api import reproduce

    config, commit = reproduce.read(folder)
    try:
        parsed = parse(config, plugins=allowed_plugins(plugins))
    except NotAllowedError as error:
        raise NotAllowedError(f"{folder / 'config.yaml'}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{folder} is of another version of nestlm, commit {commit}: {error}") from None
    return instantiate.make(parsed), config


def data_settings(overrides: list[str], *, run: Path) -> DataSettings:
    """Build the data group for text that a finished run is scored on.

    Args:
        overrides: `data=NAME` and `data.FIELD=VALUE`.
        run: the run's folder, whose sizes hold where no override names another.

    Raises:
        NestlmError, HydraException: an override is of another group, or its value cannot be used.
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

    return instantiate.build(node, DataSettings, where="data", plugins=allowed_plugins())
