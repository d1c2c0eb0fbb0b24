"""Fit prices to times: a constant plus a price a (site, choice), as cost tables add them up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from nestlm.cost.table import Rows
from nestlm.spec import SearchSpace

Array = NDArray[np.float64]


def fit_prices(
    reach: Array, times: Array, *, space: SearchSpace, alike: Sequence[int], known: Array | None = None
) -> tuple[float, Rows]:
    """Fit a constant and prices to times with the least relative errors, wider never cheaper.

    The unknowns are increments between neighbouring choices, none negative (Lawson and Hanson's least squares). An
    increment that every run paid at all sites alike cannot be told from the constant, and belongs to it.

    Args:
        reach: share of the tokens of each run that take at each site this choice or a wider one, (runs, sites, max
            choices); 0 where a site is skipped.
        times: of the runs, positive.
        space: the choices.
        alike: a number a site; sites with the same number share their prices.
        known: part of each time that is explained already, the constant included, which is then 0.
    """
    members = np.array([[number == group for number in alike] for group in sorted(set(alike))], dtype=float)
    counts = np.einsum("gs,rsk->rgk", members, reach)  # (runs, groups, choices)
    told_apart = (np.ptp(counts, axis=0) if known is None else counts.max(0)) > 0
    unknown = np.ones(len(times)) if known is None else np.zeros(len(times))
    columns = np.concatenate([unknown[:, None], counts[:, told_apart]], axis=1)
    explained = np.zeros(len(times)) if known is None else known
    solution, _ = nnls(columns / times[:, None], (times - explained) / times)
    increments = np.zeros(told_apart.shape)
    increments[told_apart] = solution[1:]
    by_group = dict(zip(sorted(set(alike)), increments.cumsum(1).tolist(), strict=True))
    rows = tuple(
        tuple(by_group[number][: len(widths)]) for number, widths in zip(alike, space.choices.values(), strict=True)
    )
    return float(solution[0]), rows


def predict(reach: Array, *, constant: float, rows: Rows) -> Array:
    """Predict the times of runs, (runs,), from prices: the inverse of `fit_prices`."""
    increments = np.zeros(reach.shape[1:])
    for index, row in enumerate(rows):
        increments[index, : len(row)] = np.diff(row, prepend=0.0)
    return constant + np.einsum("rsk,sk->r", reach, increments)


def mean_error(predicted: Array, times: Array) -> float:
    """Return the mean absolute error of predicted times, relative to the times."""
    return float(np.mean(np.abs(predicted - times) / times))
