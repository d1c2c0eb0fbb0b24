"""Run one training stage under Lightning's Trainer, from its last good checkpoint if there is one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from nestlm.callbacks.checkpoint import TimedCheckpoint, last_good_checkpoint
from nestlm.callbacks.progress import StageProgress
from nestlm.data.module import PackedTokens
from nestlm.errors import ConfigError, DivergenceError
from nestlm.module import NestedLM

# Lightning announces devices and tips at each of our many trainers; its warnings stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Lightning's own use of a name that torch renamed.
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def make_trainer(
    factory: Callable[..., L.Trainer],
    *,
    callbacks: list[L.Callback] | None = None,
    logger: Logger | bool = False,
    log_every_n_steps: int = 10,
) -> L.Trainer:
    """The trainer of the config, told what this project decides itself."""
    return factory(
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


def trainer_device(factory: Callable[..., L.Trainer]) -> torch.device:
    """Where the config's trainer computes."""
    return make_trainer(factory).strategy.root_device


def fit(
    module: NestedLM,
    data: PackedTokens,
    *,
    stage: str,
    folder: Path,
    trainer_factory: Callable[..., L.Trainer],
    logger: Logger,
    checkpoint_seconds: float,
    callbacks: Sequence[L.Callback] = (),
) -> int:
    """Train to the end of the stage; returns the step that it went on from (0: from the start)."""
    settings = data.settings
    saving = TimedCheckpoint(folder / "checkpoints", seconds=checkpoint_seconds)
    progress = StageProgress(
        stage, num_steps=module.num_steps, tokens_per_step=settings.batch_size * settings.sequence_length
    )
    trainer = make_trainer(
        trainer_factory,
        callbacks=[*callbacks, saving, progress],
        logger=logger,
        log_every_n_steps=min(10, module.num_steps),
    )
    checkpoint = last_good_checkpoint(folder / "checkpoints")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except DivergenceError as error:
        good = last_good_checkpoint(folder / "checkpoints")
        kept = "there is no checkpoint of this stage yet" if good is None else f"the last good checkpoint is {good}"
        raise DivergenceError(f"{error}; {kept}, and the stages before are kept") from error
    if trainer.global_step != module.num_steps:
        raise ConfigError(f"{stage}: stopped after {trainer.global_step} of {module.num_steps} steps; look at trainer")
    return 0 if checkpoint is None else int(checkpoint.stem.rpartition("=")[2])
