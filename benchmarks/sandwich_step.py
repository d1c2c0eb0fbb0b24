"""Measure claims 3 and 4: time and memory of a sandwich step, compared with a plain step.

OMP_WAIT_POLICY=PASSIVE python benchmarks/sandwich_step.py
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import Row, main
from nestlm.elastic.sampler.sandwich import Sandwich
from nestlm.train.objective.distillation import CrossEntropy
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.pretrain import PretrainObjective
from shapes import Shape, training_step
from turns import Spread, flops, peak, ratio, take_turns

STEPS = 2  # of a turn, so that random draws are several


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows for a sandwich step on text alone: full model, smallest and two random sub-networks."""
    sandwich = ElasticObjective(
        shape.space, sampler=Sandwich(num_random=2), distillation=CrossEntropy(), values=None, seed=0
    )  # fmt: skip
    once = {
        name: training_step(shape.decoder(), objective.to(shape.device), shape.batch, first_steps=STEPS)
        for name, objective in {"plain": PretrainObjective(), "sandwich": sandwich}.items()
    }
    ways = {name: (lambda step=step: [step() for _ in range(STEPS)]) for name, step in once.items()}
    seconds = take_turns(ways, repeats=repeats)
    share = flops(ways["sandwich"]) / flops(ways["plain"])
    times = ratio(seconds["sandwich"], seconds["plain"])
    yield Row(
        "3. sandwich step over a plain one, time over FLOPs", shape.name, times / share, 1.02,
        f"time {times.middle:.3f}, FLOPs {share:.3f}",
    )  # fmt: skip
    plain, most = peak(once["plain"]), peak(once["sandwich"])
    yield Row(
        "4. peak memory of that step over a plain one", shape.name, Spread(*[most / plain] * 3), 1.02,
        f"{most / 2**20:.1f} and {plain / 2**20:.1f} MiB besides weights and states",
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
