"""Compare bfloat16 products (`trainer.precision=bf16-mixed`) with float32, forward and backward, on this processor.

OMP_WAIT_POLICY=PASSIVE python benchmarks/precision.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from nestlm.nn.loss import LossFn
from nestlm.utils.devices import device_name
from shapes import Shape, forward_backward, llama
from turns import Way, ratio, take_turns


def passes(shape: Shape, *, bf16: bool) -> Way:
    """Return a forward and backward pass with products in bfloat16, or all in float32."""
    decoder, batch = shape.decoder(), shape.batch

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return decoder(batch.tokens_BL, output_fn=LossFn(batch.targets_BL)).output.loss

    return forward_backward(decoder, loss)


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}\n\n| shape | bf16 over float32 |\n|---|---|")
    for shape in map(llama, (256, 512)):
        seconds = take_turns({name: passes(shape, bf16=name == "bf16") for name in ("bf16", "float32")})
        print(f"| {shape.name} | {ratio(seconds['bf16'], seconds['float32']):.3f} |", flush=True)


if __name__ == "__main__":
    main()
