"""What choices cost tokens, learned while elastic training draws them anyway (our choice).

Where each token draws its own widths, every step of elastic training is a step of the value signal, too: the same pass
has random choices, and a teacher to which each token's distance is known. So a value router can start where elastic
training ends, at the price of small networks on hidden states that were computed anyway.
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
from nestlm.router.networks import SiteNetworks, growth
from nestlm.spec import SearchSpace, Site
from nestlm.train.objective.base import Term


@dataclass(frozen=True)
class ValueSettings:
    """The networks that are trained along.

    Attributes:
        hidden_width: of the networks, as of the value router that is to start with them.
        lr: their peak learning rate.
    """

    hidden_width: int
    lr: float

    def __post_init__(self) -> None:
        if self.hidden_width <= 0 or self.lr <= 0:
            raise ConfigError(
                f"elastic.values: got hidden_width={self.hidden_width}, lr={self.lr}, wanted positive numbers"
            )


class ElasticValues(nn.Module):
    """The networks of both value routers, and one for how far the whole model has moved from its teacher."""

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

    def watched(self, policy: Policy, seen: dict[Site, Tensor]) -> Policy:
        """The same policy, and the hidden states that it is shown at the space's sites, without gradient."""

        def watching(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            if site in self.rows:
                seen[site] = hidden_BLD.detach()
            return policy(site, hidden_BLD, stream)

        return watching

    def term(self, seen: dict[Site, Tensor], *, indices_SBL: Tensor, distance_BL: Tensor) -> Term:
        """Regression of the tokens' distances on what they chose.

        Args:
            seen: hidden states at each site, (B, L, D).
            indices_SBL: choices, (sites, B, L).
            distance_BL: KL of each token to the teacher.
        """
        self.steps += 1
        indices_SBL = indices_SBL.to(distance_BL.device)
        base_BL = dynamic_BL = static_BL = torch.zeros_like(distance_BL)
        for site, row in self.rows.items():
            inputs_BLD, index_BL1 = features(seen[site]), indices_SBL[row, :, :, None]
            if row == self.last:
                base_BL = self.base(inputs_BLD).squeeze(-1)
            dynamic_BLK = growth(self.dynamic.at(row, inputs_BLD))
            static_K = growth(self.static.at(row, inputs_BLD.new_ones(1)))
            dynamic_BL = dynamic_BL + dynamic_BLK.gather(-1, index_BL1).squeeze(-1)
            static_BL = static_BL + static_K[index_BL1.squeeze(-1)]
        dynamic_error = (base_BL + dynamic_BL - distance_BL).square().mean()
        static_error = (base_BL.detach() + static_BL - distance_BL).square().mean()
        return Term(dynamic_error + static_error, {"value_error": dynamic_error.detach()})


def by_token(drawn: Sample) -> TypeGuard[MixedSpecs]:
    """Whether each token has choices of its own, from which values are learned."""
    return isinstance(drawn, MixedSpecs) and drawn.indices.ndim == 3


def static_steps(record: Mapping[str, Tensor], space: SearchSpace) -> Tensor | None:
    """Steps as `growth` takes them, (sites, max choices), of what choices cost all tokens on average; None without."""
    known = part_of(record, "static.")
    if not known:
        return None
    networks = SiteNetworks(space, num_inputs=1, hidden_width=known["input"].shape[-1], init_std=0.0)
    networks.load_state_dict(known)
    steps = torch.zeros(len(space.sites), space.max_choices)
    for row, widths in enumerate(space.choices.values()):
        steps[row, : len(widths)] = networks.at(row, torch.ones(1)).detach()
    return steps


def part_of(record: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def load_values(networks: SiteNetworks, known: Mapping[str, Tensor], *, width: str, cure: str) -> None:
    """Start networks with learned values.

    Args:
        networks: to be filled.
        known: tensors of networks as elastic training left them.
        width: the setting of the networks' width, for the message.
        cure: the setting that would start them cold.

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
