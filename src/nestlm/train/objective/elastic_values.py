"""Values of choices, learned while elastic training draws choices at random anyway (our choice).

Where each token draws its own widths, a step of elastic training has all that a step of the value signal needs: random
choices, and each token's KL from a teacher. So a value router can start where elastic training ends, at the cost of
small networks on hidden states that were computed anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from nestlm.elastic.sampler.base import MixedSpecs, Sample
from nestlm.errors import ConfigError
from nestlm.nn.policy import Decision, Policy, Stream
from nestlm.router.dynamic.base import features
from nestlm.router.networks import SiteNetworks, added_losses
from nestlm.spec import SearchSpace, Site
from nestlm.train.objective.base import Term


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the networks that learn values of choices during elastic training.

    Attributes:
        hidden_width: width of the hidden layers; that of the value router that starts with them.
        lr: peak learning rate.
    """

    hidden_width: int
    lr: float

    def __post_init__(self) -> None:
        if self.hidden_width <= 0 or self.lr <= 0:
            raise ConfigError(
                f"elastic.values: got hidden_width={self.hidden_width}, lr={self.lr}, wanted positive numbers"
            )


class ElasticValues(nn.Module):
    """The networks of both value routers, and a linear map for the KL of the whole model from its teacher."""

    steps: Tensor

    def __init__(self, space: SearchSpace, *, hidden_size: int, hidden_width: int, seed: int) -> None:
        super().__init__()
        self.rows = {site: row for row, site in enumerate(space.sites)}
        self.last = max(self.rows.values(), key=lambda row: space.sites[row].layer)  # where most is known of a token
        self.dynamic = SiteNetworks(space, num_inputs=hidden_size, hidden_width=hidden_width, init_std=0.1)
        self.static = SiteNetworks(space, num_inputs=1, hidden_width=hidden_width, init_std=0.1)
        self.base = nn.Linear(hidden_size, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.dynamic.init_weights(seed=seed)
        self.static.init_weights(seed=seed)
        nn.init.zeros_(self.base.weight)
        nn.init.zeros_(self.base.bias)

    def record_hidden(self, policy: Policy, seen: dict[Site, Tensor]) -> Policy:
        """Return a policy that decides as `policy` does and stores hidden states in `seen`, by site."""

        def watching(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            if site in self.rows:
                seen[site] = hidden_BLD.detach()
            return policy(site, hidden_BLD, stream)

        return watching

    def term(self, seen: dict[Site, Tensor], *, indices_SBL: Tensor, kl_BL: Tensor) -> Term:
        """Return the squared error of predicting the tokens' KL from their hidden states and choices.

        Args:
            seen: hidden states by site, (B, L, D).
            indices_SBL: choice indices, (sites, B, L).
            kl_BL: KL of each token from the teacher, in nats.
        """
        self.steps += 1
        indices_SBL = indices_SBL.to(kl_BL.device)
        base_BL = dynamic_BL = static_BL = torch.zeros_like(kl_BL)
        for site, row in self.rows.items():
            inputs_BLD, index_BL1 = features(seen[site]), indices_SBL[row, :, :, None]
            if row == self.last:
                base_BL = self.base(inputs_BLD).squeeze(-1)
            dynamic_BLK = added_losses(self.dynamic.at(row, inputs_BLD))
            static_K = added_losses(self.static.at(row, inputs_BLD.new_ones(1)))
            dynamic_BL = dynamic_BL + dynamic_BLK.gather(-1, index_BL1).squeeze(-1)
            static_BL = static_BL + static_K[index_BL1.squeeze(-1)]
        dynamic_error = (base_BL + dynamic_BL - kl_BL).square().mean()
        static_error = (base_BL.detach() + static_BL - kl_BL).square().mean()
        return Term(dynamic_error + static_error, {"value_error": dynamic_error.detach()})


def draws_per_token(drawn: Sample) -> TypeGuard[MixedSpecs]:
    """Tell whether each token has choices of its own, from which values are learned."""
    return isinstance(drawn, MixedSpecs) and drawn.indices.ndim == 3


def static_value_steps(record: Mapping[str, Tensor], space: SearchSpace) -> Tensor | None:
    """Return what choices cost all tokens on average, as the steps that `added_losses` takes, (sites, max choices).

    Args:
        record: what elastic training recorded.
        space: sites and choices.

    Returns:
        None where elastic training learned no values.
    """
    known = select_prefix(record, "static.")
    if not known:
        return None
    networks = SiteNetworks(space, num_inputs=1, hidden_width=known["input"].shape[-1], init_std=0.0)
    networks.load_state_dict(known)
    steps = torch.zeros(len(space.sites), space.max_choices)
    for row, widths in enumerate(space.choices.values()):
        steps[row, : len(widths)] = networks.at(row, torch.ones(1)).detach()
    return steps


def select_prefix(record: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def load_values(networks: SiteNetworks, known: Mapping[str, Tensor], *, width: str, cure: str) -> None:
    """Copy values that elastic training learned into networks.

    Args:
        networks: filled in place.
        known: state of the learned networks.
        width: the setting of the networks' width, for the message.
        cure: the setting that turns the warm start off, for the message.

    Raises:
        ConfigError: the widths differ.
    """
    learned, wanted = known["input"].shape[-1], networks.input.shape[-1]
    if learned != wanted:
        raise ConfigError(
            f"{width}: got {wanted}, but elastic training learns values with elastic.values.hidden_width={learned}; "
            f"wanted the same, or {cure}=false"
        )
    networks.load_state_dict(dict(known))
