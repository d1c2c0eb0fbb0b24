"""Measure claim 7: the distillation loss over a large vocabulary, head included, compared with cross-entropy.

OMP_WAIT_POLICY=PASSIVE python benchmarks/distillation_loss.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Row, main
from nestlm.nn.loss import HeadInputs, LossFn
from shapes import Shape
from turns import Spread, Way, flops, peak, ratio, take_turns

VOCAB = 32_000


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows for nestlm's chunked losses and for torch's cross-entropy over all logits at once."""
    size, tokens = shape.config.hidden_size, shape.rows * shape.length
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(shape.device, shape.dtype)

    hidden_BLD = drawn(1, tokens, size).requires_grad_()
    head_VD = drawn(VOCAB, size).mul_(size**-0.5).requires_grad_()
    teacher = HeadInputs(drawn(1, tokens, size), drawn(VOCAB, size).mul_(size**-0.5))
    targets_BL = torch.randint(VOCAB, (1, tokens), generator=generator).to(shape.device)

    def passes(loss: Way) -> Way:
        def way() -> None:
            hidden_BLD.grad = head_VD.grad = None
            loss().backward()

        return way

    ways = {
        "distillation": passes(lambda: LossFn(targets_BL, teacher)(hidden_BLD, head_VD).loss),
        "cross-entropy": passes(
            lambda: F.cross_entropy(F.linear(hidden_BLD, head_VD).flatten(0, 1).float(), targets_BL.flatten())
        ),
        "ours": passes(lambda: LossFn(targets_BL)(hidden_BLD, head_VD).loss),
    }
    seconds = take_turns(ways, repeats=repeats)
    share = flops(ways["distillation"]) / flops(ways["cross-entropy"])
    times = {name: ratio(seconds["distillation"], seconds[name]) for name in ways}
    yield Row(
        "7. distillation over V 32000, the loss alone, time over cross-entropy's", shape.name, times["cross-entropy"],
        1.45, f"FLOPs {share:.3f}; over our cross-entropy, in chunks as well: {times['ours']:.3f}",
    )  # fmt: skip
    most = {name: peak(way) for name, way in ways.items()}
    sizes = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in most.items())
    yield Row(
        "7. its peak memory over cross-entropy's", shape.name,
        Spread(*[most["distillation"] / most["cross-entropy"]] * 3), 1.25, f"MiB: {sizes}",
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
