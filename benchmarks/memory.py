"""Compare the memory that `dry_run=true` predicts for training stages with the memory that they take.

python benchmarks/memory.py > docs/results/memory.md

It ends with stages in two ranks that hold the model in shards, each with half of the rows. On a CPU the profiler counts
what torch's allocator hands out; on a GPU torch counts itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from nestlm.config import compose
from nestlm.data.batch import Batch
from nestlm.distributed import collectives
from nestlm.distributed.device_layout import ComputePrecision, DeviceLayout
from nestlm.distributed.launch import launch
from nestlm.estimate.dry_run import training_stages
from nestlm.estimate.memory import predict
from nestlm.model.weights_io import save_weights
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.runtime import MODEL, RECORD, ROUTER, StageRuntime
from nestlm.pipeline.settings import Settings
from nestlm.train.trainer import trainer_device
from nestlm.utils.devices import device_name
from turns import highest

SHORT = ("pretrain.steps=3", "elastic.steps=4", "router.steps=3", "joint.steps=3", "checkpoint_seconds=1e9")
TINY = ("data.batch_size=4", "data.sequence_length=128")
SMALL = ("model=small", "data.batch_size=1", "data.sequence_length=128")
BF16, RECOMPUTED = "trainer.precision=bf16-mixed", "activation_checkpointing=true"
SHARDS = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
ALL = ("pretrain", "elastic", "router", "joint")
ROWS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (ALL, TINY),
    (ALL, (*TINY, BF16)),
    (("pretrain", "elastic", "joint"), (*TINY, RECOMPUTED)),
    (("elastic",), (*TINY, "sampler=sandwich")),
    (("elastic",), (*TINY, "sampler=sandwich", "teacher=ce", "data.separate_documents=false")),
    (("elastic", "joint"), (*TINY, "sampler=one", "teacher=kd_inplace")),
    (("elastic",), (*TINY, "sampler=sequence", RECOMPUTED, BF16)),
    (("elastic",), (*TINY, "axes=mlp_heads_depth")),
    (("pretrain",), (*TINY, "optim=adamw_bf16")),
    (("router", "joint"), (*TINY, "router=value")),
    (("router", "joint"), (*TINY, "router=gumbel", "router.policy=dynamic")),
    (("joint",), (*TINY, "router=knapsack")),
    (ALL, SMALL),
    (("pretrain", "elastic"), (*SMALL, BF16, RECOMPUTED)),
    (("elastic",), (*SMALL, "sampler=sandwich")),
    (("elastic",), (*SMALL, "sampler=one", "optim=adamw_bf16")),
    (ALL, (*TINY, *SHARDS)),
    (("pretrain", "elastic"), (*TINY, *SHARDS[:-1])),
    (("elastic",), (*TINY, *SHARDS, "sampler=sandwich")),
    (("pretrain",), (*TINY, *SHARDS, "trainer.strategy.shards=1")),
    (("pretrain", "elastic"), ("model=small", "data.batch_size=2", "data.sequence_length=128", *SHARDS)),
)
RANK_RUNS = 5  # of several ranks, since what gloo holds differs with who waits for whom; the least counts


class RandomTokens(L.LightningDataModule):
    """Batches of random tokens, with two documents in each row."""

    def __init__(self, settings: Settings, *, num_steps: int) -> None:
        super().__init__()
        self.settings, self.num_steps, self.vocab_size = settings.data, num_steps, settings.model.vocab_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return one batch for each step."""
        row_shard = collectives.RowShard(collectives.rank(), collectives.num_ranks())
        shape = (self.settings.batch_size // row_shard.num_ranks, self.settings.sequence_length + 1)
        documents_BL = torch.arange(shape[1] - 1).ge(shape[1] // 2).long().expand(shape[0], -1).contiguous()
        tokens = torch.randint(self.vocab_size, (self.num_steps, *shape))
        kept = documents_BL if self.settings.separate_documents else None
        batches = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), kept, row_shard) for rows in tokens]
        return DataLoader(batches, batch_size=None)


