"""What a finished run answers to a budget, and the reading of the answers that it kept in `specs/`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nestlm.cost.table import PriceList
from nestlm.errors import BudgetError, CheckpointError
from nestlm.model.weights_io import CURE
from nestlm.nn.policy import Policy, fixed
from nestlm.router.base import Answer, Router
from nestlm.spec import Budget, SubnetSpec
from nestlm.utils.json_files import REASON_LENGTH, read_json


@dataclass(frozen=True)
class AtBudget:
    """What a router answers to a budget.

    Attributes:
        budget: as it was asked.
        router: its label, as in the run's tables.
        answer: the policy; with the one sub-network that it stands for, or the plan by which tokens differ.
        achieved: cost as a share of the whole model's, of the kind that the run counts; None where tokens differ and
            nothing has been counted yet.
        prices: of what the router chooses.
    """

    budget: Budget
    router: str
    answer: Answer
    achieved: float | None
    prices: PriceList

    @property
    def policy(self) -> Policy:
        """The policy that the decoder is called with."""
        return self.answer.policy

    @property
    def spec(self) -> SubnetSpec | None:
        """The one sub-network that serves all tokens; None where tokens differ."""
        return self.answer.spec


def recall(path: Path, budget: Budget, *, router: Router, prices: PriceList) -> AtBudget:
    """Read what a run's router answered to a budget, and price its sub-network again.

    Args:
        path: of a file in `specs/`.
        budget: the one that it answers.
        router: the run's own.
        prices: of sub-networks, in all kinds that a budget may limit.

    Raises:
        CheckpointError: the file says something else, or its sub-network costs more than the budget, or not what the
            file says.
    """
    kept = read_json(path, cure=CURE)
    try:
        label, achieved = str(kept["router"]), float(kept["achieved"])
        if "plan" in kept:
            answer = router.recall(budget, kept["plan"])
        else:
            spec = router.prices.space.spec_from_axes(kept["widths"])
            answer = Answer(fixed(spec), spec)
    except BudgetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error)[:REASON_LENGTH]
        raise CheckpointError(f"{path} is damaged, or of another version of nestlm ({reason}); {CURE}") from error
    problem = mispriced(answer.spec, budget, achieved, prices=prices)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}; {CURE}")
    return AtBudget(budget, label, answer, achieved, router.prices)


def mispriced(spec: SubnetSpec | None, budget: Budget, achieved: float, *, prices: PriceList) -> str | None:
    """What is wrong with the cost of a recalled answer: above its budget, or another than was written."""
    if spec is None:
        return None if math.isfinite(achieved) and achieved > 0 else "it achieves no share of the whole model's cost"
    if not prices.fits(spec, budget):
        return f"its sub-network costs more than the budget {budget}"
    share = prices.main.share(spec)
    if not math.isclose(share, achieved, rel_tol=1e-9):
        return f"its sub-network costs {share:.6g} of the whole model, not {achieved:.6g}"
    return None
