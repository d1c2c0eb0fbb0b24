"""Typed access to the values of a Hugging Face config.json; null counts as missing, except for `read_number`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nestlm.errors import CheckpointError

LARGEST = 2**24  # a larger size means a damaged file
QUOTED_LENGTH = 60  # characters of a value that a message quotes


def quote(value: Any) -> str:
    """Return `repr(value)`, cut to a length that suits an error message."""
    text = repr(value)
    return text if len(text) <= QUOTED_LENGTH else f"{text[:QUOTED_LENGTH]}..."


def wrong_value_error(name: str, value: Any, wanted: str) -> CheckpointError:
    """Build the error for a key of config.json with an unsuitable value.

    Args:
        name: the key.
        value: its value.
        wanted: a description of suitable values.
    """
    return CheckpointError(f"model.weights: {name} is {quote(value)} in config.json, wanted {wanted}; mend config.json")


def read_size(config: Mapping[str, Any], name: str, *, default: int | None = None, most: int = LARGEST) -> int:
    """Read a whole number from 1 to `most`. Raises CheckpointError for another or a missing value."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise CheckpointError(f"model.weights: config.json lacks {name}; wanted a Hugging Face checkpoint folder")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise wrong_value_error(name, value, f"a whole number from 1 to {most}")
    return value


def read_number(config: Mapping[str, Any], name: str, *, default: float) -> float:
    """Read a positive number. Raises CheckpointError for any other value, including null."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise wrong_value_error(name, value, "a positive number")
    return value


def read_flag(config: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """Read true or false. Raises CheckpointError for any other value."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong_value_error(name, value, "true or false")
    return value


def read_object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read an object, empty if it is missing. Raises CheckpointError for any other value."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong_value_error(name, value, "an object")
    return value


def check_supported_value(config: Mapping[str, Any], name: str, value: Any) -> None:
    """Check that a key is missing or has the only value that nestlm supports. Raises CheckpointError otherwise."""
    if config.get(name, value) != value:
        raise CheckpointError(f"model.weights: {name} is {quote(config[name])} in config.json, wanted {value!r}")
