"""Annotation for config fields that name a class which nestlm instantiates later, with arguments of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deferred:
    """Describe the later call of a class in a field typed `Annotated[Callable[..., C], Deferred(...)]`.

    Attributes:
        given: parameters that the caller passes; a config cannot set them.
        takes: a TypedDict of the parameters that a config may set; None: all that are not in `given`.
    """

    given: tuple[str, ...] = ()
    takes: Any = None
