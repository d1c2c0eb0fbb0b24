"""Small networks that routers are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlm.errors import ConfigError
from nestlm.spec import SearchSpace

BUDGET_FEATURES = 9
START = 4.0  # so that growths start small: softplus(-4) = 0.018


def embed_share(shares: Tensor) -> Tensor:
    """Smooth features of budgets (n,) as shares in [0, 1]: (n, BUDGET_FEATURES).

    Slow waves only, so that a budget between two trained ones lies between their features (our choice).
    """
    waves = torch.arange(1, (BUDGET_FEATURES - 1) // 2 + 1, dtype=shares.dtype, device=shares.device)
    angles = shares[:, None] * waves * math.pi / 2
    return torch.cat((shares[:, None], angles.sin(), angles.cos()), dim=-1)


class SiteNetworks(nn.Module):
    """One two-layer network with LeakyReLU(0.1) a site."""

    valid: Tensor

    def __init__(self, space: SearchSpace, *, num_inputs: int, hidden_width: int, init_std: float) -> None:
        """Allocate the weights; `init_weights` fills them."""
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
        """Normal weights of the given standard deviation, zero biases."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad():
            for weight in (self.input, self.output):
                weight.copy_(torch.randn(weight.shape, generator=generator) * self.init_std)

    def forward(self, features: Tensor) -> Tensor:
        """All sites: features (n, inputs) to logits (n, sites, max choices); -inf where a site has fewer choices."""
        features = features.to(self.input.dtype)
        hidden = F.leaky_relu(features @ self.input + self.input_bias, 0.1)  # (sites, n, hidden width)
        logits = (hidden @ self.output + self.output_bias).transpose(0, 1)
        return logits.masked_fill(~self.valid, -math.inf)

    def at(self, row: int, features: Tensor, *, more: Tensor | None = None) -> Tensor:
        """One site: (..., inputs) to a number a choice of the site, (..., K).

        Args:
            row: the site's number in the space.
            features: the first inputs.
            more: what the other inputs amount to, from `part`.
        """
        weight = self.input[row]
        # one product of a matrix, also for a batch of sequences
        inner = F.linear(features, weight[: features.shape[-1]].T) + self.input_bias[row, 0]
        if more is not None:
            inner = inner + more
        count = self.counts[row]
        return F.linear(F.leaky_relu(inner, 0.1), self.output[row, :, :count].T, self.output_bias[row, 0, :count])

    def part(self, row: int, features: Tensor) -> Tensor:
        """What the last inputs amount to before the nonlinearity, (..., hidden width): computed once where they are
        the same for many tokens.
        """  # noqa: D205
        return features @ self.input[row, -features.shape[-1] :]


def growth(steps: Tensor) -> Tensor:
    """What choices add to a loss, from a number a step (..., K): none for the widest, and no less the narrower it is.

    Units nest, so a narrower choice seldom helps. A network free to say so finds, for every token, a choice that it
    overrates (our choice).
    """
    losses = F.softplus(steps[..., :-1] - START).flip(-1).cumsum(-1).flip(-1)
    return torch.cat((losses, torch.zeros_like(steps[..., :1])), dim=-1)
