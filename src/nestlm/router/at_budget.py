"""The policy of a finished run at a budget, and reading the policies that the run stored in `specs/`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nestlm.cost.table import PriceList
from nestlm.errors import BudgetError, CheckpointError
from nestlm.model.weights_io import CURE
from nestlm.nn.policy import Policy, fixed
from nestlm.router.base import RoutedPolicy, Router
from nestlm.spec import Budget, SubnetSpec
from nestlm.utils.json_files import REASON_LENGTH, read_json


@dataclass(frozen=True)
class AtBudget:
    """The policy of a finished run at a budget, with its cost.

    Attributes:
        budget: the budget that was asked for.
        router: label of the router, as in the run's tables.
        routed: the policy, with its sub-network, or with its plan where choices differ between tokens.
        achieved: cost as a share of the whole model's, of the kind that the run counts; None where choices differ
            between tokens and nothing has been counted yet.
        prices: prices of the router's choices.
    """

    budget: Budget
    router: str
    routed: RoutedPolicy
    achieved: float | None
    prices: PriceList

    @property
    def policy(self) -> Policy:
        """The policy that the decoder is called with."""
        return self.routed.policy

    @property
    def spec(self) -> SubnetSpec | None:
        """The sub-network that serves all tokens; None where choices differ between tokens."""
        return self.routed.spec


def recall(path: Path, budget: Budget, *, router: Router, prices: PriceList) -> AtBudget:
    """Read the policy that a run stored for a budget, and price its sub-network again.

    Args:
        path: file in `specs/`.
        budget: the budget of that file.
        router: the run's router.
        prices: prices of sub-networks, in all kinds that a budget may limit.

    Raises:
        CheckpointError: the file is damaged, or its sub-network costs more than the budget, or not what the file says.
    """
    kept = read_json(path, cure=CURE)
    try:
        label, achieved = str(kept["router"]), float(kept["achieved"])
        if "plan" in kept:
            routed = router.recall(budget, kept["plan"])
        else:
            spec = router.prices.space.spec_from_axes(kept["widths"])
            routed = RoutedPolicy(fixed(spec), spec)
    except BudgetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error)[:REASON_LENGTH]
        raise CheckpointError(f"{path} is damaged, or of another version of nestlm ({reason}); {CURE}") from error
    problem = cost_problem(routed.spec, budget, achieved, prices=prices)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}; {CURE}")
    return AtBudget(budget, label, routed, achieved, router.prices)


def cost_problem(spec: SubnetSpec | None, budget: Budget, achieved: float, *, prices: PriceList) -> str | None:
    """Return what is wrong with the cost of a stored policy: above its budget, or another than stored; None if right.

    Args:
        spec: its sub-network; None where choices differ between tokens.
        budget: the budget that it keeps.
        achieved: the stored cost, as a share of the whole model's.
        prices: prices of sub-networks.
    """
    if spec is None:
        return None if math.isfinite(achieved) and achieved > 0 else "it achieves no share of the whole model's cost"
    if not prices.fits(spec, budget):
        return f"its sub-network costs more than the budget {budget}"
    share = prices.main.share(spec)
    if not math.isclose(share, achieved, rel_tol=1e-9):
        return f"its sub-network costs {share:.6g} of the whole model, not {achieved:.6g}"
    return None
