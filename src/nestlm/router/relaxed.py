"""A random draw of choices that carries gradients to the router that it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestlm.nn.policy import Decision, Policy, constant
from nestlm.spec import SearchSpace, Site


def sample_choices(logits: Tensor, *, generator: torch.Generator) -> Tensor:
    """Choice indices drawn from softmax(logits), by adding Gumbel noise: (..., max choices) to (...)."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-20).to(logits.device)
    return (logits - (-uniform.log()).log()).argmax(-1)


def gated_policy(space: SearchSpace, probabilities: Tensor, choices: Tensor) -> Policy:
    """Run the chosen prefixes; each unit's gate is 1 and has the gradient of the probability that it runs.

    A unit between two neighbouring choices runs when the wider one or a still wider one is taken, so its probability
    is the sum over those. Units outside the drawn prefix are not computed and get their gradient in other draws
    (straight-through prefix gates: our choice for joint tuning).

    Args:
        space: the choices.
        probabilities: (sites, max choices), 0 where a site has fewer.
        choices: index drawn at each site, (sites,).
    """
    # probability that choice k or a wider one is taken
    at_least = probabilities.flip(-1).cumsum(-1).flip(-1)
    decisions: dict[Site, Decision] = {}
    for row, (site, index) in enumerate(zip(space.sites, choices.tolist(), strict=True)):
        widths = space.choices[site][: index + 1]
        bands = torch.tensor(widths).diff(prepend=torch.tensor([0])).to(at_least.device)
        soft = at_least[row, : index + 1].repeat_interleave(bands)
        decisions[site] = Decision(widths[-1], 1.0 + (soft - soft.detach()), probabilities[row])
    return constant(decisions)


def mean_probabilities(space: SearchSpace, decisions: Mapping[Site, Decision]) -> Tensor | None:
    """The distributions that a pass drew from, as means over its tokens: (sites, max choices); None if it drew none."""
    rows = []
    for site in space.sites:
        probabilities = decisions[site].probabilities
        if probabilities is None:
            return None
        rows.append(probabilities.flatten(0, -2).mean(0) if probabilities.ndim > 1 else probabilities)
    return torch.stack(rows)


def budget_loss(expected_share: Tensor, target: Tensor, *, dead_zone: float) -> Tensor:
    """How far an expected cost is from its budget, relative to the budget, beyond a dead zone: |c/b - 1| - zone."""
    return ((expected_share / target - 1.0).abs() - dead_zone).clamp_min(0.0)
