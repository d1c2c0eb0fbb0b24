"""Measure claim 2: half of the neurons and heads, forward and backward, and their share of the full model's time.

OMP_WAIT_POLICY=PASSIVE python benchmarks/sub_network.py
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import Row, main
from nestlm.nn.loss import LossFn
from nestlm.nn.policy import Policy, fixed, full
from shapes import Shape, forward_backward
from turns import Way, flops, ratio, take_turns


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows of the ratio of times over the ratio of FLOPs."""
    decoder, batch = shape.decoder(), shape.batch

    def passes(policy: Policy) -> Way:
        def loss() -> object:
            return decoder(batch.tokens_BL, policy, output_fn=LossFn(batch.targets_BL)).output.loss

        return forward_backward(decoder, loss)

    ways = {"full": passes(full), "half": passes(fixed(shape.half()))}
    seconds = take_turns(ways, repeats=repeats)
    share = flops(ways["half"]) / flops(ways["full"])
    times = ratio(seconds["half"], seconds["full"])
    yield Row(
        "2. half of neurons and heads, time over FLOPs", shape.name, times / share,
        1.04 if shape.device == "cpu" else 1.1,
        f"time {times.middle:.3f}, FLOPs {share:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
