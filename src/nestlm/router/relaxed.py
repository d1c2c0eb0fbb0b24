"""Random choices with gradients to the router: straight-through gates, soft masks, and the cost loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestlm.distributed.collectives import ALL_ROWS, RowShard
from nestlm.nn.policy import Decision, Policy, Width, constant, expand_bands
from nestlm.spec import SearchSpace, Site

LEAST_LOG = -1e4  # 0 times it is 0


def gumbel_noise(shape: torch.Size, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Tensor:
    """Draw standard Gumbel noise: the argmax of logits plus this noise is a sample from their softmax.

    Args:
        shape: of the logits; the first dimension is this rank's rows where ranks share a step.
        generator: for the noise of the rows of all ranks.
        row_shard: this rank's rows.
    """
    everywhere = (row_shard.global_rows(shape[0]), *shape[1:])
    uniform = row_shard.local_rows(torch.rand(everywhere, generator=generator)).clamp_min(1e-20)
    return -(-uniform.log()).log()


def sample_choices(logits: Tensor, *, generator: torch.Generator, row_shard: RowShard = ALL_ROWS) -> Tensor:
    """Draw choice indices from softmax(logits): (..., K) to (...)."""
    return (logits + gumbel_noise(logits.shape, generator=generator, row_shard=row_shard).to(logits)).argmax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) in nats, (..., K) to (...); logits may be -inf."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities.clamp_min(LEAST_LOG)).sum(-1)


def tail_probabilities(probabilities: Tensor) -> Tensor:
    """Return the probability that each choice or a wider one is taken, (..., K): that the units it adds run."""
    return probabilities.flip(-1).cumsum(-1).flip(-1)


def straight_through(probabilities: Tensor) -> Tensor:
    """Return gates of value 1, (..., K), whose gradient is that of the probability that the units of a choice run.

    Units outside the drawn prefix are not computed and get their gradient in other draws (our choice).
    """
    soft = tail_probabilities(probabilities)
    return 1.0 + (soft - soft.detach())


def gated_policy(space: SearchSpace, probabilities: Tensor, choices: Tensor) -> Policy:
    """Return the policy that runs one drawn sub-network for all tokens, with straight-through gates.

    Args:
        space: sites and choices.
        probabilities: (sites, max choices), 0 where a site has fewer.
        choices: index that was drawn at each site, (sites,).
    """
    gates = straight_through(probabilities)
    decisions: dict[Site, Decision] = {}
    for row, (site, index) in enumerate(zip(space.sites, choices.tolist(), strict=True)):
        widths = space.choices[site][: index + 1]
        decisions[site] = Decision(Width(widths[-1]), expand_bands(gates[row, : index + 1], widths), probabilities[row])
    return constant(decisions)


def gated_tokens(widths: tuple[int, ...], probabilities_BLK: Tensor, index_BL: Tensor) -> Decision:
    """Return the decision that runs drawn choices (B, L) of one site, with straight-through gates."""
    return Decision(Width.per_row(widths, index_BL), straight_through(probabilities_BLK), probabilities_BLK)


def soft_mask(widths: tuple[int, ...], logits: Tensor, *, noise: Tensor, temperature: float, gain: float) -> Decision:
    """Return the decision that runs a whole site with each unit weighed by a Gumbel-softmax sample.

    The weight is the probability that the unit runs, as in LLaMaFlex and Nemotron Elastic.

    Args:
        widths: of the site's choices.
        logits: (K,) or (B, L, K).
        noise: from `gumbel_noise`, of the shape of the logits.
        temperature: of the sample; towards 0 it becomes one choice.
        gain: factor of the logits.
    """
    drawn = ((gain * logits + noise) / temperature).softmax(-1)
    return Decision(gate=expand_bands(tail_probabilities(drawn), widths), probabilities=(gain * logits).softmax(-1))


def mean_probabilities(space: SearchSpace, decisions: Mapping[Site, Decision]) -> Tensor | None:
    """Stack the distributions from which the choices of a forward pass were drawn.

    Returns:
        (sites, max choices), or (B, sites, max choices) as means over tokens; None where a choice was not drawn.
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
    """Return how far a cost c is from its budget b beyond a dead zone: `max(0, |c/b - 1| - zone)`."""
    return ((expected_share / target - 1.0).abs() - dead_zone).clamp_min(0.0)
