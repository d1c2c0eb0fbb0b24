"""Devices and precision of a stage, read from its trainer's arguments: this machine need not have those devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nestlm.distributed.strategy import ShardedStrategy

DTYPES = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ComputePrecision:
    """Precision of a trainer.

    Attributes:
        dtype: of products.
        mixed: whether weights stay in float32 and are cast for each product.
    """

    dtype: torch.dtype
    mixed: bool

    @classmethod
    def from_trainer(cls, trainer: Callable[..., Any]) -> ComputePrecision | None:
        """Read the precision; None where torch has no such dtype. Lightning takes a bare 16 or bf16 for mixed."""
        name, _, kind = str(arguments(trainer).get("precision") or "32-true").partition("-")
        if name not in DTYPES:
            return None
        return cls(DTYPES[name], mixed=kind == "mixed" or (not kind and name in ("16", "bf16")))


@dataclass(frozen=True)
class DeviceLayout:
    """Devices of a stage.

    Attributes:
        on_cuda: whether they are GPUs.
        ranks: how many there are; each takes its share of a step's rows.
        shards: of them, that hold one copy of a model between them; None where each holds its own as it is.
    """

    on_cuda: bool
    ranks: int = 1
    shards: int | None = None

    @classmethod
    def from_trainer(cls, trainer: Callable[..., Any]) -> DeviceLayout:
        """Read the devices from a trainer's arguments; `auto` is what this machine has."""
        known = arguments(trainer)
        kind = known.get("accelerator", "auto")
        on_cuda = kind in ("gpu", "cuda") or (kind == "auto" and torch.cuda.is_available())
        ranks = number(known.get("devices", "auto"), on_cuda=on_cuda) * int(known.get("num_nodes", 1))
        strategy = known.get("strategy")
        if not isinstance(strategy, partial) or strategy.func is not ShardedStrategy:
            return cls(on_cuda, ranks)
        shards = strategy.keywords["shards"]
        return cls(on_cuda, ranks, ranks if shards is None else shards)

    def __str__(self) -> str:
        kind = "GPU" if self.on_cuda else "CPU"
        held = "" if self.shards is None else f", a copy of the model over every {self.shards} of them"
        return f"1 {kind}{held}" if self.ranks == 1 else f"{self.ranks} ranks, each a {kind}{held}"

    def device_memory(self) -> int | None:
        """Return the bytes of this machine's device; None where it has no device of the trainer's kind."""
        if self.on_cuda:
            return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.ranks


def arguments(trainer: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments that the config gives to Lightning's Trainer."""
    return getattr(trainer, "keywords", {})


def number(devices: Any, *, on_cuda: bool) -> int:
    """Count the devices that a trainer's `devices` argument names."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if on_cuda else 1
    return int(devices)
