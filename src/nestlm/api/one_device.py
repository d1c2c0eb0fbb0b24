"""Settings of a run, on one device of this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nestlm.errors import ConfigError
from nestlm.pipeline.settings import Settings
from nestlm.train.trainer import check_trainer


def on_device(settings: Settings, device: str | None) -> Settings:
    """Return the settings with a trainer that uses one device.

    Args:
        settings: settings of a run.
        device: a device name of torch, such as `cuda:0`; None: the accelerator of the run's trainer.

    Raises:
        ConfigError: this machine has no such device.
    """
    chosen: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    if device is not None:
        kind, _, number = device.partition(":")
        chosen |= {"accelerator": kind} | ({"devices": [int(number)]} if number.isdigit() else {})
    settings = replace(settings, trainer=partial(settings.trainer, **chosen))
    try:
        check_trainer(settings.trainer)
    except ConfigError as error:
        raise ConfigError(f"device: got {device or 'none, so that of the run'}; {error}; try device=cpu") from error
    return settings
