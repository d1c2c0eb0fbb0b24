"""Several ranks (gloo, on the CPU) do what one process does: the same losses at every step, the same results."""

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import many_runs
from many_runs import CPU, assert_same_results
from nestlm.distributed.launch import launch
from plugins import NANO

pytestmark = pytest.mark.ranks

# Adam divides by a gradient's size, also where that is the rounding of sums: without its eps, noise would be learned.
STEPS = [
    "+optim.optimizer.eps=1e-5",
    "pretrain.steps=5",
    "elastic.steps=20",
    "router.steps=20",
    "joint.steps=3",
    "budget=[0.7]",
]
SIGNALS = 0.02  # of what routers' signals say of themselves: fitted for many steps to few pairs, they enlarge rounding
# What is trained how.
RUNS = {
    "token-value": ["sampler=token", "router=value", "ranking=magnitude"],
    "sandwich-surrogate": ["sampler=sandwich", "router=surrogate", "router.policy=static", "teacher=kd_inplace"],
    "sequence-gumbel": ["sampler=sequence", "router=gumbel", "router.policy=dynamic", "axes=mlp_heads_depth"],
}
FSDP, DDP = ["trainer=fsdp"], ["trainer=ddp"]
# How many ranks, and which runs they do one after the other, each with its trainer.
LAUNCHES = {
    "fsdp and ddp": (2, [("token-value", FSDP), ("sandwich-surrogate", DDP)]),
    "other samplers": (2, [("sandwich-surrogate", FSDP), ("sequence-gumbel", FSDP)]),
    "copies in shards": (4, [("token-value", [*FSDP, "trainer.strategy.shards=2"])]),
}
SLOW = ("other samplers", "copies in shards")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Do a run in one process, once; returns its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(lambda name: many_runs.work([command(name, folder)])[0])


def command(name: str, folder: Path) -> list[str]:
    """The command line of a run, in a folder of its own."""
    return [*NANO, *STEPS, *RUNS[name], f"run_dir={folder / name}", f"cache_dir={folder / 'cache'}"]


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Everything that was logged at training steps, by name and step."""
    found = {}
    for path in sorted(run.glob("logs/**/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and "/" in name and "tokens_per_second" not in name and row["step"]:
                    found[name, int(row["step"])] = float(value)
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in LAUNCHES]
)
def test_ranks_do_what_one_process_does(case, alone, tmp_path):
    num_ranks, cases = LAUNCHES[case]
    runs = [[*command(name, tmp_path), *trainer, *CPU, f"trainer.devices={num_ranks}"] for name, trainer in cases]
    for (name, _), run in zip(cases, launch(many_runs.work, runs, num_ranks=num_ranks), strict=True):
        expected, found = losses(alone(name)), losses(run)
        assert {step for _, step in expected} >= set(range(20))
        is_loss = {key: "/loss" in key[0] or "kl" in key[0] for key in expected}
        for kind, tolerance in ((True, 1e-5), (False, SIGNALS)):
            wanted = {key: value for key, value in expected.items() if is_loss[key] is kind}
            assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=tolerance, rel=tolerance), name
        assert_same_results(alone(name), run)


def test_gradients_are_reduced_once_a_step_however_many_sub_networks_it_sums(tmp_path):
    short = ["pretrain.steps=1", "elastic.steps=2", "router=uniform", "joint.steps=0", "teacher=kd_inplace", *CPU]
    runs = [
        [*NANO, *short, f"trainer={trainer}", "trainer.devices=2", f"sampler={sampler}",
         f"run_dir={tmp_path / trainer / sampler}", f"cache_dir={tmp_path / trainer}"]
        for trainer in ("fsdp", "ddp") for sampler in ("one", "sandwich")
    ]  # fmt: skip
    blocks_and_root = 3
    assert launch(many_runs.reductions, runs, num_ranks=2) == [blocks_and_root] * 4
