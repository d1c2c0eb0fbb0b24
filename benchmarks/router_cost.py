"""Measure what routing costs at llama2_7b's sizes: the time to find a spec, and a dynamic router's FLOPs and bytes.

python benchmarks/router_cost.py
"""

from __future__ import annotations

import statistics
import time

import torch

from nestlm.config.compose import build, compose
from nestlm.cost.table import TokenTable
from nestlm.router.base import Router
from nestlm.spec import Budget

SIZES = [
    "model=llama2_7b", "model.init=random", "data.sequence_length=4096", "axes.mlp_width.multiple_of=128",
    "axes.mlp_width.fractions=[0.25,0.5,0.75,1.0]",
]  # fmt: skip
SHARES = [0.45 + 0.01 * step for step in range(50)]
BYTES_PER_WEIGHT = 2  # bfloat16


def find_times(router: Router, budgets: list[Budget]) -> list[float]:
    """Return the milliseconds to a spec, for each budget."""
    times = []
    for budget in budgets:
        started = time.perf_counter()
        router.find(budget)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    """Print both tables."""
    print("| router | limits | find a spec: median | largest |\n|---|---|---|---|")
    for name in ("uniform", "knapsack", "surrogate", "value"):
        settings = build(compose([*SIZES, f"router={name}", "router.policy=static"]))
        router = settings.make_router()
        with torch.no_grad():
            for tensor in router.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(
                        torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype)
                    )
        router.find(Budget.from_share(0.7))  # imports
        for limits in (1, 2):
            budgets = [Budget.parse([share, f"{min(1.0, share + 0.05)}memory"][:limits]) for share in SHARES]
            times = find_times(router, budgets)
            print(f"| {name} | {limits} | {statistics.median(times):.1f} ms | {max(times):.1f} ms |")
    print(
        "\n| hidden width | router's FLOPs | of the forward pass | router's bytes | of the weights |"
        "\n|---|---|---|---|---|"
    )
    for width in (16, 32, 128, 256):
        settings = build(compose([*SIZES, "router=value", f"router.network.hidden_width={width}"]))
        router, table = settings.make_router(), settings.token_prices().main
        assert isinstance(table, TokenTable), "prices of tokens"
        flops = sum(table.with_router(width).shared) - sum(table.shared)
        stored = BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in router.parameters())
        weights = BYTES_PER_WEIGHT * settings.prices().tables["params"].whole
        print(
            f"| {width} | {flops / 1e6:.1f} M a token | {flops / table.whole:.3%} | {stored / 1e6:.1f} MB | "
            f"{stored / weights:.3%} |"
        )


if __name__ == "__main__":
    main()
