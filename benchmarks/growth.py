"""Measure how cost grows: step time with sub-networks, routing with layers and choices, memory with the vocabulary.

OMP_WAIT_POLICY=PASSIVE python benchmarks/growth.py

Writes docs/images/growth.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib as mpl
import torch
from matplotlib.axes import Axes

from nestlm.config.compose import build, compose
from nestlm.elastic.sampler.sandwich import Sandwich
from nestlm.nn.loss import LossFn
from nestlm.router.static.knapsack import KnapsackRouter
from nestlm.spec import Budget
from nestlm.train.objective.distillation import CrossEntropy
from nestlm.train.objective.elastic import ElasticObjective
from shapes import Shape, llama, training_step
from turns import Spread, Way, flops, peak, take_turns

mpl.use("Agg")
from matplotlib import pyplot as plt

SUBNETS, LAYERS, VOCABULARIES = (2, 3, 4, 6, 8), (2, 4, 8, 16, 32), (1000, 8000, 32_000, 64_000)
REPEATS = 7


def small() -> Shape:
    """Return a decoder of two layers, which is enough to see how costs grow."""
    shape = llama(256)
    return replace(shape, config=replace(shape.config, blocks=shape.config.blocks[:2]), rows=4, length=128)


def steps_of(number: int) -> Way:
    """Return a sandwich step with a given number of sub-networks, the full model among them."""
    shape = small()
    sampler = Sandwich(num_random=number - 2)
    objective = ElasticObjective(shape.space, sampler=sampler, distillation=CrossEntropy(), values=None, seed=0)
    return training_step(shape.decoder(), objective, shape.batch, first_steps=1)


def routing_of(layers: int, fractions: Sequence[float]) -> Way:
    """Return a call of the exact knapsack on made-up losses."""
    shares = ",".join(f"{share:g}" for share in fractions)
    overrides = [
        f"model.num_layers={layers}", "axes=mlp", f"axes.mlp_width.fractions=[{shares}]",
        "axes.mlp_width.multiple_of=1", "data=synthetic", "router=knapsack",
    ]  # fmt: skip
    settings = build(compose(overrides))
    router = settings.make_router()
    assert isinstance(router, KnapsackRouter), "as asked for"
    generator = torch.Generator().manual_seed(0)
    space = settings.space()
    made_up = torch.rand(len(space.sites), space.max_choices, generator=generator, dtype=torch.float64)
    router.sensitivities.copy_(made_up.sort(dim=1, descending=True).values)
    budget = Budget.from_share((1 + router.floor) / 2)
    return lambda: router.find(budget)


def losses_of(vocab_size: int) -> Way:
    """Return a function that computes loss and gradients of one batch."""
    shape = small()
    shape = replace(shape, config=replace(shape.config, vocab_size=vocab_size))
    decoder, batch = shape.decoder(), shape.batch
    return lambda: decoder(batch.tokens_BL, output_fn=LossFn(batch.targets_BL)).output.loss.backward()


def draw(axes: Axes, numbers: Sequence[float], spreads: Sequence[Spread], *, label: str) -> None:
    """Draw medians with quartiles."""
    low, middle, high = zip(*spreads, strict=True)
    (line,) = axes.plot(numbers, middle, marker="o", label=label)
    axes.fill_between(numbers, low, high, alpha=0.2, color=line.get_color())


def timed(make: Callable[[int], Way], numbers: Sequence[int]) -> list[Spread]:
    """Return milliseconds of functions that are called in turns."""
    seconds = take_turns({str(number): make(number) for number in numbers}, repeats=REPEATS)
    return [Spread.of([turn * 1e3 for turn in turns]) for turns in seconds.values()]


def main() -> None:
    """Measure, and draw the picture."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    figure, (steps, routing, memory) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    times, work = timed(steps_of, SUBNETS), [flops(steps_of(number)) for number in SUBNETS]
    draw(steps, SUBNETS, times, label="measured")
    ideal = [times[0].middle * each / work[0] for each in work]
    steps.plot(SUBNETS, ideal, linestyle="--", color="grey", label="as FLOPs grow")
    steps.set(xlabel="sub-networks of a step", ylabel="ms a step", title="Training", ylim=0)
    for count in (4, 16):
        fractions = [(index + 1) / count for index in range(count)]
        made = timed(lambda layers, fractions=fractions: routing_of(layers, fractions), LAYERS)
        draw(routing, LAYERS, made, label=f"{count} choices a site")
    routing.set(xlabel="layers", ylabel="ms a budget", title="Routing (exact knapsack)", xticks=LAYERS, ylim=0)
    most = [peak(losses_of(number)) / 2**20 for number in VOCABULARIES]
    memory.plot(VOCABULARIES, most, marker="o", label="measured")
    weights = [2 * 4 * 256 * number / 2**20 for number in VOCABULARIES]
    memory.plot(VOCABULARIES, weights, linestyle="--", color="grey", label="gradients of\nembedding and head")
    memory.set(
        xlabel="vocabulary", ylabel="MiB of a step besides weights", title="Memory", xticks=VOCABULARIES[2:], ylim=0
    )
    for axes in (steps, routing, memory):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/images/growth.png", dpi=110)


if __name__ == "__main__":
    main()
