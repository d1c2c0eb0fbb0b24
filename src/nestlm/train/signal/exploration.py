"""What signals share: random choices to learn from, and how well a prediction ranks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from nestlm.spec import SearchSpace


def random_choices(
    space: SearchSpace, shape: Sequence[int], *, per_token: bool, skew: float, generator: torch.Generator
) -> Tensor:
    """Choice indices for a batch of shape (B, L): (sites, B, L) by token or (sites, B) by sequence.

    Each sequence leans towards wide or narrow choices, by a factor of exp(skew * normal) a choice everywhere and by
    another one at each site: so all budgets are seen, and what a site does to later tokens is told from what others do.
    """
    batch, length = shape
    everywhere_B = torch.randn(batch, generator=generator)
    rows = []
    for widths in space.choices.values():
        lean_B = skew * (everywhere_B + torch.randn(batch, generator=generator))
        likely_BK = (lean_B[:, None] * torch.arange(len(widths))).softmax(-1)
        drawn = torch.multinomial(likely_BK, length if per_token else 1, replacement=True, generator=generator)
        rows.append(drawn if per_token else drawn[:, 0])
    return torch.stack(rows)


def rank_correlation(predicted: Tensor, real: Tensor) -> float | None:
    """Spearman's; None where there is nothing to rank."""
    if len(real) < 3 or float(real.std()) == 0.0 or float(predicted.std()) == 0.0:
        return None
    return float(np.corrcoef(*(rankdata(side.cpu().double().numpy()) for side in (predicted, real)))[0, 1])
