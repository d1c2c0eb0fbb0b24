"""The exact multiple-choice knapsack: one choice per site, least loss, under all limits of a budget.

Sites of a block that may be skipped are one item: skipping it, or running it at any widths. So a skipped block's widths
neither cost nor lose anything.

The multipliers of the linear relaxation give every choice a reduced loss of 0 or more, and a spec's reduced losses sum
to at most what it loses above the relaxed optimum. So a dynamic programme over partial specs keeps those whose sum is
within a gap, which grows until a spec within it is found, at the latest to what the rounded relaxation loses. For 64
sites that takes tens of milliseconds, where an integer solver takes up to seconds. But where choices are worth nearly
the same and two limits bind, too many partial specs are as good; there the best spec is taken that an integer solver
finds within a number of nodes, some seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds as SolverBounds
from scipy.optimize import LinearConstraint, linprog, milp

from nestlm.cost.table import Bound, PriceList
from nestlm.spec import Budget, SearchSpace, Site, SubnetSpec

Array = NDArray[np.float64]
Choices = NDArray[np.intp]
ROUNDING = 1e-9  # relative; what passes by it is compared exactly in the end
SOLVER = 1e-6  # relative; linear solvers keep bounds to about a tenth of this
MOST_PARTIAL = 20_000  # specs within a gap; where more are as good, the integer solver is faster
MOST_NODES = 500  # of the integer solver; a number of nodes, unlike a time, gives the same spec everywhere
FIRST_GAP = 1 / 64  # of what the rounded relaxation loses; doubled, since partial specs multiply with the gap


def cheapest_loss(losses: Sequence[Sequence[float]], *, prices: PriceList, budget: Budget) -> SubnetSpec:
    """Find the spec of least summed loss that keeps the budget.

    Args:
        losses: per site one number a choice, in the order of the space; lower is better.
        prices: of the same choices.
        budget: its limits, none of which is ever crossed.

    Raises:
        BudgetError: even the smallest sub-network is above a limit.
    """
    return cheapest_within(losses, bounds=prices.bounds(budget), space=prices.space)


def cheapest_within(losses: Sequence[Sequence[float]], *, bounds: Sequence[Bound], space: SearchSpace) -> SubnetSpec:
    """Find the spec of least summed loss under bounds that the smallest sub-network keeps."""
    if all(bound.fits(space.full()) for bound in bounds):
        return space.full()
    rows = [
        np.array(row[: len(space.choices[site])], dtype=float) for site, row in zip(space.sites, losses, strict=True)
    ]
    # often one limit decides: what is best under it alone keeps the others too, and one limit is searched faster
    for tried in (*([bound] for bound in bounds), bounds):
        spec = best_within(tried, rows, space=space)
        if spec is not None and all(bound.fits(spec) for bound in bounds):
            return spec
    return space.smallest()


def best_within(bounds: Sequence[Bound], rows: Sequence[Array], *, space: SearchSpace) -> SubnetSpec | None:
    """Find the spec of least summed loss that the bounds accept; None where the search finds none.

    Args:
        bounds: the limits, in shares of their tables.
        rows: per site the losses of its choices, (choices,).
        space: the choices.
    """
    size = max(float(np.ptp(row)) for row in rows) or 1.0  # a linear solver's tolerances are absolute
    losses = [(row - row.min()) / size for row in rows]
    prices = [np.array([bound.table.prices[row] for bound in bounds], dtype=float).T for row in range(len(rows))]
    items = [Items.of(picks, losses, prices) for picks in joint_choices(space)]
    # a little more than allowed, for sums that are rounded; `first_that_fits` is exact
    allowances = np.array(
        [(bound.share + ROUNDING) * bound.table.whole - bound.table.constant for bound in bounds], dtype=float
    )
    relaxed = relax(items, allowances)
    gap = FIRST_GAP * relaxed.gap
    while gap < 2 * relaxed.gap:
        found = search(items, allowances, relaxed.multipliers, gap=min(gap, relaxed.gap))
        if found is None:
            break
        spec = first_that_fits(found, items, bounds=bounds, space=space)
        if spec is not None:
            return spec
        gap *= 2
    return solve(items, allowances, bounds=bounds, space=space)


def solve(items: list[Items], allowances: Array, *, bounds: Sequence[Bound], space: SearchSpace) -> SubnetSpec | None:
    """Find the best spec that an integer solver reaches within `MOST_NODES`; None where it reaches none.

    The solver keeps bounds only to a tolerance: a spec that exceeds one is searched for again with a tighter bound.
    """
    scale = np.maximum(np.abs(allowances), np.finfo(float).tiny)
    counts = [len(item.losses) for item in items]
    shares = np.concatenate([item.prices for item in items]).T / scale[:, None]
    one_choice = LinearConstraint(np.repeat(np.eye(len(items)), counts, axis=1), 1, 1)
    for margin in (0.0, *(SOLVER * 2**power for power in range(8))):
        limits = [
            LinearConstraint(row[None, :], -np.inf, float(limit) - margin)
            for row, limit in zip(shares, allowances / scale, strict=True)
        ]
        solution = milp(
            np.concatenate([item.losses for item in items]),
            integrality=np.ones(sum(counts)),
            bounds=SolverBounds(0, 1),
            constraints=[one_choice, *limits],
            options={"mip_rel_gap": 0.0, "node_limit": MOST_NODES},
        )
        if solution.x is None:
            break
        picked = [int(part.argmax()) for part in np.split(solution.x, np.cumsum(counts)[:-1])]
        spec = first_that_fits(np.array([picked]), items, bounds=bounds, space=space)
        if spec is not None:
            return spec
    return None


@dataclass(frozen=True)
class Items:
    """The choices of one site, or of all sites of a block that may be skipped; the first is the cheapest.

    Attributes:
        losses: (choices,).
        prices: in the units of the tables, (choices, bounds).
        picks: the choice index at each site of the item, and 0 at all others, (choices, sites).
    """

    losses: Array
    prices: Array
    picks: Choices

    @classmethod
    def of(cls, picks: Choices, losses: Sequence[Array], prices: Sequence[Array]) -> Items:
        """Sum the losses and prices of the choices in `picks`, which holds -1 at sites that do not count."""
        counts = picks >= 0
        taken = np.maximum(picks, 0)
        rows = np.nonzero(counts.any(0))[0].tolist()
        lost = [counts[:, row] * losses[row][taken[:, row]] for row in rows]
        paid = [counts[:, row, None] * prices[row][taken[:, row]] for row in rows]
        return cls(np.sum(lost, axis=0), np.sum(paid, axis=0), taken)


@dataclass(frozen=True)
class Relaxed:
    """The optimum when choices may be mixed.

    Attributes:
        multipliers: what a unit of each bound is worth in loss, (bounds,), 0 or more.
        gap: at most so much more than the relaxed optimum is lost by the best spec.
    """

    multipliers: Array
    gap: float


def relax(items: list[Items], allowances: Array) -> Relaxed:
    """Solve the linear relaxation, and round it down to a spec that keeps the bounds."""
    counts = [len(item.losses) for item in items]
    scale = np.maximum(np.abs(allowances), np.finfo(float).tiny)
    relaxed = linprog(
        np.concatenate([item.losses for item in items]),
        A_ub=np.concatenate([item.prices for item in items]).T / scale[:, None],
        b_ub=allowances / scale - SOLVER,
        A_eq=np.repeat(np.eye(len(items)), counts, axis=1),
        b_eq=np.ones(len(items)),
    )
    # any multipliers give a valid bound, and the smallest choices are a valid spec; the solver's are only better
    multipliers, rounded = np.zeros(len(scale)), [0] * len(items)
    if relaxed.x is not None:
        multipliers = np.maximum(-relaxed.ineqlin.marginals, 0.0) / scale
        mixtures = np.split(relaxed.x, np.cumsum(counts)[:-1])
        rounded = [
            cheapest_of(np.nonzero(mixture > ROUNDING)[0], item.prices)
            for item, mixture in zip(items, mixtures, strict=True)
        ]
    optimum = sum(float((item.losses + item.prices @ multipliers).min()) for item in items) - multipliers @ allowances
    lost = sum(float(item.losses[index]) for item, index in zip(items, rounded, strict=True))
    return Relaxed(multipliers, lost - float(optimum) + ROUNDING * len(items))


def cheapest_of(choices: Choices, prices: Array) -> int:
    """Return the choice, among some, that no other undercuts in any bound; where there is none, the item's first."""
    (lowest,) = np.nonzero(np.all(prices[choices] == prices[choices].min(0), axis=1))
    return int(choices[lowest[0]]) if len(lowest) else 0


