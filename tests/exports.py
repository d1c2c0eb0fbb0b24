"""Small models of every family with layers of different widths, for the tests of exports."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import parity
from models import AXES, random_decoder
from nestlm.cost.static import Flops
from nestlm.cost.table import PriceList
from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.model.family import Family
from nestlm.nn.decoder import Decoder
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.dynamic.base import DynamicRouter, Granularity
from nestlm.router.dynamic.plan import Plan
from nestlm.spec import Budget, SearchSpace, SubnetSpec
from routers import Variant

FAMILIES = {
    "llama": "Llama 3.1 (scaled positions)",
    "mistral": "Mistral",
    "qwen2": "Qwen2.5 (tied, YaRN)",
    "qwen3": "Qwen3, biases",
    "nemotron": "GPT-3 (Nemotron), biases",
}
LENGTH, PROMPT = 24, 4


@dataclass(frozen=True)
class Nest:
    """A family's tiny model with random weights that matter, and its search space."""

    family: Family
    decoder: Decoder
    axes: tuple[Axis, ...]

    @property
    def space(self) -> SearchSpace:
        return search_space(self.axes, self.decoder.config)

    def uneven(self) -> SubnetSpec:
        """Widths that differ from layer to layer; where blocks may be skipped, one is."""
        return self.space.spec({site: (site.layer + 1) % len(row) for site, row in self.space.choices.items()})


def nest(case: str, folder: Path, *, depth: bool = False) -> Nest:
    parity.checkpoint(case, folder)
    family, _ = parity.imported(folder)
    axes = (*AXES, Depth(share=0.34, layers=(1,))) if depth else AXES
    return Nest(replace(family, weights=None, init="random"), random_decoder(family.decoder_config()).eval(), axes)


def tokens(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, parity.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def routed(nested: Nest, variant: Variant, *, share: float) -> tuple[DynamicRouter, Plan]:
    """A router whose random networks tell tokens apart, and a plan in which sites decide wherever that pays."""
    per_token = Flops(context_length=LENGTH).tabulate(
        nested.space, axes=nested.axes, config=nested.decoder.config, per_token=True
    )
    router: Any = variant.settings().network(
        prices=PriceList(per_token, {}, per_token=True),
        hidden_size=nested.decoder.config.hidden_size,
        granularity=Granularity(PROMPT if variant.granularity == "prompt" else 0, LENGTH),
    )
    source = torch.Generator().manual_seed(7)
    for parameter in router.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=source))
    text = [tokens(4, LENGTH + 1, seed=seed) for seed in range(2)]
    calibration = CalibrationData(nested.decoder, [Batch(part[:, :-1], part[:, 1:], None) for part in text])
    router.eval().prepare(calibration)
    bounds = router.planned.bounds(Budget.from_share(share))
    start = Plan(share, router.fixed_point_prices(bounds))
    plan, _ = router.refine(
        start, router.record(start, calibration), bounds=bounds, calibration=calibration, gain_threshold=0.0
    )
    assert len(plan.fixed) < len(router.rows), "something decides"
    return router, plan


def continued(decoder: Decoder, policy: Any, prompt_1L: torch.Tensor, *, count: int) -> torch.Tensor:
    """The greedy continuation, without a cache."""
    with torch.no_grad():
        for _ in range(count):
            logits_1LV = decoder(prompt_1L, policy).logits_BLV
            prompt_1L = torch.cat((prompt_1L, logits_1LV[:, -1:].argmax(-1)), dim=1)
    return prompt_1L
