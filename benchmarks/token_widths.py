"""Claim 6: tokens of different widths in one pass, beside the ideal of their mean FLOPs and beside masks.

OMP_WAIT_POLICY=PASSIVE python benchmarks/token_widths.py
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import torch
from torch import Tensor

from bench import Row, main
from nestlm.cost.static import Flops
from nestlm.nn.policy import Decision, Policy, constant, full, mixed
from nestlm.spec import Site
from shapes import Shape, no_grad
from turns import ratio, take_turns


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Four widths at every site, equally likely for every token."""
    decoder, batch, space = shape.decoder(), shape.batch, shape.space
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(4, (len(space.sites), *batch.tokens_BL.shape), generator=generator).to(shape.device)
    drawn = dict(zip(space.sites, indices, strict=True))
    policies = {"full": full, "mixed": mixed(space, indices), "masked": masked(drawn, shape)}
    ways = {
        name: no_grad(lambda policy=policy: decoder(batch.tokens_BL, policy).logits_BLV)
        for name, policy in policies.items()
    }
    torch.testing.assert_close(ways["mixed"](), ways["masked"](), rtol=1e-2, atol=1e-3 if shape.device == "cpu" else 1)
    seconds = take_turns(ways, repeats=repeats)
    table = Flops(shape.length).tabulate(space, axes=shape.axes, config=shape.config, per_token=True)
    share = (table.constant + sum(mean(row) for row in table.prices)) / table.whole
    times = ratio(seconds["mixed"], seconds["full"])
    yield Row(
        "6. width by token, forward, time over FLOPs", shape.name, times / share, 1.15,
        f"time {times.middle:.3f}, mean FLOPs {share:.3f} of the whole model's",
    )  # fmt: skip
    beside = f"masked {ratio(seconds['masked'], seconds['full']).middle:.3f} of the whole model's time"
    yield Row("6. the same over masks", shape.name, ratio(seconds["mixed"], seconds["masked"]), 1.0, beside)


def masked(drawn: dict[Site, Tensor], shape: Shape) -> Policy:
    """All units run, and those beyond a token's width are multiplied by 0."""
    decisions = {}
    for site, widths in shape.space.choices.items():
        units = torch.arange(widths[-1], device=shape.device)
        own_BL = torch.tensor(widths, device=shape.device)[drawn[site]]
        decisions[site] = Decision(widths[-1], (units < own_BL[..., None]).to(shape.dtype))
    return constant(decisions)


if __name__ == "__main__":
    main(rows)
