"""What a dynamic router leaves behind for one budget: the sites at which tokens decide, and all that decides there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import kept_layers
from nestlm.errors import ExportError
from nestlm.nn.config import DecoderConfig
from nestlm.router.dynamic.base import DynamicRouter
from nestlm.router.dynamic.logits import DynamicLogitsRouter
from nestlm.router.dynamic.plan import Plan
from nestlm.router.dynamic.value import DynamicValueRouter
from nestlm.router.networks import BUDGET_FEATURES, embed_share
from nestlm.spec import SubnetSpec


@dataclass(frozen=True)
class ExportedRouter:
    """A plan as a modelling file takes it.

    Attributes:
        spec: the widths that are stored: those that all tokens run where nothing decides, all of them elsewhere.
        config: kind of router and its sites, for a config.json; layers are counted without those that all skip.
        weights: of the networks, and the ledgers' prices and incomes, by their names in the model.
    """

    spec: SubnetSpec
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def from_plan(
        cls, router: DynamicRouter, plan: Plan, *, axes: tuple[Axis, ...], config: DecoderConfig
    ) -> ExportedRouter:
        """Collect what a router needs to keep a budget by a plan.

        Args:
            router: makes the decisions.
            plan: its plan for the budget.
            axes: the axes of the router's sites.
            config: sizes of the whole model.

        Raises:
            ExportError: a router of another kind than the two that are known.
        """
        space = router.prices.space
        spec = space.spec({site: plan.fixed.get(row, -1) for site, row in router.rows.items()})
        place = {layer: number for number, layer in enumerate(kept_layers(config, spec, axes=axes))}
        sites, weights = [], dict[str, Tensor]()
        for site, row in router.rows.items():
            if row in plan.fixed:
                continue
            sites.append({"axis": site.axis, "layer": place[site.layer], "widths": list(space.choices[site])})
            prefix = f"model.layers.{place[site.layer]}.choosers.{site.axis}"
            parts = network_weights(router, plan, row) | token_bucket_weights(plan, row)
            weights |= {
                f"{prefix}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in parts.items()
            }
        first = f"model.layers.{sites[0]['layer']}.choosers.{sites[0]['axis']}"
        known = {
            "kind": router_kind(router),
            "prompt_tokens": router.granularity.prompt_tokens,
            "hidden_width": len(weights[f"{first}.input_bias"]),
            "bounds": len(plan.tariffs),
            "levels": len(weights[f"{first}.priced"]),
        }
        return cls(spec, known | {"sites": sites}, weights)


def router_kind(router: DynamicRouter) -> str:
    """What a router's networks say: logits of choices, or what these lose."""
    if isinstance(router, DynamicLogitsRouter):
        return "logits"
    if isinstance(router, DynamicValueRouter):
        return "values"
    raise ExportError(
        f"export: the modelling file knows no {type(router).__module__}.Router; wanted a static router, "
        "or router=surrogate, gumbel or value"
    )


def network_weights(router: DynamicRouter, plan: Plan, row: int) -> dict[str, Tensor]:
    """One site's network, and what makes scores of its outputs."""
    said = router_kind(router)
    assert isinstance(router, DynamicLogitsRouter | DynamicValueRouter), "as its kind says"
    networks = router.networks
    count = networks.counts[row]
    budget = torch.zeros(networks.input.shape[-1])
    scale = torch.ones(count)
    if isinstance(router, DynamicLogitsRouter):
        budget = networks.part(row, embed_share(networks.input.new_tensor([plan.share])))[0]
    else:
        scale = router.scale[row, :count]
    features = networks.input.shape[1] - (BUDGET_FEATURES if said == "logits" else 0)
    return {
        "input": networks.input[row, :features],
        "input_bias": networks.input_bias[row, 0],
        "output": networks.output[row, :, :count],
        "output_bias": networks.output_bias[row, 0, :count],
        "budget": budget,
        "scale": scale,
        "held": (plan.held * plan.prices[row]).float(),
    }


def token_bucket_weights(plan: Plan, row: int) -> dict[str, Tensor]:
    """One site's prices in integers, its incomes, and what its sequences' multipliers cost and spend."""
    prices = torch.stack([tariff.prices[row] for tariff in plan.tariffs])
    incomes = torch.tensor([incomes[row] for incomes in plan.incomes])
    paced = plan.paced.get(row)
    if paced is None:
        priced, demands = (plan.multiplier * plan.prices[row])[None], prices.new_zeros(len(prices), 1)
        aims = incomes
    else:
        priced, demands = paced.pace.priced_JK, torch.stack(paced.pace.demands)
        aims = torch.tensor([paced.aimed(each) for each in paced.ledgers])
    return {"priced": priced.float(), "prices": prices, "incomes": incomes, "aims": aims, "demands": demands}
