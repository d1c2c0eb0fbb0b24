"""The arguments of Lightning's Trainer that a config may set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from nestlm.distributed.strategy import ShardedStrategy
from nestlm.errors import ConfigError


class TrainerArguments(TypedDict, total=False):
    """Arguments of Lightning's Trainer that a config may set; stages set the others.

    Attributes:
        strategy: makes the strategy of several devices.
        devices: their number on each node, -1 or `auto` for all, or their indices.
        profiler: `simple` prints the seconds of Lightning's hooks.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    strategy: Callable[..., ShardedStrategy]
    devices: int | str | Sequence[int]
    num_nodes: int
    precision: Literal["32-true", "bf16-mixed", "bf16", "16-mixed", "16", "bf16-true"]
    deterministic: bool | Literal["warn"]
    benchmark: bool | None
    detect_anomaly: bool
    profiler: Literal["simple"] | None


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError where the devices in a trainer's arguments are none that Lightning takes."""
    devices = trainer.get("devices", "auto")
    indices = devices if isinstance(devices, list) else []
    known = {
        int: devices == -1 or (isinstance(devices, int) and devices > 0),
        str: isinstance(devices, str) and re.fullmatch(r"auto|-1|\d+(,\d+)*", devices) is not None,
        list: bool(indices) and len(set(indices)) == len(indices) and min(indices) >= 0,
    }
    if not known.get(type(devices), False):
        raise ConfigError(
            f"trainer.devices: got {devices!r}, wanted their number, -1 or auto for all, or their indices"
        )
    if trainer.get("accelerator") == "cpu" and (devices == "-1" or devices == -1 or indices):
        raise ConfigError(
            f"trainer.devices: got {devices!r} with trainer.accelerator=cpu, wanted a number of processes"
        )
    if trainer.get("num_nodes", 1) < 1:
        raise ConfigError(f"trainer.num_nodes: got {trainer['num_nodes']}, wanted 1 or more")