def held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def both(
    stage: str, overrides: Sequence[str], *, folder: Path, of_runs: Callable[[Iterable[int]], float] = min
) -> tuple[float, float]:
    """Return the predicted and the measured peak bytes of a stage of a command line; of several ranks, those of rank 0.

    Args:
        stage: its name.
        overrides: the command line.
        folder: for what earlier stages leave behind.
        of_runs: which of the runs in several ranks counts.
    """
    command = [*SHORT, *overrides]
    settings = compose.build(compose.compose(command))
    precision, layout = ComputePrecision.from_trainer(settings.trainer), DeviceLayout.from_trainer(settings.trainer)
    assert precision is not None, "it is one of torch's"
    (found,) = [each for each in training_stages(settings) if each.name == stage]
    checkpointing = settings.activation_checkpointing
    parts = predict(found, activation_checkpointing=checkpointing, layout=layout, precision=precision)
    make_inputs(settings, folder / "inputs")
    work = (stage, command, str(folder))
    if layout.ranks == 1:
        return sum(parts.values()), measure(work)
    return sum(parts.values()), of_runs(launch(measure, work, num_ranks=layout.ranks) for _ in range(RANK_RUNS))


def make_inputs(settings: Settings, folder: Path) -> None:
    """Write random weights as the results of earlier stages."""
    folder.mkdir()
    decoder = Decoder.empty(settings.model.decoder_config())
    decoder.init_weights(seed=0)
    save_weights(decoder.state_dict(), folder / MODEL)
    nothing = {"choices": torch.zeros(0, 0), "losses": torch.zeros(0), "gaps": torch.zeros(0)}
    save_weights(nothing, folder / RECORD)
    router = settings.make_router().state_dict()
    if router:
        save_weights({name: tensor.contiguous() for name, tensor in router.items()}, folder / ROUTER)


def measure(work: tuple[str, list[str], str]) -> int:
    """Bytes that a stage takes at most while it trains, on random weights and made-up text; as a rank, or alone."""
    name, command, folder = work
    settings = compose.build(compose.compose(command))
    (stage,) = [each for each in training_stages(settings) if each.name == name]
    out = Path(folder, "out")
    out.mkdir(exist_ok=True)
    logger = settings.logger(save_dir=out, name=name)
    before = dict.fromkeys(("pretrain", "rank", "elastic", "router"), Path(folder, "inputs"))
    runtime = StageRuntime.of(settings, folder=out, inputs=before, logger=logger)
    task = stage.task(stage.load_models(runtime))
    data = RandomTokens(settings, num_steps=task.steps)
    device = stage.device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        stage.train(task, runtime, data=data)
        return torch.cuda.max_memory_allocated(device)
    models = (task.models.decoder, task.models.teacher, task.models.router, task.objective)
    modules = torch.nn.ModuleList([model for model in models if model is not None])
    at_start = sum(held(tensor).nbytes for tensor in (*modules.parameters(), *modules.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        stage.train(task, runtime, data=data)
    return at_start + highest(profiler)


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="cpu", help="as in trainer=NAME, where a row does not name one")
    parser.add_argument("overrides", nargs="*", help="of one command line; default: the rows of the page")
    arguments = parser.parse_args()
    rows = ((ALL, tuple(arguments.overrides)),) if arguments.overrides else ROWS
    given = f"trainer={arguments.trainer}"
    device = trainer_device(compose.build(compose.compose(["data=synthetic", given])).trainer)
    print("# Memory: predicted and taken\n")
    print(f"{device_name(device)}, torch {torch.__version__}. {' '.join(SHORT[:-1])}; random weights and tokens.")
    print(
        "Generated by `python benchmarks/memory.py`. What two ranks of a tiny model take differs by up to a tenth\n"
        "from run to run, since gloo lets go of its buffers when it comes to it: here stands the least of "
        f"{RANK_RUNS} runs.\n"
    )
    print("| stage | command line | predicted, MiB | taken, MiB | ratio |\n|---|---|---|---|---|")
    for stages, overrides in rows:
        trainer = () if any(override.startswith("trainer=") for override in overrides) else (given,)
        for stage in stages:
            with TemporaryDirectory() as folder:
                predicted, taken = both(stage, ("data=synthetic", *trainer, *overrides), folder=Path(folder))
            numbers = f"{predicted / 2**20:,.1f} | {taken / 2**20:,.1f} | {predicted / taken:.3f}"
            print(f"| {stage} | `{' '.join(overrides)}` | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
