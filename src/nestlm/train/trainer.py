"""Run one training stage under Lightning's Trainer, from its last good checkpoint if there is one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from nestlm.distributed import collectives
from nestlm.distributed.strategy import ShardedStrategy, count_ranks_to_start
from nestlm.errors import ConfigError, DivergenceError
from nestlm.train.callbacks.stage_progress import StageProgress
from nestlm.train.callbacks.timed_checkpoint import CheckpointFile, TimedCheckpoint, last_good_checkpoint
from nestlm.train.lightning_module import NestedLM
from nestlm.utils.quiet import ignored_warnings, quiet_loggers

# Lightning announces devices and tips at each of our many trainers; its warnings stay.
LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")
RENAMED_BY_TORCH = r".*isinstance\(treespec, LeafSpec\).*"  # Lightning uses the old name

LOG_EVERY_STEPS = 10


def make_trainer(
    factory: Callable[..., L.Trainer],
    *,
    callbacks: list[L.Callback] | None = None,
    logger: Logger | bool = False,
    log_every_n_steps: int = LOG_EVERY_STEPS,
) -> L.Trainer:
    """Make the trainer of the config, with the arguments that this project sets itself."""
    strategy = getattr(factory, "keywords", {}).get("strategy")
    with quiet_lightning():
        trainer = factory(
            **({"strategy": strategy()} if isinstance(strategy, partial) else {}),  # each trainer has its own
            max_epochs=1,
            callbacks=callbacks,
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=log_every_n_steps,
        )
    keep_sigterm_handler(trainer)
    return trainer


def keep_sigterm_handler(trainer: L.Trainer) -> None:
    """Keep Lightning from handling SIGTERM: its handler ends no process, and starts collectives at any point."""
    connector = trainer._signal_connector  # there is no public way
    register = connector.register_signal_handlers

    def register_others() -> None:
        with same_handler(signal.SIGTERM):
            register()

    connector.register_signal_handlers = register_others


@contextmanager
def same_handler(signum: signal.Signals) -> Iterator[None]:
    """Put a signal's handler back at the end; other threads than the main one set none."""
    handler = signal.getsignal(signum)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signum, handler)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's announcements, and torch's warning about Lightning's code, off the terminal in a block."""
    with quiet_loggers(*LIGHTNING_LOGGERS, level=logging.WARNING), ignored_warnings(RENAMED_BY_TORCH):
        yield


def trainer_device(factory: Callable[..., L.Trainer]) -> torch.device:
    """Return the device on which the config's trainer computes."""
    return make_trainer(factory).strategy.root_device


def check_trainer(factory: Callable[..., L.Trainer]) -> None:
    """Raise ConfigError when this machine cannot run the configured trainer."""
    try:
        make_trainer(factory)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def ranks_to_start(factory: Callable[..., L.Trainer]) -> int:
    """Count the ranks that a config asks for on this machine and nobody has started yet; 0: this process will do."""
    check_trainer(factory)
    return count_ranks_to_start(make_trainer(factory))


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether checkpoints are folders of shards; otherwise each is one file."""
    return isinstance(trainer.strategy, ShardedStrategy)


def fit(
    module: NestedLM,
    data: L.LightningDataModule,
    *,
    stage: str,
    folder: Path,
    tokens_per_step: int,
    trainer_factory: Callable[..., L.Trainer],
    logger: Logger,
    checkpoint_seconds: float,
    callbacks: Sequence[L.Callback] = (),
) -> int:
    """Train to the end of a stage; returns the step that it went on from (0: from the start).

    Args:
        module: what is trained, and for how many steps.
        data: token batches, one a step.
        stage: name of the stage, for logs and messages.
        folder: folder of the stage; checkpoints go below it.
        tokens_per_step: over all ranks, for the progress bar.
        trainer_factory: makes the trainer of the config.
        logger: receives what the module logs.
        checkpoint_seconds: time between two checkpoints.
        callbacks: further callbacks of the trainer.

    Raises:
        DivergenceError: the loss is not finite; the message names the last good checkpoint.
        ConfigError: the trainer stopped early.
        Preempted: the process was told to end; a checkpoint is written.
    """
    saving = TimedCheckpoint(folder / "checkpoints", stage=stage, seconds=checkpoint_seconds)
    progress = StageProgress(stage, num_steps=module.num_steps, tokens_per_step=tokens_per_step)
    trainer = make_trainer(
        trainer_factory,
        callbacks=[*callbacks, saving, progress],
        logger=logger,
        log_every_n_steps=min(LOG_EVERY_STEPS, module.num_steps),
    )
    if not is_sharded(trainer):
        trainer.strategy.checkpoint_io = CheckpointFile()
    checkpoint = collectives.broadcast_from_rank_zero(
        last_good_checkpoint(folder / "checkpoints", is_sharded=is_sharded(trainer))
    )
    try:
        with same_handler(signal.SIGTERM), quiet_lightning():  # the checkpoints' own handler is for steps
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except DivergenceError as error:
        good = last_good_checkpoint(folder / "checkpoints", is_sharded=is_sharded(trainer))
        kept = "there is no checkpoint of this stage yet" if good is None else f"the last good checkpoint is {good}"
        raise DivergenceError(f"{error}; {kept}, and the stages before are kept") from error
    if saving.is_told_to_end:  # after the last step
        signal.raise_signal(signal.SIGTERM)
    if trainer.global_step != module.num_steps:
        raise ConfigError(f"{stage}: stopped after {trainer.global_step} of {module.num_steps} steps; look at trainer")
    return 0 if checkpoint is None else int(checkpoint.stem.rpartition("=")[2])
