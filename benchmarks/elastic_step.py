"""Measure claim 5: an elastic step with a frozen teacher, over a plain step.

OMP_WAIT_POLICY=PASSIVE python benchmarks/elastic_step.py
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import Row, main
from nestlm.elastic.sampler.one import One
from nestlm.train.objective.distillation import FrozenTeacher
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.pretrain import PretrainObjective
from shapes import Shape, training_step
from turns import flops, ratio, take_turns

STEPS = 4  # of a turn, again and again: two run the whole model, two a sub-network


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield rows for `sampler=one` at p = 0.5: the full model or one random sub-network, distilled from the teacher."""
    sampler, space = One(p_full=0.5, p_smallest=0.0), shape.space
    seed = next(seed for seed in range(100) if number_of_full(sampler, space, seed=seed) == STEPS // 2)
    elastic = ElasticObjective(space, sampler=sampler, distillation=FrozenTeacher(ce_share=0.0), values=None, seed=seed)
    teacher = shape.decoder().requires_grad_(False)
    once = {
        "plain": training_step(shape.decoder(), PretrainObjective(), shape.batch, first_steps=STEPS),
        "elastic": training_step(
            shape.decoder(), elastic.to(shape.device), shape.batch, teacher=teacher, first_steps=STEPS
        ),
    }
    ways = {name: (lambda step=step: [step() for _ in range(STEPS)]) for name, step in once.items()}
    seconds = take_turns(ways, repeats=repeats)
    share = flops(ways["elastic"]) / flops(ways["plain"])
    yield Row(
        "5. elastic step (frozen teacher, `one`, p = 0.5) over a plain one", shape.name,
        ratio(seconds["elastic"], seconds["plain"]), 1.3, f"FLOPs {share:.3f}",
    )  # fmt: skip


def number_of_full(sampler: One, space: object, *, seed: int) -> int:
    """Return how many steps of a turn run the full model."""
    draws = [sampler.draw(space, seed=seed, step=step, batch=(1, 1)) for step in range(STEPS)]
    return sum(drawn == (space.full(),) for drawn in draws)


if __name__ == "__main__":
    main(rows)
