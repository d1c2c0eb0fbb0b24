"""Optimizer and learning-rate schedule of a training stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from nestlm.errors import ConfigError


@dataclass(frozen=True)
class OptimSettings:
    """The optim group.

    Attributes:
        optimizer: makes a torch optimizer from parameter groups, each with its own learning rate.
        warmup_share: share of the steps in which the rate rises to its peak.
        final_share: share of the peak that the cosine ends at.
        clip_norm: gradients are scaled down to this norm.
    """

    optimizer: Callable[..., Optimizer]
    warmup_share: float
    final_share: float
    clip_norm: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share < 1 or not 0 <= self.final_share <= 1:
            raise ConfigError(
                f"optim: got warmup_share={self.warmup_share}, final_share={self.final_share}, wanted shares of 1"
            )
        if self.clip_norm <= 0:
            raise ConfigError(f"optim.clip_norm: got {self.clip_norm}, wanted a positive norm")

    def rate(self, step: int, *, num_steps: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then a cosine.

        The number of steps is explicit: asking the trainer for it drops the saved state of the loader.
        """
        warmup = max(1, round(self.warmup_share * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * done))
