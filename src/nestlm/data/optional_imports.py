"""Imports of packages that only some data sources need."""

from __future__ import annotations

import importlib
from types import ModuleType

from nestlm.errors import DataError


def import_optional(module: str, *, wanted_for: str, cure: str = "pip install 'nestlm[data]'") -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: dotted name of the module.
        wanted_for: the file or dataset that needs it, for the message.
        cure: the end of the message, which says how to install the package.

    Raises:
        DataError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise DataError(f"data: {wanted_for} needs the package {error.name}, which is not installed; {cure}") from error