def search(items: list[Items], allowances: Array, multipliers: Array, *, gap: float) -> Choices | None:
    """Find the best specs by dynamic programming over items, among those within `gap` of the relaxed optimum.

    Args:
        items: the blocks and sites to choose for.
        allowances: what the items may cost, for each bound.
        multipliers: prices of cost in the relaxed optimum, for each bound.
        gap: how far above the relaxed optimum a spec may be.

    Returns:
        Choices (specs, items), the lowest loss first; None if there are more than `MOST_PARTIAL` partial specs.
    """
    cheapest = np.array([item.prices.min(0) for item in items])
    cheapest_after = cheapest[::-1].cumsum(0)[::-1] - cheapest
    costs, lost, reduced = np.zeros((1, len(allowances))), np.zeros(1), np.zeros(1)
    history: list[tuple[Choices, Choices]] = []
    for item, after in zip(items, cheapest_after, strict=True):
        above = item.losses + item.prices @ multipliers
        above -= above.min()
        (choices,) = np.nonzero(above <= gap)
        parents = np.repeat(np.arange(len(lost)), len(choices))
        taken = np.tile(choices, len(lost))
        sums = reduced[parents] + above[taken]
        new_costs = costs[parents] + item.prices[taken]
        kept = np.nonzero((sums <= gap) & np.all(new_costs <= allowances - after, axis=1))[0]
        new_costs, new_lost = new_costs[kept], lost[parents[kept]] + item.losses[taken[kept]]
        best = unbeaten(new_costs, new_lost)
        costs, lost, reduced = new_costs[best], new_lost[best], sums[kept][best]
        if len(best) > MOST_PARTIAL:
            return None
        history.append((parents[kept][best], taken[kept][best]))
    # what the relaxed optimum leaves unspent also counts against the gap
    within = np.nonzero(reduced + (allowances - costs) @ multipliers <= gap)[0]
    rows = within[np.argsort(lost[within], kind="stable")]
    picked = []
    for parents, taken in reversed(history):
        picked.append(taken[rows])
        rows = parents[rows]
    return np.stack(picked[::-1], axis=1)


