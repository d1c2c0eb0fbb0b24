"""Sampling of the next token: greedy, by temperature, and from the nucleus."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from nestlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature and nucleus sampling (Holtzman et al., arXiv 1904.09751).

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set of likeliest tokens that holds this much probability.
        seed: the random number of the n-th token depends on seed and n only, so a row is the same in any batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: got {self.temperature}, wanted 0 (the likeliest token) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p: got {self.top_p}, wanted more than 0, at most 1")

    def pick(self, logits_BV: Tensor, *, number: int) -> Tensor:
        """Draw one token a row, (B,).

        Args:
            logits_BV: logits of the next token.
            number: number of tokens that were drawn before.
        """
        if self.temperature == 0.0:
            return logits_BV.argmax(-1)
        chances_BV = (logits_BV.double() / self.temperature).softmax(-1)
        ordered_BV = chances_BV.sort(-1, descending=True).values
        enough_B1 = (ordered_BV.cumsum(-1) < self.top_p).sum(-1, keepdim=True).clamp_max(chances_BV.shape[-1] - 1)
        chances_BV = chances_BV * (chances_BV >= ordered_BV.gather(-1, enough_B1))
        # summed by token number: the order by probability would change where two are almost equal
        sums_BV = chances_BV.cumsum(-1)
        drawn_B1 = Random(f"sampling/{self.seed}/{number}").random() * sums_BV[:, -1:]
        return torch.searchsorted(sums_BV, drawn_B1, right=True).squeeze(-1)


GREEDY = Sampling()
