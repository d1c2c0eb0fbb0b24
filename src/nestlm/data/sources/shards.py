"""Sources of tokens that `nestlm prepare` stored: one folder, or a mixture of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from nestlm.data.sources.base import Portion, PreparedSource
from nestlm.errors import ConfigError


@dataclass(frozen=True)
class Shards(PreparedSource):
    """One prepared folder. The order of its rows is a pure function of (seed, step), on any number of ranks.

    Attributes:
        path: the folder.
    """

    path: str

    @override
    def portions(self) -> list[Portion]:
        return [Portion(Path(self.path), 1.0)]


@dataclass(frozen=True)
class ShardMixture(PreparedSource):
    """Several prepared folders with one tokenizer, sampled in proportion to their weights.

    The order is a pure function of (seed, step). Each folder has epochs of its own.

    Attributes:
        sources: a mapping with `path` and `weight` for each folder.
    """

    sources: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources: got none, wanted [{path: FOLDER, weight: 1.0}, ...]")
        for source in self.sources:
            path, weight = source.get("path"), source.get("weight")
            positive = isinstance(weight, int | float) and math.isfinite(weight) and weight > 0
            if set(source) != {"path", "weight"} or not isinstance(path, str) or not positive:
                raise ConfigError(
                    f"data.sources: got {dict(source)}, wanted {{path: FOLDER, weight: a positive number}}"
                )

    @override
    def portions(self) -> list[Portion]:
        return [Portion(Path(source["path"]), source["weight"]) for source in self.sources]
