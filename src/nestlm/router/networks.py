"""The small networks of routers: one per site (arXiv 2406.10260), and the features that they see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.errors import ConfigError
from nestlm.spec import SearchSpace

BUDGET_FEATURES = 9
STEP_OFFSET = 4.0  # so that added losses start small: softplus(-4) = 0.018


def embed_share(shares: Tensor) -> Tensor:
    """Return smooth features of budgets as shares in [0, 1]: (n,) to (n, BUDGET_FEATURES).

    All waves are slow, so that a budget between two trained ones lies between their features (our choice).
    """
    waves = torch.arange(1, (BUDGET_FEATURES - 1) // 2 + 1, dtype=shares.dtype, device=shares.device)
    angles = shares[:, None] * waves * math.pi / 2
    return torch.cat((shares[:, None], angles.sin(), angles.cos()), dim=-1)


@dataclass(frozen=True)
class SiteWeights:
    """The two-layer network of one site, for one budget: `scale * (LeakyReLU(x W + b + budget) V + c)`.

    Attributes:
        input: W, (D, hidden width).
        input_bias: b, (hidden width,).
        output: V, (hidden width, K).
        output_bias: c, (K,).
        budget: what the budget adds to the hidden layer, (hidden width,).
        scale: factor of each output, (K,).
    """

    input: Tensor
    input_bias: Tensor
    output: Tensor
    output_bias: Tensor
    budget: Tensor
    scale: Tensor


class SiteNetworks(nn.Module):
    """Two-layer networks with LeakyReLU(0.1), one a site, stacked in tensors.

    Attributes:
        counts: number of choices of each site.
        valid: True where a site has a choice, (sites, max choices).
    """

    valid: Tensor

    def __init__(self, space: SearchSpace, *, num_inputs: int, hidden_width: int, init_std: float) -> None:
        """Allocate the weights with zeros; `init_weights` fills them.

        Args:
            space: sites and choices.
            num_inputs: features that each network sees.
            hidden_width: width of the hidden layers.
            init_std: standard deviation of the first weights.

        Raises:
            ConfigError: the width is not positive.
        """
        super().__init__()
        if hidden_width <= 0:
            raise ConfigError(f"router.network.hidden_width: got {hidden_width}, wanted a positive width")
        sites, choices = len(space.sites), space.max_choices
        self.init_std = init_std
        self.input = nn.Parameter(torch.zeros(sites, num_inputs, hidden_width))
        self.input_bias = nn.Parameter(torch.zeros(sites, 1, hidden_width))
        self.output = nn.Parameter(torch.zeros(sites, hidden_width, choices))
        self.output_bias = nn.Parameter(torch.zeros(sites, 1, choices))
        self.counts = [len(space.choices[site]) for site in space.sites]
        valid = torch.arange(choices) < torch.tensor(self.counts)[:, None]
        self.register_buffer("valid", valid, persistent=False)

    def init_weights(self, *, seed: int) -> None:
        """Draw normal weights of standard deviation `init_std`, the same for a seed on any device."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad():
            for weight in (self.input, self.output):
                weight.copy_(torch.randn(weight.shape, generator=generator) * self.init_std)

    def forward(self, features: Tensor) -> Tensor:
        """Run all networks: features (n, inputs) to (n, sites, max choices); -inf where a site has fewer choices."""
        features = features.to(self.input.dtype)
        hidden = F.leaky_relu(features @ self.input + self.input_bias, 0.1)  # (sites, n, hidden width)
        logits = (hidden @ self.output + self.output_bias).transpose(0, 1)
        return logits.masked_fill(~self.valid, -math.inf)

    def at(self, row: int, features: Tensor, *, more: Tensor | None = None) -> Tensor:
        """Run the network of one site: (..., inputs) to (..., K).

        Args:
            row: number of the site in the space.
            features: all inputs, or the first ones.
            more: contribution of the last inputs to the hidden layer, from `part`.
        """
        weight = self.input[row]
        # one product of a matrix, also for a batch of sequences
        inner = F.linear(features, weight[: features.shape[-1]].T) + self.input_bias[row, 0]
        if more is not None:
            inner = inner + more
        count = self.counts[row]
        return F.linear(F.leaky_relu(inner, 0.1), self.output[row, :, :count].T, self.output_bias[row, 0, :count])

    def part(self, row: int, features: Tensor) -> Tensor:
        """Return what the last inputs add to the hidden layer of one site, (..., hidden width).

        Inputs that are the same for many tokens, such as the budget's, so run once.
        """
        return features @ self.input[row, -features.shape[-1] :]

    def site_weights(
        self, row: int, *, num_inputs: int, budget: Tensor | None = None, scale: Tensor | None = None
    ) -> SiteWeights:
        """Return the network of one site as tensors of its own.

        Args:
            row: number of the site in the space.
            num_inputs: the first inputs, whose weights are returned.
            budget: what the other inputs add to the hidden layer, (hidden width,); None adds nothing.
            scale: factor of each output, (K,); None: 1.
        """
        count = self.counts[row]
        return SiteWeights(
            input=self.input[row, :num_inputs],
            input_bias=self.input_bias[row, 0],
            output=self.output[row, :, :count],
            output_bias=self.output_bias[row, 0, :count],
            budget=torch.zeros(self.input.shape[-1]) if budget is None else budget,
            scale=torch.ones(count) if scale is None else scale,
        )


def added_losses(steps: Tensor) -> Tensor:
    """Turn one number for each step between choices into what choices add to a loss, (..., K) to (..., K).

    The widest choice adds 0, and a narrower one never less than a wider one: units nest, so a narrower choice seldom
    helps, and a free network finds for every token a choice that it overrates (our choice).
    """
    losses = F.softplus(steps[..., :-1] - STEP_OFFSET).flip(-1).cumsum(-1).flip(-1)
    return torch.cat((losses, torch.zeros_like(steps[..., :1])), dim=-1)