def unbeaten(costs: Array, lost: Array) -> Choices:
    """Return the indices of the partial specs that no other dominates.

    With one bound, a spec dominates those that cost as much or more and lose as much or more. With several bounds, only
    specs of equal cost are compared.
    """
    if costs.shape[1] == 1:
        order = np.lexsort((lost, costs[:, 0]))
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], lost[order])))[:-1]
        return order[lost[order] < best_before]
    # one key to sort by: equal costs have the same; where others share it too, a double is kept, which does no harm
    mixture = costs @ np.sqrt(np.arange(2.0, 2.0 + costs.shape[1]))
    order = np.lexsort((lost, mixture))
    ordered = costs[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    return order[first]


def first_that_fits(
    found: Choices, items: Sequence[Items], *, bounds: Sequence[Bound], space: SearchSpace
) -> SubnetSpec | None:
    """Return the first spec of `found`, (specs, items), that the bounds accept; None where they accept none."""
    for row in found.tolist():
        picked = np.sum([item.picks[choice] for item, choice in zip(items, row, strict=True)], axis=0)
        spec = space.spec(dict(zip(space.sites, picked.tolist(), strict=True)))
        if all(bound.fits(spec) for bound in bounds):
            return spec
    return None


def joint_choices(space: SearchSpace) -> list[Choices]:
    """List the items of a space: choice indices, (choices, sites), with -1 where a site does not count."""
    rows = {site: row for row, site in enumerate(space.sites)}
    inside: dict[Site, list[Site]] = {}
    for site in space.sites:
        inside.setdefault(space.enclosing.get(site, site), []).append(site)
    items = []
    for first, sites in inside.items():
        skips = first.is_block
        others = [site for site in sites if site != first]
        combined = list(product(*(range(len(space.choices[site])) for site in others))) if skips else []
        picks = np.full((1 + len(combined) if skips else len(space.choices[first]), len(space.sites)), -1)
        picks[:, rows[first]] = [0, *[1] * len(combined)] if skips else range(len(picks))
        for column, site in enumerate(others):
            picks[1:, rows[site]] = [choice[column] for choice in combined]
        items.append(picks)
    return items


def use_up(
    spec: SubnetSpec, losses: Sequence[Sequence[float]], *, space: SearchSpace, bounds: tuple[Bound, ...]
) -> SubnetSpec:
    """Widen sites, a choice at a time and where it adds least to the losses first, until no site can grow.

    A router's distribution is sharp, so its likeliest spec may lie well below the budget; wider seldom hurts (our
    choice).
    """
    indices = dict(zip(space.sites, space.indices(spec), strict=True))
    rows = {site: row for row, site in enumerate(space.sites)}

    def step(site: Site) -> float:
        row, index = losses[rows[site]], indices[site]
        return row[index + 1] - row[index]

    growing = {site for site in space.sites if indices[site] + 1 < len(space.choices[site])}
    while awake := [site for site in sorted(growing) if space.runs(site, indices)]:
        site = min(awake, key=step)
        wider = space.spec(indices | {site: indices[site] + 1})
        if all(bound.fits(wider) for bound in bounds):
            indices[site] += 1
        else:
            growing.discard(site)
        if indices[site] + 1 >= len(space.choices[site]):
            growing.discard(site)
    return space.spec(indices)
