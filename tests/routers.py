"""Every router with every policy and granularity that it has, on a small model, for tests of all routers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from models import AXES, decoder_config
from nestlm.config import instantiate
from nestlm.config.allowlist import import_object
from nestlm.cost.memory import Memory
from nestlm.cost.static import Flops
from nestlm.cost.table import CostTable, PriceList
from nestlm.data.batch import Batch
from nestlm.elastic.axes.base import search_space
from nestlm.nn.decoder import DecoderOutput
from nestlm.router.base import Router
from nestlm.router.dynamic.base import Granularity
from nestlm.train.stage_settings import RouterSettings
from plugins import NANO, compose, options

CONFIG = decoder_config(num_kv_groups=2)
SPACE = search_space(AXES, CONFIG)
LENGTH, PROMPT = 24, 4


def flops(*, per_token: bool) -> CostTable:
    return Flops(context_length=LENGTH).tabulate(SPACE, axes=AXES, config=CONFIG, per_token=per_token)


def uneven(table: CostTable, name: str) -> CostTable:
    """Make a table of a second kind of cost, in which late layers are dearer."""
    rows = zip(SPACE.sites, table.prices, strict=True)
    prices = tuple(tuple(price * (1 + site.layer) for price in row) for site, row in rows)
    added = sum(new[-1] - old[-1] for new, old in zip(prices, table.prices, strict=True))
    return replace(table, name=name, prices=prices, whole=table.whole + added)


MEMORY = Memory(batch_size=2, context_length=LENGTH, bytes_per_element=2, cache_bytes_per_element=2)
STATIC = PriceList(flops(per_token=False), {"memory": MEMORY.tabulate(SPACE, axes=AXES, config=CONFIG)})
TOKENS = PriceList(flops(per_token=True), {"latency": uneven(flops(per_token=True), "latency")}, per_token=True)


@dataclass(frozen=True)
class Variant:
    """A router option with a policy and a granularity."""

    option: str
    policy: str
    granularity: str = "token"

    def settings(self):
        spelled = [f"router={self.option}", f"router.policy={self.policy}"]
        spelled += ["router.granularity=prompt"] if self.granularity == "prompt" else []
        return instantiate.build(compose([*NANO, *spelled])["router"], RouterSettings, where="router")

    def router(self, *, static: PriceList = STATIC, tokens: PriceList = TOKENS) -> Router:
        if self.policy == "static":
            return self.settings().network(prices=static).eval()
        granularity = Granularity(PROMPT if self.granularity == "prompt" else 0, LENGTH)
        network = self.settings().network(prices=tokens, hidden_size=CONFIG.hidden_size, granularity=granularity)
        # networks at their start see little of a token; these differ from token to token, so that deciding pays
        source = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=source))
        return network.eval()

    def __str__(self) -> str:
        return f"{self.option}-{self.policy}-{self.granularity}"


def variants(policy: str | None = None) -> Iterator[Variant]:
    for option in options("router"):
        target = compose([*NANO, f"router={option}"])["router"]["network"]["_target_"]
        decides = getattr(import_object(target, where="router.network"), "per_token", None)  # of a function: either
        if policy in (None, "static") and decides is not True:
            yield Variant(option, "static")
        if policy in (None, "dynamic") and decides is not False:
            yield from (Variant(option, "dynamic"), Variant(option, "dynamic", "prompt"))


EVERY = pytest.mark.parametrize("variant", list(variants()), ids=str)
STATICS = pytest.mark.parametrize("variant", list(variants("static")), ids=str)
DYNAMICS = pytest.mark.parametrize("variant", list(variants("dynamic")), ids=str)


def batches(seed: int, *, count: int = 2, rows: int = 4) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 50, (rows, LENGTH + 1), generator=source) for _ in range(count)]
    return [Batch(part[:, :-1], part[:, 1:], None) for part in tokens]


def choices(output: DecoderOutput) -> dict[str, torch.Tensor]:
    """Return the choice indices of tokens at sites where they may differ, by the name of the site."""
    widths = {str(site): decision.width for site, decision in output.decisions.items()}
    return {site: width.index for site, width in widths.items() if width.index is not None}
