"""The cache key of a stage: a hash of everything that determines its result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from nestlm.pipeline.code_digest import code_digest
from nestlm.pipeline.stages.base import Stage

# Packages whose version decides numbers.
DETERMINING = ("torch", "lightning", "tokenizers", "numpy", "scipy")
PLACES = ("path", "tokenizer")  # fields of the data section that name places


def stage_key(
    stage: Stage[Any], *, config: Mapping[str, Any], previous: Sequence[str], outside: str, plugins: Sequence[str]
) -> str:
    """Hash what determines a stage's result.

    Args:
        stage: its fields name the sections of the config that count.
        config: the resolved settings, as plain values.
        previous: what the stages that it builds on say of themselves.
        outside: identifies the text, the weights, the table or the device.
        plugins: packages of the user, whose source counts as this package's does.
    """
    sections = {known.name: determining_part(known.name, config[known.name]) for known in fields(stage)}
    code = code_digest(stage, plugins=plugins)
    content = [stage.name, sections, previous, outside, code, platform.python_version(), *map(version, DETERMINING)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def determining_part(section: str, config: Any) -> Any:
    """Return the part of a config section that determines results.

    How many ranks share the work is left out, so that another number can go on, and where weights, text and tokenizer
    lie: their contents count. A stream is known by its place, too.
    """
    rules = {"data": data_part, "model": model_part, "trainer": trainer_part}
    return rules[section](config) if section in rules else config


def data_part(config: Any) -> Any:
    """Return the data section without places, unless the source is a stream."""
    return config if "heldout_documents" in config["source"] else without_places(config)


def model_part(config: Any) -> Any:
    """Return the model section with whether there are weights in place of where they are."""
    return config | {"weights": config["weights"] is not None}


def trainer_part(config: Any) -> Any:
    """Return the trainer section without the layout of ranks."""
    return {key: value for key, value in config.items() if key not in ("devices", "num_nodes", "strategy")}


def without_places(node: Any) -> Any:
    """Return a section of the config with whether there is a path in place of every path in it."""
    if isinstance(node, list):
        return [without_places(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {name: value is not None if name in PLACES else without_places(value) for name, value in node.items()}
