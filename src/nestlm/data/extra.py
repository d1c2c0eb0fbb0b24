"""Packages that only some sources need."""

from __future__ import annotations

import importlib
from types import ModuleType

from nestlm.errors import DataError


def load_extra(module: str, *, wanted_for: str) -> ModuleType:
    """Import a module of the optional extra `data`. Raises DataError, naming the extra, when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise DataError(
            f"data: {wanted_for} needs the package {error.name}, which is not installed; pip install 'nestlm[data]'"
        ) from error
