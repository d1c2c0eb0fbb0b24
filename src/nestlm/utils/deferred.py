"""Annotation of config fields whose class is called later, with arguments that no config knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deferred:
    """How a class of `Annotated[Callable[..., C], Deferred(...)]` is called when the time comes.

    Attributes:
        given: parameters whose values the caller knows; a config cannot set them.
        takes: a TypedDict of the only parameters that a config may set; None: all others.
    """

    given: tuple[str, ...] = ()
    takes: Any = None
