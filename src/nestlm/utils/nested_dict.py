"""Dotted names of nested settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a nested mapping, with their values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}", value
            yield from flat_items(value, f"{prefix}{key}.")
