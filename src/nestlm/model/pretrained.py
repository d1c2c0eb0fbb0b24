"""The option `model=pretrained`, which takes family and sizes from the checkpoint of the weights."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any

from nestlm import model
from nestlm.errors import CheckpointError
from nestlm.model import hub
from nestlm.model.checkpoint import read_hf_config
from nestlm.model.config_json import quote
from nestlm.model.family import Family


def family_from_checkpoint(*, weights: str, context_length: int | None, pretraining_tokens: float | None) -> Family:
    """Build the family object for a checkpoint from its config.json.

    Args:
        weights: a folder, or a hub's OWNER/NAME or OWNER/NAME@REVISION.
        context_length: longest rows, L; None takes the checkpoint's limit.
        pretraining_tokens: number of tokens that the weights were trained on; None if unknown.

    Raises:
        CheckpointError: there is no checkpoint, or its family or features are not supported.
    """
    config = read_hf_config(hub.fetch_small_files(weights))
    known = find_families()
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"model.weights: model_type is {quote(kind)} in config.json, wanted one of {', '.join(sorted(known))}"
        )
    return known[kind].from_hf_config(
        weights, config, context_length=context_length, pretraining_tokens=pretraining_tokens
    )


def find_families() -> dict[str, type[Family]]:
    """Collect the family classes of this package by the `model_type` of their config.json."""
    found: dict[str, type[Family]] = {}
    for info in pkgutil.iter_modules(model.__path__):
        module = importlib.import_module(f"{model.__name__}.{info.name}")
        for value in vars(module).values():
            is_here = isinstance(value, type) and value.__module__ == module.__name__
            if is_here and issubclass(value, Family) and value is not Family:
                found[value.model_type] = value
    return found


def to_config_node(value: Any) -> Any:
    """Convert a dataclass instance to a config node with `_target_` and its fields; other values stay as they are."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    kind = type(value)
    return {
        "_target_": f"{kind.__module__}.{kind.__qualname__}",
        **{field.name: to_config_node(getattr(value, field.name)) for field in fields(value)},
    }
