"""Checks of settings against each other, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nestlm.data.sources.base import PreparedSource
from nestlm.data.tokenizer import check_vocabulary, load_tokenizer
from nestlm.errors import ConfigError
from nestlm.pipeline.settings import Settings
from nestlm.pipeline.stages.elastic import ElasticStage


def check(settings: Settings) -> None:
    """Check the settings of a run before anything is loaded.

    Raises:
        NestlmError: settings that do not fit each other, or weights or a tokenizer that cannot be used.
    """
    config = settings.model.decoder_config()
    settings.model.check_weights(dry_run=settings.dry_run)
    if settings.data.sequence_length > config.context_length:
        raise ConfigError(
            f"data.sequence_length: got {settings.data.sequence_length}, wanted at most "
            f"model.context_length={config.context_length}"
        )
    devices, nodes = (getattr(settings.trainer, "keywords", {}).get(name, 1) for name in ("devices", "num_nodes"))
    if isinstance(devices, int) and devices > 0 and devices * nodes > 1:
        settings.data.check_ranks(devices * nodes)
        if "strategy" not in getattr(settings.trainer, "keywords", {}):
            raise ConfigError(
                f"trainer.devices: got {devices} on {nodes} nodes, wanted 1: several devices need trainer=fsdp, or "
                "trainer=ddp"
            )
    check_tokenizer(settings)
    if settings.data.heldout_share is None and not isinstance(settings.data.source, PreparedSource):
        raise ConfigError("data.heldout_share: got null, wanted a share between 0 and 0.5")
    try:
        settings.optim.optimizer([nn.Parameter(torch.zeros(1))], lr=1e-3)
    except ValueError as error:
        raise ConfigError(f"optim.optimizer: {error}") from error
    for name in ("run_dir", "cache_dir"):
        path = getattr(settings, name)
        if path is not None and Path(path).is_file():
            raise ConfigError(f"{name}: {path} is a file, wanted a folder")
    if len(set(settings.latencies)) > 1:
        raise ConfigError(
            "costs.latency: differs from cost, which prices time as well; a run measures one table, so leave one out"
        )
    if settings.latency is not None and settings.latency.context_length > config.context_length:
        raise ConfigError(
            f"cost.context_length: got {settings.latency.context_length}, wanted at most "
            f"model.context_length={config.context_length}"
        )
    if settings.is_priced:
        check_budgets(settings)


def check_tokenizer(settings: Settings) -> None:
    """Raise NestlmError where the tokenizer is missing or damaged, or has more tokens than the model."""
    file, size = settings.tokenizer_file, settings.model.decoder_config().vocab_size
    if file is None:
        return
    if file.is_file():
        check_vocabulary(load_tokenizer(file), vocab_size=size)
        special = settings.special_tokens
        if special is not None and special.begin >= size:
            raise ConfigError(
                f"data.begin_token: that of {file} is token {special.begin}, model.vocab_size is {size}; name another"
            )
    elif settings.data.tokenizer is None:
        raise ConfigError(
            f"data.tokenizer: {file.parent} has no tokenizer.json, the only form of a tokenizer that is read; save it "
            "with transformers' AutoTokenizer and save_pretrained, or name another with data.tokenizer=FILE"
        )
    elif not settings.dry_run:
        raise ConfigError(f"data.tokenizer: {file} does not exist; wanted a tokenizer.json")


def check_budgets(settings: Settings) -> None:
    """Raise NestlmError, before anything is trained, where a budget cannot be kept at the prices of the settings."""
    prices = settings.prices()
    router = settings.make_router()
    for budget in settings.budgets:
        prices.check(budget)
        router.check(budget)
    signal, values = settings.make_signal(router), ElasticStage.of(settings).make_values()
    if signal is not None and values is not None:  # for their own checks only
        signal.warm_up(router, {"choices": torch.zeros(0, 0), **values.state_dict()})
