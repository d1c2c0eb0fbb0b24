"""Reading and writing of rotary embedding settings in a config.json, flat or under `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from nestlm.errors import CheckpointError
from nestlm.model.config_json import quote, read_number, read_object
from nestlm.nn.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

SCALINGS: dict[str, type[LinearScaling | Llama3Scaling | YarnScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


def read_rotary_share(config: Mapping[str, Any], default: float) -> float:
    """Read the share of a head's entries to which rotary embeddings apply; `default` is the family's."""
    return read_number({**config, **read_object(config, "rope_parameters")}, PARTIAL, default=default)


def read_rotary(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read the base theta and the scaling of rotary embeddings.

    Raises:
        CheckpointError: the scaling, or one of its settings, is not supported.
    """
    keys = {**read_object(config, "rope_scaling"), **read_object(config, "rope_parameters")}
    theta = read_number({"rope_theta": config.get("rope_theta", 10_000.0)} | keys, "rope_theta", default=10_000.0)
    keys.pop("rope_theta", None)
    keys.pop(PARTIAL, None)
    old_kind = keys.pop("type", "default")
    kind = keys.pop("rope_type", old_kind)
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise CheckpointError(
            f"model.weights: scales rotary positions by {quote(kind)}, which is not supported; wanted one of "
            f"{', '.join(SCALINGS)}, or none"
        )
    known = {field.name for field in fields(SCALINGS[kind])}
    if ORIGINAL in known:
        keys.setdefault(ORIGINAL, config.get("max_position_embeddings"))
    unknown = sorted(set(keys) - known)
    if unknown:
        raise CheckpointError(
            f"model.weights: the {kind} scaling of rotary positions has {quote(unknown[0])}, not supported"
        )
    for name in keys:
        read_number(keys, name, default=1.0)
    try:
        return theta, SCALINGS[kind](**keys)
    except TypeError as error:
        raise CheckpointError(
            f"model.weights: the {kind} scaling of rotary positions is incomplete ({error})"
        ) from error


def write_rotary(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Build the `rope_parameters` of a config.json, from which `read_rotary` reads the same values."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    assert isinstance(scaling, LinearScaling | Llama3Scaling | YarnScaling), "of SCALINGS"
    kind = next(name for name, each in SCALINGS.items() if isinstance(scaling, each))
    return {"rope_theta": theta, "rope_type": kind, **asdict(scaling)}
