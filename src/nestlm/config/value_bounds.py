"""Bounds of plain values in a config, by the name of the field.

They refuse values that no run has a use for, and values that would hold up a dry run or fill the memory.
"""

from __future__ import annotations

import math
from typing import Any

from nestlm.errors import ConfigError
from nestlm.utils.messages import check_text, quote_value

DEEPEST, MOST = 16, 100_000  # levels and values of a config
LARGEST_INT = 2**63
# The largest useful counts.
LARGEST = {
    "num_layers": 1024,
    "num_heads": 1024,
    "num_kv_groups": 1024,
    "head_dim": 4096,
    "hidden_size": 2**17,
    "mlp_width": 2**20,
    "vocab_size": 2**24,
    "context_length": 2**25,
    "sequence_length": 2**25,
    "original_max_position_embeddings": 2**25,
    "prompt_tokens": 2**25,
    "batch_size": 2**20,
    "eval_batch_size": 2**20,
    "num_workers": 1024,
    "num_documents": 10**7,
    "num_words": 10**6,
    "heldout_documents": 10**9,
    "num_sequences": 10**8,
    "num_random": 1000,
    "budgets_per_step": 1000,
    "specs_per_step": 1000,
    "steps": 10**9,
    "anneal_steps": 10**9,
    "elastic_probe_steps": 10**9,
    "hidden_width": 2**16,
    "replay": 10**6,
    "candidates": 10**6,
    "population": 10**5,
    "generations": 10**5,
    "parents": 10**5,
    "repeats": 10**4,
    "multiple_of": 2**20,
    "devices": 10**5,
    "num_nodes": 10**5,
    "shards": 10**6,
}
POSITIVE = {
    "context_length", "sequence_length", "batch_size", "eval_batch_size", "bytes_per_element", "repeats", "factor",
    "cache_bytes_per_element", "norm_eps", "rope_theta", "timeout_hours", "checkpoint_seconds", "skew", "gain",
    "hidden_width", "specs_per_step", "anneal_steps", "candidates", "population", "generations", "num_documents",
    "num_words", "budgets_per_step", "prompt_tokens", "original_max_position_embeddings", "high_freq_factor",
    "temperature",
}  # fmt: skip
NOT_NEGATIVE = {
    "lr", "joint_lr", "steps", "cost_weight", "dead_zone", "entropy_weight", "gate", "init_std", "weight_decay",
    "num_workers", "num_sequences", "num_random", "pretraining_tokens", "elastic_probe_steps", "low_freq_factor",
    "replay", "seed",
}  # fmt: skip
SHARES = {
    "random_share", "warmup_share", "final_share", "ce_share", "p_full", "p_smallest", "rotary_share", "share", "betas"
}  # fmt: skip
LONGEST = {"fractions": 256, "budget": 256, "sources": 1000, "plugins": 100, "layers": 1024}


def check_values(value: Any, where: str = "", *, depth: int = 0) -> int:
    """Check every value of a config.

    Args:
        value: the config, or a part of it.
        where: dotted name of the part, for messages.
        depth: levels above the part.

    Returns:
        The number of values.

    Raises:
        ConfigError: a value is not plain, not finite or out of bounds, or there are too many values or levels.
    """
    if depth > DEEPEST:
        raise ConfigError(f"{where[:80]}...: deeper than {DEEPEST} levels, wanted the config of a run")
    check_value(value, where)
    count = 1
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                raise ConfigError(f"{where or 'config'}: got the key {quote_value(key)}, wanted a text")
            below = f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}".lstrip(".")
            count += check_values(item, below, depth=depth + 1)
            if count > MOST:
                raise ConfigError(f"{where or 'config'}: got more than {MOST} values, wanted the config of a run")
    return count


def check_value(value: Any, where: str) -> None:
    """Raise ConfigError if a value is not plain, not finite or out of bounds."""
    name = where.rpartition(".")[2].partition("[")[0]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: got {value}, wanted a finite number")
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        raise ConfigError(f"{where}: got {quote_value(value, longest=30)}, wanted a number below 2**63")
    if isinstance(value, int) and value > LARGEST.get(name, LARGEST_INT):
        raise ConfigError(f"{where}: got {value}, wanted at most {LARGEST[name]}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        check_sign(value, name, where)
    if isinstance(value, list) and len(value) > LONGEST.get(name, MOST):
        raise ConfigError(f"{where}: got {len(value)} of them, wanted at most {LONGEST.get(name, MOST)}")
    if isinstance(value, str):
        check_text(value, where)
    elif not isinstance(value, int | float | list | dict | None):
        raise ConfigError(f"{where}: got {quote_value(value)}, wanted plain values: numbers, texts, lists and mappings")


def check_sign(value: float, name: str, where: str) -> None:
    """Raise ConfigError if a number is below what its name allows, or is a share above 1."""
    if name in POSITIVE and value <= 0:
        raise ConfigError(f"{where}: got {value}, wanted a positive number")
    if name in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"{where}: got {value}, wanted 0 or more")
    if name in SHARES and not 0 <= value <= 1:
        raise ConfigError(f"{where}: got {value}, wanted a share, from 0 to 1")
