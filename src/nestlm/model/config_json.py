"""Values of a config.json, each of the type that transformers wants it to have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nestlm.errors import CheckpointError

LARGEST = 2**24  # of a size: beyond it is a damaged file
SHOWN = 60  # characters of a value in a message


def quote(value: Any) -> str:
    """A value as messages quote it: long ones are cut."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def wrong_value_error(name: str, value: Any, wanted: str) -> CheckpointError:
    """The error for a key of a config.json that has a value of another kind."""
    return CheckpointError(f"model.weights: {name} is {quote(value)} in config.json, wanted {wanted}; mend config.json")


def read_size(config: Mapping[str, Any], name: str, *, default: int | None = None, most: int = LARGEST) -> int:
    """A whole number from 1 to `most`. Raises CheckpointError where it is absent without a default, or another."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise CheckpointError(f"model.weights: config.json lacks {name}; wanted a Hugging Face checkpoint folder")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise wrong_value_error(name, value, f"a whole number from 1 to {most}")
    return value


def read_number(config: Mapping[str, Any], name: str, *, default: float) -> float:
    """A positive number. Raises CheckpointError for anything else, null as well."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise wrong_value_error(name, value, "a positive number")
    return value


def read_flag(config: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """True or false. Raises CheckpointError for anything else; null stands for the default."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong_value_error(name, value, "true or false")
    return value


def read_section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object, empty where it is null or absent. Raises CheckpointError for anything else."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong_value_error(name, value, "an object")
    return value


def check_value(config: Mapping[str, Any], name: str, value: Any) -> None:
    """Raise CheckpointError unless a key, where it is there, has the one value that is computed."""
    if config.get(name, value) != value:
        raise CheckpointError(f"model.weights: {name} is {quote(config[name])} in config.json, wanted {value!r}")
