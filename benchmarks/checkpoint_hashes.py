"""Measure what hashing a training checkpoint costs: a step at SmolLM2-135M's sizes, alone and while 1.6 GB are hashed.

OMP_WAIT_POLICY=PASSIVE python benchmarks/checkpoint_hashes.py > docs/results/checkpoint-hashes.md
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.loss import LossFn
from nestlm.utils.checksums import SHA256, XXH128, HashAlgorithm, hash_file
from nestlm.utils.devices import device_name
from shapes import Shape, forward_backward
from turns import Spread, Way, take_turns

CONFIG = DecoderConfig(49_152, 576, 64, 2048, tuple(BlockConfig(9, 3, 1536) for _ in range(30)))
BYTES = 12 * 134_515_008  # weights and the two moments of AdamW, in float32
SECONDS_BETWEEN = 15  # checkpoint_seconds


def step_beside(step: Way, path: Path, algorithm: HashAlgorithm | None) -> Way:
    """Return a step beside which another thread hashes a checkpoint, as in training; it ends when both have."""

    def both() -> None:
        with ThreadPoolExecutor(1) as pool:
            hashing = None if algorithm is None else pool.submit(hash_file, path, algorithm)
            step()
            if hashing is not None:
                hashing.result()

    return both


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    shape = Shape("SmolLM2-135M", CONFIG)
    decoder, batch = shape.decoder(), shape.batch

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return decoder(batch.tokens_BL, output_fn=LossFn(batch.targets_BL)).output.loss

    step = forward_backward(decoder, loss)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        with path.open("wb") as file:
            for _ in range(BYTES >> 24):
                file.write(os.urandom(1 << 24))
        ways = {"none": None, XXH128.file_name: XXH128, SHA256.file_name: SHA256}
        seconds = take_turns(
            {name: step_beside(step, path, algorithm) for name, algorithm in ways.items()}, repeats=repeats, warm_up=1
        )
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {repeats} repeats in turns.\n")
    print(
        f"| hashes of {BYTES / 1e9:.1f} GB | a step, s | more than alone, s | of the time, one in {SECONDS_BETWEEN} s |"
    )
    print("|---|---|---|---|")
    for name, mine in seconds.items():
        more = Spread.of([one - other for one, other in zip(mine, seconds["none"], strict=True)])
        print(f"| {name} | {Spread.of(mine):.2f} | {more:.2f} | {more.middle / SECONDS_BETWEEN:.1%} |")


if __name__ == "__main__":
    main()
