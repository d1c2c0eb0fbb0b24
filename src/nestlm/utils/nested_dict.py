"""Nested dictionaries as dotted keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a nested dictionary with its value, inner dictionaries included.

    Args:
        node: the dictionary; any other value yields nothing.
        prefix: text before each key.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}", value
            yield from flat_items(value, f"{prefix}{key}.")
