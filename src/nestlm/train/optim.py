"""Optimizer and learning-rate schedule of a training stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlm.errors import ConfigError
from nestlm.utils.deferred import Deferred

AVERAGES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimSettings:
    """The optim group.

    Attributes:
        optimizer: makes a torch optimizer from parameter groups, each with its own learning rate.
        warmup_share: share of the steps in which the rate rises to its peak.
        final_share: share of the peak that the cosine ends at.
        clip_norm: gradients are scaled down to this norm.
    """

    optimizer: Annotated[Callable[..., Optimizer], Deferred(("params", "lr"))]
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
        """Return the learning rate at a step as a share of its peak: linear warm-up, then a cosine.

        The number of steps is explicit: asking the trainer for it drops the saved state of the loader.
        """
        warmup = max(1, round(self.warmup_share * num_steps))
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * done))


class AdamWBf16States(Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its two averages in bfloat16, 4 bytes a weight, and computes in float32.

    With 8 bits of precision the average of squares stops falling where beta2 is above about 0.996, since a step then
    changes less than half of its last bit.
    """

    def __init__(
        self, params: Any, *, betas: tuple[float, float], weight_decay: float, lr: float = 1e-3, eps: float = 1e-8
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"got lr={lr}, betas={list(betas)}, weight_decay={weight_decay}, eps={eps}, wanted betas below 1, a "
                "positive eps, and 0 or more otherwise"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.register_load_state_dict_post_hook(keep_bf16)  # torch casts what it loads to the weights' dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights that have gradients; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad.float(), group)
        return loss

    def update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one weight, in float32."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in AVERAGES:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = (state[name].float() for name in AVERAGES)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        for name, value in zip(AVERAGES, (mean, square), strict=True):
            state[name].copy_(value)
        root = square.sqrt_().div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** state["step"]))


def keep_bf16(optimizer: Optimizer) -> None:
    """Put loaded averages back into bfloat16, as they were saved."""
    for state in optimizer.state.values():
        for name in AVERAGES:
            state[name] = state[name].bfloat16()
