"""Random draws of choices that carry gradients to the router that they were drawn from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Decision, Mixed, Policy, by_unit, constant
from nestlm.spec import SearchSpace, Site

LEAST_LOG = -1e4  # 0 times it is 0


def gumbel_noise(shape: torch.Size, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Tensor:
    """Noise whose addition to logits makes their argmax a draw from their softmax.

    Args:
        shape: of the logits, whose first dimension is a rank's rows where a step is shared.
        generator: of the noise of all rows.
        row_shard: which rows these are.
    """
    everywhere = (row_shard.total(shape[0]), *shape[1:])
    uniform = row_shard.own(torch.rand(everywhere, generator=generator)).clamp_min(1e-20)
    return -(-uniform.log()).log()


def sample_choices(logits: Tensor, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Tensor:
    """Choice indices drawn from softmax(logits): (..., max choices) to (...)."""
    return (logits + gumbel_noise(logits.shape, generator=generator, row_shard=row_shard).to(logits)).argmax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (..., K) to (...); choices that a site has not are at -inf."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities.clamp_min(LEAST_LOG)).sum(-1)


def at_least(probabilities: Tensor) -> Tensor:
    """Probability that each choice or a wider one is taken, (..., K): that the units it adds run."""
    return probabilities.flip(-1).cumsum(-1).flip(-1)


def straight_through(probabilities: Tensor) -> Tensor:
    """Factors of the bands: their value is 1, their gradient that of the probability that the band runs.

    Units outside the drawn prefix are not computed and get their gradient in other draws (our choice).
    """
    soft = at_least(probabilities)
    return 1.0 + (soft - soft.detach())


def gated_policy(space: SearchSpace, probabilities: Tensor, choices: Tensor) -> Policy:
    """Run one drawn spec for all tokens, with straight-through gates.

    Args:
        space: the choices.
        probabilities: (sites, max choices), 0 where a site has fewer.
        choices: index drawn at each site, (sites,).
    """
    gates = straight_through(probabilities)
    decisions: dict[Site, Decision] = {}
    for row, (site, index) in enumerate(zip(space.sites, choices.tolist(), strict=True)):
        widths = space.choices[site][: index + 1]
        decisions[site] = Decision(widths[-1], by_unit(gates[row, : index + 1], widths), probabilities[row])
    return constant(decisions)


def gated_tokens(widths: tuple[int, ...], probabilities_BLK: Tensor, index_BL: Tensor) -> Decision:
    """Run what was drawn for each token at a site, with straight-through gates."""
    return Decision(Mixed(widths, index_BL), straight_through(probabilities_BLK), probabilities_BLK)


def soft_mask(widths: tuple[int, ...], logits: Tensor, *, noise: Tensor, temperature: float, gain: float) -> Decision:
    """Run the whole site, each unit weighed by how likely it runs under a Gumbel-softmax draw, (K,) or (B, L, K).

    As in LLaMaFlex and Nemotron Elastic: a gain sharpens the logits, a temperature the draw.
    """
    drawn = ((gain * logits + noise) / temperature).softmax(-1)
    return Decision(None, by_unit(at_least(drawn), widths), (gain * logits).softmax(-1))


def mean_probabilities(space: SearchSpace, decisions: Mapping[Site, Decision]) -> Tensor | None:
    """The distributions that a pass drew from: (sites, max choices), or (B, sites, max choices) as means over tokens.

    None if it drew from none.
    """
    rows = []
    for site in space.sites:
        probabilities = decisions[site].probabilities
        if probabilities is None:
            return None
        row = probabilities.mean(-2) if probabilities.ndim > 1 else probabilities
        rows.append(torch.nn.functional.pad(row, (0, space.max_choices - row.shape[-1])))
    return torch.stack(rows, dim=-2)


def budget_loss(expected_share: Tensor, target: Tensor, *, dead_zone: float) -> Tensor:
    """How far an expected cost is from its budget, relative to the budget, beyond a dead zone: |c/b - 1| - zone."""
    return ((expected_share / target - 1.0).abs() - dead_zone).clamp_min(0.0)
