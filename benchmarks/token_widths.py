"""Measure claim 6: tokens of different widths in one pass, compared with the ideal of their mean FLOPs and with masks.

On a GPU also how much faster than the whole model a pass is whose tokens cost half of it in the mean.

OMP_WAIT_POLICY=PASSIVE python benchmarks/token_widths.py
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import torch
from torch import Tensor

from bench import Row, main
from nestlm.cost.static import Flops
from nestlm.nn.policy import Decision, Policy, Width, constant, full, mixed
from nestlm.spec import Site
from shapes import Shape, no_grad
from turns import ratio, take_turns


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows for four widths at every site, equally likely for every token."""
    decoder, batch, space = shape.decoder(), shape.batch, shape.space
    generator = torch.Generator().manual_seed(2)
    table = Flops(shape.length).tabulate(space, axes=shape.axes, config=shape.config, per_token=True)
    sizes = (len(space.sites), *batch.tokens_BL.shape)
    indices = torch.randint(4, sizes, generator=generator)
    # the smallest or the whole width, so that half of the cost is what they come to
    smallest = torch.rand(sizes, generator=generator) < 0.5 / (1 - table.share(space.smallest()))
    policies = {
        "full": full,
        "mixed": mixed(space, indices.to(shape.device)),
        "masked": masked(dict(zip(space.sites, indices, strict=True)), shape),
        "half": mixed(space, torch.where(smallest, 0, 3).to(shape.device)),
    }
    ways = {
        name: no_grad(lambda policy=policy: decoder(batch.tokens_BL, policy).logits_BLV)
        for name, policy in policies.items()
        if name != "half" or shape.device == "cuda"
    }
    torch.testing.assert_close(ways["mixed"](), ways["masked"](), rtol=1e-2, atol=1e-3 if shape.device == "cpu" else 1)
    seconds = take_turns(ways, repeats=repeats)
    share = (table.constant + sum(mean(row) for row in table.prices)) / table.whole
    times = ratio(seconds["mixed"], seconds["full"])
    yield Row(
        "6. width by token, forward, time over FLOPs", shape.name, times / share,
        1.15 if shape.device == "cpu" else 1.1,
        f"time {times.middle:.3f}, mean FLOPs {share:.3f} of the whole model's",
    )  # fmt: skip
    beside = f"masked {ratio(seconds['masked'], seconds['full']).middle:.3f} of the whole model's time"
    yield Row("6. the same over masks", shape.name, ratio(seconds["mixed"], seconds["masked"]), 1.0, beside)
    if "half" in ways:
        yield Row(
            "6. whole model's time over that of tokens at half of its cost", shape.name,
            ratio(seconds["full"], seconds["half"]), 1.4, "ideal 2", at_least=True,
        )  # fmt: skip


def masked(drawn: dict[Site, Tensor], shape: Shape) -> Policy:
    """Return a pass in which all units run, and those beyond a token's width are multiplied by 0."""
    decisions = {}
    for site, widths in shape.space.choices.items():
        units = torch.arange(widths[-1], device=shape.device)
        own_BL = torch.tensor(widths)[drawn[site]].to(shape.device)
        decisions[site] = Decision(Width(widths[-1]), (units < own_BL[..., None]).to(shape.dtype))
    return constant(decisions)


if __name__ == "__main__":
    main(rows)
