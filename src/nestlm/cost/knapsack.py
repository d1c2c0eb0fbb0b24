"""The exact multiple-choice knapsack: one choice per site, least loss, under a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from nestlm.cost.table import CostTable
from nestlm.spec import Budget, SubnetSpec


def cheapest_loss(losses: Sequence[Sequence[float]], *, table: CostTable, budget: Budget) -> SubnetSpec:
    """The spec of least summed loss whose cost is at or below the budget.

    Args:
        losses: per site one number a choice, in the order of the space; lower is better.
        table: prices of the same choices.
        budget: the bound, which is never crossed.

    Raises:
        BudgetError: even the smallest sub-network costs more.
    """
    table.check(budget)
    space = table.space
    if table.fits(space.full(), budget):
        return space.full()
    counts = [len(space.choices[site]) for site in space.sites]
    objective = np.concatenate(
        [np.asarray(row[:count], dtype=float) for row, count in zip(losses, counts, strict=True)]
    )
    prices = np.concatenate([np.asarray(row, dtype=float) for row in table.prices]) / table.full_cost
    one_choice_per_site = np.repeat(np.eye(len(counts)), counts, axis=1)
    allowance = budget.share - table.constant / table.full_cost
    margin = 0.0
    # The solver keeps bounds to about 1e-6 only; a spec that slips over is refused and asked for again, tighter.
    for _ in range(8):
        solution = milp(
            objective,
            integrality=np.ones_like(objective),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_choice_per_site, 1, 1),
                LinearConstraint(prices[None, :], -np.inf, allowance - margin),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            break
        chosen = [int(part.argmax()) for part in np.split(solution.x, np.cumsum(counts)[:-1])]
        spec = space.spec(dict(zip(space.sites, chosen, strict=True)))
        if table.fits(spec, budget):
            return spec
        margin = max(2 * margin, 1e-7)
    return space.smallest()
