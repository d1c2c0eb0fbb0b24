"""Shared by signals: random choices to learn from, and the rank correlation of predictions with measurements."""

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
    """Draw choice indices for a batch.

    Each sequence prefers wide or narrow choices, by a factor of exp(skew * normal) from one choice to the next: one
    factor for all sites times one for each site. So all budgets occur, and the effect of a site on later tokens can be
    told from that of other sites (our choice).

    Args:
        space: sites and choices.
        shape: (B, L).
        per_token: whether each token draws, or each sequence.
        skew: standard deviation of the preferences.
        generator: for all draws.

    Returns:
        (sites, B, L) per token, or (sites, B).
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
    """Return Spearman's rank correlation; None for fewer than 3 values, or where one side is constant."""
    if len(real) < 3 or float(real.std()) == 0.0 or float(predicted.std()) == 0.0:
        return None
    return float(np.corrcoef(*(rankdata(side.cpu().double().numpy()) for side in (predicted, real)))[0, 1])
