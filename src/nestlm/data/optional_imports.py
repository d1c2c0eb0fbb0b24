"""Packages that only some sources need."""

from __future__ import annotations

import importlib
from types import ModuleType

from nestlm.errors import DataError


def import_optional(module: str, *, wanted_for: str, cure: str = "pip install 'nestlm[data]'") -> ModuleType:
    """Import a module of an optional extra, by default `data`. Raises DataError with the cure when it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise DataError(f"data: {wanted_for} needs the package {error.name}, which is not installed; {cure}") from error
