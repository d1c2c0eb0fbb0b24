"""Collect what an export stores of a dynamic router for one budget: sites, networks and token buckets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestlm.elastic.axes.base import Axis
from nestlm.elastic.surgery import kept_layers
from nestlm.errors import ExportError
from nestlm.nn.config import DecoderConfig
from nestlm.router.dynamic.plan import Plan
from nestlm.router.protocols import ExportableRouter, PlanningRouter, exportable
from nestlm.spec import SubnetSpec


@dataclass(frozen=True)
class ExportedRouter:
    """A dynamic router and its plan for one budget, in the form that `remote/modeling_routed.py` reads.

    Attributes:
        spec: widths to store: the fixed width at sites that the plan fixes, the full width at all others.
        config: kind of router and its sites, for config.json. Layer numbers leave out layers that all tokens skip.
        weights: tensors of the networks, and prices and refill rates of the token buckets, by name in the model.
    """

    spec: SubnetSpec
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def from_plan(
        cls, router: PlanningRouter, plan: Plan, *, axes: tuple[Axis, ...], config: DecoderConfig
    ) -> ExportedRouter:
        """Collect networks, prices and refill rates of all sites that a plan leaves to the tokens.

        Args:
            router: the dynamic router.
            plan: the router's plan for the budget.
            axes: the axes of the router's sites.
            config: sizes of the whole model.

        Raises:
            ExportError: the modelling file has no networks of this router's kind.
        """
        kind = exportable(router)
        if kind is None:
            raise ExportError(
                f"export: the modelling file knows no {type(router).__module__}.{type(router).__qualname__}; wanted a "
                "static router, or router=surrogate, gumbel or value"
            )
        space = router.prices.space
        spec = space.spec({site: plan.fixed.get(row, -1) for site, row in router.rows.items()})
        place = {layer: number for number, layer in enumerate(kept_layers(config, spec, axes=axes))}
        sites, weights = [], dict[str, Tensor]()
        for site, row in router.rows.items():
            if row in plan.fixed:
                continue
            sites.append({"axis": site.axis, "layer": place[site.layer], "widths": list(space.choices[site])})
            prefix = f"model.layers.{place[site.layer]}.choosers.{site.axis}"
            parts = network_weights(kind, plan, row) | token_bucket_weights(plan, row)
            weights |= {
                f"{prefix}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in parts.items()
            }
        first = f"model.layers.{sites[0]['layer']}.choosers.{sites[0]['axis']}"
        known = {
            "kind": kind.output_kind,
            "prompt_tokens": router.granularity.prompt_tokens,
            "hidden_width": len(weights[f"{first}.input_bias"]),
            "bounds": len(plan.limits),
            "levels": len(weights[f"{first}.priced"]),
        }
        return cls(spec, known | {"sites": sites}, weights)


def network_weights(router: ExportableRouter, plan: Plan, row: int) -> dict[str, Tensor]:
    """Return the tensors of one site's network by name.

    The network's scores already contain a penalty for cost, at the plan's implicit multiplier. `held`, (K,), is that
    penalty; the model adds it to the scores to cancel it.

    Args:
        router: gives the network of each site.
        plan: the plan for the budget.
        row: number of the site.
    """
    site = router.site_weights(row, plan.budget_feature)
    return {
        "input": site.input,
        "input_bias": site.input_bias,
        "output": site.output,
        "output_bias": site.output_bias,
        "budget": site.budget,
        "scale": site.scale,
        "held": (plan.implicit_multiplier * plan.costs[row]).float(),
    }


def token_bucket_weights(plan: Plan, row: int) -> dict[str, Tensor]:
    """Return the tensors of one site's token buckets by name.

    Amounts are integers in fixed-point units: `prices` (bounds, K), refill rates `incomes` and target rates `aims`
    (bounds,), and `demands` (bounds, J), mean spending at each of J multipliers. `priced` (J, K) is the cost of the
    choices at each multiplier in units of score.

    Args:
        plan: the plan for the budget.
        row: number of the site.
    """
    prices = torch.stack([limit.prices[row] for limit in plan.limits])
    rates = torch.tensor([rates[row] for rates in plan.refill_rates])
    paced = plan.paced.get(row)
    if paced is None:
        priced, demands = (plan.multiplier * plan.costs[row])[None], prices.new_zeros(len(prices), 1)
        targets = rates
    else:
        priced, demands = paced.pace.priced_JK, torch.stack(paced.pace.demands)
        targets = torch.tensor([paced.target_rate(bucket) for bucket in paced.buckets])
    return {"priced": priced.float(), "prices": prices, "incomes": rates, "aims": targets, "demands": demands}
