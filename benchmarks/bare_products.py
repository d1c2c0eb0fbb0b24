"""Measure claims 2, 6 and 8 for the matrix products alone, without a decoder around them.

OMP_WAIT_POLICY=PASSIVE python benchmarks/bare_products.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Row, main
from nestlm.nn.config import DecoderConfig
from shapes import QUARTERS, Shape, no_grad
from turns import Way, flops, ratio, take_turns


class Products:
    """The matrix products of a decoder's linear maps. Each map has weights and inputs of its own."""

    def __init__(self, config: DecoderConfig, *, rows: int) -> None:
        size, block = config.hidden_size, config.blocks[0]
        self.heads, self.neurons = block.num_heads * config.head_dim, block.mlp_width
        inward = (self.heads,) * 3 + (self.neurons,) * 2
        shapes = [*((outputs, size) for outputs in inward), (size, self.heads), (size, self.neurons)]
        self.layers = [[torch.randn(shape) for shape in shapes] for _ in config.blocks]
        self.head = torch.randn(config.vocab_size, size)
        cuts = {size, *(int(width * share) for width in (self.heads, self.neurons) for share in QUARTERS)}
        self.inputs = {inputs: torch.randn(rows, inputs) for inputs in cuts}

    def run(
        self, weight: Tensor, rows: int | slice, *, outputs: float = 1.0, inputs: float = 1.0, back: bool = False
    ) -> None:
        """Multiply rows by a share of a map's outputs and inputs; with `back`, also compute the gradients of both."""
        cut = weight[: int(len(weight) * outputs), : int(weight.shape[1] * inputs)]
        x_ni = self.inputs[cut.shape[1]][rows if isinstance(rows, slice) else slice(rows)]
        made_no = F.linear(x_ni, cut)
        if back:
            torch.mm(made_no, cut)
            torch.mm(made_no.T, x_ni)

    def whole_batch(self, share: float, *, rows: int, back: bool = False) -> Way:
        """Multiply all rows at one width."""

        def way() -> None:
            for *inward, o, down in self.layers:
                for weight in inward:
                    self.run(weight, rows, outputs=share, back=back)
                for weight in (o, down):
                    self.run(weight, rows, inputs=share, back=back)
            self.run(self.head, rows, back=back)

        return no_grad(way)

    def groups(self, shares: Sequence[float], *, rows: int) -> Way:
        """Multiply an equal number of rows at each width; keys, values and logits at full width for all."""
        each = rows // len(shares)

        def way() -> None:
            for q, k, v, up, gate, o, down in self.layers:
                for weight in (k, v):
                    self.run(weight, rows)
                for number, share in enumerate(shares):
                    group = slice(number * each, (number + 1) * each)
                    for weight in (q, up, gate):
                        self.run(weight, group, outputs=share)
                    for weight in (o, down):
                        self.run(weight, group, inputs=share)
            self.run(self.head, rows)

        return no_grad(way)


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield table rows of time over FLOPs; for decoding, of the speed-up over the ratio of FLOPs."""
    assert shape.device == "cpu", "there is no such row for GPUs"
    tokens = shape.rows * shape.length
    products = Products(shape.config, rows=tokens)
    ways = {
        "full": products.whole_batch(1.0, rows=tokens),
        "groups": products.groups(QUARTERS, rows=tokens),
        "full and back": products.whole_batch(1.0, rows=tokens, back=True),
        "half and back": products.whole_batch(0.5, rows=tokens, back=True),
        "full, one row": products.whole_batch(1.0, rows=1),
        "half, one row": products.whole_batch(0.5, rows=1),
    }
    seconds = take_turns(ways, repeats=repeats)

    def row(claim: str, whole: str, part: str, bound: float) -> Row:
        share, times = flops(ways[part]) / flops(ways[whole]), ratio(seconds[part], seconds[whole])
        beside = f"time {times.middle:.3f}, FLOPs {share:.3f}"
        return Row(f"{claim}: products alone", shape.name, times / share, bound, beside)

    yield row("2. half of neurons and heads, time over FLOPs", "full and back", "half and back", 1.04)
    yield row("6. width by token, forward, time over FLOPs", "full", "groups", 1.15)
    gain = ratio(seconds["full, one row"], seconds["half, one row"])
    ideal = flops(ways["full, one row"]) / flops(ways["half, one row"])
    yield Row(
        "8. decoding at half width, speed-up over the ideal: products alone", shape.name, gain / ideal,
        0.9 if shape.config.hidden_size >= 512 else 0.7, f"speed-up {gain.middle:.2f}, ideal {ideal:.2f}",
        at_least=True,
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
